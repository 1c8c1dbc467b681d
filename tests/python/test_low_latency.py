# SPDX-License-Identifier: MIT
"""low_latency_dispatch and combine against a dense reference."""

import itertools
import threading

import deep_ep
import epx
import pytest
import ranks
import torch
from ranks import Rank
from reference import difference, experts_of, from_fp8, make_batches, to_fp8

E, K, H, MOST = 8, 3, 512, 24


def buffer_for(me: Rank, hidden: int = H) -> deep_ep.Buffer:
    hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(
        MOST, hidden, me.size, E
    )
    return deep_ep.Buffer(
        me.group,
        num_rdma_bytes=hint,
        low_latency_mode=True,
        num_qps_per_rank=E // me.size,
    )


def expected_rows(me, batches, expert):
    """Rows that an expert receives: by source rank, then token."""
    return torch.cat(
        [it.x[(it.topk_idx == expert).any(dim=1)] for it in batches]
    )


def power_of_2_scales(x):
    blocks = x.float().unflatten(1, (x.shape[1] // 128, 128))
    largest = blocks.abs().amax(dim=2).clamp(1e-4)
    return torch.exp2(torch.ceil(torch.log2(largest * (1 / 448.0))))


def check_received(me, batches, received, counts, use_fp8, rounded, ue8m0):
    first, end = experts_of(me, E, me.index)
    slots = me.size * MOST
    rows, scales = received if use_fp8 else (received, None)
    hidden = batches[0].x.shape[1]
    assert rows.shape == (end - first, slots, hidden) and rows.is_contiguous()
    assert counts.dtype == torch.int32 and counts.shape == (end - first,)
    if use_fp8:
        assert rows.dtype == torch.float8_e4m3fn
        wide = -(-hidden // 512) if ue8m0 else hidden // 128
        assert scales.shape == (end - first, slots, wide)
        assert scales.dtype == (torch.int32 if ue8m0 else torch.float32)
        assert scales.stride() == (wide * slots, 1, slots)
        values = from_fp8(rows, scales).cpu()
    else:
        assert rows.dtype == torch.bfloat16
        values = rows.float().cpu()
    for local in range(end - first):
        wanted = expected_rows(me, batches, first + local)
        count = wanted.shape[0]
        assert counts[local].item() == count
        got = values[local, :count]
        if not use_fp8:
            assert torch.equal(got, wanted.float())
        elif not rounded:
            assert torch.equal(got, from_fp8(*to_fp8(wanted)))
        else:
            assert difference(got, wanted) < 7e-4
            if not ue8m0:
                assert torch.equal(
                    scales[local, :count].cpu(), power_of_2_scales(wanted)
                )
    return values.to(torch.bfloat16).to(me.device)


def finish(how, event, hook):
    """Waits in the way that was asked for."""
    assert (hook is not None) == (how == "hook")
    assert (event.event is not None) == (how == "event")
    if how == "hook":
        hook()
    elif how == "event":
        event.current_stream_wait()


def check_waits(me, waits):
    """Nobody waits for itself, nor less than nothing for another."""
    assert waits[me.index] == 1
    assert (waits >= 1).all()


def check_mode(
    me, buffer, batches, use_fp8, rounded, ue8m0, how, use_logfmt=False
):
    asked = {
        "async_finish": how == "event",
        "return_recv_hook": how == "hook",
    }
    mine = batches[me.index].to(me.device)
    first, end = experts_of(me, E, me.index)
    totals = torch.ones(end - first, dtype=torch.int32, device=me.device)
    waits = torch.ones(me.size, dtype=torch.int64, device=me.device)
    received, counts, handle, event, hook = buffer.low_latency_dispatch(
        mine.x,
        mine.topk_idx,
        MOST,
        E,
        cumulative_local_expert_recv_stats=totals,
        dispatch_wait_recv_cost_stats=waits,
        use_fp8=use_fp8,
        round_scale=rounded,
        use_ue8m0=ue8m0,
        **asked,
    )
    finish(how, event, hook)
    assert torch.equal(totals - 1, counts)
    check_waits(me, waits)
    outputs = check_received(
        me, batches, received, counts, use_fp8, rounded, ue8m0
    )
    for zero_copy, in_place in itertools.product((False, True), repeat=2):
        if zero_copy:
            buffer.get_next_low_latency_combine_buffer(handle)[:] = outputs
        out = torch.full_like(mine.x, float("nan")) if in_place else None
        combined, event, hook = buffer.low_latency_combine(
            outputs,
            mine.topk_idx,
            mine.topk_weights,
            handle,
            zero_copy=zero_copy,
            out=out,
            combine_wait_recv_cost_stats=waits,
            use_logfmt=use_logfmt,
            **asked,
        )
        finish(how, event, hook)
        check_waits(me, waits)
        assert out is None or combined is out
        assert combined.dtype == torch.bfloat16
        assert not combined.isnan().any()
        weight = mine.topk_weights.sum(dim=1, keepdim=True)
        worst = 7e-4 if use_fp8 else 1e-5  # LogFMT-10, too, as in DeepEP
        assert difference(combined, mine.x.float() * weight) < worst


MODES = (
    (False, False, False),
    (True, False, False),
    (True, True, False),
    (True, True, True),
)


def every_mode(me: Rank, tokens, hidden: int = H) -> None:
    buffer = buffer_for(me, hidden)
    batches = make_batches(me, tokens, hidden, E, K)
    for how, mode in itertools.product(("call", "event", "hook"), MODES):
        check_mode(me, buffer, batches, *mode, how)
        if not mode[0]:
            check_mode(me, buffer, batches, *mode, how, use_logfmt=True)


def logfmt_is_close(me: Rank) -> None:
    """Each element by the bound of docs/formats.md; exact where it must be."""
    buffer = buffer_for(me)
    mine = make_batches(me, [MOST], H, E, 1, masked=0.0)[me.index]
    mine.x[:, 64:128] = 3.0  # one magnitude
    mine.x[:, 128] = 0.0
    mine = mine.to(me.device)
    weights = torch.ones_like(mine.topk_weights)
    rows, _, handle, _, _ = buffer.low_latency_dispatch(
        mine.x, mine.topk_idx, MOST, E, use_fp8=False
    )

    def combine(use_logfmt):
        return buffer.low_latency_combine(
            rows, mine.topk_idx, weights, handle, use_logfmt=use_logfmt
        )[0].float()

    x, out = mine.x.float(), combine(True)
    assert torch.equal(combine(False), x)
    assert not torch.equal(out, x)
    assert torch.equal(out[:, 64:129], x[:, 64:129])
    sizes = x.abs().unflatten(1, (-1, 64))
    least = sizes.masked_fill(sizes == 0, float("inf")).amin(2, keepdim=True)
    span = torch.log2(sizes.amax(2, keepdim=True) / least).clamp(max=32)
    bound = (span / 1465 + 2**-14 + 2**-8) * sizes  # and that of bf16
    assert ((out - x).abs() <= bound.flatten(1)).all()


@pytest.mark.parametrize("size", [1, 2])
def test_logfmt_is_close(size: int, device: str) -> None:
    ranks.run(size, logfmt_is_close, device=device)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("tokens", [[MOST], [7, 0, MOST, 1]])
def test_every_mode(size: int, tokens, device: str) -> None:
    ranks.run(size, every_mode, tokens, device=device)


@pytest.mark.parametrize("hidden", [640, 7168])
def test_hidden_sizes(hidden: int, device: str) -> None:
    ranks.run(2, every_mode, [MOST, 5], hidden, device=device)


def two_at_once(me: Rank) -> None:
    """Two micro-batches: hooks from another thread, in any mixture."""
    buffer = buffer_for(me)
    batches = make_batches(me, [MOST], H, E, K)
    mine = batches[me.index].to(me.device)

    def send(sign):
        return buffer.low_latency_dispatch(
            mine.x * sign,
            mine.topk_idx,
            MOST,
            E,
            use_fp8=False,
            return_recv_hook=True,
        )

    def call(hook):
        thread = threading.Thread(target=hook)
        thread.start()
        thread.join()

    for _ in range(3):
        one, _, handle_one, _, hook_one = send(1)
        two, _, handle_two, _, hook_two = send(-1)
        call(hook_one)
        call(hook_two)
        sent = [
            buffer.low_latency_combine(
                rows,
                mine.topk_idx,
                mine.topk_weights,
                handle,
                return_recv_hook=True,
            )
            for rows, handle in ((one, handle_one), (two, handle_two))
        ]
        call(sent[0][2])
        call(sent[1][2])
        weight = mine.topk_weights.sum(dim=1, keepdim=True)
        wanted = mine.x.float() * weight
        assert difference(sent[0][0], wanted) < 1e-5
        assert torch.equal(sent[0][0], -sent[1][0])


def test_two_at_once(device: str) -> None:
    ranks.run(2, two_at_once, device=device)


def refusals(me: Rank) -> None:
    buffer = buffer_for(me)
    mine = make_batches(me, [MOST], H, E, K)[me.index].to(me.device)

    def dispatch(**more):
        return buffer.low_latency_dispatch(
            mine.x, mine.topk_idx, MOST, E, use_fp8=False, **more
        )

    with pytest.raises(ValueError, match="24 tokens, more than"):
        buffer.low_latency_dispatch(mine.x, mine.topk_idx, MOST - 1, E)
    with pytest.raises(ValueError, match="bfloat16"):
        buffer.low_latency_dispatch(mine.x.float(), mine.topk_idx, MOST, E)
    for totals in (torch.zeros(E), torch.zeros(1, dtype=torch.int32)):
        with pytest.raises(ValueError, match="cumulative_local_expert_recv"):
            dispatch(cumulative_local_expert_recv_stats=totals)
    with pytest.raises(AssertionError):
        dispatch(async_finish=True, return_recv_hook=True)
    # Limits, in EPX's own words: of rows, of K and of experts.
    narrow = mine.x[:, :12].contiguous()
    with pytest.raises(epx.CallError, match="hidden"):
        buffer.low_latency_dispatch(narrow, mine.topk_idx, MOST, E)
    wide = mine.topk_idx.repeat(1, 22)
    with pytest.raises(epx.CallError, match="topk is 66; allowed are 1 to 64"):
        buffer.low_latency_dispatch(mine.x, wide, MOST, E)
    with pytest.raises(epx.CallError, match="num_experts is 1025"):
        buffer.low_latency_dispatch(mine.x, mine.topk_idx, MOST, 1025)
    rows, _, old, _, _ = dispatch()
    dispatch()
    dispatch()
    with pytest.raises(RuntimeError, match="too old"):
        buffer.low_latency_combine(rows, mine.topk_idx, mine.topk_weights, old)
    rows, _, handle, _, _ = dispatch()
    with pytest.raises(ValueError, match="topk_weights"):
        buffer.low_latency_combine(
            rows, mine.topk_idx, mine.topk_weights[:, 1:], handle
        )
    # What is returned may be disposed of: it is the caller's own tensor.
    rows.set_(torch.empty(0, dtype=rows.dtype, device=rows.device))
    assert dispatch()[0].numel() > 0
    assert dispatch()[0].numel() > 0


def test_refusals(device: str) -> None:
    ranks.run(2, refusals, device=device)

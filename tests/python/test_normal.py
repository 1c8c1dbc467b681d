# SPDX-License-Identifier: MIT
"""Buffer.dispatch and combine against a dense reference."""

import time

import deep_ep
import pytest
import ranks
import torch
from ranks import Rank
from reference import (
    experts_of,
    from_fp8,
    make_batches,
    ranks_per_token,
    received_by_rank,
    to_fp8,
)

E, K, H = 16, 4, 256


def layout_of(buffer, batch, **more):
    per_rank, per_rdma, per_expert, goes, event = buffer.get_dispatch_layout(
        batch.topk_idx, E, **more
    )
    return {
        "num_tokens_per_rank": per_rank,
        "num_tokens_per_rdma_rank": per_rdma,
        "is_token_in_rank": goes,
        "num_tokens_per_expert": per_expert,
    }, event


def check_mode(me, buffer, batches, kind, with_topk, is_async, previous):
    mine = batches[me.index].to(me.device)
    rows, idx, weights, counts = received_by_rank(me, batches, E)
    x = mine.x
    if kind == "fp8":
        x = to_fp8(mine.x)
    args, _ = layout_of(buffer, mine)

    def more():
        return {
            "async_finish": is_async,
            "previous_event": buffer.capture() if previous else None,
        }

    if with_topk:
        args.update(topk_idx=mine.topk_idx, topk_weights=mine.topk_weights)
    got, got_idx, got_weights, per_expert, handle, event = buffer.dispatch(
        x=x, **args, **more()
    )
    event.current_stream_wait() if is_async else None
    assert (event.event is not None) == is_async
    first = me.index * (E // me.size)
    assert per_expert == [
        sum(int((it.topk_idx == e).sum()) for it in batches)
        for e in range(first, first + E // me.size)
    ]
    if kind == "fp8":
        assert got[0].dtype == torch.float8_e4m3fn
        assert got[1].shape == (rows.shape[0], H // 128)
        expected = from_fp8(*to_fp8(rows))
        got = from_fp8(*got).cpu()
        assert torch.equal(got, expected)
        got = got.to(torch.bfloat16).to(me.device)
    else:
        assert torch.equal(got.cpu(), rows)
    if with_topk:
        assert got_idx.dtype == torch.int64
        assert got_weights.dtype == torch.float32
        assert torch.equal(got_idx.cpu(), idx)
        assert torch.equal(got_weights.cpu(), weights)
    else:
        assert got_idx is None and got_weights is None

    cached = buffer.dispatch(x=x, handle=handle, **more())
    assert len(cached) == 6 and cached[1:5] == (None,) * 4
    cached[5].current_stream_wait() if is_async else None
    again = from_fp8(*cached[0]).cpu() if kind == "fp8" else cached[0].cpu()
    assert torch.equal(again.to(got.dtype), got.cpu())

    out, out_weights, event = buffer.combine(
        x=got,
        handle=handle,
        topk_weights=got_weights if with_topk else None,
        **more(),
    )
    event.current_stream_wait() if is_async else None
    spread = ranks_per_token(me, batches[me.index], E).unsqueeze(1)
    expected = (
        from_fp8(*to_fp8(batches[me.index].x))
        if kind == "fp8"
        else (batches[me.index].x.float())
    )
    expected = expected.to(torch.bfloat16).float() * spread
    torch.testing.assert_close(
        out.float().cpu(), expected, rtol=8e-3, atol=1e-6
    )
    if with_topk:
        assert torch.equal(out_weights.cpu(), batches[me.index].topk_weights)
    else:
        assert out_weights is None


def every_mode(me: Rank) -> None:
    buffer = deep_ep.Buffer(me.group, 64 << 20, 0)
    batches = make_batches(me, [37, 64, 0, 5], H, E, K)
    for kind in ("bf16", "fp8"):
        for with_topk in (True, False):
            for is_async in (False, True):
                for previous in (False, True):
                    check_mode(
                        me,
                        buffer,
                        batches,
                        kind,
                        with_topk,
                        is_async,
                        previous,
                    )


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_mode(size: int, device: str) -> None:
    ranks.run(size, every_mode, device=device)


def element_types(me: Rank, dtype: torch.dtype) -> None:
    buffer = deep_ep.Buffer(me.group, 64 << 20)
    batches = make_batches(me, [9, 16], H, E, K, dtype)
    mine = batches[me.index].to(me.device)
    args, _ = layout_of(buffer, mine)
    got, _, _, _, handle, _ = buffer.dispatch(
        mine.x, topk_idx=mine.topk_idx, **args
    )
    assert torch.equal(got.cpu(), received_by_rank(me, batches, E)[0])
    out, none, _ = buffer.combine(got, handle)
    assert out.dtype == dtype and none is None
    spread = ranks_per_token(me, batches[me.index], E).unsqueeze(1)
    torch.testing.assert_close(
        out.float().cpu(), mine.x.float().cpu() * spread, rtol=8e-3, atol=0
    )


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32]
)
def test_element_types(dtype: torch.dtype, device: str) -> None:
    ranks.run(2, element_types, dtype, device=device)


def layout_is_right(me: Rank) -> None:
    buffer = deep_ep.Buffer(me.group)
    for num_experts in (E, E + 3):  # not all ranks hold as many
        batch = make_batches(me, [33], H, num_experts, K)[me.index]
        per_rank, none, per_expert, goes, event = buffer.get_dispatch_layout(
            batch.topk_idx.to(me.device), num_experts
        )
        assert event.event is None and none is None
        assert per_rank.dtype == per_expert.dtype == torch.int32
        assert goes.dtype == torch.bool and goes.is_contiguous()
        for rank in range(me.size):
            first, end = experts_of(me, num_experts, rank)
            here = (batch.topk_idx >= first) & (batch.topk_idx < end)
            assert torch.equal(goes[:, rank].cpu(), here.any(dim=1))
            assert per_rank[rank] == here.any(dim=1).sum()
        for expert in range(num_experts):
            assert per_expert[expert] == (batch.topk_idx == expert).sum()


def test_layout(device: str) -> None:
    ranks.run(4, layout_is_right, device=device)


def fixed_rows(me: Rank) -> None:
    buffer = deep_ep.Buffer(me.group, 64 << 20)
    batches = make_batches(me, [20, 7], H, E, K)
    mine = batches[me.index].to(me.device)
    rows, idx, weights, _ = received_by_rank(me, batches, E)
    args, _ = layout_of(buffer, mine)
    got, got_idx, got_weights, per_expert, handle, _ = buffer.dispatch(
        mine.x,
        topk_idx=mine.topk_idx,
        topk_weights=mine.topk_weights,
        num_worst_tokens=50,
        **args,
    )
    count = rows.shape[0]
    assert got.shape == (50, H) and got_idx.shape == (50, K)
    assert per_expert == []
    assert torch.equal(got[:count].cpu(), rows)
    assert torch.equal(got_idx[:count].cpu(), idx)
    assert (got_idx[count:] == -1).all()
    assert torch.equal(got_weights[:count].cpu(), weights)
    out, _, _ = buffer.combine(got, handle)
    spread = ranks_per_token(me, batches[me.index], E).unsqueeze(1)
    torch.testing.assert_close(
        out.float().cpu(), mine.x.float().cpu() * spread, rtol=8e-3, atol=0
    )
    again = buffer.dispatch(mine.x, handle=handle)[0]
    assert torch.equal(again[:count].cpu(), rows)


def test_fixed_rows(device: str) -> None:
    ranks.run(2, fixed_rows, device=device)


def biases(me: Rank) -> None:
    buffer = deep_ep.Buffer(me.group, 64 << 20)
    mine = make_batches(me, [11], H, E, K)[me.index].to(me.device)
    args, _ = layout_of(buffer, mine)
    got, _, _, _, handle, _ = buffer.dispatch(
        mine.x, topk_idx=mine.topk_idx, **args
    )
    spread = ranks_per_token(me, mine.to("cpu"), E).unsqueeze(1)
    spread = spread.to(me.device)
    one, two = torch.randn_like(mine.x), torch.randn_like(mine.x)
    for bias, sum_of in ((one, one.float()), ((one, two), one.float() + two)):
        out, _, _ = buffer.combine(got, handle, bias=bias)
        torch.testing.assert_close(
            out.float(), mine.x.float() * spread + sum_of, rtol=1e-2, atol=2e-2
        )


def test_bias(device: str) -> None:
    ranks.run(2, biases, device=device)


def two_buffers(me: Rank) -> None:
    """An event of one buffer orders a call of another."""
    one, two = (deep_ep.Buffer(me.group, 32 << 20) for _ in range(2))
    batches = make_batches(me, [40, 25], 4096, E, K)
    mine = batches[me.index].to(me.device)
    args, _ = layout_of(one, mine)
    spread = ranks_per_token(me, batches[me.index], E).unsqueeze(1)
    for is_async in (False, True):
        got, _, _, _, handle, event = one.dispatch(
            mine.x, topk_idx=mine.topk_idx, async_finish=True, **args
        )
        _, _, _, _, other, _ = two.dispatch(
            mine.x, topk_idx=mine.topk_idx, **args
        )
        event.current_stream_wait()
        if me.device == "cpu":  # what follows takes its time
            queue = one._lanes.default._queue
            queue.submit(lambda: time.sleep(0.2))
        out, _, event = one.combine(got, handle, async_finish=True)
        again, _, _, _, _, event = two.dispatch(
            out, handle=other, previous_event=event, async_finish=is_async
        )
        event.current_stream_wait() if is_async else None
        back, _, _ = two.combine(again, other)
        torch.testing.assert_close(
            back.float().cpu(),
            batches[me.index].x.float() * spread * spread,
            rtol=2e-2,
            atol=0,
        )


def test_two_buffers(device: str) -> None:
    ranks.run(2, two_buffers, device=device)


def alignment_and_scales(me: Rank) -> None:
    """Counts are rounded up; scales may lie in any order."""
    buffer = deep_ep.Buffer(me.group, 64 << 20)
    batches = make_batches(me, [12, 30], 512, E, K)
    mine = batches[me.index].to(me.device)
    args, _ = layout_of(buffer, mine)
    rows, scales = to_fp8(mine.x)
    plain = buffer.dispatch((rows, scales), topk_idx=mine.topk_idx, **args)
    by_column = scales.t().contiguous().t()
    other = buffer.dispatch(
        (rows, by_column),
        topk_idx=mine.topk_idx,
        expert_alignment=128,
        **args,
    )
    assert all(it % 128 == 0 for it in other[3])
    assert [-(-it // 128) * 128 for it in plain[3]] == other[3]
    assert torch.equal(plain[0][1], other[0][1])
    packed = torch.arange(rows.shape[0], dtype=torch.int32, device=me.device)
    packed = packed.view(-1, 1).contiguous()
    got = buffer.dispatch((rows, packed), topk_idx=mine.topk_idx, **args)
    assert got[0][1].dtype == torch.int32 and got[0][1].shape[1] == 1


def test_alignment_and_scales(device: str) -> None:
    ranks.run(2, alignment_and_scales, device=device)

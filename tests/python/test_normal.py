# SPDX-License-Identifier: MIT
"""Buffer.dispatch and combine against a dense reference."""

import itertools
import time
from typing import NamedTuple

import deep_ep
import pytest
import ranks
import torch
from ranks import Rank
from reference import (
    difference,
    experts_of,
    from_fp8,
    make_batches,
    ranks_per_token,
    received_by_rank,
    to_fp8,
)

E, K, H, MOST = 16, 4, 256, 64


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


class Mode(NamedTuple):
    """What DeepEP's own test of these calls goes through."""

    kind: str
    with_topk: bool = True
    is_async: bool = False
    previous: bool = False

    def how(self, buffer):
        return {
            "async_finish": self.is_async,
            "previous_event": buffer.capture() if self.previous else None,
        }

    def wait(self, event):
        assert (event.event is not None) == self.is_async
        if self.is_async:
            event.current_stream_wait()

    def of(self, x):
        """A batch's rows, as they are sent."""
        if self.kind == "fp8":
            return to_fp8(x)
        return x.to(getattr(torch, self.kind))


def values(rows):
    """What rows stand for, on the CPU."""
    rows = from_fp8(*rows) if isinstance(rows, tuple) else rows
    return rows.float().cpu()


def is_near(a, b, rtol=8e-3):
    torch.testing.assert_close(a.float().cpu(), b, rtol=rtol, atol=1e-6)
    assert difference(a, b) < 5e-6


def check_combine(me, buffer, batches, mode, rows, weights, handle):
    """Rows that go back as they came: each token's, once for each rank."""
    if isinstance(rows, tuple):
        rows = from_fp8(*rows).to(torch.bfloat16)
    out, out_weights, event = buffer.combine(
        x=rows, handle=handle, topk_weights=weights, **mode.how(buffer)
    )
    mode.wait(event)
    batch = batches[me.index]
    sent = mode.of(batch.x)
    if isinstance(sent, tuple):
        sent = from_fp8(*sent).to(torch.bfloat16)
    assert out.dtype == sent.dtype
    is_near(out, sent.float() * ranks_per_token(me, batch, E).unsqueeze(1))
    if weights is None:
        assert out_weights is None
    else:
        assert torch.equal(out_weights.cpu(), batch.topk_weights)


def check_cached(me, buffer, mode, x, handle, wanted):
    """Other rows by the same handle."""
    count = wanted.shape[0]
    got, *nothing, event = buffer.dispatch(
        x=x, handle=handle, **mode.how(buffer)
    )
    assert nothing == [None] * 4
    mode.wait(event)
    assert torch.equal(values(got)[:count], wanted)


def check_worst(me, buffer, batches, mode, x, args, wanted):
    """As many rows as can ever come, without a look at the counts."""
    count, most = wanted[0].shape[0], me.size * MOST
    rows, idx, weights, per_expert, handle, event = buffer.dispatch(
        x=x, num_worst_tokens=most, **args, **mode.how(buffer)
    )
    mode.wait(event)
    assert values(rows).shape == (most, H) and per_expert == []
    assert idx.shape == weights.shape == (most, K)
    for got, want in zip((values(rows), idx.cpu(), weights.cpu()), wanted):
        assert torch.equal(got[:count], want)
    assert (idx[count:] == -1).all() and not weights[count:].any()
    check_cached(me, buffer, mode, x, handle, wanted[0])
    check_combine(me, buffer, batches, mode, rows, weights, handle)


def check_mode(me, buffer, batches, mode):
    mine = batches[me.index].to(me.device)
    x = mode.of(mine.x)
    sent, idx, weights, _ = received_by_rank(me, batches, E)
    wanted = values(mode.of(sent))
    args, _ = layout_of(buffer, mine)
    if mode.with_topk:
        args.update(topk_idx=mine.topk_idx, topk_weights=mine.topk_weights)
    got, got_idx, got_weights, per_expert, handle, event = buffer.dispatch(
        x=x, **args, **mode.how(buffer)
    )
    mode.wait(event)
    first, end = experts_of(me, E, me.index)
    assert per_expert == [
        sum(int((it.topk_idx == e).sum()) for it in batches)
        for e in range(first, end)
    ]
    if mode.kind == "fp8":
        assert got[0].dtype == torch.float8_e4m3fn
        assert got[1].shape == (wanted.shape[0], H // 128)
    else:
        assert got.dtype == x.dtype
    assert torch.equal(values(got), wanted)
    if mode.with_topk:
        assert got_idx.dtype == torch.int64
        assert got_weights.dtype == torch.float32
        assert torch.equal(got_idx.cpu(), idx)
        assert torch.equal(got_weights.cpu(), weights)
        check_worst(me, buffer, batches, mode, x, args, (wanted, idx, weights))
    else:
        assert got_idx is None and got_weights is None
    check_cached(me, buffer, mode, x, handle, wanted)
    check_combine(me, buffer, batches, mode, got, got_weights, handle)


def every_mode(me: Rank) -> None:
    buffer = deep_ep.Buffer(me.group, 64 << 20, 0)
    batches = make_batches(me, [37, MOST, 0, 5], H, E, K)
    flags = (False, True)
    for kind in ("bfloat16", "fp8", "float16", "float32"):
        for mode in itertools.product(flags, flags, flags):
            check_mode(me, buffer, batches, Mode(kind, *mode))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_mode(size: int, device: str) -> None:
    ranks.run(size, every_mode, device=device)


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

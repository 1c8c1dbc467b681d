# SPDX-License-Identifier: MIT
"""Ranks that go on in their group without another."""

import time

import deep_ep
import epx
import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
from ranks import Rank
from reference import difference, make_batches

E, K, H, MOST = 8, 3, 128, 12
GONE = 1


def without(me: Rank, idx: torch.Tensor) -> torch.Tensor:
    """The routing that remains."""
    first, count = epx.local_experts(E, me.size, GONE)
    gone = (idx >= first) & (idx < first + count)
    return idx.masked_fill(gone, -1)


def masked_group(me: Rank) -> None:
    """One rank leaves; the others plan anew, and with what they had."""
    group = epx.Group.from_torch(me.group, heap_bytes=8 << 20, timeout=30)
    batch = make_batches(me, [MOST] * me.size, H, E, K)[me.index]
    idx, x = batch.topk_idx, batch.x
    plan = group.plan(idx, E, max_tokens_per_rank=MOST)
    received = plan.dispatch(x)
    plan.combine(received.x)
    assert group.masked() == [] and plan.counts().num_dropped == 0
    dist.barrier(me.group)  # or what a peer has yet to complete would fail
    if me.index == GONE:
        while True:
            try:
                group.check()
            except epx.PeerError as error:
                if error.status == epx.Status.ERR_MASKED:
                    break
            time.sleep(0.01)
        with pytest.raises(epx.PeerError, match="masked"):
            group.mask()
        group.close()
        return
    group.mask([GONE])
    assert group.masked() == [GONE]
    with pytest.raises(epx.CallError, match="new routing"):
        plan.dispatch(x)
    plan.update(idx)
    left = without(me, idx)
    dropped = np.full((MOST, K), 7, dtype=np.uint8)
    received = plan.dispatch(x, dropped=dropped)
    assert (dropped == (left != idx).numpy()).all()
    counts = plan.counts()
    assert counts.num_dropped == dropped.sum()
    assert counts.rank_tokens[GONE] == 0
    out = plan.combine(received.x).x
    ends = [sum(epx.local_experts(E, me.size, r)) for r in range(me.size)]
    rank_of = torch.bucketize(left, torch.tensor(ends), right=True)
    times = torch.zeros(MOST, 1)
    for rank in range(me.size):
        times += ((rank_of == rank) & (left >= 0)).any(1, keepdim=True)
    assert torch.equal(out.float(), (x.float() * times).bfloat16().float())
    with pytest.raises(epx.CallError, match="but for this rank"):
        group.mask([me.index])
    group.close()


def test_masked_group() -> None:
    ranks.run(3, masked_group)


def masked_buffer(me: Rank) -> None:
    """DeepEP's calls, with a rank that goes on by itself."""
    buffer = deep_ep.Buffer(me.group, 1 << 20, low_latency_mode=True)
    batch = make_batches(me, [MOST] * me.size, H, E, K)[me.index].to(me.device)
    weights = batch.topk_weights
    status = torch.full((me.size,), 7, dtype=torch.int32, device=me.device)
    for turn in range(4):
        if turn == 2:
            dist.barrier(me.group)
            if me.index == GONE:
                break
            buffer.low_latency_update_mask_buffer(GONE, True)
            weights = weights.masked_fill(without(me, batch.topk_idx) < 0, 0)
        rows, _, handle, _, _ = buffer.low_latency_dispatch(
            batch.x, batch.topk_idx, MOST, E, use_fp8=False
        )
        out = buffer.low_latency_combine(
            rows, batch.topk_idx, batch.topk_weights, handle
        )[0]
        wanted = batch.x.float() * weights.sum(1, keepdim=True)
        assert difference(out, wanted) < 1e-5
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [
            int(turn >= 2 and rank == GONE) for rank in range(me.size)
        ]
    if me.index != GONE:
        buffer.low_latency_update_mask_buffer(GONE, True)
        with pytest.raises(NotImplementedError, match="back"):
            buffer.low_latency_update_mask_buffer(GONE, False)
        with pytest.raises(NotImplementedError, match="back"):
            buffer.low_latency_clean_mask_buffer()
    buffer.destroy()


def test_masked_buffer(device: str) -> None:
    ranks.run(3, masked_buffer, device=device)

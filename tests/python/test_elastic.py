# SPDX-License-Identifier: MIT
"""ElasticBuffer.dispatch and combine against a dense reference."""

import itertools
from typing import NamedTuple

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

E, K, H, MOST = 8, 3, 256, 40


def buffer_for(me: Rank) -> deep_ep.ElasticBuffer:
    return deep_ep.ElasticBuffer(
        me.group,
        num_max_tokens_per_rank=MOST,
        hidden=H,
        num_topk=K,
        explicitly_destroy=True,
    )


def aligned(count: int, step: int) -> int:
    return -(-count // step) * step


def check_handle(me, handle, batches, step, synced):
    counts = received_by_rank(me, batches, E)[3]
    per_rank = torch.tensor(counts).cumsum(0)
    told = handle.psum_num_recv_tokens_per_scaleup_rank
    assert told.dtype == torch.int32
    assert told.cpu().tolist() == per_rank.tolist()
    first, end = experts_of(me, E, me.index)
    start, ends, padded = 0, [], []
    for expert in range(first, end):
        count = sum(int((it.topk_idx == expert).sum()) for it in batches)
        padded.append(aligned(count, step))
        ends.append(start + (count if handle.do_expand else padded[-1]))
        start += padded[-1]
    told = handle.psum_num_recv_tokens_per_expert
    assert told.dtype == torch.int32
    assert told.cpu().tolist() == ends
    listed = handle.num_recv_tokens_per_expert_list
    assert isinstance(listed, list)
    assert listed == (padded if synced else [])
    return sum(counts), ends, padded


class Mode(NamedTuple):
    """What is asked of the calls, besides the layout."""

    fp8: bool
    synced: bool
    is_async: bool = False
    previous: bool = False

    @property
    def step(self):
        return 16 if self.fp8 != self.synced else 1

    def how(self, buffer):
        return {
            "previous_event": buffer.capture() if self.previous else None,
            "async_with_compute_stream": self.is_async,
            "allocate_on_comm_stream": self.previous and self.is_async,
        }

    def wait(self, event):
        assert (event.event is not None) == self.is_async
        if self.is_async:
            event.current_stream_wait()


def check_by_rank(me, buffer, batches, mode):
    fp8, step, synced = mode.fp8, mode.step, mode.synced
    mine = batches[me.index].to(me.device)
    rows, idx, weights, _ = received_by_rank(me, batches, E)
    stats = torch.zeros(E // me.size, dtype=torch.int32, device=me.device)
    got, got_idx, got_weights, handle, event = buffer.dispatch(
        to_fp8(mine.x) if fp8 else mine.x,
        topk_idx=mine.topk_idx,
        topk_weights=mine.topk_weights,
        cumulative_local_expert_recv_stats=stats,
        num_experts=E,
        expert_alignment=step,
        do_handle_copy=not mode.previous,
        do_cpu_sync=synced,
        **mode.how(buffer),
    )
    mode.wait(event)
    count, _, _ = check_handle(me, handle, batches, step, synced)
    per_expert = handle.num_unaligned_recv_tokens_per_expert
    assert torch.equal(stats, per_expert)
    size = count if synced else me.size * MOST
    assert got_idx.shape == got_weights.shape == (size, K)
    values = from_fp8(*got) if fp8 else got
    wanted = from_fp8(*to_fp8(rows)) if fp8 else rows
    assert values.shape == (size, H)
    assert torch.equal(values[:count].cpu(), wanted)
    assert torch.equal(got_idx[:count].cpu(), idx)
    assert torch.equal(got_weights[:count].cpu(), weights)

    cached, cached_idx, none, same, event = buffer.dispatch(
        mine.x, handle=handle, **mode.how(buffer)
    )
    mode.wait(event)
    assert same is handle and none is None
    assert torch.equal(cached[:count].cpu(), rows)
    assert torch.equal(cached_idx[:count].cpu(), idx)

    outputs = values.to(torch.bfloat16)
    ones = torch.ones_like(mine.x)
    out, out_weights, event = buffer.combine(
        outputs,
        handle,
        topk_weights=got_weights,
        bias=(ones, 2 * ones) if mode.previous else None,
        **mode.how(buffer),
    )
    mode.wait(event)
    spread = ranks_per_token(me, batches[me.index], E).unsqueeze(1)
    sent = from_fp8(*to_fp8(mine.x)) if fp8 else mine.x
    sent = sent.to(torch.bfloat16).float().cpu()
    torch.testing.assert_close(
        out.float().cpu(),
        sent * spread + (3 if mode.previous else 0),
        rtol=8e-3,
        atol=1e-2,
    )
    assert torch.equal(out_weights.cpu(), batches[me.index].topk_weights)


def check_expanded(me, buffer, batches, mode, by_column):
    fp8, step, synced = mode.fp8, mode.step, mode.synced
    mine = batches[me.index].to(me.device)
    got, none, got_weights, handle, event = buffer.dispatch(
        to_fp8(mine.x) if fp8 else mine.x,
        topk_idx=mine.topk_idx,
        topk_weights=mine.topk_weights,
        num_experts=E,
        num_max_tokens_per_rank=MOST,
        expert_alignment=step,
        do_cpu_sync=synced,
        do_expand=True,
        use_tma_aligned_col_major_sf=by_column,
        **mode.how(buffer),
    )
    mode.wait(event)
    assert none is None
    _, ends, padded = check_handle(me, handle, batches, step, synced)
    size = sum(padded)
    if not synced:
        local = E // me.size
        most = me.size * MOST * min(K, local) + (step - 1) * local
        size = aligned(most, step)
    assert got_weights.shape == (size,)
    if fp8:
        assert got[1].shape == (size, H // 128)
        if by_column:
            assert got[1].stride() == (1, aligned(size, 4))
    values = from_fp8(*got) if fp8 else got
    assert values.shape == (size, H)
    first, _ = experts_of(me, E, me.index)
    start = 0
    for local, end in enumerate(ends):
        sent, weights = [], []
        for batch in batches:
            token, k = (batch.topk_idx == first + local).nonzero().T
            sent.append(batch.x[token])
            weights.append(batch.topk_weights[token, k])
        wanted = torch.cat(sent)
        wanted = from_fp8(*to_fp8(wanted)) if fp8 else wanted
        assert torch.equal(values[start:end].cpu(), wanted)
        assert torch.equal(got_weights[start:end].cpu(), torch.cat(weights))
        start = aligned(end, step)
        padding = got[0] if fp8 else got
        assert not padding[end:start].float().any()
        assert not got_weights[end:start].any()

    again = buffer.dispatch(
        mine.x,
        topk_weights=mine.topk_weights,
        handle=handle,
        do_expand=True,
        **mode.how(buffer),
    )
    mode.wait(again[4])
    assert again[1] is None
    end = ends[-1]
    assert torch.equal(again[2][:end].cpu(), got_weights[:end].cpu())

    bias = torch.ones_like(mine.x)
    out, out_weights, event = buffer.combine(
        values.to(torch.bfloat16),
        handle,
        topk_weights=got_weights,
        bias=bias,
        **mode.how(buffer),
    )
    mode.wait(event)
    chosen = (batches[me.index].topk_idx >= 0).sum(dim=1, keepdim=True)
    sent = from_fp8(*to_fp8(mine.x)) if fp8 else mine.x
    sent = sent.to(torch.bfloat16).float().cpu()
    torch.testing.assert_close(
        out.float().cpu(), sent * chosen + 1, rtol=1e-2, atol=1e-2
    )
    assert torch.equal(out_weights.cpu(), batches[me.index].topk_weights)


def every_mode(me: Rank) -> None:
    buffer = buffer_for(me)
    batches = make_batches(me, [MOST, 3, 0, 17], H, E, K)
    for mode in itertools.product((False, True), repeat=4):
        mode = Mode(*mode)
        check_by_rank(me, buffer, batches, mode)
        check_expanded(me, buffer, batches, mode, by_column=mode.previous)
    buffer.destroy()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_mode(size: int, device: str) -> None:
    ranks.run(size, every_mode, device=device)


def handles(me: Rank) -> None:
    buffer = buffer_for(me)
    mine = make_batches(me, [8], H, E, K)[me.index].to(me.device)
    kept = mine.topk_idx.clone()
    args = {"topk_idx": mine.topk_idx, "num_experts": E}
    _, _, _, handle, event = buffer.dispatch(mine.x, **args)
    assert event.event is None
    assert handle.topk_idx.data_ptr() != mine.topk_idx.data_ptr()
    _, _, _, other, _ = buffer.dispatch(mine.x, do_handle_copy=False, **args)
    assert other.topk_idx is mine.topk_idx
    assert torch.equal(handle.topk_idx, kept)
    with pytest.raises(ValueError, match="num_experts is 9"):
        buffer.dispatch(mine.x, num_experts=9, handle=handle)
    with pytest.raises(ValueError, match="do_cpu_sync"):
        buffer.dispatch(mine.x, do_cpu_sync=True, handle=handle)
    with pytest.raises(ValueError, match="num_experts"):
        buffer.dispatch(mine.x, mine.topk_idx)
    size = deep_ep.ElasticBuffer.get_buffer_size_hint(
        me.group, MOST, H, num_topk=K, use_fp8_dispatch=True
    )
    assert size % (2 << 20) == 0 and size > 0
    assert buffer.get_theoretical_num_sms(E, K) >= 1
    assert buffer.get_theoretical_num_qps(4) >= 1
    assert buffer.get_logical_domain_size() == (1, me.size)
    buffer.barrier()
    before = buffer.capture()
    assert isinstance(before, deep_ep.EventHandle)
    got, _, _, _, event = buffer.dispatch(
        mine.x,
        handle=handle,
        previous_event=before,
        async_with_compute_stream=True,
        allocate_on_comm_stream=True,
    )
    with event:
        pass
    assert got.shape[1] == H


def test_handles(device: str) -> None:
    ranks.run(2, handles, device=device)

# SPDX-License-Identifier: MIT
"""Events, and what else is asked of the buffers beside their calls."""

import deep_ep
import pytest
import ranks
import torch
from frameworks import MOST, E, H, K, batch_of, close, summed
from ranks import Rank
from reference import difference


def dispatched(buffer, batch, **more):
    layout = buffer.get_dispatch_layout(batch.topk_idx, E)
    rows, _, _, counts, handle, event = buffer.dispatch(
        batch.x,
        topk_idx=batch.topk_idx,
        num_tokens_per_expert=layout[2],
        **more,
    )
    return rows, counts, handle, event


def waits(me: Rank) -> None:
    """All ways to wait, what they return, and what they keep."""
    buffer = deep_ep.Buffer(me.group, 32 << 20)
    batch = batch_of(me)
    called = []

    def hook():
        called.append(1)
        return "said"

    def started():
        rows, _, handle, event = dispatched(buffer, batch, async_finish=True)
        assert isinstance(event, deep_ep.EventOverlap)
        assert isinstance(event.event, deep_ep.EventHandle)
        return rows, handle, event

    rows, handle, event = started()
    event.register_hook_after_wait(hook)
    with pytest.raises(AssertionError, match="a hook already"):
        event.register_hook_after_wait(hook)
    assert event.wait() == "said"
    assert event.wait() is None and len(called) == 1
    assert event.current_stream_wait(release_handle=True) is None
    with pytest.raises(AssertionError, match="not asynchronous"):
        event.current_stream_wait()
    close(buffer.combine(rows, handle)[0], summed(me, batch))

    rows, handle, event = started()
    with event as entered:
        assert entered is event
    assert event.event is not None
    with event(release_handle=True):
        pass
    assert event.event is None
    with event:  # of a call that was not asynchronous: nothing to wait for
        pass
    close(buffer.combine(rows, handle)[0], summed(me, batch))

    # Any of these may be given as the event to wait for.
    kept = deep_ep.EventOverlap(deep_ep.EventHandle(), (batch.x,))
    assert kept.extra_tensors[0] is batch.x
    for previous in (None, deep_ep.EventOverlap(), kept, kept.event):
        rows, _, handle, _ = dispatched(buffer, batch, previous_event=previous)
        close(buffer.combine(rows, handle)[0], summed(me, batch))
    deep_ep.EventHandle().current_stream_wait()


def test_waits(device: str) -> None:
    ranks.run(2, waits, device=device)


def before_the_epilogue(me: Rank) -> None:
    buffer = deep_ep.ElasticBuffer(
        me.group,
        num_cpu_bytes=0,
        num_max_tokens_per_rank=MOST,
        hidden=H,
        num_topk=K,
        num_allocated_qps=5,
    )
    assert (buffer.rank_idx, buffer.num_ranks) == (me.index, me.size)
    assert buffer.get_theoretical_num_qps(4) == 5
    batch = batch_of(me)
    for event in (buffer.capture(), deep_ep.EventOverlap(buffer.capture())):
        how = {
            "previous_event": buffer.capture(),
            "previous_event_before_epilogue": event,
            "async_with_compute_stream": True,
            "allocate_on_comm_stream": True,
        }
        rows, _, _, handle, event = buffer.dispatch(
            batch.x, topk_idx=batch.topk_idx, num_experts=E, **how
        )
        event.current_stream_wait()
        assert handle.num_recv_tokens == rows.shape[0]
        out, _, event = buffer.combine(rows, handle, **how)
        event.current_stream_wait()
        close(out, summed(me, batch))


def test_before_the_epilogue(device: str) -> None:
    ranks.run(2, before_the_epilogue, device=device)


def streams_and_scratch(me: Rank) -> None:
    buffer = deep_ep.Buffer(
        me.group, 1 << 20, 2 << 20, use_fabric=True, allow_mnnvl=True
    )
    elastic = deep_ep.ElasticBuffer(me.group, 1 << 20)
    for made in (buffer, elastic):
        if me.device == "cuda":
            assert made.get_comm_stream() != torch.cuda.current_stream()
        else:
            with pytest.raises(RuntimeError, match="on the CPU"):
                made.get_comm_stream()
    scratch = buffer.get_local_buffer_tensor(torch.int8)
    assert scratch.dtype == torch.int8 and scratch.numel() == 1 << 20
    assert scratch.device.type == me.device
    wide = buffer.get_local_buffer_tensor(torch.int32, use_rdma_buffer=True)
    assert wide.numel() * 4 == 2 << 20
    part = buffer.get_local_buffer_tensor(
        torch.bfloat16, size=torch.Size((3, 5)), offset=7
    )
    assert part.shape == (3, 5) and part.dtype == torch.bfloat16


def test_streams_and_scratch(device: str) -> None:
    ranks.run(2, streams_and_scratch, device=device)


def narrow_indices(me: Rank) -> None:
    """Routing of int32, which DeepEP can be built for."""
    buffer = deep_ep.Buffer(me.group, 32 << 20)
    batch = batch_of(me)
    wide_layout = buffer.get_dispatch_layout(batch.topk_idx, E)
    wide_rows, wide_counts, _, _ = dispatched(buffer, batch)
    batch.topk_idx = batch.topk_idx.int()
    for one, other in zip(
        buffer.get_dispatch_layout(batch.topk_idx, E)[2:4], wide_layout[2:4]
    ):
        assert torch.equal(one, other)
    rows, counts, handle, _ = dispatched(buffer, batch)
    assert torch.equal(rows, wide_rows) and counts == wide_counts
    close(buffer.combine(rows, handle)[0], summed(me, batch))
    rows, _, handle, _, _ = buffer.low_latency_dispatch(
        batch.x, batch.topk_idx, MOST, E, use_fp8=False
    )
    out, _, _ = buffer.low_latency_combine(
        rows, batch.topk_idx, batch.topk_weights, handle
    )
    weight = batch.topk_weights.sum(dim=1, keepdim=True)
    assert difference(out, batch.x.float() * weight) < 1e-5


def test_narrow_indices(device: str) -> None:
    ranks.run(2, narrow_indices, device=device)

# SPDX-License-Identifier: MIT
"""The calls that frameworks make of ElasticBuffer: their exact forms, and what
they read."""

import deep_ep
import pytest
import ranks
import torch
from frameworks import MOST, E, H, K, batch_of, close, summed
from ranks import Rank
from reference import to_fp8


def vllm_elastic(me: Rank, expand: bool) -> None:
    buffer = deep_ep.ElasticBuffer(
        group=me.group,
        num_max_tokens_per_rank=MOST,
        hidden=H,
        num_topk=K,
        use_fp8_dispatch=False,
        allow_hybrid_mode=False,
        prefer_overlap_with_compute=False,
        allow_multiple_reduction=False,
        explicitly_destroy=True,
        num_cpu_timeout_secs=60,
        num_gpu_timeout_secs=60,
    )
    assert buffer.get_theoretical_num_sms(num_experts=E, num_topk=K) > 0
    batch = batch_of(me, (MOST, 0))
    rows, idx, weights, handle, event = buffer.dispatch(
        x=batch.x,
        topk_idx=batch.topk_idx,
        topk_weights=batch.topk_weights,
        num_experts=E,
        num_max_tokens_per_rank=None if expand else MOST,
        do_expand=expand,
        do_cpu_sync=expand,
        async_with_compute_stream=False,
    )
    assert event.event is None
    if expand:
        assert idx is None and weights.dim() == 1
        assert len(handle.num_recv_tokens_per_expert_list) == E // me.size
    else:
        assert handle.num_recv_tokens_per_expert_list == []
        count = handle.psum_num_recv_tokens_per_scaleup_rank[-1].item()
        assert rows.shape[0] == me.size * MOST >= count
    out, _, event = buffer.combine(
        x=rows,
        handle=handle,
        topk_weights=None,
        async_with_compute_stream=False,
        allocate_on_comm_stream=False,
    )
    if event.event is not None:
        event.current_stream_wait()
    assert out.shape == batch.x.shape
    buffer.destroy()


@pytest.mark.parametrize("expand", [False, True])
def test_vllm_elastic(expand: bool, device: str) -> None:
    ranks.run(2, vllm_elastic, expand, device=device)


def sglang_elastic(me: Rank) -> None:
    buffer = deep_ep.ElasticBuffer(
        me.group,
        num_max_tokens_per_rank=MOST,
        hidden=H,
        num_topk=K,
        use_fp8_dispatch=True,
        allow_hybrid_mode=True,
        sl_idx=0,
        prefer_overlap_with_compute=False,
    )
    assert buffer.num_bytes > 0
    num_sms = buffer.get_theoretical_num_sms(E, K)
    num_qps = buffer.get_theoretical_num_qps(num_sms)
    batch = batch_of(me)
    for synced, expand in ((True, False), (False, False), (True, True)):
        rows, _, weights, handle, _ = buffer.dispatch(
            to_fp8(batch.x),
            topk_idx=batch.topk_idx,
            topk_weights=batch.topk_weights,
            num_experts=E,
            num_max_tokens_per_rank=MOST,
            expert_alignment=128 if expand else 1,
            num_sms=num_sms,
            num_qps=num_qps,
            use_tma_aligned_col_major_sf=True,
            do_cpu_sync=synced,
            do_expand=expand,
        )
        assert rows[1].stride(0) == 1
        count = handle.psum_num_recv_tokens_per_scaleup_rank[-1].item()
        assert handle.psum_num_recv_tokens_per_expert.shape == (E // me.size,)
        assert count <= rows[0].shape[0]
        outputs = torch.zeros(
            rows[0].shape, dtype=torch.bfloat16, device=me.device
        )
        out, _, _ = buffer.combine(
            outputs,
            handle=handle,
            topk_weights=weights,
            num_sms=num_sms,
            num_qps=num_qps,
        )
        assert not out.any()


def test_sglang_elastic(device: str) -> None:
    ranks.run(2, sglang_elastic, device=device)


def megatron_elastic(me: Rank) -> None:
    """Megatron's dev tree: forward, and the backward of each call."""
    hint = deep_ep.ElasticBuffer.get_buffer_size_hint(
        me.group, num_max_tokens_per_rank=MOST, hidden=H, num_topk=K
    )
    buffer = deep_ep.ElasticBuffer(
        me.group,
        num_bytes=hint,
        num_max_tokens_per_rank=MOST,
        hidden=H,
        num_topk=K,
    )
    assert buffer.group is me.group and buffer.num_bytes == hint
    assert buffer.num_max_tokens_per_rank == MOST
    batch = batch_of(me)
    for is_async, on_comm in ((False, False), (True, True), (True, False)):

        def how(is_async=is_async, on_comm=on_comm):
            return {
                "previous_event": buffer.capture() if on_comm else None,
                "async_with_compute_stream": is_async,
                "allocate_on_comm_stream": on_comm,
            }

        def wait(event, is_async=is_async):
            assert (event.event is not None) == is_async
            event.current_stream_wait() if is_async else ()

        rows, idx, weights, handle, event = buffer.dispatch(
            batch.x,
            topk_idx=batch.topk_idx,
            topk_weights=batch.topk_weights,
            num_experts=E,
            num_max_tokens_per_rank=MOST,
            expert_alignment=1,
            num_sms=12,
            **how(),
        )
        wait(event)
        assert handle.num_sms == 12
        listed = handle.num_recv_tokens_per_expert_list
        assert sum(listed) == (idx >= 0).sum()
        out, _, event = buffer.combine(
            rows, handle=handle, num_sms=handle.num_sms, **how()
        )
        wait(event)
        close(out, summed(me, batch))
        # Backward: of the dispatch, then of the combine.
        grad, grad_weights, event = buffer.combine(
            rows, handle=handle, topk_weights=weights.float(), **how()
        )
        wait(event)
        close(grad, summed(me, batch))
        assert torch.equal(grad_weights, batch.topk_weights)
        grad, _, _, _, event = buffer.dispatch(
            batch.x, handle=handle, num_sms=handle.num_sms, **how()
        )
        wait(event)
        assert torch.equal(grad, rows)


@pytest.mark.parametrize("size", [1, 2])
def test_megatron_elastic(size: int, device: str) -> None:
    ranks.run(size, megatron_elastic, device=device)


def torchtitan(me: Rank) -> None:
    buffer = deep_ep.ElasticBuffer(
        me.group,
        num_bytes=deep_ep.ElasticBuffer.get_buffer_size_hint(
            me.group, MOST, H, num_topk=K, use_fp8_dispatch=False
        ),
        num_max_tokens_per_rank=MOST,
        hidden=H,
        num_topk=K,
        deterministic=True,
        explicitly_destroy=True,
    )
    num_sms = buffer.get_theoretical_num_sms(E, K)
    batch = batch_of(me)
    for synced in (True, False):
        rows, idx, weights, handle, _ = buffer.dispatch(
            batch.x,
            topk_idx=batch.topk_idx,
            topk_weights=batch.topk_weights,
            num_experts=E,
            num_max_tokens_per_rank=MOST,
            num_sms=num_sms,
            do_cpu_sync=synced,
        )
        ends = handle.psum_num_recv_tokens_per_expert
        assert ends.dtype == torch.int32 and ends.shape == (E // me.size,)
        assert ends[-1] == (idx >= 0).sum()
        listed = handle.num_recv_tokens_per_expert_list
        assert listed == [] if not synced else sum(listed) == ends[-1]
        count = int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])
        cached = buffer.dispatch(
            batch.x, handle=handle, num_sms=handle.num_sms, do_cpu_sync=False
        )
        assert torch.equal(cached[0][:count], rows[:count])
        # Upstream needs num_sms to be told again.
        again = buffer.dispatch(batch.x, handle=handle)
        assert torch.equal(again[0][:count], rows[:count])
        out, sums, _ = buffer.combine(
            rows, handle=handle, topk_weights=weights
        )
        close(out, summed(me, batch))
        assert torch.equal(sums, batch.topk_weights)


@pytest.mark.parametrize("size", [1, 2])
def test_torchtitan(size: int, device: str) -> None:
    ranks.run(size, torchtitan, device=device)


def deepspeed(me: Rank) -> None:
    buffer = deep_ep.ElasticBuffer(
        me.group,
        num_max_tokens_per_rank=MOST,
        hidden=H,
        num_topk=K,
        num_allocated_qps=12 + 4,
        allow_hybrid_mode=True,
        explicitly_destroy=True,
    )
    num_qps = buffer.get_theoretical_num_qps(12)
    batch = batch_of(me)
    rows, none, weights, handle, _ = buffer.dispatch(
        batch.x,
        topk_idx=batch.topk_idx.to(deep_ep.topk_idx_t),
        topk_weights=batch.topk_weights,
        num_experts=E,
        do_expand=True,
        expert_alignment=1,
        num_sms=12,
        num_qps=num_qps,
    )
    assert none is None and weights.shape == rows.shape[:1]
    assert sum(handle.num_recv_tokens_per_expert_list) == rows.shape[0]
    again = buffer.dispatch(
        batch.x, handle=handle, do_expand=True, num_sms=12, num_qps=num_qps
    )
    assert torch.equal(again[0], rows)
    out, sums, _ = buffer.combine(
        rows, handle=handle, topk_weights=weights, num_sms=12
    )
    chosen = (batch.topk_idx >= 0).sum(1, keepdim=True)
    close(out, batch.x.float() * chosen)
    assert torch.equal(sums, batch.topk_weights)
    buffer.destroy()


def test_deepspeed(device: str) -> None:
    ranks.run(2, deepspeed, device=device)


def no_tokens(me: Rank) -> None:
    """Where upstream waits for a token that does not come."""
    buffer = deep_ep.ElasticBuffer(
        me.group, num_max_tokens_per_rank=MOST, hidden=H, num_topk=K
    )
    batch = batch_of(me, (0,))
    for synced in (True, False):
        for expand in (True, False):
            rows, _, weights, handle, _ = buffer.dispatch(
                batch.x,
                topk_idx=batch.topk_idx,
                topk_weights=batch.topk_weights,
                num_experts=E,
                do_cpu_sync=synced,
                do_expand=expand,
            )
            told = handle.psum_num_recv_tokens_per_scaleup_rank
            assert not told.any()
            out, _, _ = buffer.combine(
                rows, handle=handle, topk_weights=weights
            )
            assert out.shape == (0, H)


@pytest.mark.parametrize("size", [1, 2])
def test_no_tokens(size: int, device: str) -> None:
    ranks.run(size, no_tokens, device=device)

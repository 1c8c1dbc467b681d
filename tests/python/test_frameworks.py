# SPDX-License-Identifier: MIT
"""The calls that frameworks make of Buffer: their exact forms, and what they
read."""

import inspect
import subprocess
import sys
import threading

import deep_ep
import deep_ep.utils
import pytest
import ranks
import torch
from frameworks import MOST, E, H, K, batch_of, close, summed
from ranks import Rank
from reference import difference, from_fp8, to_fp8


def test_names_are_types_that_annotations_can_use() -> None:
    for module in (deep_ep, deep_ep.utils):
        assert isinstance(module.EventHandle, type)
        assert isinstance(module.EventOverlap, type)
    for name in ("Buffer", "Config", "ElasticBuffer", "EPHandle"):
        assert isinstance(getattr(deep_ep, name), type)
    assert deep_ep.topk_idx_t == torch.int64
    assert deep_ep.Buffer.is_sm90_compiled()
    for function in (deep_ep.Buffer.dispatch, deep_ep.ElasticBuffer.dispatch):
        kinds = {
            it.kind for it in inspect.signature(function).parameters.values()
        }
        assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


def test_configs_are_there_before_any_group() -> None:
    before = deep_ep.Buffer.num_sms
    deep_ep.Buffer.set_num_sms(24)
    assert deep_ep.Buffer.num_sms == 24
    with pytest.raises(AssertionError):
        deep_ep.Buffer.set_num_sms(7)
    for size in (1, 2, 3, 8, 48, 96, 160, 1000):
        config = deep_ep.Buffer.get_dispatch_config(size)
        assert config.num_sms == 24
        assert config.get_nvl_buffer_size_hint(H * 2, size) > 0
        config = deep_ep.Buffer.get_combine_config(size)
        assert config.get_rdma_buffer_size_hint(H * 2, size) >= 0
    deep_ep.Buffer.set_num_sms(before)
    config = deep_ep.Config(
        num_sms=20,
        num_max_nvl_chunked_send_tokens=6,
        num_max_nvl_chunked_recv_tokens=256,
        num_max_rdma_chunked_send_tokens=6,
        num_max_rdma_chunked_recv_tokens=128,
    )
    assert config.num_max_rdma_chunked_recv_tokens == 128
    assert deep_ep.Config(20, 8, 256).num_sms == 20
    hint = deep_ep.Buffer.get_low_latency_rdma_size_hint
    assert hint(MOST, H, 8, E) == hint(
        num_max_dispatch_tokens_per_rank=MOST,
        hidden=H,
        num_ranks=8,
        num_experts=E,
    )


def vllm_high_throughput(me: Rank, overlapped: bool) -> None:
    buffer = deep_ep.Buffer(
        group=me.group,
        num_nvl_bytes=64 << 20,
        num_rdma_bytes=0,
        low_latency_mode=False,
        num_qps_per_rank=1,
        explicitly_destroy=True,
    )
    config = buffer.get_dispatch_config(2) if me.size == 2 else None
    for x_of in (lambda x: x, to_fp8):
        batch = batch_of(me, (MOST, 0))
        previous = buffer.capture() if overlapped else None
        per_rank, per_rdma, per_expert, goes, event = (
            buffer.get_dispatch_layout(
                topk_idx=batch.topk_idx,
                num_experts=E,
                previous_event=previous,
                async_finish=False,
                allocate_on_comm_stream=False,
            )
        )
        assert event.event is None
        rows, idx, weights, counts, handle, event = buffer.dispatch(
            x=x_of(batch.x),
            handle=None,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma,
            is_token_in_rank=goes,
            num_tokens_per_expert=per_expert,
            topk_idx=batch.topk_idx,
            topk_weights=batch.topk_weights,
            expert_alignment=1,
            config=config,
            previous_event=previous,
            async_finish=not overlapped,
            allocate_on_comm_stream=False,
        )
        assert isinstance(counts, list) and len(counts) == E // me.size
        assert (event.event is not None) == (not overlapped)
        if event.event is not None:
            event.current_stream_wait()
        if isinstance(rows, tuple):
            assert rows[0].dtype == torch.float8_e4m3fn
            assert rows[1].shape == (rows[0].shape[0], H // 128)
            rows = torch.zeros(rows[0].shape, dtype=torch.bfloat16)
            rows = rows.to(me.device)
        # Global indices are made of local ones.
        offset = me.index * len(counts)
        torch.where(idx == -1, E - 1 if me.index == 0 else 0, idx + offset)
        assert weights.dtype == torch.float32
        out, none, event = buffer.combine(
            x=rows,
            handle=handle,
            topk_weights=None,
            config=config,
            previous_event=previous,
            async_finish=not overlapped,
            allocate_on_comm_stream=False,
        )
        assert none is None and out.shape == batch.x.shape
        if event.event is not None:
            event.current_stream_wait()
        if x_of is not to_fp8:
            close(out, summed(me, batch))
    buffer.destroy()
    buffer.destroy()


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_vllm_high_throughput(size, overlapped, device) -> None:
    ranks.run(size, vllm_high_throughput, overlapped, device=device)


def vllm_low_latency(me: Rank) -> None:
    hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank=MOST,
        hidden=H,
        num_ranks=me.size,
        num_experts=E,
    )
    buffer = deep_ep.Buffer(
        group=me.group,
        num_nvl_bytes=64 << 20,
        num_rdma_bytes=hint,
        low_latency_mode=True,
        num_qps_per_rank=E // me.size,
        allow_nvlink_for_low_latency_mode=True,
        allow_mnnvl=False,
        explicitly_destroy=True,
        enable_shrink=True,
    )
    batch = batch_of(me, (MOST, 0))
    output = torch.empty_like(batch.x)
    rows, counts, handle, _, hook = buffer.low_latency_dispatch(
        batch.x,
        batch.topk_idx,
        MOST,
        E,
        use_fp8=False,
        round_scale=False,
        use_ue8m0=False,
        async_finish=False,
        return_recv_hook=True,
    )
    worker = threading.Thread(target=hook)
    worker.start()
    worker.join()
    assert rows.shape == (E // me.size, me.size * MOST, H)
    assert counts.dtype == torch.int32
    for hooked in (False, True):
        _, _, hook = buffer.low_latency_combine(
            rows,
            batch.topk_idx,
            batch.topk_weights,
            handle,
            async_finish=False,
            zero_copy=False,
            return_recv_hook=hooked,
            out=output,
        )
        assert (hook is not None) == hooked
        if hook is not None:
            hook()
        weight = batch.topk_weights.sum(dim=1, keepdim=True)
        assert difference(output, batch.x.float() * weight) < 1e-5
    # Fault tolerance, when nothing has happened.
    status = torch.full((me.size,), 7, dtype=torch.int32, device=me.device)
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [0] * me.size
    buffer.get_local_buffer_tensor(
        dtype=torch.int8, use_rdma_buffer=True
    ).zero_()
    buffer.low_latency_clean_mask_buffer()
    buffer.low_latency_update_mask_buffer(0, False)
    buffer.destroy()


@pytest.mark.parametrize("size", [1, 2])
def test_vllm_low_latency(size: int, device: str) -> None:
    ranks.run(size, vllm_low_latency, device=device)


def sglang_normal(me: Rank, buffer, batch, is_async: bool, alignment: int):
    """Dispatch of one micro-batch; combine is left for later."""
    previous = deep_ep.Buffer.capture() if is_async else None
    per_rank, per_rdma, per_expert, goes, previous = (
        buffer.get_dispatch_layout(
            batch.topk_idx,
            E,
            previous_event=previous,
            async_finish=is_async,
            allocate_on_comm_stream=previous is not None,
        )
    )
    rows, idx, weights, counts, handle, event = buffer.dispatch(
        batch.x,
        topk_idx=batch.topk_idx,
        topk_weights=batch.topk_weights,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_rdma,
        is_token_in_rank=goes,
        num_tokens_per_expert=per_expert,
        previous_event=previous,
        async_finish=is_async,
        allocate_on_comm_stream=(previous is not None) and is_async,
        expert_alignment=alignment,
        config=None,
    )
    event.current_stream_wait() if is_async else ()
    assert isinstance(counts, list)
    assert sum(counts) % alignment == 0
    return rows, handle


def sglang(me: Rank) -> None:
    """One buffer for prefill and decode, two micro-batches in flight."""
    config = deep_ep.Buffer.get_dispatch_config(me.size)
    nvl = config.get_nvl_buffer_size_hint(2 * H, me.size)
    rdma = max(
        config.get_rdma_buffer_size_hint(2 * H, me.size),
        deep_ep.Buffer.get_low_latency_rdma_size_hint(MOST, H, me.size, E),
    )
    buffer = deep_ep.Buffer(
        me.group,
        min(nvl, 64 << 20),
        rdma,
        low_latency_mode=True,
        num_qps_per_rank=max(E // me.size, deep_ep.Buffer.num_sms),
        allow_mnnvl=True,
    )
    assert buffer.low_latency_mode and buffer.group_size == me.size
    batch = batch_of(me)
    recorded = torch.zeros(E // me.size, dtype=torch.int32, device=me.device)
    for is_async in (False, True):
        one, handle_one = sglang_normal(me, buffer, batch, is_async, 128)
        two, handle_two = sglang_normal(me, buffer, batch, is_async, 1)
        for rows, handle in ((two, handle_two), (one, handle_one)):
            previous = deep_ep.Buffer.capture() if is_async else None
            out, _, event = buffer.combine(
                rows,
                handle,
                async_finish=is_async,
                previous_event=previous,
                allocate_on_comm_stream=previous is not None,
                config=None,
            )
            event.current_stream_wait() if is_async else ()
            close(out, summed(me, batch))
        buffer.clean_low_latency_buffer(MOST, H, E)
        for hooked in (True, False):
            rows, counts, handle, event, hook = buffer.low_latency_dispatch(
                batch.x,
                batch.topk_idx,
                MOST,
                E,
                use_fp8=True,
                async_finish=not hooked,
                return_recv_hook=hooked,
                round_scale=True,
                use_ue8m0=True,
            )
            hook() if hooked else event.current_stream_wait()
            recorded += counts
            assert rows[1].dtype == torch.int32
            outputs = torch.zeros(
                rows[0].shape, dtype=torch.bfloat16, device=me.device
            )
            out, event, hook = buffer.low_latency_combine(
                x=outputs,
                topk_idx=batch.topk_idx,
                topk_weights=batch.topk_weights,
                handle=handle,
                async_finish=not hooked,
                return_recv_hook=hooked,
            )
            hook() if hooked else event.current_stream_wait()
            assert not out.any()
    assert recorded.sum() > 0


@pytest.mark.parametrize("size", [1, 2, 4])
def test_sglang(size: int, device: str) -> None:
    ranks.run(size, sglang, device=device)


class MegatronDispatch(torch.autograd.Function):
    """As Megatron's: the handle goes through autograd as a plain object."""

    @staticmethod
    def forward(ctx, buffer, x, idx, weights, is_async, on_comm):
        previous = None
        if is_async:
            previous = deep_ep.EventOverlap(deep_ep.EventHandle())
        per_rank, per_rdma, per_expert, goes, previous = (
            buffer.get_dispatch_layout(
                idx,
                E,
                previous_event=previous,
                async_finish=is_async,
                allocate_on_comm_stream=on_comm,
            )
        )
        rows, local_idx, local_weights, counts, handle, event = (
            buffer.dispatch(
                x,
                topk_idx=idx,
                topk_weights=weights.float(),
                num_tokens_per_rank=per_rank,
                num_tokens_per_rdma_rank=per_rdma,
                is_token_in_rank=goes,
                num_tokens_per_expert=per_expert,
                previous_event=previous,
                async_finish=is_async,
                allocate_on_comm_stream=on_comm,
            )
        )
        if is_async:
            event.current_stream_wait()
        ctx.state = (buffer, handle, is_async, on_comm)
        return rows, local_idx, local_weights, torch.tensor(counts), handle

    @staticmethod
    def backward(ctx, grad, _idx, grad_weights, _counts, _handle):
        buffer, handle, is_async, on_comm = ctx.state
        previous = None
        if is_async:
            previous = deep_ep.EventOverlap(deep_ep.EventHandle())
        x, weights, event = buffer.combine(
            grad.contiguous(),
            handle,
            topk_weights=grad_weights.float(),
            previous_event=previous,
            async_finish=is_async,
            allocate_on_comm_stream=on_comm,
        )
        if is_async:
            event.current_stream_wait()
        return None, x, None, weights, None, None


class MegatronCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, buffer, x, handle, is_async, on_comm):
        previous = None
        if is_async:
            previous = deep_ep.EventOverlap(deep_ep.EventHandle())
        out, _, event = buffer.combine(
            x,
            handle=handle,
            async_finish=is_async,
            previous_event=previous,
            allocate_on_comm_stream=on_comm,
        )
        if is_async:
            event.current_stream_wait()
        ctx.state = (buffer, handle, is_async, on_comm)
        return out, None

    @staticmethod
    def backward(ctx, grad, _):
        buffer, handle, is_async, on_comm = ctx.state
        previous = None
        if is_async:
            previous = deep_ep.EventOverlap(deep_ep.EventHandle())
        x, none_0, none_1, none_2, none_3, event = buffer.dispatch(
            grad.contiguous(),
            handle=handle,
            previous_event=previous,
            async_finish=is_async,
            allocate_on_comm_stream=on_comm,
        )
        assert none_0 is none_1 is none_2 is none_3 is None
        if is_async:
            event.current_stream_wait()
        return None, x, None, None, None


def megatron(me: Rank) -> None:
    bytes_of = 2 * H
    nvl = rdma = 0
    for config in (
        deep_ep.Buffer.get_dispatch_config(me.group.size()),
        deep_ep.Buffer.get_combine_config(me.group.size()),
    ):
        nvl = max(config.get_nvl_buffer_size_hint(bytes_of, me.size), nvl)
        rdma = max(config.get_rdma_buffer_size_hint(bytes_of, me.size), rdma)
    nvl = min(nvl, 64 << 20)
    buffer = deep_ep.Buffer(me.group, nvl, rdma)
    assert buffer.group is me.group
    assert (buffer.num_nvl_bytes, buffer.num_rdma_bytes) == (nvl, rdma)
    batch = batch_of(me)
    for is_async, on_comm in ((False, False), (True, True), (True, False)):
        x = batch.x.clone().requires_grad_()
        weights = batch.topk_weights.clone().requires_grad_()
        rows, idx, local, counts, handle = MegatronDispatch.apply(
            buffer, x, batch.topk_idx, weights, is_async, on_comm
        )
        assert counts.sum() == (idx >= 0).sum().cpu()
        # A larger one replaces the buffer; the old handle is used with it.
        buffer = deep_ep.Buffer(me.group, nvl, rdma)
        share = local.masked_fill(idx < 0, 0).sum(1, keepdim=True)
        y = (rows * share).to(torch.bfloat16)
        out, _ = MegatronCombine.apply(buffer, y, handle, is_async, on_comm)
        weight = batch.topk_weights.sum(1, keepdim=True)
        torch.testing.assert_close(
            out.float(), batch.x.float() * weight, rtol=2e-2, atol=1e-2
        )
        out.float().sum().backward()
        torch.testing.assert_close(
            x.grad.float(),
            weight.expand_as(batch.x),
            rtol=2e-2,
            atol=1e-2,
        )
        wanted = batch.x.float().sum(1, keepdim=True).expand_as(weights)
        wanted = wanted.masked_fill(batch.topk_idx < 0, 0)
        torch.testing.assert_close(weights.grad, wanted, rtol=2e-2, atol=2e-1)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_megatron(size: int, device: str) -> None:
    ranks.run(size, megatron, device=device)


def megatron_lite(me: Rank) -> None:
    """Submit, and wait for it much later."""
    buffer = deep_ep.Buffer(
        group=me.group, num_nvl_bytes=64 << 20, num_rdma_bytes=0
    )
    batch = batch_of(me)
    layout = buffer.get_dispatch_layout(
        batch.topk_idx,
        num_experts=E,
        previous_event=None,
        async_finish=True,
        allocate_on_comm_stream=False,
    )
    rows, _, _, _, handle, event = buffer.dispatch(
        batch.x,
        topk_idx=batch.topk_idx,
        topk_weights=batch.topk_weights,
        num_tokens_per_rank=layout[0],
        is_token_in_rank=layout[3],
        num_tokens_per_expert=layout[2],
        previous_event=layout[4],
        async_finish=True,
    )
    torch.ones(64, 64, device=me.device) @ torch.ones(64, device=me.device)
    event.current_stream_wait()
    out, _, event = buffer.combine(
        rows, handle, topk_weights=None, async_finish=True
    )
    event.current_stream_wait()
    close(out, summed(me, batch))


def test_megatron_lite(device: str) -> None:
    ranks.run(2, megatron_lite, device=device)


def tensorrt_llm(me: Rank) -> None:
    """A communicator of mpi4py in place of a group."""

    class Comm:
        def Get_rank(self):  # noqa: N802
            return me.index

        def Get_size(self):  # noqa: N802
            return me.size

        def allgather(self, item):
            items = [None] * me.size
            torch.distributed.all_gather_object(items, item)
            return items

    with pytest.raises(ValueError, match="group or comm"):
        deep_ep.Buffer(None, 0, 0)
    buffer = deep_ep.Buffer(None, 64 << 20, 64 << 20, comm=Comm())
    batch = batch_of(me)
    rows, _, handle, event, hook = buffer.low_latency_dispatch(
        batch.x, batch.topk_idx, MOST, E, use_fp8=False
    )
    assert event.event is None and hook is None
    out, event, hook = buffer.low_latency_combine(
        rows, batch.topk_idx, batch.topk_weights, handle
    )
    assert event.event is None and hook is None
    weight = batch.topk_weights.sum(dim=1, keepdim=True)
    assert difference(out, batch.x.float() * weight) < 1e-5


def test_tensorrt_llm(device: str) -> None:
    ranks.run(2, tensorrt_llm, device=device)


def uneven(me: Rank) -> None:
    """More than upstream can: experts that the ranks do not divide."""
    buffer = deep_ep.Buffer(me.group, 64 << 20)
    batch = batch_of(me, (5, 0, MOST))
    layout = buffer.get_dispatch_layout(batch.topk_idx, E)
    rows, idx, _, counts, handle, _ = buffer.dispatch(
        batch.x,
        topk_idx=batch.topk_idx,
        topk_weights=batch.topk_weights,
        num_tokens_per_rank=layout[0],
        is_token_in_rank=layout[3],
        num_tokens_per_expert=layout[2],
    )
    assert len(counts) == (3, 3, 2)[me.index]
    assert idx.max() < len(counts)
    close(buffer.combine(rows, handle)[0], summed(me, batch))
    with pytest.raises(ValueError, match="num_tokens_per_expert"):
        buffer.dispatch(batch.x, topk_idx=batch.topk_idx)


def test_experts_need_not_divide(device: str) -> None:
    ranks.run(3, uneven, device=device)


def vllm_two_threads(me: Rank) -> None:
    """Dual-batch overlap: each micro-batch has a thread, one runs at a time.

    A hook is called by the other micro-batch's thread.
    """
    hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(MOST, H, me.size, E)
    buffer = deep_ep.Buffer(
        group=me.group,
        num_rdma_bytes=hint,
        low_latency_mode=True,
        num_qps_per_rank=E // me.size,
        explicitly_destroy=True,
    )
    batches = [batch_of(me, (MOST, 0)), batch_of(me, (9, MOST))]
    turns = [threading.Semaphore(1), threading.Semaphore(0)]
    hooks = [None, None]  # what the other thread has to call
    failed = []

    def give_way(index, hook=None):
        hooks[1 - index] = hook
        turns[1 - index].release()
        take_turn(index)

    def take_turn(index):
        turns[index].acquire()
        hook, hooks[index] = hooks[index], None
        if hook is not None:
            hook()

    def micro_batch(index):
        batch = batches[index]
        for use_fp8 in (False, True):
            rows, counts, handle, _, hook = buffer.low_latency_dispatch(
                batch.x,
                batch.topk_idx,
                MOST,
                E,
                use_fp8=use_fp8,
                round_scale=False,
                use_ue8m0=False,
                async_finish=False,
                return_recv_hook=True,
            )
            give_way(index, hook)
            assert int(counts.sum()) >= 0
            if use_fp8:
                rows = from_fp8(*rows).to(torch.bfloat16)
            out = torch.empty_like(batch.x)
            _, _, hook = buffer.low_latency_combine(
                rows,
                batch.topk_idx,
                batch.topk_weights,
                handle,
                async_finish=False,
                zero_copy=False,
                return_recv_hook=True,
                out=out,
            )
            give_way(index, hook)
            weight = batch.topk_weights.sum(dim=1, keepdim=True)
            worst = 7e-4 if use_fp8 else 1e-5
            assert difference(out, batch.x.float() * weight) < worst

    def run(index):
        try:
            take_turn(index)
            micro_batch(index)
        except BaseException as error:
            failed.append(error)
        turns[1 - index].release()

    threads = [threading.Thread(target=run, args=(it,)) for it in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


@pytest.mark.parametrize("size", [1, 2])
def test_vllm_two_threads(size: int, device: str) -> None:
    ranks.run(size, vllm_two_threads, device=device)


def no_tokens(me: Rank) -> None:
    """No rank has a token, or none of them goes anywhere."""
    buffer = deep_ep.Buffer(me.group, 64 << 20, low_latency_mode=True)
    nowhere = batch_of(me)
    nowhere.topk_idx.fill_(-1)
    for batch in (batch_of(me, (0,)), nowhere):
        for is_async in (False, True):
            rows, handle = sglang_normal(me, buffer, batch, is_async, 128)
            assert rows.shape == (0, H)
            out, _, event = buffer.combine(
                rows, handle, async_finish=is_async, config=None
            )
            event.current_stream_wait() if is_async else ()
            assert out.shape == batch.x.shape and not out.any()
            assert buffer.dispatch(out, handle=handle)[0].shape == (0, H)
        for hooked in (False, True):
            rows, counts, handle, _, hook = buffer.low_latency_dispatch(
                batch.x,
                batch.topk_idx,
                MOST,
                E,
                use_fp8=True,
                return_recv_hook=hooked,
            )
            hook() if hooked else ()
            assert not counts.any()
            out, _, hook = buffer.low_latency_combine(
                torch.zeros_like(rows[0], dtype=torch.bfloat16),
                batch.topk_idx,
                batch.topk_weights,
                handle,
                return_recv_hook=hooked,
            )
            hook() if hooked else ()
            assert out.shape == batch.x.shape and not out.any()


@pytest.mark.parametrize("size", [1, 2])
def test_no_tokens(size: int, device: str) -> None:
    ranks.run(size, no_tokens, device=device)


def primus_turbo(me: Rank) -> None:
    """Rows of a fixed number, and gradients through them."""
    buffer = deep_ep.Buffer(me.group, 64 << 20, 0)
    batch = batch_of(me)
    layout = buffer.get_dispatch_layout(batch.topk_idx, E)
    for is_async in (False, True):
        rows, idx, weights, counts, handle, event = buffer.dispatch(
            batch.x,
            topk_idx=batch.topk_idx,
            topk_weights=batch.topk_weights,
            num_tokens_per_rank=layout[0],
            num_tokens_per_rdma_rank=layout[1],
            is_token_in_rank=layout[3],
            num_tokens_per_expert=layout[2],
            num_worst_tokens=me.size * MOST,
            config=deep_ep.Buffer.get_dispatch_config(me.size),
            async_finish=is_async,
        )
        event.current_stream_wait() if is_async else ()
        assert rows.shape == (me.size * MOST, H) and counts == []
        assert idx.shape == weights.shape == (me.size * MOST, K)
        out, sums, event = buffer.combine(
            rows, handle, topk_weights=weights, async_finish=is_async
        )
        event.current_stream_wait() if is_async else ()
        close(out, summed(me, batch))
        assert torch.equal(sums, batch.topk_weights)


@pytest.mark.parametrize("size", [1, 2])
def test_primus_turbo(size: int, device: str) -> None:
    ranks.run(size, primus_turbo, device=device)


def test_modules_are_found_and_imported_as_frameworks_do() -> None:
    """vLLM's probe, Megatron's and NeMo's guarded import, LMDeploy's call at
    import: without a group, a card or a launcher."""
    code = (
        "import importlib, importlib.util\n"
        "assert importlib.util.find_spec('deep_ep') is not None\n"
        "importlib.import_module('deep_ep')\n"
        "from deep_ep import Buffer, Config, ElasticBuffer, EPHandle\n"
        "from deep_ep.utils import EventHandle, EventOverlap\n"
        "import deep_ep\n"
        "assert deep_ep.EventHandle is EventHandle\n"
        "Buffer.set_num_sms(28)\n"
        "assert Buffer.num_sms == 28 and Buffer.is_sm90_compiled()\n"
        "def f(a: 'x' = None, b: deep_ep.Config | None = None,\n"
        "      c: deep_ep.EPHandle | None = None): pass\n"
        "import torch; assert not torch.cuda.is_initialized()\n"
    )
    if sys.version_info < (3, 10):
        code = code.replace(" | None", "")
    subprocess.run([sys.executable, "-c", code], check=True)


def what_is_not_there(me: Rank) -> None:
    """It is refused with a sentence, before anything moves."""
    buffer = deep_ep.Buffer(me.group, low_latency_mode=True)
    batch = batch_of(me)
    args = (batch.x, batch.topk_idx, MOST, E)
    rows, _, handle, _, _ = buffer.low_latency_dispatch(*args, use_fp8=False)
    back = (rows, batch.topk_idx, batch.topk_weights, handle)
    out = buffer.low_latency_combine(*back)[0]
    weight = batch.topk_weights.sum(dim=1, keepdim=True)
    assert difference(out, batch.x.float() * weight) < 1e-5
    with pytest.raises(TypeError, match="use_nvfp4"):
        buffer.low_latency_dispatch(*args, use_nvfp4=True)


def test_what_is_not_there(device: str) -> None:
    ranks.run(2, what_is_not_there, device=device)

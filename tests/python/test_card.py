# SPDX-License-Identifier: MIT
"""What only a card has: graphs, and streams beside one another."""

import deep_ep
import epx
import pytest
import ranks
import test_elastic
import test_low_latency
import test_normal
import torch
from frameworks import MOST, E, H, K, batch_of, close, summed
from ranks import Rank
from reference import difference

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def card() -> None:
    if not torch.cuda.is_available():
        pytest.skip("NOT CHECKED on a card: there is none here")


def low_latency_buffer(me: Rank) -> deep_ep.Buffer:
    hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(MOST, H, me.size, E)
    return deep_ep.Buffer(me.group, 0, hint, low_latency_mode=True)


def weighted(batch) -> torch.Tensor:
    return batch.x.float() * batch.topk_weights.sum(dim=1, keepdim=True)


def captured_low_latency(me: Rank) -> None:
    buffer = low_latency_buffer(me)
    original = batch_of(me)
    batch = batch_of(me)
    out = torch.empty_like(batch.x)
    totals = torch.zeros(E // me.size, dtype=torch.int32, device=me.device)

    def layer(hooked: bool) -> torch.Tensor:
        rows, counts, handle, _, hook = buffer.low_latency_dispatch(
            batch.x,
            batch.topk_idx,
            MOST,
            E,
            cumulative_local_expert_recv_stats=totals,
            use_fp8=False,
            return_recv_hook=hooked,
        )
        hook() if hooked else ()
        _, _, hook = buffer.low_latency_combine(
            rows,
            batch.topk_idx,
            batch.topk_weights,
            handle,
            return_recv_hook=hooked,
            out=out,
        )
        hook() if hooked else ()
        return counts

    with (
        pytest.raises(RuntimeError, match="cannot be captured"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        layer(False)
    for hooked in (False, True):
        for _ in range(2):
            layer(hooked)
        torch.cuda.synchronize()
        torch.distributed.barrier()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            counts = layer(hooked)
        for step in range(4):
            batch.x.copy_(original.x * (step + 1))
            batch.topk_idx.copy_(original.topk_idx.roll(step, 0))
            batch.topk_weights.copy_(original.topk_weights.roll(step, 0))
            totals.zero_()
            out.fill_(float("nan"))
            graph.replay()
            assert difference(out, weighted(batch)) < 1e-5
            assert torch.equal(totals, counts)
            out.fill_(float("nan"))
            layer(hooked)
            assert difference(out, weighted(batch)) < 1e-5


@pytest.mark.parametrize("size", [1, 2])
def test_low_latency_in_a_graph(size: int) -> None:
    ranks.run(size, captured_low_latency, device="cuda")


def captured_fixed_rows(me: Rank) -> None:
    """High-throughput calls of fixed rows, whose plans the graph holds."""
    buffer = deep_ep.Buffer(me.group, 64 << 20)
    elastic = deep_ep.ElasticBuffer(
        me.group, num_max_tokens_per_rank=MOST, hidden=H, num_topk=K
    )
    original, batch = batch_of(me), batch_of(me)

    def normal() -> torch.Tensor:
        layout = buffer.get_dispatch_layout(batch.topk_idx, E)
        rows, _, _, _, handle, _ = buffer.dispatch(
            batch.x,
            topk_idx=batch.topk_idx,
            topk_weights=batch.topk_weights,
            num_tokens_per_rank=layout[0],
            is_token_in_rank=layout[3],
            num_tokens_per_expert=layout[2],
            num_worst_tokens=me.size * MOST,
        )
        return buffer.combine(rows, handle)[0]

    def expanding() -> torch.Tensor:
        rows, _, _, handle, _ = elastic.dispatch(
            batch.x,
            topk_idx=batch.topk_idx,
            topk_weights=batch.topk_weights,
            num_experts=E,
            do_cpu_sync=False,
        )
        told.append(handle.psum_num_recv_tokens_per_scaleup_rank)
        return elastic.combine(rows, handle)[0]

    told = []
    for layer in (normal, expanding):
        close(layer(), summed(me, batch))
        torch.cuda.synchronize()
        torch.distributed.barrier()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer()
        captured = told[-1:]
        for step in range(3):
            batch.x.copy_(original.x * (step + 1))
            batch.topk_idx.copy_(original.topk_idx.roll(step, 0))
            graph.replay()
            close(out, summed(me, batch))
            counted = [it.tolist() for it in captured]
            close(layer(), summed(me, batch))
            assert counted == [it.tolist() for it in told[-1:]]


@pytest.mark.parametrize("size", [1, 2])
def test_fixed_rows_in_a_graph(size: int) -> None:
    ranks.run(size, captured_fixed_rows, device="cuda")


def overlapped_combine(me: Rank) -> None:
    """SGLang's overlap: sent on one stream, the hook called under another."""
    buffer = low_latency_buffer(me)
    batch = batch_of(me)
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    for _ in range(3):
        rows, _, handle, event, _ = buffer.low_latency_dispatch(
            batch.x, batch.topk_idx, MOST, E, use_fp8=False, async_finish=True
        )
        event.current_stream_wait()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            torch.cuda._sleep(10_000_000)
            out, _, hook = buffer.low_latency_combine(
                x=rows,
                topk_idx=batch.topk_idx,
                topk_weights=batch.topk_weights,
                handle=handle,
                async_finish=False,
                return_recv_hook=True,
            )
        hook()
        main.wait_stream(side)
        assert difference(out, weighted(batch)) < 1e-5


def test_a_hook_under_another_stream() -> None:
    ranks.run(2, overlapped_combine, device="cuda")


def streams_that_are_given(me: Rank) -> None:
    """Arrays live as long as the work on the stream that was given."""
    group = epx.Group.from_torch(device="cuda", heap_bytes=64 << 20)
    batch = batch_of(me)
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    outs = []
    for stream in (side, side.cuda_stream, None) * 3:
        side.wait_stream(main)
        with torch.cuda.stream(side):
            torch.cuda._sleep(10_000_000)
        plan = group.plan(batch.topk_idx, E, "EXPERT_MAJOR", stream=stream)
        rows = plan.dispatch(batch.x, stream=stream).x
        weights = batch.topk_weights.clone()
        outs.append(plan.combine(rows, topk_weights=weights, stream=stream).x)
        del plan, rows, weights
        # What may be given their memory must not harm them.
        torch.full((1 << 20,), float("nan"), device="cuda")
        group.empty((1 << 20,), torch.float32).fill_(float("nan"))
        main.wait_stream(side)
    for out in outs:
        assert difference(out, weighted(batch)) < 1e-5
    group.close()


def test_streams_that_are_given() -> None:
    ranks.run(2, streams_that_are_given, device="cuda")


def both_devices(me: Rank) -> None:
    """One buffer, tensors of the card and of the host in turn."""
    buffer = deep_ep.Buffer(me.group, 64 << 20)
    sent = batch_of(me)
    for device in ("cuda", "cpu") * 2:
        batch = sent.to(device)
        layout = buffer.get_dispatch_layout(batch.topk_idx, E)
        rows, _, _, _, handle, event = buffer.dispatch(
            batch.x,
            topk_idx=batch.topk_idx,
            num_tokens_per_expert=layout[2],
            async_finish=True,
        )
        event.current_stream_wait()
        assert rows.device.type == device
        out = buffer.combine(rows, handle)[0]
        close(out, summed(me, sent).to(device))


def test_both_devices() -> None:
    ranks.run(2, both_devices, device="cuda")


@pytest.mark.parametrize(
    "function, arguments",
    [
        (test_normal.every_mode, ()),
        (test_elastic.every_mode, ()),
        (test_low_latency.every_mode, ([MOST, 7, 0, 1],)),
        (test_low_latency.every_mode, ([MOST, 5], 7168)),
    ],
)
def test_eight_ranks_on_a_card(function, arguments) -> None:
    ranks.run(8, function, *arguments, device="cuda", timeout=200)

# SPDX-License-Identifier: MIT
"""The epx package: layouts, memory, queues, errors, autograd."""

import ctypes
import gc
import threading

import epx
import numpy as np
import pytest
import ranks
import torch
from epx import autograd
from ranks import Rank
from reference import (
    difference,
    experts_of,
    make_batches,
    received_by_rank,
)

E, K, H = 8, 3, 32


def in_threads(size, function):
    """Runs function(group) on `size` threads, each a rank."""
    failed = []

    def run(bootstrap):
        try:
            with epx.Group(bootstrap, heap_bytes=16 << 20) as group:
                function(group)
        except BaseException as error:
            failed.append(error)

    threads = [
        threading.Thread(target=run, args=(it,))
        for it in epx.bootstrap.threads(size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def routing(rank, tokens=10):
    random = np.random.default_rng(rank)
    chosen = [random.permutation(E)[:K] for _ in range(tokens)]
    return np.array(chosen, dtype=np.int64).reshape(tokens, K)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("layout", list(epx.Layout))
def test_numpy_arrays(layout, dtype):
    def run(group):
        topk_idx = routing(group.rank)
        x = np.random.default_rng(9).standard_normal((10, H)).astype(dtype)
        weights = np.full((10, K), 1 / K, np.float32)
        plan = group.plan(topk_idx, E, layout, max_tokens_per_rank=10)
        by_rank = layout is epx.Layout.RANK_MAJOR
        got = plan.dispatch(
            x,
            topk_weights=weights,
            with_topk_idx=by_rank,
            with_src_token=True,
            with_expert_counts=True,
        )
        counts = plan.counts()
        assert got.expert_counts.tolist() == counts.expert_rows
        assert isinstance(got.x, np.ndarray) and got.x.dtype == dtype
        assert group.memory.num_live >= 3
        y = got.x
        if by_rank:
            share = np.where(got.topk_idx >= 0, got.topk_weights, 0).sum(1)
            y = (y * share[:, None]).astype(dtype)
        out = plan.combine(y, topk_weights=None if by_rank else weights)
        np.testing.assert_allclose(out.x, x, rtol=5e-3, atol=2e-3)
        plan.update(topk_idx[:4])
        again = plan.dispatch(x[:4])
        out = plan.combine(again.x, topk_weights=None)
        assert out.x.shape == (4, H)

    in_threads(2, run)


def test_quantize_by_name_or_number():
    def run(group):
        plan = group.plan(routing(group.rank), E, "EXPERT_MAJOR")
        x = torch.randn(10, H, dtype=torch.bfloat16)
        rows = plan.dispatch(x).x
        out = plan.combine(rows, quantize="LOGFMT10").x
        again = plan.combine(rows, quantize=epx.Quantize.LOGFMT10).x
        assert torch.equal(out, again)
        assert not torch.equal(out, plan.combine(rows).x)
        assert difference(out, x.float() * K) < 1e-5
        for quantize in ("F8E4M3_F32", 9):
            with pytest.raises(epx.CallError, match="quantize is"):
                plan.combine(rows, quantize=quantize)
        with pytest.raises(epx.CallError, match="EPX_BF16"):
            plan.combine(rows.float(), quantize="LOGFMT10")
        with pytest.raises(epx.CallError, match="quantize is"):
            plan.dispatch(x, quantize="LOGFMT10")

    in_threads(2, run)


@pytest.mark.parametrize("layout", list(epx.Layout))
def test_new_routing_comes_with_a_dispatch(layout):
    def run(group):
        slots = layout is epx.Layout.EXPERT_SLOTS
        capacity = 0 if slots else 100
        empty = np.empty((0, K), np.int64)
        plan = group.plan(
            empty, E, layout, max_tokens_per_rank=10, recv_capacity=capacity
        )
        totals = np.ones(plan.num_local_experts, np.int32)
        wanted = totals.copy()
        waits = np.zeros(group.num_ranks, np.int64)
        for tokens in (10, 0, 7):
            topk_idx = routing(group.rank, tokens)
            x = np.full((tokens, H), tokens, np.float32)
            got = plan.dispatch(
                x,
                topk_idx=topk_idx,
                with_expert_counts=True,
                recv_expert_totals=totals,
                wait_ns=waits,
            )
            assert plan.num_tokens == tokens
            assert got.expert_counts.tolist() == plan.counts().expert_rows
            wanted += got.expert_counts
            np.testing.assert_array_equal(totals, wanted)
            out = plan.combine(got.x, wait_ns=waits)
            assert out.x.shape == (tokens, H)
            assert waits[group.rank] == 0 and (waits >= 0).all()
        with pytest.raises(ValueError, match="wait_ns is"):
            plan.dispatch(x, wait_ns=waits[1:])
        with pytest.raises(ValueError, match="recv_expert_totals is"):
            plan.dispatch(x, recv_expert_totals=totals[1:])
        with pytest.raises(ValueError, match=r"topk_idx is \[10, 2\]"):
            plan.dispatch(x, topk_idx=routing(0)[:, :2].copy())
        assert plan.num_tokens == 7
        exact = group.plan(routing(group.rank), E)
        with pytest.raises(epx.CallError, match="EPX_NEW_ROUTING"):
            exact.dispatch(
                np.ones((10, H), np.float32), topk_idx=routing(group.rank)
            )

    in_threads(2, run)


def test_what_the_machine_has():
    info = epx.library_info()
    assert info.version == epx.__version__
    assert "cpu" in info.engines and "thread" in info.fabrics
    here = epx.device_info("cpu")
    assert here.num_workers >= 1 and here.memory_bytes > 0
    assert "shm" in here.fabrics and here.pci == ""
    with pytest.raises(ValueError, match="cpu and cuda"):
        epx.device_info("tpu")
    with pytest.raises(epx.CallError):
        epx.device_info("cpu", 1)


def test_fixed_capacity_and_its_excess():
    def run(group):
        plan = group.plan(routing(group.rank), E, recv_capacity=40)
        got = plan.dispatch(np.ones((10, H), np.float32), with_topk_idx=True)
        assert got.x.shape == (40, H)
        count = plan.counts().num_recv_tokens
        assert (got.topk_idx[count:] == -1).all()
        tight = group.plan(routing(group.rank), E, recv_capacity=3)
        with pytest.raises(epx.GroupError) as caught:
            tight.dispatch(np.ones((10, H), np.float32))
        assert caught.value.status == epx.Status.ERR_CAPACITY

    in_threads(2, run)


def test_memory_comes_back_and_runs_out_gently():
    def run(group):
        free = group.info().heap_free_bytes
        array = group.empty((1000, H), "float32")
        view = array[3:].T
        del array
        gc.collect()
        assert group.info().heap_free_bytes < free
        del view
        gc.collect()
        assert group.info().heap_free_bytes == free
        tensor = group.empty((1000, H), torch.bfloat16)
        assert group.memory.num_live == 1
        view = tensor.view(-1)[5:]
        del tensor
        assert group.memory.num_live == 1
        del view
        assert group.memory.num_live == 0
        # More than there is: ordinary arrays, and all goes on as before.
        held = [group.empty((1 << 20,), "float32") for _ in range(8)]
        assert 0 < group.memory.num_live < 8
        plan = group.plan(routing(group.rank), E, "EXPERT_MAJOR")
        x = np.ones((10, H), np.float32)
        got = plan.dispatch(x, recv_x=None)
        out = plan.combine(np.array(got.x))
        np.testing.assert_array_equal(out.x, x * K)
        assert len(held) == 8
        assert group.empty((0, H), "float32").shape == (0, H)

    in_threads(2, run)


def test_a_group_waits_for_its_arrays():
    def run(group):
        kept.append(group.empty((100,), "float32"))
        group.close()
        kept[-1][:] = 7
        assert group.handle is not None
        kept.clear()
        gc.collect()
        assert group.handle is None
        group.close()
        with pytest.raises(epx.CallError):
            group.plan(routing(0), E)

    kept = []
    in_threads(1, run)


def test_queue_runs_in_order():
    def run(group):
        queue = group.queue()
        plan = group.plan(routing(group.rank), E, stream=queue)
        x = np.ones((10, H), np.float32)
        got = plan.dispatch(x, stream=queue)
        queue.submit(lambda: np.multiply(got.x, 2, out=got.x))
        out = plan.combine(got.x, stream=queue)
        assert not queue.idle
        queue.synchronize()
        assert queue.idle
        spread = out.x[:, 0] / 2
        assert ((spread >= 1) & (spread <= group.num_ranks)).all()

        def fail():
            raise KeyError("mine")

        queue.submit(fail)
        with pytest.raises(KeyError):
            queue.synchronize()
        queue.synchronize()
        bad = np.full((10, K), E, np.int64)
        group.plan(bad, E, stream=queue)
        with pytest.raises(epx.CallError, match="topk_idx"):
            queue.synchronize()
        queue.close()

    in_threads(1, run)


def test_arguments_are_checked():
    def run(group):
        plan = group.plan(routing(0), E)
        x = np.ones((10, H), np.float32)
        with pytest.raises(ValueError, match=r"x is \[9, 32\]"):
            plan.dispatch(x[:9])
        with pytest.raises(ValueError, match="contiguous"):
            plan.dispatch(np.ones((10, 2 * H), np.float32)[:, ::2])
        with pytest.raises(TypeError, match="float64"):
            plan.dispatch(x.astype(np.float64))
        with pytest.raises(TypeError, match="topk_idx is of"):
            group.plan(routing(0).astype(np.float32), E)
        with pytest.raises(epx.CallError, match="num_experts"):
            group.plan(routing(0), 5000)
        with pytest.raises(ValueError, match="device"):
            epx.Group(device="tpu")
        with pytest.raises(ValueError, match="at most 2"):
            plan.combine(x, bias=(x, x, x))

    in_threads(1, run)


def test_an_unfinished_operation_does_not_stop_the_end():
    def run(group):
        plan = group.plan(routing(0), E)
        plan.dispatch(np.ones((10, H), np.float32), send_only=True)
        with pytest.raises(epx.CallError) as caught:
            plan.close()
        assert caught.value.status == epx.Status.ERR_STATE
        plan.complete()

    in_threads(1, run)


def test_the_pools_allocator():
    """As PyTorch calls it; what it gives is of the group in use."""
    from epx import pool

    library = pool.library()
    library.epx_pool_alloc.restype = ctypes.c_void_p
    library.epx_pool_free.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t]
    library.epx_pool_free.argtypes += [ctypes.c_int, ctypes.c_void_p]

    def alloc(num_bytes):
        return library.epx_pool_alloc(ctypes.c_ssize_t(num_bytes), 0, None)

    def run(group):
        free = group.info().heap_free_bytes
        assert alloc(4096) is None
        assert library.epx_pool_use(group.handle) is None
        one, two = alloc(4096), alloc(1 << 20)
        assert alloc(1 << 40) is None
        assert group.info().heap_free_bytes < free
        assert library.epx_pool_use(None) == group.handle
        for ptr in (one, two, one):  # the last one is nobody's
            library.epx_pool_free(ptr, 0, 0, None)
        assert group.info().heap_free_bytes == free
        with pytest.raises(ValueError, match="on the CPU"):
            pool.MemPool(group)

    in_threads(1, run)


def pooled(me: Rank) -> None:
    from epx.pool import MemPool

    group = epx.Group.from_torch(device="cuda", heap_bytes=256 << 20)
    mine = make_batches(me, [32], H, E, K)[me.index].to("cuda")
    plan = group.plan(mine.topk_idx, E, "EXPERT_MAJOR")
    rows = plan.dispatch(mine.x).x
    free = group.info().heap_free_bytes
    with MemPool(group).use():
        outputs = rows @ torch.eye(H, dtype=rows.dtype, device="cuda")
    assert group.info().heap_free_bytes < free
    out = plan.combine(outputs, topk_weights=mine.topk_weights).x
    weight = mine.topk_weights.sum(dim=1, keepdim=True)
    torch.testing.assert_close(
        out.float(), mine.x.float() * weight, rtol=1e-2, atol=1e-2
    )
    with pytest.raises(RuntimeError, match="pool"):
        group.close()


@pytest.mark.gpu
def test_a_gemm_in_the_pool():
    if not torch.cuda.is_available():
        pytest.skip("NOT CHECKED on a card: there is none here")
    ranks.run(2, pooled, device="cuda")


def failing_gather(me: Rank) -> None:
    class Broken:
        def Get_rank(self):  # noqa: N802
            return me.index

        def Get_size(self):  # noqa: N802
            return me.size

        def allgather(self, item):
            raise KeyError("no wire")

    with pytest.raises(epx.Error) as caught:
        epx.Group.from_mpi(Broken())
    assert isinstance(caught.value.__cause__, KeyError)

    class Working(Broken):
        def allgather(self, item):
            items = [None] * me.size
            torch.distributed.all_gather_object(items, item)
            return items

    with epx.Group.from_mpi(Working()) as group:
        assert (group.rank, group.num_ranks) == (me.index, me.size)
        assert group.info().fabric == "shm"


def test_bootstraps():
    ranks.run(2, failing_gather)


def dtypes(me: Rank, name: str) -> None:
    group = epx.Group.from_torch(device=me.device)
    batches = make_batches(me, [9, 14], 64, E, K, torch.float32)
    kind = getattr(torch, name)

    def cast(x):
        return x.to(kind) if kind.is_floating_point else x.to(torch.int8)

    mine = batches[me.index].to(me.device)
    plan = group.plan(mine.topk_idx, E)
    got = plan.dispatch(cast(mine.x).view(kind), with_src_token=True)
    for batch in batches:
        batch.x = cast(batch.x).view(kind)
    wanted = received_by_rank(me, batches, E)[0]
    assert got.x.dtype == kind
    same = got.x.cpu().view(torch.uint8) == wanted.view(torch.uint8)
    assert same.all()
    plan = group.plan(mine.topk_idx.int(), E)
    got = plan.dispatch(cast(mine.x).view(kind), with_topk_idx=True)
    assert got.topk_idx.dtype == torch.int32


@pytest.mark.parametrize(
    "name",
    ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
    + ["uint8", "int8"],
)
def test_element_types(name: str, device: str) -> None:
    ranks.run(2, dtypes, name, device=device)


def gradients(me: Rank, layout: epx.Layout, fixed: bool) -> None:
    """What training on all ranks gives is what one rank would give."""
    group = epx.Group.from_torch(device=me.device)
    batches = make_batches(me, [6, 11], H, E, K, torch.float32)
    mine = batches[me.index]
    first, end = experts_of(me, E, me.index)
    random = torch.Generator().manual_seed(5)
    experts = torch.randn(E, H, H, generator=random) / 6

    def leaf(x):
        return x.clone().to(me.device).requires_grad_()

    # On one rank, with all experts.
    everything = experts.clone().requires_grad_()
    total, alone = 0, None
    for index, batch in enumerate(batches):
        x, weights = (
            it.clone().requires_grad_() for it in (batch.x, batch.topk_weights)
        )
        chosen = everything[batch.topk_idx.clamp(min=0)]
        y = torch.tanh(torch.einsum("th,tkhj->tkj", x, chosen))
        used = weights.masked_fill(batch.topk_idx < 0, 0)
        out = (used.unsqueeze(2) * y).sum(1)
        total = total + (out**2).sum()
        if index == me.index:
            alone = (x, weights, out)
    total.backward()

    x, weights = leaf(mine.x), leaf(mine.topk_weights)
    local = leaf(experts[first:end])
    slots = layout is epx.Layout.EXPERT_SLOTS
    plan = group.plan(
        mine.topk_idx.to(me.device),
        E,
        layout,
        max_tokens_per_rank=11 if slots else 0,
        recv_capacity=100 if fixed and not slots else 0,
    )
    if layout is epx.Layout.RANK_MAJOR:
        rows, row_weights, idx = autograd.dispatch(plan, x, weights)
        y = torch.tanh(
            torch.einsum("th,tkhj->tkj", rows, local[idx.clamp(min=0)])
        )
        used = row_weights.masked_fill(idx < 0, 0)
        out = autograd.combine(plan, (used.unsqueeze(2) * y).sum(1))
    else:
        rows, none, _ = autograd.dispatch(plan, x)
        assert none is None
        offsets = plan.counts().expert_offsets
        flat = rows.view(-1, H)
        y = torch.cat(
            [
                torch.tanh(flat[a:b] @ local[e])
                for e, (a, b) in enumerate(zip(offsets, offsets[1:]))
            ]
            + [torch.zeros_like(flat[offsets[-1] :])]
        )
        out = autograd.combine(plan, y.view(rows.shape), weights)
    (out**2).sum().backward()

    def close(a, b):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-5)

    close(out, alone[2])
    close(x.grad, alone[0].grad)
    close(weights.grad, alone[1].grad)
    close(local.grad, everything.grad[first:end])


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("layout", list(epx.Layout))
def test_gradients(layout: epx.Layout, fixed: bool, device: str) -> None:
    ranks.run(2, gradients, layout, fixed, device=device)

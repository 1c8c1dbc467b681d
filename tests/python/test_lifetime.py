# SPDX-License-Identifier: MIT
"""What happens when programs end, ranks stop, and memory runs out."""

import contextlib
import gc
import os
import subprocess
import sys
import threading
import time

import deep_ep
import epx
import numpy as np
import pytest
import ranks
import torch
from ranks import Rank
from reference import make_batches

E, K, H = 8, 2, 128

EXIT = """
import os, sys, torch, torch.distributed as dist
rank, folder, device = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", store=dist.FileStore(folder, 2), rank=rank,
                        world_size=2)
import deep_ep
buffer = deep_ep.Buffer(dist.group.WORLD, 1 << 20, explicitly_destroy=True)
idx = torch.tensor([[0, 7]] * 4, device=device)
x = torch.ones(4, 64, dtype=torch.bfloat16, device=device)
layout = buffer.get_dispatch_layout(idx, 8)
held = buffer.dispatch(x, topk_idx=idx, num_tokens_per_expert=layout[2],
                       async_finish=True)
low = buffer.low_latency_dispatch(x, idx, 4, 8, return_recv_hook=True)
if device == "cuda":  # who ends amid a kernel may take others under MPS along
    torch.cuda.synchronize()
print("said")
"""


def test_a_program_may_end_without_destroy(tmp_path, device: str) -> None:
    """With arrays alive, an event not waited for and a hook not called."""
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", EXIT, str(rank)]
            + [str(tmp_path / "store"), device],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    for program in programs:
        out, err = program.communicate(timeout=200)
        assert (program.returncode, err.decode()) == (0, "")
        assert out == b"said\n"


def test_import_takes_little_beyond_pytorch() -> None:
    """No package that PyTorch does not import, and few modules of Python's.

    How long it takes is for tools/bench/python_overhead.py to say.
    """
    code = (
        "import sys, torch\n"
        "before = {*sys.modules}\n"
        "import epx, deep_ep, deep_ep.utils\n"
        "print(*sorted({*sys.modules} - before))\n"
    )
    said = subprocess.check_output([sys.executable, "-c", code])
    names = said.decode().split()
    own = [it for it in names if it.split(".")[0] in ("epx", "deep_ep")]
    assert len(own) > 15
    assert len(names) - len(own) < 10


def grouped_alone() -> epx.Group:
    (bootstrap,) = epx.bootstrap.threads(1)
    return epx.Group(bootstrap, heap_bytes=16 << 20, num_workers=2)


def test_a_forked_process_releases_nothing() -> None:
    """It has no copy of the threads that it would wait for."""
    group = grouped_alone()
    queue = group.queue()
    plan = group.plan(np.zeros((4, 1), np.int64), E, stream=queue)
    held = plan.dispatch(np.ones((4, H), np.float32), stream=queue)
    queue.synchronize()
    child = os.fork()
    if child == 0:
        del held, plan, queue, group
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0) == (child, 0)
    assert (held.x == 1).all()
    plan.dispatch(np.ones((4, H), np.float32), stream=queue)
    queue.synchronize()


def test_a_queue_may_die_in_its_own_thread() -> None:
    """To release it is to wait for the function that found the garbage."""
    group = grouped_alone()
    queue = group.queue()
    end = queue._end
    dropped, found = threading.Event(), threading.Event()

    def find() -> None:
        dropped.wait()
        gc.collect()
        found.set()

    queue.submit(find)
    cycle = [queue]
    cycle.append(cycle)
    gc.disable()
    del queue, cycle
    dropped.set()
    assert found.wait(60), "the queue waits for itself"
    gc.enable()
    assert not end.alive
    while group.handle is not None:  # until its thread has been joined
        with contextlib.suppress(epx.CallError):
            group.close()
        time.sleep(0.01)


def made_again(me: Rank) -> None:
    batch = make_batches(me, [6], H, E, K)[me.index].to(me.device)
    held = []
    for _ in range(4):
        buffer = deep_ep.Buffer(me.group, 8 << 20)
        layout = buffer.get_dispatch_layout(batch.topk_idx, E)
        got = buffer.dispatch(
            batch.x, topk_idx=batch.topk_idx, num_tokens_per_expert=layout[2]
        )
        held.append((got[0], got[4]))
    del buffer, got
    gc.collect()
    # The handles of buffers that are gone still work, with any buffer.
    other = deep_ep.Buffer(me.group, 8 << 20)
    outs = [other.combine(rows, handle)[0] for rows, handle in held]
    for out in outs:
        assert torch.equal(out, outs[0])
    other.destroy()
    with pytest.raises((epx.Error, RuntimeError)):
        other.low_latency_dispatch(batch.x, batch.topk_idx, 8, E)


def test_buffers_are_made_again_without_destroy(device: str) -> None:
    ranks.run(2, made_again, device=device)


def a_lost_rank(me: Rank) -> None:
    buffer = deep_ep.Buffer(me.group, 8 << 20, timeout_secs=1)
    batch = make_batches(me, [6], H, E, K)[me.index].to(me.device)
    layout = buffer.get_dispatch_layout(batch.topk_idx, E)

    def dispatch():
        buffer.dispatch(
            batch.x, topk_idx=batch.topk_idx, num_tokens_per_expert=layout[2]
        )

    dispatch()
    if me.index == 0:
        with pytest.raises(epx.Error) as caught:
            dispatch()
        assert isinstance(caught.value, (epx.PeerError, epx.GroupError))
        assert "rank" in str(caught.value)


def test_a_late_rank_is_an_error_in_time(device: str) -> None:
    ranks.run(2, a_lost_rank, device=device)


def full_heap(me: Rank) -> None:
    """Rows that are held fill the heap: the next ones lie elsewhere."""
    buffer = deep_ep.Buffer(me.group, 1 << 20)
    group = buffer._lanes.of(torch.empty(0, device=me.device)).group
    batch = make_batches(me, [64], 4096, E, K)[me.index].to(me.device)
    layout = buffer.get_dispatch_layout(batch.topk_idx, E)
    # Room for a few batches, and not for what each of the plans would stage.
    room = 4 << 20
    free = group.info().heap_free_bytes - room
    ballast = group.memory.array((free,), torch.uint8, staged=False)
    assert ballast is not None
    held, live = [], [group.memory.num_live]
    for _ in range(12):
        got = buffer.dispatch(
            batch.x, topk_idx=batch.topk_idx, num_tokens_per_expert=layout[2]
        )
        held.append(got)
        live.append(group.memory.num_live)
    first, last = live[1] - live[0], live[-1] - live[-2]
    assert first > last, f"{first} new arrays in the heap, then {last}"
    outs = [buffer.combine(it[0], it[4])[0] for it in held]
    for out in outs:
        assert torch.equal(out, outs[0])
    del held, got, ballast
    gc.collect()
    if me.device == "cuda":
        group.memory.reclaim(wait=True)
    assert group.memory.num_live == 0


def test_a_full_heap_costs_a_copy_only(device: str) -> None:
    ranks.run(2, full_heap, device=device)


def test_the_timeout_variable(monkeypatch) -> None:
    from deep_ep.lane import default_timeout

    monkeypatch.delenv("DEEP_EP_TIMEOUT_SECS", raising=False)
    assert default_timeout() == 100
    monkeypatch.setenv("DEEP_EP_TIMEOUT_SECS", "2.5")
    assert default_timeout() == 2.5
    for bad in ("soon", "-1", "0", "nan"):
        monkeypatch.setenv("DEEP_EP_TIMEOUT_SECS", bad)
        with pytest.raises(ValueError, match="DEEP_EP_TIMEOUT_SECS"):
            default_timeout()
    assert os.environ["DEEP_EP_TIMEOUT_SECS"] == "nan"

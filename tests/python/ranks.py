# SPDX-License-Identifier: MIT
"""Several ranks for a test: processes joined by gloo.

They are forked from a server that has only imported packages: a copy of the
test's own process, which may have threads and garbage of its own, could wait
for either.
"""

import contextlib
import dataclasses
import faulthandler
import multiprocessing
import os
import tempfile
import time
import traceback
from typing import Any, Callable, List

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
# What assert_close would import takes seconds; once will do.
_CONTEXT.set_forkserver_preload(
    ["deep_ep", "epx.autograd", "pytest", "torch.distributed.tensor"]
)
# Seconds that ranks on a card have to end by themselves once one has failed:
# who is killed amid a kernel may take everyone under MPS along.
_PATIENCE = 35


@dataclasses.dataclass
class Rank:
    """One of them, as its function sees it."""

    index: int
    size: int
    device: str
    group: Any

    def generator(self, index: int = -1) -> torch.Generator:
        """The same numbers on every rank, for the data of rank `index`."""
        seed = 1000 + (self.index if index < 0 else index)
        return torch.Generator().manual_seed(seed)


def run(
    size: int,
    function: Callable[..., None],
    *args: Any,
    device: str = "cpu",
    timeout: float = 100,
    nodes: int = 1,
) -> None:
    """Runs ``function(rank, *args)`` on each rank; fails as the first does.

    Several nodes are joined by loopback, as hosts would be by their network.
    """
    with tempfile.TemporaryDirectory() as folder:
        said = _CONTEXT.SimpleQueue()
        ranks = [
            _CONTEXT.Process(
                target=_rank,
                args=(index, size, folder, device, timeout, said)
                + (index * nodes // size, nodes, function, args),
            )
            for index in range(size)
        ]
        for rank in ranks:
            rank.start()
        try:
            errors = _collect(ranks, said, time.monotonic() + timeout)
        finally:
            _end(ranks, _PATIENCE if device == "cuda" else 0)
    assert not errors, "\n".join(errors)


def _collect(ranks: List[Any], said: Any, deadline: float) -> List[str]:
    """What went wrong; ends early, as the others would wait for a timeout."""
    missing = set(range(len(ranks)))
    while missing:
        if not said.empty():
            index, error = said.get()
            missing.discard(index)
            if error:
                return [f"rank {index}: {error}"]
            continue
        for index in missing:
            code = ranks[index].exitcode
            if code is not None and said.empty():
                return [f"rank {index} has ended with {code}"]
        if time.monotonic() > deadline:
            return [f"ranks {sorted(missing)} did not end in time"]
        time.sleep(0.01)
    return []


def _end(ranks: List[Any], patience: float) -> None:
    deadline = time.monotonic() + patience
    for rank in ranks:
        rank.join(max(0, deadline - time.monotonic()))
        rank.kill()
        rank.join()


def _rank(
    index: int,
    size: int,
    folder: str,
    device: str,
    timeout: float,
    said: Any,
    node: int,
    nodes: int,
    function: Callable[..., None],
    args: Any,
) -> None:
    error = ""
    if nodes > 1:
        os.environ["EPX_NODE"] = str(node + 1)
        os.environ["EPX_NET_DEVICE"] = "lo"
    try:
        torch.set_num_threads(1)
        faulthandler.dump_traceback_later(0.9 * timeout)
        if device == "cuda":
            torch.cuda.set_device(0)
        store = dist.FileStore(os.path.join(folder, "store"), size)
        dist.init_process_group(
            "gloo", store=store, rank=index, world_size=size
        )
        function(Rank(index, size, device, dist.group.WORLD), *args)
        dist.barrier()
    except BaseException:
        error = traceback.format_exc()
    said.put((index, error))
    if device == "cuda":
        with contextlib.suppress(BaseException):
            torch.cuda.synchronize()
    os._exit(0)

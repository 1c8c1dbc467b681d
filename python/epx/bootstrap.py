# SPDX-License-Identifier: MIT
"""How the ranks of a group first meet.

What ``opened`` gives is the ``epx_bootstrap_t`` for the time in which a group
is made.
"""

import contextlib
import ctypes
from typing import Any, Callable, Iterator, List, Optional

from . import _c
from .errors import Error, Status

# Gathers an object of every rank, in the order of ranks.
AllGather = Callable[[Any], List[Any]]


class Bootstrap:
    """The ranks of a launcher, from the environment (see ``epx.h``)."""

    @contextlib.contextmanager
    def opened(self, timeout_ns: int) -> Iterator[Any]:
        """The pointer for ``epx_group_config_t``."""
        made = ctypes.POINTER(_c.Bootstrap)()
        _c.lib.epx_bootstrap_env_create(timeout_ns, ctypes.byref(made))
        try:
            yield made
        finally:
            _c.lib.epx_bootstrap_destroy(made)


class ObjectBootstrap(Bootstrap):
    """Ranks that can gather Python objects among them."""

    def __init__(self, rank: int, num_ranks: int, gather: AllGather) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self.gather = gather

    @contextlib.contextmanager
    def opened(self, timeout_ns: int) -> Iterator[Any]:
        """The pointer for ``epx_group_config_t``."""
        failed: List[BaseException] = []

        # Called by C, which has let go of the GIL; ctypes takes it again.  An
        # exception must not get lost there.
        def allgather(
            _: Optional[int], send: int, recv: int, size: int, deadline: int
        ) -> int:
            try:
                rows = self.gather(ctypes.string_at(send, size))
                everything = b"".join(rows)
                if len(everything) != size * self.num_ranks:
                    raise RuntimeError("the gather lost or made up a rank")
                ctypes.memmove(recv, everything, len(everything))
            except BaseException as error:  # noqa: BLE001
                failed.append(error)
                return int(Status.ERR_SYSTEM)
            return 0

        own = _c.Bootstrap(
            rank=self.rank,
            num_ranks=self.num_ranks,
            allgather=_c.ALLGATHER(allgather),
        )
        try:
            yield ctypes.pointer(own)
        except Error as error:
            if failed:
                raise error from failed[0]
            raise


class ThreadBootstrap(Bootstrap):
    """One of several threads of this process: see ``threads``."""

    def __init__(self, made: Any) -> None:
        self._made = made

    @contextlib.contextmanager
    def opened(self, timeout_ns: int) -> Iterator[Any]:
        """The pointer for ``epx_group_config_t``."""
        try:
            yield self._made
        finally:
            _c.lib.epx_bootstrap_destroy(self._made)


def threads(num_ranks: int) -> List[ThreadBootstrap]:
    """One bootstrap for each of ``num_ranks`` threads of this process.

    Each serves to make one group.
    """
    made = (ctypes.POINTER(_c.Bootstrap) * num_ranks)()
    _c.lib.epx_bootstrap_threads_create(num_ranks, made)
    return [ThreadBootstrap(it) for it in made]


def from_torch(process_group: Any = None) -> ObjectBootstrap:
    """The ranks of a process group of ``torch.distributed``, of any backend.

    ``None`` is the default group.
    """
    import torch.distributed as dist

    if process_group is None:
        process_group = dist.group.WORLD
        if process_group is None:
            raise ValueError("torch.distributed has not been initialised")
    num_ranks = process_group.size()

    def gather(item: Any) -> List[Any]:
        items: List[Any] = [None] * num_ranks
        dist.all_gather_object(items, item, process_group)
        return items

    return ObjectBootstrap(process_group.rank(), num_ranks, gather)


def from_mpi(comm: Any) -> ObjectBootstrap:
    """The ranks of a communicator of mpi4py."""
    return ObjectBootstrap(comm.Get_rank(), comm.Get_size(), comm.allgather)

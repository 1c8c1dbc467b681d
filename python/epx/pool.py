# SPDX-License-Identifier: MIT
"""PyTorch's own tensors in EPX memory: a pool for ``torch.cuda``.

What a GEMM writes there can be combined without a copy:

    pool = epx.pool.MemPool(group)
    with pool.use():
        outputs = rows @ weights
    plan.combine(outputs)
"""

import contextlib
import ctypes
import os
from typing import Any, Iterator, List

from .group import Group

LIBRARY = os.path.join(os.path.dirname(__file__), "libepx_pool.so.0")

# PyTorch may keep memory of a pool that is gone: their groups stay.
_groups: List[Group] = []


def library() -> ctypes.CDLL:
    """The allocator's functions."""
    found = ctypes.CDLL(LIBRARY)
    found.epx_pool_use.restype = ctypes.c_void_p
    found.epx_pool_use.argtypes = [ctypes.c_void_p]
    return found


class MemPool:
    """A ``torch.cuda.MemPool`` over the heap of a group on a card.

    Its memory is as limited as the heap: PyTorch reports when it has run out.
    The group then lives until the process ends, and cannot be closed.
    """

    def __init__(self, group: Group) -> None:
        import torch
        from torch.cuda.memory import CUDAPluggableAllocator

        if not group.is_cuda:
            raise ValueError("the group is on the CPU; a pool is for a card")
        self._library = library()
        self._group = group
        self._allocator = CUDAPluggableAllocator(
            LIBRARY, "epx_pool_alloc", "epx_pool_free"
        )
        self.pool: Any = torch.cuda.MemPool(self._allocator.allocator())
        group.stays = True
        _groups.append(group)

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """This thread's tensors for the group's card come from the pool."""
        import torch

        before = self._library.epx_pool_use(self._group.handle)
        try:
            with torch.cuda.use_mem_pool(self.pool, self._group.device):
                yield
        finally:
            self._library.epx_pool_use(before)

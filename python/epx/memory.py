# SPDX-License-Identifier: MIT
"""Arrays that live in EPX memory, where peers reach them in one hop.

The memory goes back to the group's heap when the last array on it dies.  When
the heap has no room, arrays are ordinary ones: the library then adds a copy,
and the result is the same.
"""

import collections
import ctypes
import math
import weakref
from typing import (
    TYPE_CHECKING,
    Any,
    Deque,
    List,
    Optional,
    Sequence,
    Set,
    Tuple,
)

from . import _c
from .arrays import is_torch_dtype
from .errors import HeapExhaustedError
from .lifetime import at_end_of

if TYPE_CHECKING:
    from .group import Group

_PAGE = 4096
_WRITABLE = 0x200  # PyBUF_WRITE

_view = ctypes.pythonapi.PyMemoryView_FromMemory
_view.restype = ctypes.py_object
_view.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int]


class _Block:
    """A block of the heap, in the form that NumPy or PyTorch takes over."""

    def __init__(self, interface: str, ptr: int, num_bytes: int) -> None:
        described = {
            "version": 3,
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (ptr, False),
            "strides": None,
        }
        setattr(self, interface, described)


class Memory:
    """What a group's heap holds for Python."""

    def __init__(self, group: "Group") -> None:
        # The group owns this object; its blocks keep the group alive.
        self._group = weakref.ref(group)
        self._widest = 0
        # The blocks.  Finalizers run at any point of any thread, so that no
        # count may be kept: only what the interpreter does in one step.
        self._live: Set[int] = set()
        # CUDA: pointer, and the events after which nobody uses it; None where
        # they could not yet be recorded.
        self._retired: Deque[Tuple[int, Optional[List[Any]]]] = (
            collections.deque()
        )

    @property
    def num_live(self) -> int:
        """How many blocks of the heap arrays have."""
        return len(self._live)

    def array(
        self, shape: Sequence[int], dtype: Any, staged: bool = True
    ) -> Optional[Any]:
        """An array of a dtype of PyTorch or NumPy, None if there is no room.

        ``staged``: leave room for a staging block as wide as the widest array,
        so that what does not lie in EPX memory can still be moved.
        """
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes == 0:
            return None
        group = self._group()
        assert group is not None
        if group.is_cuda:
            if group.is_capturing():
                return None  # the graph's own pool knows how long it is used
            self.reclaim(wait=False)
        size = -(-num_bytes // _PAGE) * _PAGE
        if staged:
            # A row that arrives in 8 bits goes home in 16.
            share = 2 if dtype.itemsize == 1 else 1
            self._widest = max(self._widest, share * size)
            if size + self._widest > group.heap_free_bytes():
                return None
        ptr = self._alloc(group, size)
        if ptr is None:
            return None
        # What the array keeps alive, and whose end is the array's.
        owner: Any
        if group.is_cuda:
            owner = _Block("__cuda_array_interface__", ptr, num_bytes)
        elif is_torch_dtype(dtype):
            owner = _view(ptr, num_bytes, _WRITABLE)
        else:
            owner = _Block("__array_interface__", ptr, num_bytes)
        # Keeps the group, so that the heap outlives what lies in it.
        at_end_of(owner, _retire, group, ptr)
        return _array_on(owner, shape, dtype, group.device)

    def _alloc(self, group: "Group", size: int) -> Optional[int]:
        found = ctypes.c_void_p()
        try:
            _c.lib.epx_mem_alloc(group.handle, size, ctypes.byref(found))
        except HeapExhaustedError:
            return None
        ptr = found.value
        assert ptr is not None
        self._live.add(ptr)
        return ptr

    def retire(self, group: "Group", ptr: int) -> None:
        """The last array on a block has died."""
        if not group.is_cuda:
            self._free(group, ptr)
            return
        events = None if group.is_capturing() else group.record_streams()
        self._retired.append((ptr, events))
        if group.close_pending:
            self.reclaim(wait=True)

    def reclaim(self, wait: bool) -> None:
        """Frees the retired blocks that no stream uses any more."""
        group = self._group()
        if group is None or not self._retired or group.is_capturing():
            return
        for _ in range(len(self._retired)):
            ptr, events = self._retired.popleft()
            if events is None:
                events = group.record_streams()
            if wait:
                for event in events:
                    event.synchronize()
            if all(event.query() for event in events):
                self._free(group, ptr)
            else:
                self._retired.append((ptr, events))

    def _free(self, group: "Group", ptr: int) -> None:
        # First, since another thread may get the block again at once.
        self._live.remove(ptr)
        _c.lib.epx_mem_free(group.handle, ptr)
        if group.close_pending and not self._live:
            group.close()


def _retire(group: "Group", ptr: int) -> None:
    group.memory.retire(group, ptr)


def _array_on(
    owner: Any, shape: Sequence[int], dtype: Any, device: str
) -> Any:
    if not is_torch_dtype(dtype):
        import numpy

        return numpy.asarray(owner).view(dtype).reshape(shape)
    import torch

    if isinstance(owner, _Block):
        taken = torch.as_tensor(owner, device=device)
        return taken.view(dtype).view(*shape)
    return torch.frombuffer(owner, dtype=dtype).view(*shape)


def ordinary(shape: Sequence[int], dtype: Any, device: str) -> Any:
    """An array of the same kind outside the heap."""
    if is_torch_dtype(dtype):
        import torch

        return torch.empty(tuple(shape), dtype=dtype, device=device)
    import numpy

    return numpy.empty(tuple(shape), dtype=dtype)

# SPDX-License-Identifier: MIT
"""Groups: R ranks, one engine, one heap per rank."""

import contextlib
import ctypes
import gc
import weakref
from typing import (
    Any,
    Callable,
    ContextManager,
    Dict,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Union,
)

from . import _c
from . import bootstrap as _bootstrap
from .arrays import to_dtype
from .errors import Error, HeapExhaustedError
from .lifetime import at_end_of
from .memory import Memory, ordinary
from .plan import Layout, Plan
from .streams import Queue

Stream = Any  # None, a Queue, a torch.cuda.Stream, or a cudaStream_t as an int


class Network(NamedTuple):
    """``epx_network_config_t``: how ranks of different nodes are joined.

    What is None or -1 is left to the environment, UCX's variables included.
    """

    device: Optional[str] = None
    transports: Optional[str] = None
    service_level: int = -1
    traffic_class: int = -1
    gid_index: int = -1
    adaptive_routing: int = -1
    num_lanes: int = -1
    core: int = -1
    wire: Optional[str] = None
    gpudirect: int = -1

    def to_c(self) -> _c.NetworkConfig:
        """The struct."""
        return _c.NetworkConfig(
            **{
                name: value.encode() if isinstance(value, str) else value
                for name, value in self._asdict().items()
            }
        )


class GroupInfo(NamedTuple):
    """``epx_group_info_t``"""

    rank: int
    num_ranks: int
    num_workers: int
    max_experts: int
    engine: str
    fabric: str
    heap_bytes: int
    heap_free_bytes: int
    heap_largest_free_bytes: int
    num_nodes: int
    node: int


class Group:
    """Ranks that dispatch and combine.  Making one is collective.

    Args:
        bootstrap: how the ranks meet (``epx.bootstrap``); default: the
            environment that a launcher gives.
        device: "cpu", "cuda" (PyTorch's current card) or "cuda:N".
        heap_bytes: memory that peers reach; 0 is 1 GiB.
        num_workers: threads or SMs for an operation; 0: the library's choice.
        max_experts: the most experts of any plan; 0 is 1024.
        timeout: seconds that any wait for a peer may take; 0 is 30.
        lost_after: seconds without a sign of life after which a peer is lost;
            0 is 1.
        network: for ranks of several hosts.
        node: ranks with different numbers are joined by the network, as if
            they were on different hosts; 0: the variable EPX_NODE, else those
            of one host share its memory.

    A group is released when it, its plans and queues, and the arrays in its
    memory are gone.  ``close`` does so at once, but for those arrays.
    """

    def __init__(
        self,
        bootstrap: Optional[_bootstrap.Bootstrap] = None,
        *,
        device: str = "cpu",
        heap_bytes: int = 0,
        num_workers: int = 0,
        max_experts: int = 0,
        timeout: float = 0,
        lost_after: float = 0,
        network: Optional[Network] = None,
        node: int = 0,
    ) -> None:
        self.is_cuda, self.device_ordinal = _parse_device(device)
        self.device = f"cuda:{self.device_ordinal}" if self.is_cuda else "cpu"
        self.handle: Optional[int] = None
        self.close_pending = False
        self.stays = False  # others than Python have memory of its heap
        self._streams: Dict[int, Any] = {}
        self._may_capture = False  # not since the last look at all streams
        config = _c.GroupConfig(
            device=_c.DEVICE_CUDA if self.is_cuda else _c.DEVICE_CPU,
            device_ordinal=self.device_ordinal,
            heap_bytes=heap_bytes,
            num_workers=num_workers,
            max_experts=max_experts,
            timeout_ns=int(timeout * 1e9),
            lost_after_ns=int(lost_after * 1e9),
            node=node,
        )
        if network is not None:
            config.network = ctypes.pointer(network.to_c())
        if bootstrap is None:
            bootstrap = _bootstrap.Bootstrap()
        made = ctypes.c_void_p()
        with bootstrap.opened(config.timeout_ns) as opened:
            config.bootstrap = opened
            _c.lib.epx_group_create(ctypes.byref(config), ctypes.byref(made))
        self.handle = made.value
        self._end = at_end_of(self, _destroy, made.value)
        info = self.info()
        self.rank = info.rank
        self.num_ranks = info.num_ranks
        self.num_workers = info.num_workers
        self.memory = Memory(self)
        self._parts: "weakref.WeakSet[Any]" = weakref.WeakSet()

    @classmethod
    def from_torch(cls, process_group: Any = None, **config: Any) -> "Group":
        """The ranks of a ``torch.distributed`` group, of any backend."""
        return cls(_bootstrap.from_torch(process_group), **config)

    @classmethod
    def from_mpi(cls, comm: Any, **config: Any) -> "Group":
        """The ranks of a communicator of mpi4py."""
        return cls(_bootstrap.from_mpi(comm), **config)

    def info(self) -> GroupInfo:
        """What the group is made of, and how full its heap is."""
        return GroupInfo(**_c.values(self._query()))

    def heap_free_bytes(self) -> int:
        """What the heap has left, of which ``info`` tells more."""
        return int(self._query().heap_free_bytes)

    def _query(self) -> _c.GroupInfo:
        info = _c.GroupInfo()
        _c.lib.epx_group_query(self.handle, ctypes.byref(info))
        return info

    def check(self) -> None:
        """Raises the error that broke the group, if one did."""
        _c.lib.epx_group_status(self.handle)

    def abort(self) -> None:
        """Ends every call that waits, here and on the peers, with an error."""
        _c.lib.epx_group_abort(self.handle)

    def mask(self, ranks: Sequence[int] = ()) -> None:
        """Goes on without some ranks, and those that are known to be lost.

        Collective over the ranks that remain, who need not name the same.
        Their plans want new routing (``Plan.update``), or new ones are made.
        """
        array = (ctypes.c_int32 * len(ranks))(*ranks)
        _c.lib.epx_group_mask(self.handle, array, len(ranks))

    def masked(self) -> List[int]:
        """The ranks that are masked."""
        found = (ctypes.c_int32 * self.num_ranks)()
        _c.lib.epx_group_masked(self.handle, found)
        return [rank for rank in range(self.num_ranks) if found[rank]]

    def local_experts(
        self, num_experts: int, rank: Optional[int] = None
    ) -> Tuple[int, int]:
        """First expert of a rank (default: this one), and how many it has."""
        at = self.rank if rank is None else rank
        return local_experts(num_experts, self.num_ranks, at)

    def empty(self, shape: Union[int, Sequence[int]], dtype: Any) -> Any:
        """An array in EPX memory, or an ordinary one when the heap is full.

        A dtype of PyTorch gives a tensor; NumPy's, or its name, an array.
        """
        extents = (shape,) if isinstance(shape, int) else tuple(shape)
        kind = to_dtype(dtype)
        found = self.memory.array(extents, kind)
        return ordinary(extents, kind, self.device) if found is None else found

    def queue(self) -> Queue:
        """A queue, the CPU's stream."""
        made = Queue(self)
        self._parts.add(made)
        return made

    def plan(
        self,
        topk_idx: Any,
        num_experts: int,
        layout: Union[Layout, str] = Layout.RANK_MAJOR,
        *,
        max_tokens_per_rank: int = 0,
        recv_capacity: int = 0,
        expert_alignment: int = 0,
        send_only_row_bytes: int = 0,
        stream: Stream = None,
    ) -> Plan:
        """The routing of one batch.  Collective, stream order.

        Args:
            topk_idx: [T, K] of int32 or int64, experts or -1.
            num_experts: in all.
            layout: how received rows lie: ``Layout`` or its name.
            max_tokens_per_rank: the most tokens that any rank will ever route
                through this plan; 0: it cannot be updated.
            recv_capacity: rows to receive on every rank, so that nobody need
                ask for counts; 0: exact counts.
            expert_alignment: EXPERT_MAJOR pads each expert to a multiple.
            send_only_row_bytes: see ``epx.h``.
            stream: a queue, or a stream of CUDA; None: in the call, or on the
                current stream.  Results are allocated in the order of the
                current stream, for which another one has to wait first.
        """
        made = Plan(
            self,
            topk_idx,
            num_experts,
            Layout(layout) if isinstance(layout, int) else Layout[layout],
            max_tokens_per_rank=max_tokens_per_rank,
            recv_capacity=recv_capacity,
            expert_alignment=expert_alignment,
            send_only_row_bytes=send_only_row_bytes,
            stream=stream,
        )
        self._parts.add(made)
        return made

    def stream_handle(self, stream: Stream) -> Optional[int]:
        """The ``epx_stream_t`` of what a caller gave."""
        if not self.is_cuda:
            return None if stream is None else stream.handle
        stream = self.stream_object(stream)
        self.note_stream(stream)
        return stream.cuda_stream

    def stream_object(self, stream: Stream) -> Any:
        """A stream of CUDA as PyTorch has it; None is the current one."""
        import torch

        if stream is None:
            return torch.cuda.current_stream(self.device_ordinal)
        if isinstance(stream, int):
            return torch.cuda.ExternalStream(stream, self.device_ordinal)
        return stream

    def computing_on(self, stream: Stream) -> ContextManager[Any]:
        """Where PyTorch computes in the order of a stream of CUDA."""
        if not self.is_cuda or stream is None:
            return contextlib.nullcontext()
        import torch

        return torch.cuda.stream(self.stream_object(stream))

    def note_stream(self, stream: Any) -> None:
        """A stream of CUDA whose work uses arrays in the group's memory.

        Those of the group's calls are noted by themselves.
        """
        import torch

        self._streams.setdefault(stream.cuda_stream, stream)
        if torch.cuda.is_current_stream_capturing():
            self._may_capture = True

    def is_capturing(self) -> bool:
        """Whether the current or a noted stream is being captured.

        Then no event can be recorded there, and none anywhere asked for.
        """
        import torch

        if torch.cuda.is_current_stream_capturing():
            return True
        if self._may_capture:
            for stream in list(self._streams.values()):
                with torch.cuda.stream(stream):
                    if torch.cuda.is_current_stream_capturing():
                        return True
            self._may_capture = False
        return False

    def record_streams(self) -> List[Any]:
        """An event on every noted stream, and on the current one."""
        import torch

        streams = dict(self._streams)
        current = torch.cuda.current_stream(self.device_ordinal)
        streams.setdefault(current.cuda_stream, current)
        return [it.record_event() for it in streams.values()]

    def retrying(self, call: Callable[[], None]) -> None:
        """Makes a call; when the heap is full, once more after a clean-up."""
        try:
            call()
        except HeapExhaustedError:
            gc.collect()
            self.memory.reclaim(wait=True)
            call()

    def close(self) -> None:
        """Releases the group's plans, queues and, when free, its heap.

        The heap goes with the last array that lies in it.  Not collective.
        """
        if self.stays:
            raise RuntimeError("a group with a pool cannot be closed")
        for part in list(self._parts):
            part.close()
        if self.is_cuda and self.handle is not None:
            self.memory.reclaim(wait=True)
        self.close_pending = True
        if self.memory.num_live == 0 and self.handle is not None:
            # Of several that come here at once, one destroys it.
            handle, self.handle = self.handle, None
            try:
                _c.lib.epx_group_destroy(handle)
            except Error:
                self.handle = handle
                raise
            self._end.detach()

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def local_experts(
    num_experts: int, num_ranks: int, rank: int
) -> Tuple[int, int]:
    """First expert of a rank, and how many it has."""
    first, count = ctypes.c_int32(), ctypes.c_int32()
    _c.lib.epx_local_experts(
        num_experts,
        num_ranks,
        rank,
        ctypes.byref(first),
        ctypes.byref(count),
    )
    return first.value, count.value


def _parse_device(device: Any) -> Tuple[bool, int]:
    name, _, ordinal = str(device).partition(":")
    if name == "cpu":
        return False, 0
    if name != "cuda":
        raise ValueError(f"device is {device!r}; allowed are cpu and cuda[:N]")
    if ordinal:
        return True, int(ordinal)
    import torch

    return True, torch.cuda.current_device()


def _destroy(handle: int) -> None:
    # An operation that was never completed still has its arrays.
    with contextlib.suppress(Error):
        _c.lib.epx_group_destroy(handle)

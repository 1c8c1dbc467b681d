# SPDX-License-Identifier: MIT
"""Where operations run: a group on a device, and the streams beside it."""

import contextlib
import os
from typing import (
    Any,
    Callable,
    ContextManager,
    Dict,
    Iterator,
    List,
    Optional,
)

import epx
import torch
from epx.bootstrap import ObjectBootstrap, from_mpi, from_torch

from .event import EventHandle

TIMEOUT_VARIABLE = "DEEP_EP_TIMEOUT_SECS"
_MIN_CPU_HEAP = 1 << 30
_MIN_CUDA_HEAP = 64 << 20
# Plans lie in the heap of a card, and rows come with what routes them.
_PLANS = 32 << 20


class Operation:
    """One call in progress: where it runs, and what becomes of it.

    Attributes:
        stream: what to give to EPX.
        event: set when the call is asynchronous and has been started.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.event: Optional[EventHandle] = None
        self.tensors: List[torch.Tensor] = []

    def uses(self, *tensors: Any) -> None:
        """Tensors that the operation works on; tuples of them, or None."""
        for item in tensors:
            if isinstance(item, torch.Tensor):
                self.tensors.append(item)
            elif isinstance(item, tuple):
                self.uses(*item)

    def computing(self) -> ContextManager[Any]:
        """Where PyTorch has to compute to be in the operation's order."""
        if isinstance(self.stream, torch.cuda.Stream):
            return torch.cuda.stream(self.stream)
        return contextlib.nullcontext()

    def then(self, function: Callable[[], None]) -> None:
        """Has PyTorch compute after what the operation has started."""
        if isinstance(self.stream, epx.Queue):
            self.stream.submit(function)
            return
        with self.computing():
            function()


class Lane:
    """A group on the CPU: calls run in the caller, or queued if they may.

    Attributes:
        group: on the device.
        num_nodes: ranks of one reach each other's memory.
        node_of_rank: [R] of int32; nodes count from that of rank 0.
    """

    def __init__(self, group: epx.Group, ranks: ObjectBootstrap) -> None:
        self.group = group
        info, nodes = group.info(), [0] * group.num_ranks
        if info.num_nodes > 1:
            nodes = ranks.gather(info.node)
        self.num_nodes = info.num_nodes
        self.node_of_rank = torch.tensor(
            nodes, dtype=torch.int32, device=group.device
        )
        self._queue: Optional[epx.Queue] = None
        self._captured: List[epx.Plan] = []

    def plan(self, *arguments: Any, **named: Any) -> epx.Plan:
        """A plan; one that a graph holds stays for as long as the lane."""
        made = self.group.plan(*arguments, **named)
        if self.is_capturing():
            self._captured.append(made)
        return made

    def is_capturing(self) -> bool:
        """Whether calls of now are captured in a graph of CUDA."""
        return self.group.is_cuda and torch.cuda.is_current_stream_capturing()

    def settle(self) -> None:
        """Lets what is queued run first, so that calls keep their order."""
        if self._queue is not None and not self._queue.idle:
            self._queue.synchronize()

    def mask(self, rank: int) -> None:
        """Goes on without a rank; what was queued is over, or has failed."""
        with contextlib.suppress(epx.Error):
            self.settle()
        self.group.mask([rank])

    def current_stream(self) -> Optional[int]:
        """Where a call runs that is not asynchronous and waits for no event.

        What ``operation`` gives such a call, in less time.
        """
        self.settle()
        return None

    @contextlib.contextmanager
    def operation(
        self,
        previous_event: Optional[EventHandle] = None,
        is_async: bool = False,
        allocate_on_comm_stream: bool = False,
        other_event: Optional[EventHandle] = None,
    ) -> Iterator[Operation]:
        """Runs what is inside in its place among the group's calls."""
        for event in (previous_event, other_event):
            if event is not None:
                event.stream_wait(self._queue)
        if not is_async:
            self.settle()
            yield Operation(None)
            return
        if self._queue is None:
            self._queue = self.group.queue()
        started = Operation(self._queue)
        yield started
        self._queue.keep(started.tensors)
        started.event = EventHandle(queue=self._queue)

    def comm_stream(self) -> Any:
        """The stream beside the current one."""
        raise RuntimeError("there is no communication stream on the CPU")


class CudaLane(Lane):
    """A group on a card.

    Calls run on the current stream; beside it, on the communication stream,
    when they are asynchronous or wait for an event of their own.
    """

    def __init__(self, group: epx.Group, ranks: ObjectBootstrap) -> None:
        super().__init__(group, ranks)
        self._comm = torch.cuda.Stream(group.device_ordinal, priority=-1)

    def settle(self) -> None:
        """Nothing to do: the library keeps the order."""

    def current_stream(self) -> Optional[int]:
        """The current stream's handle."""
        return self.group.stream_handle(None)

    @contextlib.contextmanager
    def operation(
        self,
        previous_event: Optional[EventHandle] = None,
        is_async: bool = False,
        allocate_on_comm_stream: bool = False,
        other_event: Optional[EventHandle] = None,
    ) -> Iterator[Operation]:
        """Runs what is inside behind an event, else the current stream.

        The other event is waited for besides.
        """
        compute = torch.cuda.current_stream(self.group.device_ordinal)
        self.group.note_stream(compute)
        runs_beside = previous_event is not None or is_async
        stream = self._comm if runs_beside else compute
        if other_event is not None:
            other_event.stream_wait(stream)
        if not runs_beside:
            yield Operation(compute)
            return
        if previous_event is None:
            self._comm.wait_stream(compute)
        else:
            previous_event.stream_wait(self._comm)
        started = Operation(self._comm)
        # What PyTorch gives to one stream it may have taken back from work of
        # that stream that has yet to run: only who waits for all may use it.
        waits_for_all = previous_event is None and not allocate_on_comm_stream
        allocating = None if waits_for_all else self._comm
        with torch.cuda.stream(allocating):
            yield started
        # Memory of PyTorch's that both streams use may not be given to others
        # before both are done, in a graph neither.
        for tensor in started.tensors:
            tensor.record_stream(self._comm)
            tensor.record_stream(compute)
        if is_async:
            started.event = EventHandle(self._comm)
        else:
            compute.wait_stream(self._comm)

    def comm_stream(self) -> Any:
        """The stream beside the current one."""
        return self._comm


class Lanes:
    """The lanes of a buffer, by the device of the tensors that are given.

    The one that is expected is made at once, the other when it is first used;
    both are collective.
    """

    def __init__(
        self,
        group: Any,
        comm: Any,
        num_bytes: int,
        timeout: Optional[float],
    ) -> None:
        if group is not None:
            self.ranks: ObjectBootstrap = from_torch(group)
        elif comm is not None:
            self.ranks = from_mpi(comm)
        else:
            raise ValueError("either group or comm must be given")
        self._num_bytes = num_bytes
        self._timeout = default_timeout() if timeout is None else timeout
        self._lanes: Dict[str, Lane] = {}
        self.destroyed = False
        self.default = self._lane(
            "cuda" if torch.cuda.is_available() else "cpu"
        )

    def of(self, tensor: torch.Tensor) -> Lane:
        """The lane of a tensor's device."""
        # The device's type is a string made anew, which takes far longer.
        if tensor.is_cuda:
            return self._lane("cuda")
        return self._lane("cpu" if tensor.is_cpu else tensor.device.type)

    def _lane(self, kind: str) -> Lane:
        lane = self._lanes.get(kind)
        if lane is None:
            if self.destroyed:
                raise RuntimeError("the buffer has been destroyed")
            lane = self._make(kind)
            self._lanes[kind] = lane
        return lane

    def _make(self, kind: str) -> Lane:
        # The host's memory is taken as it is touched, so there it may be more
        # than was asked for.
        if kind == "cuda":
            heap_bytes = max(self._num_bytes + _PLANS, _MIN_CUDA_HEAP)
        else:
            heap_bytes = max(2 * self._num_bytes, _MIN_CPU_HEAP)
        group = epx.Group(
            self.ranks,
            device=kind,
            heap_bytes=heap_bytes,
            timeout=self._timeout,
        )
        made = CudaLane if kind == "cuda" else Lane
        return made(group, self.ranks)

    def __iter__(self) -> Iterator[Lane]:
        return iter(self._lanes.values())

    def destroy(self) -> None:
        """Releases the groups.  Not collective; may be called again."""
        self.destroyed = True
        for lane in self:
            lane.group.close()


def default_timeout() -> float:
    """Seconds that a wait for a peer may take: DeepEP's, or the user's."""
    value = os.environ.get(TIMEOUT_VARIABLE, "100")
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0
    if not 0 < seconds < 1e9:
        raise ValueError(
            f"{TIMEOUT_VARIABLE} is {value!r}; it must be a number of seconds"
        )
    return seconds

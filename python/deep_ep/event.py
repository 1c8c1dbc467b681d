# SPDX-License-Identifier: MIT
"""Events: what the current stream can wait for.

With CUDA an event is one of a stream.  On the CPU, where PyTorch computes in
the caller, only what was started with ``async_finish`` is still to come: it
runs in a queue, and to wait is to drain that.
"""

from typing import Any, Callable, Optional, Tuple

import epx
import torch


class EventHandle:
    """A point in a stream; made by itself, in the current one."""

    def __init__(
        self,
        stream: "Optional[torch.cuda.Stream]" = None,
        queue: Optional[epx.Queue] = None,
    ) -> None:
        self._queue = queue
        self._event: Any = None
        if stream is not None:
            self._event = stream.record_event()
        elif queue is None and torch.cuda.is_initialized():
            self._event = torch.cuda.current_stream().record_event()

    def current_stream_wait(self) -> None:
        """Makes the current stream wait for this point."""
        if self._queue is not None:
            self._queue.synchronize()
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)

    def stream_wait(self, stream: Any) -> None:
        """Makes another stream, or a queue, wait for this point."""
        if self._queue is not None and self._queue is not stream:
            self._queue.synchronize()
        if self._event is not None:
            if isinstance(stream, torch.cuda.Stream):
                stream.wait_event(self._event)
            else:
                self._event.synchronize()


class EventOverlap:
    """An event, or none: the result of every call.

    Attributes:
        event: ``None`` unless the call was asynchronous.
        extra_tensors: tensors that live as long as this object.
    """

    def __init__(
        self,
        event: Optional[EventHandle] = None,
        extra_tensors: Optional[Tuple[Any, ...]] = None,
    ) -> None:
        self.event = event
        self.extra_tensors = extra_tensors
        self.hook_after_wait: Optional[Callable[[], Any]] = None
        self._release_after_with = False

    def current_stream_wait(self, release_handle: bool = False) -> Any:
        """Makes the current stream wait; returns what the hook returns."""
        assert self.event is not None, "the call was not asynchronous"
        self.event.current_stream_wait()
        hook, self.hook_after_wait = self.hook_after_wait, None
        if release_handle:
            self.event = None
        return None if hook is None else hook()

    def wait(self) -> Any:
        """As ``current_stream_wait``."""
        return self.current_stream_wait()

    def register_hook_after_wait(self, hook: Callable[[], Any]) -> None:
        """Has ``hook`` called once, after the wait."""
        assert self.hook_after_wait is None, "there is a hook already"
        self.hook_after_wait = hook

    def __call__(self, release_handle: bool = False) -> "EventOverlap":
        """Chooses what leaving ``with`` does."""
        self._release_after_with = release_handle
        return self

    def __enter__(self) -> "EventOverlap":
        return self

    def __exit__(self, *_: object) -> None:
        if self.event is not None:
            self.current_stream_wait(self._release_after_with)
        self._release_after_with = False


def handle_of(event: Any) -> Optional[EventHandle]:
    """The handle of an ``EventOverlap`` (which may have none), or itself."""
    return (
        event
        if isinstance(event, EventHandle)
        else (getattr(event, "event", None))
    )

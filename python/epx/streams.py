# SPDX-License-Identifier: MIT
"""The CPU's stream: a thread that runs what it is given, in order."""

import contextlib
import ctypes
from typing import TYPE_CHECKING, Any, Callable, List, Optional

from . import _c
from .errors import Error
from .lifetime import at_end_of, here

if TYPE_CHECKING:
    from .group import Group


class Queue:
    """``epx_queue_t``.  Arrays given to it are kept until it has drained."""

    def __init__(self, group: "Group") -> None:
        made = ctypes.c_void_p()
        _c.lib.epx_queue_create(group.handle, ctypes.byref(made))
        self.group = group
        self.handle: Optional[int] = made.value
        self._kept: List[Any] = []
        self._errors: List[BaseException] = []
        self._end = at_end_of(self, _destroy, group, made.value)

    def keep(self, *things: Any) -> None:
        """Keeps these alive until the queue has drained."""
        self._kept.append(things)

    def submit(self, function: Callable[[], None]) -> None:
        """Runs a function of yours in order.

        ``synchronize`` raises what it has raised.
        """
        errors = self._errors

        def run(_: Any) -> None:
            here.in_queue = True
            try:
                function()
            except BaseException as error:  # noqa: BLE001
                errors.append(error)
            finally:
                here.in_queue = False

        callback = _c.QUEUE_FUNCTION(run)
        self.keep(callback)
        _c.lib.epx_queue_submit(self.handle, callback, None)

    def synchronize(self) -> None:
        """Waits until everything queued has run, and raises its first error.

        An error of EPX stops the queue: what followed it was skipped.
        """
        kept, self._kept = self._kept, []
        try:
            _c.lib.epx_queue_synchronize(self.handle)
        finally:
            kept.clear()
        if self._errors:
            error = self._errors[0]
            self._errors.clear()
            raise error

    @property
    def idle(self) -> bool:
        """Whether nothing was given to it since it was synchronized."""
        return not self._kept

    def close(self) -> None:
        """Runs what is queued, then releases the queue."""
        self._end.detach()
        handle, self.handle = self.handle, None
        self._kept.clear()
        if handle is not None:
            _c.lib.epx_queue_destroy(handle)


def _destroy(group: "Group", handle: int) -> None:
    # An error that nobody has asked for is of no use.
    with contextlib.suppress(Error):
        _c.lib.epx_queue_destroy(handle)

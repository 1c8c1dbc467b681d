# SPDX-License-Identifier: MIT
"""What C made for an object is released when that dies."""

import os
import threading
import weakref
from typing import Any, Callable

# .in_queue: this thread is a queue's, and runs a function of Python's.
here = threading.local()


def at_end_of(
    owner: Any, release: Callable[..., None], *args: Any
) -> "weakref.finalize[..., Any]":
    """Calls ``release(*args)`` when ``owner`` dies, not at exit.

    A process that was forked off has copies of the objects but not of the
    threads behind them: what dies there releases nothing.
    """
    end = weakref.finalize(owner, _in_process, os.getpid(), release, *args)
    end.atexit = False
    return end


def _in_process(
    process_id: int, release: Callable[..., None], *args: Any
) -> None:
    if os.getpid() != process_id:
        return
    if getattr(here, "in_queue", False):
        # Garbage may be found anywhere, but to release it may mean to wait
        # for the very queue that this thread has to serve.
        threading.Thread(target=release, args=args).start()
        return
    release(*args)

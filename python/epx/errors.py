# SPDX-License-Identifier: MIT
"""What calls raise: the statuses of the C library, grouped by what is hurt."""

import enum


class Status(enum.IntEnum):
    """Values of ``epx_status_t``."""

    OK = 0
    # the call: nothing has changed, it can be made again, corrected
    ERR_NULL = -1
    ERR_INVALID = -2
    ERR_SHAPE = -3
    ERR_DTYPE = -4
    ERR_EXPERT = -5
    ERR_TOO_SMALL = -6
    ERR_WRONG_GROUP = -7
    ERR_STATE = -8
    ERR_UNSUPPORTED = -9
    ERR_ENVIRONMENT = -10
    # resources: nothing has changed
    ERR_NO_MEMORY = -20
    ERR_HEAP_EXHAUSTED = -21
    ERR_SYSTEM = -22
    # a peer: the group can no longer be used, or goes on without a rank
    ERR_TIMEOUT = -40
    ERR_PEER_LOST = -41
    ERR_PEER_DATA = -42
    ERR_AUTH = -43
    ERR_ABORTED = -44
    ERR_MASKED = -45
    # the group: every rank sees the same error
    ERR_MISMATCH = -60
    ERR_CAPACITY = -61
    ERR_BROKEN = -62


class Error(RuntimeError):
    """Any failure of EPX.

    Attributes:
        status: which one (``Status``, or an int that this package is too old
            to know).
    """

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        try:
            self.status: int = Status(status)
        except ValueError:
            self.status = status


class CallError(Error, ValueError):
    """The arguments: nothing has changed, call again, corrected."""


class UnsupportedError(CallError, NotImplementedError):
    """This build or machine cannot do it."""


class ResourceError(Error):
    """Memory or a system call: nothing has changed."""


class HeapExhaustedError(ResourceError, MemoryError):
    """The group's heap has no room for it."""


class PeerError(Error):
    """A peer was late, lost or wrong: the group is broken."""


class GroupError(Error):
    """The ranks disagree, exceed a fixed capacity, or failed earlier."""


_BY_STATUS = {
    Status.ERR_UNSUPPORTED: UnsupportedError,
    Status.ERR_HEAP_EXHAUSTED: HeapExhaustedError,
}


def error_of(status: int, sentence: str) -> Error:
    """The exception for a status that is not OK."""
    kind = _BY_STATUS.get(status)  # type: ignore[call-overload]
    if kind is None:
        if status > -20:
            kind = CallError
        elif status > -40:
            kind = ResourceError
        elif status > -60:
            kind = PeerError
        else:
            kind = GroupError
    return kind(status, sentence)

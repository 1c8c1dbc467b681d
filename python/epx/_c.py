# SPDX-License-Identifier: MIT
"""``epx/epx.h`` for ctypes, one to one.

Structs have the fields of the header in its order; ``size`` is set when one is
made.  Functions raise instead of returning a status.
"""

import ctypes
import itertools
import os
from ctypes import (
    CFUNCTYPE,
    POINTER,
    byref,
    c_char,
    c_char_p,
    c_int,
    c_int32,
    c_int64,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from typing import Any

from .errors import error_of

VERSION = (0, 1)  # major and minor that this file mirrors

MAX_TOPK = 64
MAX_BIAS = 2
SCALE_BLOCK = 128

F32, F16, BF16, F8E4M3, F8E5M2, BYTES, I32, I64 = range(1, 9)
DEVICE_CPU, DEVICE_CUDA = 0, 1
LAYOUT_RANK_MAJOR, LAYOUT_EXPERT_MAJOR, LAYOUT_EXPERT_SLOTS = 1, 2, 3
SEND_ONLY, NEW_ROUTING = 1, 2


class Struct(ctypes.Structure):
    """A struct whose first field is its size."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self.size = ctypes.sizeof(self)


ALLGATHER = CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p, c_size_t, c_int64)
DESTROY = CFUNCTYPE(None, c_void_p)
QUEUE_FUNCTION = CFUNCTYPE(None, c_void_p)


class Bootstrap(Struct):
    """``epx_bootstrap_t``"""

    _fields_ = [
        ("size", c_size_t),
        ("rank", c_int32),
        ("num_ranks", c_int32),
        ("allgather", ALLGATHER),
        ("destroy", DESTROY),
        ("context", c_void_p),
    ]


class NetworkConfig(Struct):
    """``epx_network_config_t``"""

    _fields_ = [
        ("size", c_size_t),
        ("device", c_char_p),
        ("transports", c_char_p),
        ("service_level", c_int32),
        ("traffic_class", c_int32),
        ("gid_index", c_int32),
        ("adaptive_routing", c_int32),
        ("num_lanes", c_int32),
        ("core", c_int32),
        ("wire", c_char_p),
        ("gpudirect", c_int32),
    ]


class GroupConfig(Struct):
    """``epx_group_config_t``"""

    _fields_ = [
        ("size", c_size_t),
        ("bootstrap", POINTER(Bootstrap)),
        ("device", c_int),
        ("device_ordinal", c_int32),
        ("heap_bytes", c_uint64),
        ("num_workers", c_int32),
        ("max_experts", c_int32),
        ("timeout_ns", c_uint64),
        ("lost_after_ns", c_uint64),
        ("network", POINTER(NetworkConfig)),
        ("node", c_int32),
    ]


class GroupInfo(Struct):
    """``epx_group_info_t``"""

    _fields_ = [
        ("size", c_size_t),
        ("rank", c_int32),
        ("num_ranks", c_int32),
        ("num_workers", c_int32),
        ("max_experts", c_int32),
        ("engine", c_char_p),
        ("fabric", c_char_p),
        ("heap_bytes", c_uint64),
        ("heap_free_bytes", c_uint64),
        ("heap_largest_free_bytes", c_uint64),
        ("num_nodes", c_int32),
        ("node", c_int32),
    ]


class PlanArgs(Struct):
    """``epx_plan_args_t``"""

    _fields_ = [
        ("size", c_size_t),
        ("layout", c_int),
        ("num_experts", c_int32),
        ("topk", c_int32),
        ("idx_dtype", c_int),
        ("num_tokens", c_int64),
        ("topk_idx", c_void_p),
        ("max_tokens_per_rank", c_int64),
        ("recv_capacity", c_int64),
        ("expert_alignment", c_int32),
        ("send_only_row_bytes", c_int64),
    ]


class PlanCounts(Struct):
    """``epx_plan_counts_t``"""

    _fields_ = [
        ("size", c_size_t),
        ("num_rows", c_int64),
        ("num_recv_tokens", c_int64),
        ("num_recv_rows", c_int64),
        ("first_expert", c_int32),
        ("num_local_experts", c_int32),
        ("rank_tokens", POINTER(c_int64)),
        ("expert_rows", POINTER(c_int64)),
        ("expert_offsets", POINTER(c_int64)),
        ("num_dropped", c_int64),
    ]


class DispatchArgs(Struct):
    """``epx_dispatch_args_t``"""

    _fields_ = [
        ("size", c_size_t),
        ("x", c_void_p),
        ("hidden", c_int64),
        ("dtype", c_int),
        ("quantize", c_int),
        ("scales", c_void_p),
        ("num_scales", c_int32),
        ("scale_token_stride", c_int64),
        ("scale_stride", c_int64),
        ("topk_weights", c_void_p),
        ("recv_x", c_void_p),
        ("recv_rows", c_int64),
        ("recv_scales", c_void_p),
        ("recv_scale_row_stride", c_int64),
        ("recv_scale_stride", c_int64),
        ("recv_scale_expert_stride", c_int64),
        ("recv_topk_idx", c_void_p),
        ("recv_topk_weights", c_void_p),
        ("recv_src_token", c_void_p),
        ("recv_expert_counts", c_void_p),
        ("flags", c_uint32),
        ("num_workers", c_int32),
        ("num_tokens", c_int64),
        ("topk_idx", c_void_p),
        ("recv_expert_totals", c_void_p),
        ("wait_ns", c_void_p),
        ("dropped", c_void_p),
    ]


class CombineArgs(Struct):
    """``epx_combine_args_t``"""

    _fields_ = [
        ("size", c_size_t),
        ("x", c_void_p),
        ("num_rows", c_int64),
        ("hidden", c_int64),
        ("dtype", c_int),
        ("topk_weights", c_void_p),
        ("bias", c_void_p * MAX_BIAS),
        ("out", c_void_p),
        ("recv_topk_weights", c_void_p),
        ("out_topk_weights", c_void_p),
        ("flags", c_uint32),
        ("num_workers", c_int32),
        ("wait_ns", c_void_p),
        ("quantize", c_int),
    ]


class LibraryInfo(Struct):
    """``epx_library_info_t``"""

    _fields_ = [
        ("size", c_size_t),
        ("version", c_char_p),
        ("engines", POINTER(c_char_p)),
        ("fabrics", POINTER(c_char_p)),
        ("cpu_isa", c_char_p),
        ("num_cores", c_int32),
    ]


class DeviceInfo(Struct):
    """``epx_device_info_t``"""

    _fields_ = [
        ("size", c_size_t),
        ("num_devices", c_int32),
        ("num_workers", c_int32),
        ("compute_major", c_int32),
        ("compute_minor", c_int32),
        ("memory_bytes", c_uint64),
        ("name", c_char * 96),
        ("pci", c_char * 16),
        ("fabrics", c_char_p * 8),
        ("reachable_devices", c_uint64),
        ("fast_devices", c_uint64),
    ]


# Name in C -> class, for whoever wants to compare them with the header.
STRUCTS = {
    "epx_bootstrap_t": Bootstrap,
    "epx_network_config_t": NetworkConfig,
    "epx_group_config_t": GroupConfig,
    "epx_group_info_t": GroupInfo,
    "epx_plan_args_t": PlanArgs,
    "epx_plan_counts_t": PlanCounts,
    "epx_dispatch_args_t": DispatchArgs,
    "epx_combine_args_t": CombineArgs,
    "epx_library_info_t": LibraryInfo,
    "epx_device_info_t": DeviceInfo,
}

# Functions that return a status, and what they take.
_CALLS = {
    "epx_bootstrap_env_create": [c_uint64, POINTER(POINTER(Bootstrap))],
    "epx_bootstrap_threads_create": [c_int32, POINTER(POINTER(Bootstrap))],
    "epx_group_create": [POINTER(GroupConfig), POINTER(c_void_p)],
    "epx_group_destroy": [c_void_p],
    "epx_group_abort": [c_void_p],
    "epx_group_mask": [c_void_p, POINTER(c_int32), c_int32],
    "epx_group_masked": [c_void_p, POINTER(c_int32)],
    "epx_group_status": [c_void_p],
    "epx_group_query": [c_void_p, POINTER(GroupInfo)],
    "epx_mem_alloc": [c_void_p, c_uint64, POINTER(c_void_p)],
    "epx_mem_free": [c_void_p, c_void_p],
    "epx_queue_create": [c_void_p, POINTER(c_void_p)],
    "epx_queue_destroy": [c_void_p],
    "epx_queue_submit": [c_void_p, QUEUE_FUNCTION, c_void_p],
    "epx_queue_synchronize": [c_void_p],
    "epx_plan_create": [
        c_void_p,
        POINTER(PlanArgs),
        c_void_p,
        POINTER(c_void_p),
    ],
    "epx_plan_update": [c_void_p, c_int64, c_void_p, c_void_p],
    "epx_plan_counts": [c_void_p, POINTER(PlanCounts)],
    "epx_plan_destroy": [c_void_p],
    "epx_dispatch": [c_void_p, POINTER(DispatchArgs), c_void_p],
    "epx_combine": [c_void_p, POINTER(CombineArgs), c_void_p],
    "epx_complete": [c_void_p, c_void_p],
    "epx_library_query": [POINTER(LibraryInfo)],
    "epx_device_query": [c_int, c_int32, POINTER(DeviceInfo)],
    "epx_local_experts": [
        c_int32,
        c_int32,
        c_int32,
        POINTER(c_int32),
        POINTER(c_int32),
    ],
}


def _open() -> ctypes.CDLL:
    """The library beside this file, else the one the system has."""
    own = os.path.join(os.path.dirname(os.path.abspath(__file__)), LIBRARY)
    return ctypes.CDLL(own if os.path.exists(own) else LIBRARY)


def _checked(status: int, *_: object) -> None:
    """Raises for what a function returned."""
    if status != 0:
        raise error_of(status, lib.epx_last_error().decode())


def _bind(library: ctypes.CDLL) -> None:
    library.epx_last_error.restype = c_char_p
    library.epx_last_error.argtypes = []
    library.epx_status_string.restype = c_char_p
    library.epx_status_string.argtypes = [c_int]
    library.epx_dtype_size.restype = c_size_t
    library.epx_dtype_size.argtypes = [c_int]
    library.epx_bootstrap_destroy.restype = None
    library.epx_bootstrap_destroy.argtypes = [POINTER(Bootstrap)]
    for name, arguments in _CALLS.items():
        function = getattr(library, name)
        function.restype = c_int
        function.argtypes = arguments
        function.errcheck = _checked


def _check_version() -> str:
    info = LibraryInfo()
    lib.epx_library_query(byref(info))
    version = info.version.decode()
    if tuple(int(it) for it in version.split(".")[:2]) != VERSION:
        wanted = ".".join(str(it) for it in VERSION)
        raise ImportError(
            f"libepx is version {version}, but this package needs {wanted}"
        )
    return version


LIBRARY = "libepx.so.0"
lib = _open()
_bind(lib)
version = _check_version()


def values(struct: Struct) -> "dict[str, Any]":
    """The fields of a struct that was filled in, but for its size."""
    return {
        name: _value(getattr(struct, name)) for name, *_ in struct._fields_[1:]
    }


def _value(field: Any) -> Any:
    """A number as it is; strings, and NULL-terminated arrays of them."""
    if isinstance(field, int):
        return field
    if isinstance(field, bytes):
        return field.decode()
    strings = itertools.takewhile(lambda it: it is not None, field)
    return [it.decode() for it in strings]

# SPDX-License-Identifier: MIT
"""What the library and the machine can do."""

import ctypes
from typing import List, NamedTuple

from . import _c


class LibraryInfo(NamedTuple):
    """``epx_library_info_t``"""

    version: str
    engines: List[str]
    fabrics: List[str]
    cpu_isa: str
    num_cores: int


class DeviceInfo(NamedTuple):
    """``epx_device_info_t``"""

    num_devices: int
    num_workers: int
    compute_major: int
    compute_minor: int
    memory_bytes: int
    name: str
    pci: str
    fabrics: List[str]
    reachable_devices: int
    fast_devices: int


def library_info() -> LibraryInfo:
    """What this build is made of."""
    info = _c.LibraryInfo()
    _c.lib.epx_library_query(ctypes.byref(info))
    return LibraryInfo(**_c.values(info))


def device_info(device: str = "cpu", ordinal: int = 0) -> DeviceInfo:
    """A device: "cpu", or "cuda", which starts CUDA in this process.

    ``epx.UnsupportedError`` tells what is missing for CUDA.
    """
    kinds = {"cpu": _c.DEVICE_CPU, "cuda": _c.DEVICE_CUDA}
    if device not in kinds:
        raise ValueError(f"device is {device!r}; allowed are cpu and cuda")
    info = _c.DeviceInfo()
    _c.lib.epx_device_query(kinds[device], ordinal, ctypes.byref(info))
    return DeviceInfo(**_c.values(info))

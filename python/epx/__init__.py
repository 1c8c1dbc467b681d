# SPDX-License-Identifier: MIT
"""EPX: dispatch and combine of Mixture-of-Experts tokens between ranks.

A thin layer over the C library, for PyTorch's tensors and NumPy's arrays:

    group = epx.Group.from_torch()
    plan = group.plan(topk_idx, num_experts, "EXPERT_MAJOR")
    received = plan.dispatch(x)
    ... the local experts ...
    out = plan.combine(received.x, topk_weights=topk_weights).x

The contract of each call is in ``epx/epx.h``.
"""

from . import bootstrap
from ._c import version as __version__
from .errors import (
    CallError,
    Error,
    GroupError,
    HeapExhaustedError,
    PeerError,
    ResourceError,
    Status,
    UnsupportedError,
)
from .group import Group, GroupInfo, Network, local_experts
from .library import DeviceInfo, LibraryInfo, device_info, library_info
from .plan import Combined, Counts, Layout, Plan, Quantize, Received
from .streams import Queue

__all__ = [
    "CallError",
    "Combined",
    "Counts",
    "DeviceInfo",
    "Error",
    "Group",
    "GroupError",
    "GroupInfo",
    "HeapExhaustedError",
    "Layout",
    "LibraryInfo",
    "Network",
    "PeerError",
    "Plan",
    "Quantize",
    "Queue",
    "Received",
    "ResourceError",
    "Status",
    "UnsupportedError",
    "__version__",
    "bootstrap",
    "device_info",
    "library_info",
    "local_experts",
]

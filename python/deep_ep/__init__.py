# SPDX-License-Identifier: MIT
"""DeepEP's names over EPX: what imports ``deep_ep`` runs unchanged.

``Buffer`` is DeepEP's first interface, ``ElasticBuffer`` its second.  Tensors
may be on a card or on the CPU, over a process group of any backend.  See
docs/python.md for what differs.
"""

import epx
import torch

from .buffer import Buffer
from .config import Config
from .elastic import ElasticBuffer, EPHandle
from .event import EventHandle, EventOverlap

# Of the interfaces; after the plus sign it is EPX's own.
__version__ = f"2.1.0+epx{epx.__version__}"

topk_idx_t = torch.int64

__all__ = [
    "Buffer",
    "Config",
    "EPHandle",
    "ElasticBuffer",
    "EventHandle",
    "EventOverlap",
    "topk_idx_t",
]

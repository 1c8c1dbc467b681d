# SPDX-License-Identifier: MIT
"""Where frameworks look for the events, too."""

from ..event import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]

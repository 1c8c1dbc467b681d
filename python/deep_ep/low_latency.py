# SPDX-License-Identifier: MIT
"""Low-latency calls: fixed shapes, one plan refreshed for each batch.

Two slots per shape take turns.  A slot keeps its plan, what the library needs
to be told of it, and the memory that is received into, so that a call does
little more than to make one call of C, and can be captured.  For that alone
this module goes below epx's own calls.
"""

import ctypes
from typing import Any, Callable, Dict, List, Optional, Tuple, Union

import epx
import torch
from epx import _c
from epx.plan import num_scales_of

from .config import round_up
from .event import EventOverlap
from .lane import Lane, Lanes

Rows = Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]
Hook = Optional[Callable[[], None]]
_Tensors = Tuple[Optional[torch.Tensor], ...]
_NEW_ROUTING_SENT = _c.NEW_ROUTING | _c.SEND_ONLY
_LOGFMT = int(epx.Quantize.LOGFMT10)
_NUM_SLOTS = 2
_ALIGNMENT = 2 << 20
_SLACK = 32 << 20
_BESIDE_ROW = 1024  # what may travel with a row: indices, weights, padding


def size_hint(
    max_tokens: int, hidden: int, num_ranks: int, num_experts: int
) -> int:
    """Bytes of heap that the two slots of a shape need."""
    row = 2 * hidden + 4 * num_scales_of(hidden, False)
    slots = -(-num_experts // num_ranks) * num_ranks * max_tokens
    # Received rows and outputs of each slot, and one block to stage outputs
    # in; the rows of each source, twice in each slot's plan.
    wanted = slots * (2 * row + 3 * 2 * hidden)
    wanted += 2 * _NUM_SLOTS * num_ranks * max_tokens * (row + _BESIDE_ROW)
    return round_up(wanted + _SLACK, _ALIGNMENT)


class _Mode:
    """The arguments of a dispatch of one format, and where it receives."""

    def __init__(self, slot: "_Slot", quantize: epx.Quantize) -> None:
        plan, hidden = slot.plan, slot.hidden
        num_local, num_slots = plan.num_local_experts, plan.slots_per_expert
        self.scales: Optional[torch.Tensor] = None
        kind = torch.float8_e4m3fn if quantize else torch.bfloat16
        self.x = slot.memory((num_local, num_slots, hidden), kind)
        self.args = _c.DispatchArgs(
            hidden=hidden,
            dtype=_c.BF16,
            quantize=quantize,
            recv_x=self.x.data_ptr(),
            recv_rows=num_local * num_slots,
        )
        if quantize:
            packed = quantize == epx.Quantize.F8E4M3_UE8M0
            num_scales = num_scales_of(hidden, packed)
            columns = slot.memory(
                (num_local, num_scales, num_slots),
                torch.int32 if packed else torch.float32,
            )
            self.scales = columns.transpose(1, 2)
            self.args.recv_scales = columns.data_ptr()
            self.args.recv_scale_row_stride = 1
            self.args.recv_scale_stride = num_slots
            self.args.recv_scale_expert_stride = num_scales * num_slots

    def received(self) -> Rows:
        """New tensors, so that a caller may dispose of them."""
        if self.scales is None:
            return self.x.detach()
        return self.x.detach(), self.scales.detach()


class _Slot:
    """One of those that take turns for batches of a shape."""

    def __init__(
        self,
        lane: Lane,
        max_tokens: int,
        num_experts: int,
        hidden: int,
        routing: torch.Tensor,
    ) -> None:
        self.lane = lane
        self.hidden = hidden
        self.turn = 0  # which batch the plan knows
        self.plan = _make_plan(
            lane.group, max_tokens, num_experts, hidden, routing[:0]
        )
        self._modes: Dict[epx.Quantize, _Mode] = {}
        self._combine_buffer: Optional[torch.Tensor] = None
        self.combine_args = _c.CombineArgs(
            num_rows=self.plan.num_local_experts * self.plan.slots_per_expert,
            hidden=hidden,
            dtype=_c.BF16,
        )

    def memory(
        self, shape: Tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """A tensor for as long as the slot lives."""
        group = self.lane.group
        found = group.memory.array(shape, dtype, staged=False)
        if found is None:
            found = torch.empty(shape, dtype=dtype, device=group.device)
        return found

    def mode(self, quantize: epx.Quantize) -> _Mode:
        """The arguments of a format; its memory is taken when first used."""
        made = self._modes.get(quantize)
        if made is None:
            made = self._modes[quantize] = _Mode(self, quantize)
        return made

    def combine_buffer(self) -> torch.Tensor:
        """Memory for the experts' outputs, which peers read in place."""
        if self._combine_buffer is None:
            shape = (
                self.plan.num_local_experts,
                self.plan.slots_per_expert,
                self.hidden,
            )
            self._combine_buffer = self.memory(shape, torch.bfloat16)
        return self._combine_buffer


class LowLatencyHandle:
    """What a dispatch leaves for its combine.

    It is good until the second next dispatch of its shape.
    """

    def __init__(self, slot: _Slot, num_tokens: int) -> None:
        self._slot = slot
        self._turn = slot.turn
        self.num_tokens = num_tokens

    def slot(self) -> _Slot:
        """The slot, if it has not been taken for another batch."""
        if self._slot.turn != self._turn:
            raise RuntimeError(
                "the handle is too old: it is good until the second next "
                "low_latency_dispatch of its shape"
            )
        return self._slot

    def combine_buffer(self) -> torch.Tensor:
        """See ``Buffer.get_next_low_latency_combine_buffer``."""
        return self.slot().combine_buffer().detach()


class LowLatency:
    """The low-latency calls of a buffer."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._slots: Dict[Any, List[_Slot]] = {}

    def destroy(self) -> None:
        """Lets go of all slots."""
        self._slots.clear()

    def dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        max_tokens: int,
        num_experts: int,
        totals: Optional[torch.Tensor],
        waits: Optional[torch.Tensor],
        use_fp8: bool,
        round_scale: bool,
        use_ue8m0: bool,
        is_async: bool,
        with_hook: bool,
    ) -> Tuple[Rows, torch.Tensor, LowLatencyHandle, EventOverlap, Hook]:
        """See ``Buffer.low_latency_dispatch``."""
        assert not (is_async and with_hook), "a hook or an event, not both"
        assert round_scale or not use_ue8m0, "use_ue8m0 needs round_scale"
        lane = self._lanes.of(x)
        num_tokens, hidden = _check_batch(x, topk_idx, max_tokens)
        slot = self._next_slot(lane, max_tokens, num_experts, hidden, topk_idx)
        mode = slot.mode(_quantize(use_fp8, round_scale, use_ue8m0))
        num_local = slot.plan.num_local_experts
        counts = x.new_empty(num_local, dtype=torch.int32)
        args = mode.args
        args.x = x.data_ptr()
        args.num_tokens = num_tokens
        args.topk_idx = topk_idx.data_ptr()
        args.recv_expert_counts = counts.data_ptr()
        args.recv_expert_totals = _stats_pointer(
            "cumulative_local_expert_recv_stats",
            totals,
            num_local,
            torch.int32,
        )
        args.wait_ns = _stats_pointer(
            "dispatch_wait_recv_cost_stats",
            waits,
            lane.group.num_ranks,
            torch.int64,
        )
        args.flags = _NEW_ROUTING_SENT if with_hook else _c.NEW_ROUTING
        used = (x, topk_idx, counts, totals, waits)
        on, event = _run(slot, _c.lib.epx_dispatch, args, is_async, used)
        hook = _make_hook(slot, on, used) if with_hook else None
        return (
            mode.received(),
            counts,
            LowLatencyHandle(slot, num_tokens),
            event,
            hook,
        )

    def combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: LowLatencyHandle,
        use_logfmt: bool,
        zero_copy: bool,
        is_async: bool,
        with_hook: bool,
        out: Optional[torch.Tensor],
        waits: Optional[torch.Tensor],
    ) -> Tuple[torch.Tensor, EventOverlap, Hook]:
        """See ``Buffer.low_latency_combine``."""
        assert not (is_async and with_hook), "a hook or an event, not both"
        slot = handle.slot()
        shape = (handle.num_tokens, slot.hidden)
        if out is None:
            out = x.new_empty(shape, dtype=torch.bfloat16)
        if zero_copy:
            x = slot.combine_buffer()
        _check_combine(slot, x, topk_idx, topk_weights, out, shape)
        args = slot.combine_args
        args.x = x.data_ptr()
        args.topk_weights = topk_weights.data_ptr()
        args.out = out.data_ptr()
        args.wait_ns = _stats_pointer(
            "combine_wait_recv_cost_stats",
            waits,
            slot.lane.group.num_ranks,
            torch.int64,
        )
        args.flags = _c.SEND_ONLY if with_hook else 0
        args.quantize = _LOGFMT if use_logfmt else 0
        used = (x, topk_weights, out, waits)
        on, event = _run(slot, _c.lib.epx_combine, args, is_async, used)
        hook = _make_hook(slot, on, used) if with_hook else None
        return out, event, hook

    def _next_slot(
        self,
        lane: Lane,
        max_tokens: int,
        num_experts: int,
        hidden: int,
        topk_idx: torch.Tensor,
    ) -> _Slot:
        key = (
            lane,
            max_tokens,
            num_experts,
            hidden,
            topk_idx.shape[1],
            topk_idx.dtype,
        )
        slots = self._slots.get(key)
        if slots is None:
            if lane.is_capturing():
                raise RuntimeError(
                    "the first low_latency_dispatch of a shape cannot be "
                    "captured in a graph: make one before"
                )
            lane.settle()  # plans are made in the call
            slots = self._slots[key] = [
                _Slot(lane, max_tokens, num_experts, hidden, topk_idx)
                for _ in range(_NUM_SLOTS)
            ]
        slot = slots.pop(0)
        slots.append(slot)
        slot.turn += 1
        return slot


def unsupported(what: str) -> epx.Error:
    """The error for what is DeepEP's and not yet EPX's."""
    return epx.UnsupportedError(
        epx.Status.ERR_UNSUPPORTED, f"{what} is not supported by this version"
    )


def _run(
    slot: _Slot, call: Any, args: _c.Struct, is_async: bool, used: _Tensors
) -> Tuple[Optional[int], EventOverlap]:
    """Makes a call of C; returns its ``epx_stream_t`` and its event."""
    lane, plan = slot.lane, slot.plan.handle
    if not is_async:
        on = lane.current_stream()
        call(plan, ctypes.byref(args), on)
        return on, EventOverlap()
    with lane.operation(is_async=True) as run:
        on = lane.group.stream_handle(run.stream)
        call(plan, ctypes.byref(args), on)
        run.uses(used)
    return on, EventOverlap(run.event)


def _make_hook(
    slot: _Slot, on: Optional[int], used: _Tensors
) -> Callable[[], None]:
    """What receives, on the stream of the call that has sent.

    It may be called from another thread, and under another current stream.
    """
    kept = [used]  # for as long as the operation is open

    def hook() -> None:
        slot.lane.settle()
        _c.lib.epx_complete(slot.plan.handle, on)
        kept.clear()

    return hook


def _make_plan(
    group: epx.Group,
    max_tokens: int,
    num_experts: int,
    hidden: int,
    no_routing: torch.Tensor,
) -> epx.Plan:
    """A plan whose send-only dispatches wait for nobody, where there is such.

    Without, they wait until their peers have entered theirs.
    """

    def make(send_only_row_bytes: int) -> epx.Plan:
        return group.plan(
            no_routing.contiguous(),
            num_experts,
            epx.Layout.EXPERT_SLOTS,
            max_tokens_per_rank=max_tokens,
            send_only_row_bytes=send_only_row_bytes,
        )

    try:
        return make(max(2 * hidden, hidden + 4 * num_scales_of(hidden, False)))
    except epx.UnsupportedError:  # of a row too wide for the card
        return make(0)


def _stats_pointer(
    name: str, stats: Optional[torch.Tensor], count: int, dtype: torch.dtype
) -> Optional[int]:
    """The address of a tensor that is added to, if there is one."""
    if stats is None:
        return None
    if (
        stats.shape != (count,)
        or stats.dtype != dtype
        or not stats.is_contiguous()
    ):
        raise ValueError(
            f"{name} is {list(stats.shape)} of {stats.dtype}; it must be "
            f"[{count}] of {dtype}, contiguous"
        )
    return stats.data_ptr()


def _quantize(
    use_fp8: bool, round_scale: bool, use_ue8m0: bool
) -> epx.Quantize:
    if not use_fp8:
        return epx.Quantize.NONE
    if use_ue8m0:
        return epx.Quantize.F8E4M3_UE8M0
    if round_scale:
        return epx.Quantize.F8E4M3_POW2
    return epx.Quantize.F8E4M3_F32


def _check_batch(
    x: torch.Tensor, topk_idx: torch.Tensor, max_tokens: int
) -> Tuple[int, int]:
    num_tokens, hidden = x.shape
    if x.dtype != torch.bfloat16:
        raise ValueError(f"x is of {x.dtype}; it must be of torch.bfloat16")
    if num_tokens > max_tokens:
        raise ValueError(
            f"x has {num_tokens} tokens, more than "
            f"num_max_dispatch_tokens_per_rank, {max_tokens}"
        )
    if topk_idx.dim() != 2 or topk_idx.shape[0] != num_tokens:
        raise ValueError(
            f"topk_idx is {list(topk_idx.shape)}; it must be [{num_tokens}, K]"
        )
    if not (x.is_contiguous() and topk_idx.is_contiguous()):
        raise ValueError("x and topk_idx must be contiguous")
    return num_tokens, hidden


def _check_combine(
    slot: _Slot,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    out: torch.Tensor,
    shape: Tuple[int, int],
) -> None:
    plan = slot.plan
    rows = (plan.num_local_experts, plan.slots_per_expert, slot.hidden)
    batch = (shape[0], plan.topk)
    wanted = (
        ("x", x, rows, torch.bfloat16),
        ("topk_idx", topk_idx, batch, plan.idx_dtype),
        ("topk_weights", topk_weights, batch, torch.float32),
        ("out", out, shape, torch.bfloat16),
    )
    for name, tensor, extents, dtype in wanted:
        if tensor.shape != extents or tensor.dtype != dtype:
            raise ValueError(
                f"{name} is {list(tensor.shape)} of {tensor.dtype}; "
                f"it must be {list(extents)} of {dtype}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous")

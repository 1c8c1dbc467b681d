# SPDX-License-Identifier: MIT
"""Plans: the routing of one batch, and what moves by it."""

import contextlib
import ctypes
import enum
import math
from typing import (
    TYPE_CHECKING,
    Any,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Union,
)

from . import _c
from .arrays import (
    dense,
    dtype_code,
    is_tensor,
    of_type,
    pointer,
    sibling_dtype,
    strides,
)
from .errors import Error
from .lifetime import at_end_of
from .memory import ordinary
from .streams import Queue

if TYPE_CHECKING:
    from .group import Group


class Layout(enum.IntEnum):
    """How received rows lie: see docs/design.md for drawings."""

    RANK_MAJOR = _c.LAYOUT_RANK_MAJOR
    EXPERT_MAJOR = _c.LAYOUT_EXPERT_MAJOR
    EXPERT_SLOTS = _c.LAYOUT_EXPERT_SLOTS


class Quantize(enum.IntEnum):
    """What becomes of bf16 rows on their way: see ``epx.h``.

    FP8 is for dispatch, LOGFMT10 for combine.
    """

    NONE = 0
    F8E4M3_F32 = 1
    F8E4M3_POW2 = 2
    F8E4M3_UE8M0 = 3
    LOGFMT10 = 4


class Counts(NamedTuple):
    """``epx_plan_counts_t``, copied."""

    num_rows: int
    num_recv_tokens: int
    num_recv_rows: int
    first_expert: int
    num_local_experts: int
    rank_tokens: List[int]
    expert_rows: List[int]
    expert_offsets: List[int]
    num_dropped: int


class Received(NamedTuple):
    """What a dispatch brings; None for what was not asked for."""

    x: Any
    scales: Any
    topk_idx: Any
    topk_weights: Any
    src_token: Any
    expert_counts: Any


class Combined(NamedTuple):
    """What a combine brings; None for what was not asked for."""

    x: Any
    topk_weights: Any


class Plan:
    """``epx_plan_t``; made by ``Group.plan``.

    Calls on one plan must not overlap.  ``num_tokens`` and ``topk`` are those
    of the routing.
    """

    def __init__(
        self,
        group: "Group",
        topk_idx: Any,
        num_experts: int,
        layout: Layout,
        *,
        max_tokens_per_rank: int,
        recv_capacity: int,
        expert_alignment: int,
        send_only_row_bytes: int,
        stream: Any,
    ) -> None:
        routing = dense("topk_idx", topk_idx, (None, None))
        of_type("topk_idx", topk_idx, _c.I32, _c.I64)
        self.group = group
        self.num_experts = num_experts
        self.layout = layout
        self.max_tokens_per_rank = max_tokens_per_rank
        self.recv_capacity = recv_capacity
        self.num_tokens, self.topk = topk_idx.shape
        self.idx_dtype = topk_idx.dtype
        self.first_expert, self.num_local_experts = group.local_experts(
            num_experts
        )
        self._open: Tuple[Any, ...] = ()  # arrays of a send-only operation
        args = _c.PlanArgs(
            layout=layout,
            num_experts=num_experts,
            topk=self.topk,
            idx_dtype=dtype_code(topk_idx.dtype),
            num_tokens=self.num_tokens,
            topk_idx=routing,
            max_tokens_per_rank=max_tokens_per_rank,
            recv_capacity=recv_capacity,
            expert_alignment=expert_alignment,
            send_only_row_bytes=send_only_row_bytes,
        )
        made = ctypes.c_void_p()
        on = group.stream_handle(stream)
        group.retrying(
            lambda: _c.lib.epx_plan_create(
                group.handle, ctypes.byref(args), on, ctypes.byref(made)
            )
        )
        self.handle: Optional[int] = made.value
        self._end = at_end_of(self, _destroy, group, made.value)
        self._keep(stream, topk_idx)

    def update(self, topk_idx: Any, stream: Any = None) -> None:
        """New routing.  Collective, stream order."""
        before = self.num_tokens
        routing = self._new_routing(topk_idx)
        on = self.group.stream_handle(stream)
        try:
            _c.lib.epx_plan_update(self.handle, self.num_tokens, routing, on)
        except Error:
            self.num_tokens = before
            raise
        self._keep(stream, topk_idx)

    def _new_routing(self, topk_idx: Any) -> int:
        """The address of routing that this plan can take."""
        of_type("topk_idx", topk_idx, dtype_code(self.idx_dtype))
        routing = dense("topk_idx", topk_idx, (None, self.topk))
        self.num_tokens = topk_idx.shape[0]
        return routing

    def counts(self) -> Counts:
        """Blocks until every peer has told its counts.  Local."""
        found = _c.PlanCounts()
        _c.lib.epx_plan_counts(self.handle, ctypes.byref(found))
        num_local = found.num_local_experts
        return Counts(
            found.num_rows,
            found.num_recv_tokens,
            found.num_recv_rows,
            found.first_expert,
            num_local,
            found.rank_tokens[: self.group.num_ranks],
            found.expert_rows[:num_local],
            found.expert_offsets[: num_local + 1],
            found.num_dropped,
        )

    @property
    def slots_per_expert(self) -> int:
        """EXPERT_SLOTS: rows that each local expert has."""
        return self.group.num_ranks * self.max_tokens_per_rank

    @property
    def is_fixed(self) -> bool:
        """Whether received rows are of one extent, whatever the routing."""
        return self.layout is Layout.EXPERT_SLOTS or self.recv_capacity > 0

    def lead(self, num_rows: Optional[int] = None) -> Tuple[int, ...]:
        """The extents of received rows; waits when they are not fixed."""
        if self.layout is Layout.EXPERT_SLOTS:
            return (self.num_local_experts, self.slots_per_expert)
        if num_rows is None:
            num_rows = self.recv_capacity or self.counts().num_rows
        return (num_rows,)

    def dispatch(
        self,
        x: Any,
        *,
        topk_idx: Any = None,
        scales: Any = None,
        quantize: Union[Quantize, str] = Quantize.NONE,
        topk_weights: Any = None,
        with_topk_idx: bool = False,
        with_src_token: bool = False,
        with_expert_counts: bool = False,
        recv_x: Any = None,
        recv_scales: Any = None,
        recv_expert_totals: Any = None,
        wait_ns: Any = None,
        dropped: Any = None,
        num_rows: Optional[int] = None,
        send_only: bool = False,
        num_workers: int = 0,
        stream: Any = None,
    ) -> Received:
        """Sends this rank's tokens and receives those for its experts.

        Args:
            x: [T, H], dense.
            topk_idx: [T, K], new routing, as ``update`` takes it, in the same
                call; for plans of fixed rows.
            scales: [T, S] of 4 bytes each, any strides; with rows that are
                quantised already.
            quantize: what becomes of bf16 rows on their way.
            topk_weights: [T, K] of float32, to come along.
            with_topk_idx, with_src_token, with_expert_counts: ask for these.
            recv_x, recv_scales: where to receive; default: new arrays in EPX
                memory.  Scales may have any strides.
            recv_expert_totals: [L] of int32, to which are added the rows that
                arrive for each local expert.
            wait_ns: [R] of int64, to which are added the nanoseconds that this
                rank waits for each.
            dropped: [T, K] of uint8, to be 1 for entries that count as -1
                since their expert's rank is masked, else 0.
            num_rows: rows to receive, for a caller that knows the counts.
            send_only: only start; ``complete`` finishes.
            num_workers: threads or SMs, 0: the group's.
            stream: as in ``Group.plan``.

        Where rows are fixed, those that do not arrive have topk_idx -1 and
        weight 0, and are else undefined.
        """
        kind = _kind_of(quantize)
        hidden = x.shape[-1]
        routing = 0
        if topk_idx is not None:
            routing = self._new_routing(topk_idx)
        if recv_x is None:
            lead = self.lead(num_rows)
            arrives = sibling_dtype(x, "float8_e4m3fn") if kind else x.dtype
            recv_x = self.group.empty((*lead, hidden), arrives)
        lead = tuple(recv_x.shape[:-1])
        args = _c.DispatchArgs(
            x=dense("x", x, (self.num_tokens, None)),
            hidden=hidden,
            dtype=dtype_code(x.dtype),
            quantize=kind,
            recv_x=dense("recv_x", recv_x, (*lead, hidden)),
            recv_rows=math.prod(lead),
            flags=_flags(send_only, topk_idx is not None),
            num_workers=num_workers,
            num_tokens=self.num_tokens,
            topk_idx=routing,
        )
        weights = recv_topk_idx = src_token = counts = None
        recv_scales = self._ask_scales(args, x, scales, recv_scales, lead)
        if topk_weights is not None:
            weights = self._ask_weights(args, topk_weights, lead, stream)
        if with_topk_idx:
            recv_topk_idx = self._ask_topk_idx(args, lead, stream)
        if with_src_token:
            src_token = self.group.empty(lead, sibling_dtype(x, "int32"))
            args.recv_src_token = pointer(src_token)
        if with_expert_counts:
            counts = ordinary(  # only this rank writes them
                (self.num_local_experts,),
                sibling_dtype(x, "int32"),
                self.group.device,
            )
            args.recv_expert_counts = pointer(counts)
        if recv_expert_totals is not None:
            of_type("recv_expert_totals", recv_expert_totals, _c.I32)
            args.recv_expert_totals = dense(
                "recv_expert_totals",
                recv_expert_totals,
                (self.num_local_experts,),
            )
        received = Received(
            recv_x, recv_scales, recv_topk_idx, weights, src_token, counts
        )
        args.wait_ns = self._waits(wait_ns)
        if dropped is not None:
            of_type("dropped", dropped, _c.BYTES)
            args.dropped = dense(
                "dropped", dropped, (self.num_tokens, self.topk)
            )
        given = (x, topk_idx, scales, topk_weights, recv_expert_totals)
        used = (*given, wait_ns, dropped, received)
        self._run(_c.lib.epx_dispatch, args, stream, send_only, used)
        return received

    def _waits(self, wait_ns: Any) -> Optional[int]:
        if wait_ns is None:
            return None
        of_type("wait_ns", wait_ns, _c.I64)
        return dense("wait_ns", wait_ns, (self.group.num_ranks,))

    def _ask_scales(
        self,
        args: _c.DispatchArgs,
        x: Any,
        scales: Any,
        recv_scales: Any,
        lead: Tuple[int, ...],
    ) -> Any:
        """Where scales arrive, if any do."""
        if scales is not None:
            of_type("scales", scales, _c.F32, _c.I32)
            if len(scales.shape) != 2 or scales.shape[0] != self.num_tokens:
                raise ValueError(
                    f"scales is {list(scales.shape)}; it must be "
                    f"[{self.num_tokens}, *]"
                )
            num_scales, kind = scales.shape[1], scales.dtype
            args.num_scales = num_scales
            if self.num_tokens > 0:
                args.scales = pointer(scales)
                args.scale_token_stride, args.scale_stride = strides(scales)
        elif args.quantize:
            packed = args.quantize == Quantize.F8E4M3_UE8M0
            num_scales = num_scales_of(args.hidden, packed)
            kind = sibling_dtype(x, "int32" if packed else "float32")
        else:
            return None
        if recv_scales is None:
            recv_scales = self.group.empty((*lead, num_scales), kind)
        args.recv_scales = pointer(recv_scales)
        if args.recv_scales:
            steps = strides(recv_scales)
            args.recv_scale_row_stride, args.recv_scale_stride = steps[-2:]
            if len(steps) == 3:
                args.recv_scale_expert_stride = steps[0]
        return recv_scales

    def _ask_weights(
        self,
        args: _c.DispatchArgs,
        weights: Any,
        lead: Tuple[int, ...],
        stream: Any,
    ) -> Any:
        of_type("topk_weights", weights, _c.F32)
        shape = (self.num_tokens, self.topk)
        args.topk_weights = dense("topk_weights", weights, shape) or _NOTHING
        if self.layout is Layout.RANK_MAJOR:
            lead = (*lead, self.topk)
        recv_weights = self._filled(lead, weights.dtype, 0, stream)
        args.recv_topk_weights = pointer(recv_weights) or _NOTHING
        return recv_weights

    def _ask_topk_idx(
        self, args: _c.DispatchArgs, lead: Tuple[int, ...], stream: Any
    ) -> Any:
        topk_idx = self._filled((*lead, self.topk), self.idx_dtype, -1, stream)
        args.recv_topk_idx = pointer(topk_idx)
        return topk_idx

    def _filled(
        self, shape: Tuple[int, ...], dtype: Any, value: int, stream: Any
    ) -> Any:
        """A new array; where rows are fixed, what does not arrive is known."""
        array = self.group.empty(shape, dtype)
        if self.is_fixed:
            with self.group.computing_on(stream):
                array[...] = value
        return array

    def combine(
        self,
        x: Any,
        *,
        topk_weights: Any = None,
        bias: Sequence[Any] = (),
        recv_topk_weights: Any = None,
        out: Any = None,
        wait_ns: Any = None,
        quantize: Union[Quantize, str] = Quantize.NONE,
        send_only: bool = False,
        num_workers: int = 0,
        stream: Any = None,
    ) -> Combined:
        """Sums the rows that each of this rank's tokens has in ``x``.

        Args:
            x: rows in the plan's layout, as dispatch gave them; one hop when
                they lie in EPX memory.
            topk_weights: [T, K] of float32; not in RANK_MAJOR.
            bias: at most two of [T, H], which start the sum.
            recv_topk_weights: shaped as dispatch gave them, to be summed into
                the result's ``topk_weights`` [T, K].
            out: [T, H], where to write; default: a new, ordinary array.
            quantize: NONE, or LOGFMT10 for bf16 rows.
            wait_ns, send_only, num_workers, stream: as in ``dispatch``.
        """
        hidden = x.shape[-1]
        num_rows = math.prod(x.shape[:-1])
        code = dtype_code(x.dtype)
        shape = (self.num_tokens, hidden)
        if out is None:
            out = ordinary(shape, x.dtype, self.group.device)
        args = _c.CombineArgs(
            x=dense("x", x, (None,) * (len(x.shape) - 1) + (hidden,)),
            num_rows=num_rows,
            hidden=hidden,
            dtype=code,
            out=dense("out", of_type("out", out, code), shape),
            flags=_flags(send_only),
            num_workers=num_workers,
            wait_ns=self._waits(wait_ns),
            quantize=_kind_of(quantize),
        )
        if topk_weights is not None:
            of_type("topk_weights", topk_weights, _c.F32)
            args.topk_weights = dense(
                "topk_weights", topk_weights, (self.num_tokens, self.topk)
            )
        if len(bias) > _c.MAX_BIAS:
            raise ValueError(
                f"bias has {len(bias)} arrays; at most {_c.MAX_BIAS} are added"
            )
        for i, rows in enumerate(bias):
            args.bias[i] = dense("bias", of_type("bias", rows, code), shape)
        summed = None
        if recv_topk_weights is not None:
            summed = self._ask_sums(args, x, recv_topk_weights)
        combined = Combined(out, summed)
        used = (x, topk_weights, *bias, recv_topk_weights, wait_ns, combined)
        self._run(_c.lib.epx_combine, args, stream, send_only, used)
        return combined

    def _ask_sums(self, args: _c.CombineArgs, x: Any, weights: Any) -> Any:
        """Where the sums of weights come to lie."""
        of_type("recv_topk_weights", weights, _c.F32)
        shape = tuple(x.shape[:-1])
        if self.layout is Layout.RANK_MAJOR:
            shape = (*shape, self.topk)
        args.recv_topk_weights = (
            dense("recv_topk_weights", weights, shape) or _NOTHING
        )
        summed = ordinary(
            (self.num_tokens, self.topk), weights.dtype, self.group.device
        )
        args.out_topk_weights = pointer(summed) or _NOTHING
        return summed

    def complete(self, stream: Any = None) -> None:
        """The receive hook: finishes what ``send_only`` has started."""
        _c.lib.epx_complete(self.handle, self.group.stream_handle(stream))
        used, self._open = self._open, ()
        self._keep(stream, *used)

    def close(self) -> None:
        """Releases the plan; ``epx.CallError`` while a send-only operation of
        it is open."""
        if self.handle is not None:
            _c.lib.epx_plan_destroy(self.handle)
            self._end.detach()
            self.handle = None

    def _run(
        self,
        call: Any,
        args: _c.Struct,
        stream: Any,
        send_only: bool,
        used: Tuple[Any, ...],
    ) -> None:
        on = self.group.stream_handle(stream)
        self.group.retrying(lambda: call(self.handle, ctypes.byref(args), on))
        if send_only:
            self._open = used
        self._keep(stream, *used)

    def _keep(self, stream: Any, *things: Any) -> None:
        """Has arrays outlive their use in a stream that was given."""
        if isinstance(stream, Queue):
            stream.keep(self, *things)
        elif stream is not None and self.group.is_cuda:
            stream = self.group.stream_object(stream)
            for thing in things:
                for array in thing if isinstance(thing, tuple) else (thing,):
                    if is_tensor(array):
                        array.record_stream(stream)


# An address for arrays without elements: NULL would mean that none is given,
# which must be the same on every rank.
_nothing = ctypes.create_string_buffer(16)
_NOTHING = ctypes.addressof(_nothing)


def _kind_of(quantize: Union[Quantize, str]) -> Quantize:
    return Quantize[quantize] if isinstance(quantize, str) else quantize


def num_scales_of(hidden: int, packed: bool) -> int:
    """Scales of a quantised row; packed, four are in an int32."""
    num_scales = -(-hidden // _c.SCALE_BLOCK)
    return -(-num_scales // 4) if packed else num_scales


def _flags(send_only: bool, new_routing: bool = False) -> int:
    return _c.SEND_ONLY * send_only | _c.NEW_ROUTING * new_routing


def _destroy(group: "Group", handle: int) -> None:
    # One with an operation that was never completed goes with the group.
    with contextlib.suppress(Error):
        _c.lib.epx_plan_destroy(handle)

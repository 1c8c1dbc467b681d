# SPDX-License-Identifier: MIT
"""DeepEP's second interface."""

from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

import epx
import torch
from epx.plan import num_scales_of

from .buffer import Bias, Rows, bias_list, split_rows, workers
from .config import round_up
from .event import EventHandle, EventOverlap, handle_of
from .lane import Lane, Lanes, Operation
from .layout import dispatch_layout

_ALIGNMENT = 2 << 20
_TMA_ROWS = 4  # scales of 4 bytes in the 16 that TMA aligns to


class _Shape(NamedTuple):
    """What makes a plan, besides the routing."""

    num_experts: int
    num_max_tokens_per_rank: int
    expert_alignment: int
    do_expand: bool
    do_cpu_sync: bool


class EPHandle:
    """What a dispatch leaves for cached dispatches and combines.

    Attributes:
        do_expand: rows are by expert, one for each (token, expert).
        num_experts, expert_alignment, num_max_tokens_per_rank, num_sms: of the
            dispatch.
        topk_idx: [T, K], a copy unless none was wanted.
        num_recv_tokens: tokens received; rows there are room for without
            do_cpu_sync.
        num_expanded_tokens: the same of (token, expert) pairs, with padding.
        num_recv_tokens_per_expert_list: counts of the local experts, rounded
            up to expert_alignment; empty without do_cpu_sync.
        psum_num_recv_tokens_per_scaleup_rank: [R] of int32, inclusive sums of
            the tokens received from each rank.
        psum_num_recv_tokens_per_expert: [L] of int32, where each expert's rows
            end: with padding, or in expanded rows without its own.
        num_unaligned_recv_tokens_per_expert: [L] of int32.
    """

    def __init__(
        self,
        lane: Lane,
        plan: epx.Plan,
        shape: _Shape,
        num_sms: int,
        topk_idx: torch.Tensor,
    ) -> None:
        self.do_expand = shape.do_expand
        self.num_experts = shape.num_experts
        self.expert_alignment = shape.expert_alignment
        self.num_max_tokens_per_rank = shape.num_max_tokens_per_rank
        self.num_sms = num_sms
        self.topk_idx = topk_idx
        self.num_recv_tokens = 0
        self.num_expanded_tokens = 0
        self.num_recv_tokens_per_expert_list: List[int] = []
        self.psum_num_recv_tokens_per_scaleup_rank = _counters(
            lane.group.num_ranks, topk_idx
        )
        self.psum_num_recv_tokens_per_expert = _counters(
            plan.num_local_experts, topk_idx
        )
        self.num_unaligned_recv_tokens_per_expert = _counters(
            plan.num_local_experts, topk_idx
        )
        self._lane = lane
        self._plan = plan

    def _check(
        self,
        num_experts: Optional[int],
        num_max_tokens_per_rank: Optional[int],
        expert_alignment: Optional[int],
    ) -> None:
        """Whether a cached dispatch asks for what the handle is for."""
        asked = (
            ("num_experts", num_experts),
            ("num_max_tokens_per_rank", num_max_tokens_per_rank),
            ("expert_alignment", expert_alignment),
        )
        for name, value in asked:
            if value is not None and value != getattr(self, name):
                raise ValueError(
                    f"{name} is {value}; the handle was made with "
                    f"{getattr(self, name)}"
                )

    @property
    def _num_rows(self) -> int:
        return (
            self.num_expanded_tokens
            if self.do_expand
            else self.num_recv_tokens
        )

    def _set_host_counts(self, counts: epx.Counts) -> None:
        """Fills in what the host knows."""
        step = self.expert_alignment
        padded = [round_up(it, step) for it in counts.expert_rows]
        self.num_recv_tokens = counts.num_recv_tokens
        self.num_expanded_tokens = sum(padded)
        self.num_recv_tokens_per_expert_list = padded
        self._set_sums(
            torch.tensor(counts.rank_tokens, dtype=torch.int32),
            torch.tensor(counts.expert_rows, dtype=torch.int32),
        )

    def _set_sums(
        self, per_rank: torch.Tensor, per_expert: torch.Tensor
    ) -> None:
        """Fills in the tensors from the counts [R] and [L]."""
        step = self.expert_alignment
        padded = (per_expert + (step - 1)) // step * step
        ends = padded.cumsum(0, dtype=torch.int32)
        if self.do_expand:
            ends = ends - padded + per_expert
        sums = per_rank.cumsum(0, dtype=torch.int32)
        self.psum_num_recv_tokens_per_scaleup_rank.copy_(sums)
        self.psum_num_recv_tokens_per_expert.copy_(ends)
        self.num_unaligned_recv_tokens_per_expert.copy_(per_expert)


class ElasticBuffer:
    """Ranks that dispatch and combine, with the names of DeepEP's version 2.

    Attributes:
        group, rank_idx, num_ranks: of the communicator.
        num_bytes: memory that peers reach.
        num_max_tokens_per_rank: for dispatches that do not say.
        num_nvlink_ranks, num_rdma_ranks: ranks of this node, whose memory
            this one reaches; and nodes.
        num_scaleup_ranks, num_scaleout_ranks: all ranks, and 1: what goes to
            another node takes the same calls.
    """

    def __init__(
        self,
        group: Any,
        num_bytes: Optional[int] = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: Optional[float] = None,
        num_gpu_timeout_secs: Optional[float] = None,
        explicitly_destroy: bool = False,
    ) -> None:
        """Collective over the group.

        Args:
            group: a ``torch.distributed`` group of any backend.
            num_bytes: memory that peers reach; or else what follows decides.
            num_max_tokens_per_rank, hidden, num_topk, use_fp8_dispatch: of the
                batches to come.
            deterministic: always so.
            num_cpu_timeout_secs, num_gpu_timeout_secs: how long to wait for a
                peer, the longer one; default: the environment variable
                DEEP_EP_TIMEOUT_SECS, else 100.
            num_cpu_bytes, allow_hybrid_mode, allow_multiple_reduction,
                prefer_overlap_with_compute, sl_idx, num_allocated_qps: without
                meaning here.
            explicitly_destroy: only kept: a buffer that is not destroyed is
                released when nothing needs it any more, without a barrier.
        """
        if num_bytes is None:
            num_bytes = self.get_buffer_size_hint(
                group,
                num_max_tokens_per_rank,
                hidden,
                num_topk,
                use_fp8_dispatch,
            )
        given = [
            it
            for it in (num_cpu_timeout_secs, num_gpu_timeout_secs)
            if it is not None
        ]
        self._lanes = Lanes(group, None, num_bytes, max(given, default=None))
        self._exchanges: Dict[Lane, epx.Plan] = {}
        self.group = group
        self.rank_idx = self._lanes.ranks.rank
        self.num_ranks = self._lanes.ranks.num_ranks
        self.num_bytes = num_bytes
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.deterministic = deterministic
        self.allow_hybrid_mode = allow_hybrid_mode
        self.allow_multiple_reduction = allow_multiple_reduction
        self.prefer_overlap_with_compute = prefer_overlap_with_compute
        self.explicitly_destroy = explicitly_destroy
        self.num_allocated_qps = num_allocated_qps
        self.num_scaleout_ranks, self.num_scaleup_ranks = 1, self.num_ranks
        nodes = self._lanes.default.node_of_rank.tolist()
        self.num_rdma_ranks = self._lanes.default.num_nodes
        self.num_nvlink_ranks = nodes.count(nodes[self.rank_idx])
        self.scaleout_rank_idx, self.scaleup_rank_idx = 0, self.rank_idx

    def destroy(self) -> None:
        """Releases what the buffer holds.  Not collective; may be repeated."""
        self._lanes.destroy()

    @staticmethod
    def get_buffer_size_hint(
        group: Any,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
    ) -> int:
        """Bytes with which batches of this shape move in one hop.

        Room for the rows that arrive when routing is even, twice, and as much
        for what goes back.  Uneven batches work too, through a copy.
        """
        fan_out = min(num_topk, group.size()) if num_topk else group.size()
        rows = num_max_tokens_per_rank * max(fan_out, 1)
        received = 2 * hidden
        if use_fp8_dispatch:
            received = hidden + 4 * num_scales_of(hidden, False)
        beside = 16 * max(num_topk, 1)
        wanted = rows * (2 * (received + beside) + 2 * 2 * hidden)
        return round_up(wanted + _ALIGNMENT, _ALIGNMENT)

    @staticmethod
    def capture() -> EventHandle:
        """The current point of the current stream."""
        return EventHandle()

    def get_comm_stream(self) -> Any:
        """The stream of asynchronous calls, on a card."""
        return self._lanes.default.comm_stream()

    def get_physical_domain_size(self) -> Tuple[int, int]:
        """Nodes, and ranks of this one."""
        return self.num_rdma_ranks, self.num_nvlink_ranks

    def get_logical_domain_size(self) -> Tuple[int, int]:
        """Ranks of scale-out and of scale-up: 1 and all."""
        return self.num_scaleout_ranks, self.num_scaleup_ranks

    def get_theoretical_num_sms(
        self,
        num_experts: int,
        num_topk: int,
        num_scaleout_topk: int = 0,
        rdma_gbs: float = 0,
        nvlink_gbs: float = 0,
        sm_read_gbs: float = 200,
        sm_write_gbs: float = 50,
    ) -> int:
        """The SMs (on the CPU: threads) that calls use by default."""
        return self._lanes.default.group.num_workers

    def get_theoretical_num_qps(self, num_sms: int) -> int:
        """A number to hand back: there are no queue pairs."""
        return max(self.num_allocated_qps, 1)

    def barrier(
        self,
        use_comm_stream: bool = True,
        with_cpu_sync: bool = False,
        sequential: bool = True,
    ) -> None:
        """Waits on the host until all ranks are here."""
        if self._lanes.default.group.is_cuda:
            torch.cuda.synchronize()
        self._lanes.ranks.gather(None)

    def dispatch(
        self,
        x: Rows,
        topk_idx: Optional[torch.Tensor] = None,
        topk_weights: Optional[torch.Tensor] = None,
        cumulative_local_expert_recv_stats: Optional[torch.Tensor] = None,
        num_experts: Optional[int] = None,
        num_max_tokens_per_rank: Optional[int] = None,
        expert_alignment: Optional[int] = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Union[None, EventHandle, EventOverlap] = None,
        previous_event_before_epilogue: Union[
            None, EventHandle, EventOverlap
        ] = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: Optional[EPHandle] = None,
        do_handle_copy: bool = True,
        do_cpu_sync: Optional[bool] = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> Tuple[
        Rows,
        Optional[torch.Tensor],
        Optional[torch.Tensor],
        EPHandle,
        EventOverlap,
    ]:
        """Sends each token to its experts.  Collective.

        Args:
            x: [T, H] of any float type, or FP8 rows with their scales [T, S].
            topk_idx: [T, K], experts or -1; None with a handle.
            topk_weights: [T, K] of float32, to come along.
            cumulative_local_expert_recv_stats: [L] of int32, to which the
                counts are added.
            num_experts, num_max_tokens_per_rank, expert_alignment: default:
                the handle's; else the constructor's, and 1.
            num_sms: 0 for the default.
            num_qps: without meaning here.
            previous_event, async_with_compute_stream, allocate_on_comm_stream:
                as in DeepEP.
            previous_event_before_epilogue: waited for at the start, too.
            handle: of an earlier dispatch, to send other rows the same way.
            do_handle_copy: keep a copy of topk_idx.
            do_cpu_sync: the host waits for exact counts; default: True without
                a handle.  False gives the most rows that can ever come.
            do_expand: a row for each (token, expert), by expert.
            do_zero_padding: always so.
            use_tma_aligned_col_major_sf: scales column by column.

        Returns:
            rows, with scales if such were given; local topk_idx [rows, K], or
            None with do_expand; weights [rows, K], with do_expand [rows], or
            None; the handle; an event.
        """
        rows, scales = split_rows(x)
        if handle is None:
            if topk_idx is None or num_experts is None:
                raise ValueError(
                    "without a handle topk_idx and num_experts are needed"
                )
            lane = self._lanes.of(rows)
            num_sms = num_sms or lane.group.num_workers
            shape = _Shape(
                num_experts,
                num_max_tokens_per_rank or self.num_max_tokens_per_rank,
                expert_alignment or 1,
                do_expand,
                do_cpu_sync is not False,
            )
        else:
            if topk_idx is not None or do_cpu_sync:
                raise ValueError(
                    "topk_idx and do_cpu_sync are not for a dispatch with a "
                    "handle, which knows its routing and counts"
                )
            lane = handle._lane
            num_sms = num_sms or handle.num_sms
            handle._check(
                num_experts, num_max_tokens_per_rank, expert_alignment
            )
        with lane.operation(
            handle_of(previous_event),
            async_with_compute_stream,
            allocate_on_comm_stream,
            handle_of(previous_event_before_epilogue),
        ) as run:
            counts_on_device = False
            if handle is None:
                assert topk_idx is not None
                handle = self._route(
                    lane, run, shape, num_sms, topk_idx, do_handle_copy
                )
                counts_on_device = not shape.do_cpu_sync
            recv_scales = None
            if use_tma_aligned_col_major_sf and scales is not None:
                recv_scales = _scales_by_column(lane, scales, handle._num_rows)
            got = handle._plan.dispatch(
                rows,
                scales=scales,
                topk_weights=topk_weights,
                with_topk_idx=not handle.do_expand,
                with_expert_counts=counts_on_device,
                recv_scales=recv_scales,
                recv_expert_totals=cumulative_local_expert_recv_stats,
                num_rows=handle._num_rows,
                num_workers=workers(lane, num_sms),
                stream=run.stream,
            )
            if counts_on_device:
                self._count_on_device(lane, run, handle, got.expert_counts)
            run.uses(rows, scales, topk_weights, got, handle.topk_idx)
            run.uses(cumulative_local_expert_recv_stats)
        received = got.x if scales is None else (got.x, got.scales)
        return (
            received,
            got.topk_idx,
            got.topk_weights,
            handle,
            EventOverlap(run.event),
        )

    def _route(
        self,
        lane: Lane,
        run: Operation,
        shape: _Shape,
        num_sms: int,
        topk_idx: torch.Tensor,
        do_handle_copy: bool,
    ) -> EPHandle:
        """A handle with a new plan, and counts if the host waits for them."""
        if shape.num_max_tokens_per_rank == 0 and not shape.do_cpu_sync:
            raise ValueError(
                "num_max_tokens_per_rank is needed without do_cpu_sync"
            )
        most = self._most_rows(shape, topk_idx.shape[1])
        capacity = most[1] if shape.do_expand else most[0]
        layout = epx.Layout.RANK_MAJOR
        if shape.do_expand:
            layout = epx.Layout.EXPERT_MAJOR
        plan = lane.plan(
            topk_idx,
            shape.num_experts,
            layout,
            recv_capacity=0 if shape.do_cpu_sync else capacity,
            expert_alignment=shape.expert_alignment if shape.do_expand else 0,
            stream=run.stream,
        )
        run.uses(topk_idx)
        with run.computing():
            kept = topk_idx.clone() if do_handle_copy else topk_idx
            handle = EPHandle(lane, plan, shape, num_sms, kept)
            if shape.do_cpu_sync:
                handle._set_host_counts(plan.counts())
            else:
                handle.num_recv_tokens, handle.num_expanded_tokens = most
        return handle

    def _count_on_device(
        self,
        lane: Lane,
        run: Operation,
        handle: EPHandle,
        per_expert: torch.Tensor,
    ) -> None:
        """Counts for a handle without the host: ranks tell each other.

        Each sends one row to each, that says how many tokens it has sent.
        """
        told = torch.zeros(
            self.num_ranks, 4, dtype=torch.int32, device=per_expert.device
        )

        def count() -> None:
            per_rank, _, _ = dispatch_layout(
                handle.topk_idx, handle.num_experts, self.num_ranks
            )
            told[:, 0] = per_rank

        run.then(count)
        got = self._exchange(lane, run).dispatch(
            told.view(torch.uint8), num_rows=self.num_ranks, stream=run.stream
        )
        heard = got.x.view(torch.int32)
        run.then(lambda: handle._set_sums(heard[:, 0], per_expert))
        run.uses(told, got, per_expert)

    def _exchange(self, lane: Lane, run: Operation) -> epx.Plan:
        """The plan by which each rank sends one row to each."""
        plan = self._exchanges.get(lane)
        if plan is None:
            to_each = torch.arange(self.num_ranks, device=lane.group.device)
            plan = lane.plan(
                to_each.view(-1, 1),
                self.num_ranks,
                recv_capacity=self.num_ranks,
                stream=run.stream,
            )
            if not lane.is_capturing():  # else it is the graph's alone
                self._exchanges[lane] = plan
        return plan

    def _most_rows(self, shape: _Shape, num_topk: int) -> Tuple[int, int]:
        """The most tokens, and expanded rows, that a rank can receive."""
        tokens = self.num_ranks * shape.num_max_tokens_per_rank
        num_local = -(-shape.num_experts // self.num_ranks)
        step = shape.expert_alignment
        expanded = tokens * min(num_topk, num_local) + (step - 1) * num_local
        return tokens, round_up(expanded, step)

    def combine(
        self,
        x: torch.Tensor,
        handle: EPHandle,
        topk_weights: Optional[torch.Tensor] = None,
        bias: Bias = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Union[None, EventHandle, EventOverlap] = None,
        previous_event_before_epilogue: Union[
            None, EventHandle, EventOverlap
        ] = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor], EventOverlap]:
        """Sums each token's rows of all ranks, unweighted.  Collective.

        Args:
            x: rows as dispatch gave them.
            handle: of that dispatch.
            topk_weights: shaped as dispatch gave them, to be summed too.
            bias: none, one or two of [T, H] to start the sum with.
            num_sms: 0 for the dispatch's.
            num_qps: without meaning here.
            previous_event, async_with_compute_stream, allocate_on_comm_stream:
                as in DeepEP.
            previous_event_before_epilogue: waited for at the start, too.

        Returns:
            sums [T, H], sums of the weights [T, K] or None, and an event.
        """
        lane = handle._lane
        with lane.operation(
            handle_of(previous_event),
            async_with_compute_stream,
            allocate_on_comm_stream,
            handle_of(previous_event_before_epilogue),
        ) as run:
            done = handle._plan.combine(
                x,
                bias=bias_list(bias),
                recv_topk_weights=topk_weights,
                num_workers=workers(lane, num_sms or handle.num_sms),
                stream=run.stream,
            )
            run.uses(x, topk_weights, bias, done)
        return done.x, done.topk_weights, EventOverlap(run.event)


def _counters(count: int, like: torch.Tensor) -> torch.Tensor:
    return torch.empty(count, dtype=torch.int32, device=like.device)


def _scales_by_column(
    lane: Lane, scales: torch.Tensor, num_rows: int
) -> torch.Tensor:
    """Where scales [rows, S] arrive column by column, aligned for TMA."""
    step = round_up(num_rows, _TMA_ROWS)
    columns = lane.group.empty((scales.shape[1], step), scales.dtype)
    return columns[:, :num_rows].t()

# SPDX-License-Identifier: MIT
"""DeepEP's first interface."""

from typing import Any, Callable, List, Optional, Set, Tuple, Union

import epx
import torch

from .config import Config, round_up
from .event import EventHandle, EventOverlap, handle_of
from .lane import Lane, Lanes
from .layout import dispatch_layout, ranks_as_experts, tokens_per_node
from .low_latency import (
    LowLatency,
    LowLatencyHandle,
    size_hint,
    unsupported,
)

Rows = Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]
Bias = Union[None, torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]
_SCRATCH_BYTES = 64 << 20


class Handle:
    """What a dispatch leaves for cached dispatches and combines.

    May be used any number of times, in any order, also when the buffer that
    made it is gone.
    """

    def __init__(self, lane: Lane, plan: epx.Plan, num_rows: int) -> None:
        self.lane = lane
        self.plan = plan
        self.num_rows = num_rows


def split_rows(x: Rows) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """Rows, and their scales if there are any."""
    return (x[0], x[1]) if isinstance(x, tuple) else (x, None)


def bias_list(bias: Bias) -> Tuple[torch.Tensor, ...]:
    """None, one or two biases, as a tuple."""
    if bias is None:
        return ()
    return bias if isinstance(bias, tuple) else (bias,)


def workers(lane: Lane, num_sms: int) -> int:
    """What EPX takes for a number of SMs; it means nothing on the CPU."""
    return min(num_sms, lane.group.num_workers) if lane.group.is_cuda else 0


class Buffer:
    """Ranks that dispatch and combine, with DeepEP's names.

    Attributes:
        num_sms: SMs for high-throughput calls without a config.
        rank, group_size, group: of the communicator.
        num_nvl_bytes, num_rdma_bytes: as given; their sum is the heap of a
            card.
        low_latency_mode: as given; both kinds of calls always work.
    """

    num_sms: int = 20

    def __init__(
        self,
        group: Any,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
        use_fabric: bool = False,
        *,
        timeout_secs: Optional[float] = None,
    ) -> None:
        """Collective over the group.

        Args:
            group: a ``torch.distributed`` group of any backend.
            num_nvl_bytes, num_rdma_bytes: memory that peers reach.
            low_latency_mode: only kept.
            num_qps_per_rank, allow_nvlink_for_low_latency_mode, allow_mnnvl,
                use_fabric: without meaning here.
            explicitly_destroy: only kept: a buffer that is not destroyed is
                released when nothing needs it any more, without a barrier.
            enable_shrink: only kept.
            comm: an mpi4py communicator, in place of the group.
            timeout_secs: how long to wait for a peer; default: the environment
                variable DEEP_EP_TIMEOUT_SECS, else 100.
        """
        self._lanes = Lanes(
            group, comm, num_nvl_bytes + num_rdma_bytes, timeout_secs
        )
        self.rank = self._lanes.ranks.rank
        self.group_size = self._lanes.ranks.num_ranks
        self.group = comm if group is None else group
        self.num_nvl_bytes = num_nvl_bytes
        self.num_rdma_bytes = num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink
        self._low_latency = LowLatency(self._lanes)
        self._scratch: Optional[torch.Tensor] = None

    def destroy(self) -> None:
        """Releases what the buffer holds.  Not collective; may be repeated."""
        self._low_latency.destroy()
        self._lanes.destroy()

    # --- What can be asked without a buffer ---------------------------------

    @staticmethod
    def is_sm90_compiled() -> bool:
        """True: low-latency calls need no special build."""
        return True

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Sets the SMs of high-throughput calls without a config."""
        assert new_num_sms % 2 == 0, "The SM count must be even"
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        """The current point of the current stream."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """The config for any number of ranks."""
        return Config(Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """The config for any number of ranks."""
        return Config(Buffer.num_sms)

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int,
        hidden: int,
        num_ranks: int,
        num_experts: int,
    ) -> int:
        """Bytes that low-latency calls of this shape need."""
        return size_hint(
            num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts
        )

    def get_comm_stream(self) -> Any:
        """The stream of asynchronous calls, on a card."""
        return self._lanes.default.comm_stream()

    def get_local_buffer_tensor(
        self,
        dtype: torch.dtype,
        size: Optional[torch.Size] = None,
        offset: int = 0,
        use_rdma_buffer: bool = False,
    ) -> torch.Tensor:
        """A tensor to write to, at most 64 MiB unless more is asked for.

        EPX needs no cleaning and shows nobody its memory: what is written
        there changes nothing, which is what callers that zero it want.
        """
        given = self.num_rdma_bytes if use_rdma_buffer else self.num_nvl_bytes
        wanted = 0 if size is None else size.numel() + offset
        num_bytes = max(min(given, _SCRATCH_BYTES), wanted * dtype.itemsize)
        if self._scratch is None or self._scratch.numel() < num_bytes:
            device = self._lanes.default.group.device
            self._scratch = torch.zeros(
                round_up(num_bytes, 16), dtype=torch.uint8, device=device
            )
        tensor = self._scratch[: num_bytes // 16 * 16].view(dtype)[offset:]
        return tensor if size is None else tensor[: size.numel()].view(size)

    # --- High throughput ----------------------------------------------------

    def get_dispatch_layout(
        self,
        topk_idx: torch.Tensor,
        num_experts: int,
        previous_event: Optional[EventOverlap] = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Tuple[
        torch.Tensor,
        Optional[torch.Tensor],
        torch.Tensor,
        torch.Tensor,
        EventOverlap,
    ]:
        """Who gets how much of this rank's tokens.  Local.

        Returns:
            tokens per rank [R] and per node [N] (int32; None of one node),
            tokens per expert [E] (int32), which token goes to which rank
            [T, R] (bool), and an event.
        """
        lane = self._lanes.of(topk_idx)
        with (
            lane.operation(
                handle_of(previous_event),
                async_finish,
                allocate_on_comm_stream,
            ) as run,
            run.computing(),
        ):
            per_rank, per_expert, goes = dispatch_layout(
                topk_idx, num_experts, self.group_size
            )
            per_node = None
            if lane.num_nodes > 1:
                per_node = tokens_per_node(
                    goes, lane.node_of_rank, lane.num_nodes
                )
            run.uses(topk_idx, per_rank, per_node, per_expert, goes)
        return per_rank, per_node, per_expert, goes, EventOverlap(run.event)

    def dispatch(
        self,
        x: Rows,
        handle: Optional[Handle] = None,
        num_tokens_per_rank: Optional[torch.Tensor] = None,
        num_tokens_per_rdma_rank: Optional[torch.Tensor] = None,
        is_token_in_rank: Optional[torch.Tensor] = None,
        num_tokens_per_expert: Optional[torch.Tensor] = None,
        topk_idx: Optional[torch.Tensor] = None,
        topk_weights: Optional[torch.Tensor] = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Optional[Config] = None,
        previous_event: Optional[EventOverlap] = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Tuple[
        Rows,
        Optional[torch.Tensor],
        Optional[torch.Tensor],
        Optional[List[int]],
        Optional[Handle],
        EventOverlap,
    ]:
        """Sends each token to the ranks of its experts.  Collective.

        Args:
            x: [T, H] of any float type, or FP8 rows with their scales [T, S].
            handle: of an earlier dispatch, to send other rows the same way.
            num_tokens_per_rank, num_tokens_per_rdma_rank: not needed here.
            is_token_in_rank: routes the tokens where topk_idx is not given.
            num_tokens_per_expert: [E]; only its shape matters where topk_idx
                is given.
            topk_idx: [T, K], experts or -1.
            topk_weights: [T, K] of float32.
            expert_alignment: rounds up the counts that are returned.
            num_worst_tokens: rows to receive; then the host does not wait, and
                the call can be captured.
            config: only num_sms is used.
            previous_event, async_finish, allocate_on_comm_stream: as in
                DeepEP.

        Returns:
            rows by source rank, local topk_idx and topk_weights of them (-1
            and 0 where an expert is elsewhere), counts per local expert as a
            list (empty with num_worst_tokens), a handle and an event; of a
            cached dispatch only rows and event.
        """
        rows, scales = split_rows(x)
        num_sms = Buffer.num_sms if config is None else config.num_sms
        waited_for = handle_of(previous_event)
        if handle is not None:
            assert topk_idx is None and topk_weights is None
            with handle.lane.operation(
                waited_for, async_finish, allocate_on_comm_stream
            ) as run:
                got = handle.plan.dispatch(
                    rows,
                    scales=scales,
                    num_rows=handle.num_rows,
                    num_workers=workers(handle.lane, num_sms),
                    stream=run.stream,
                )
                run.uses(rows, scales, got)
            received = got.x if scales is None else (got.x, got.scales)
            return received, None, None, None, None, EventOverlap(run.event)

        if num_tokens_per_expert is None:
            raise ValueError("num_tokens_per_expert must be given: [E]")
        lane = self._lanes.of(rows)
        num_experts = num_tokens_per_expert.shape[0]
        with lane.operation(
            waited_for, async_finish, allocate_on_comm_stream
        ) as run:
            if topk_idx is None:
                if is_token_in_rank is None:
                    raise ValueError("topk_idx or is_token_in_rank is needed")
                with run.computing():
                    routing = ranks_as_experts(is_token_in_rank, num_experts)
            else:
                routing = topk_idx
            plan = lane.plan(
                routing,
                num_experts,
                epx.Layout.RANK_MAJOR,
                recv_capacity=num_worst_tokens,
                stream=run.stream,
            )
            num_rows, per_expert = num_worst_tokens, []
            if num_worst_tokens == 0:
                counts = plan.counts()
                num_rows, per_expert = counts.num_rows, counts.expert_rows
            got = plan.dispatch(
                rows,
                scales=scales,
                topk_weights=topk_weights,
                with_topk_idx=topk_idx is not None,
                num_rows=num_rows,
                num_workers=workers(lane, num_sms),
                stream=run.stream,
            )
            run.uses(rows, scales, routing, topk_weights, got)
        if topk_idx is None and num_worst_tokens == 0:
            per_expert = self._expert_counts(num_tokens_per_expert)
        received = got.x if scales is None else (got.x, got.scales)
        return (
            received,
            got.topk_idx,
            got.topk_weights,
            [round_up(it, expert_alignment) for it in per_expert],
            Handle(lane, plan, num_rows),
            EventOverlap(run.event),
        )

    def _expert_counts(self, num_tokens_per_expert: torch.Tensor) -> List[int]:
        """What this rank's experts get, of ranks that told no topk_idx."""
        told = self._lanes.ranks.gather(num_tokens_per_expert.tolist())
        first, count = epx.local_experts(
            num_tokens_per_expert.shape[0], self.group_size, self.rank
        )
        return [sum(it[e] for it in told) for e in range(first, first + count)]

    def combine(
        self,
        x: torch.Tensor,
        handle: Handle,
        topk_weights: Optional[torch.Tensor] = None,
        bias: Bias = None,
        config: Optional[Config] = None,
        previous_event: Optional[EventOverlap] = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor], EventOverlap]:
        """Sums each token's rows of all ranks, unweighted.  Collective.

        Args:
            x: rows as dispatch gave them.
            handle: of that dispatch.
            topk_weights: [rows, K], to be summed too.
            bias: none, one or two of [T, H] to start the sum with.
            config: only num_sms is used.
            previous_event, async_finish, allocate_on_comm_stream: as in
                DeepEP.

        Returns:
            sums [T, H], sums of the weights [T, K] or None, and an event.
        """
        num_sms = Buffer.num_sms if config is None else config.num_sms
        with handle.lane.operation(
            handle_of(previous_event), async_finish, allocate_on_comm_stream
        ) as run:
            done = handle.plan.combine(
                x,
                bias=bias_list(bias),
                recv_topk_weights=topk_weights,
                num_workers=workers(handle.lane, num_sms),
                stream=run.stream,
            )
            run.uses(x, topk_weights, bias, done)
        return done.x, done.topk_weights, EventOverlap(run.event)

    # --- Low latency --------------------------------------------------------

    def clean_low_latency_buffer(
        self,
        num_max_dispatch_tokens_per_rank: int,
        hidden: int,
        num_experts: int,
    ) -> None:
        """Nothing: no memory needs cleaning between calls or modes."""

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Optional[torch.Tensor] = None,
        dispatch_wait_recv_cost_stats: Optional[torch.Tensor] = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> Tuple[
        Rows,
        torch.Tensor,
        LowLatencyHandle,
        EventOverlap,
        Optional[Callable[[], None]],
    ]:
        """Sends each token to its experts, in fixed shapes.  Collective.

        With L local experts and N = R * num_max_dispatch_tokens_per_rank.

        Args:
            x: [T, H] of bfloat16.
            topk_idx: [T, K], experts or -1.
            num_max_dispatch_tokens_per_rank: T is at most this.
            num_experts: in all.
            cumulative_local_expert_recv_stats: [L] of int32, to which the
                counts are added.
            dispatch_wait_recv_cost_stats: [R] of int64, to which are added the
                nanoseconds that this rank waits for each.
            use_fp8: rows arrive as FP8 with a scale for each 128 channels.
            round_scale: scales are powers of 2.
            use_ue8m0: scales are their exponents, four in an int32.
            async_finish, return_recv_hook: as in DeepEP; not both.

        Returns:
            rows [L, N, H], or with FP8 those and their scales [L, N, S], whose
            last two dimensions are column-major; counts [L] (int32); a handle;
            an event; and the hook, None unless it was asked for.

        Rows are overwritten by the second next call of this shape.
        """
        return self._low_latency.dispatch(
            x,
            topk_idx,
            num_max_dispatch_tokens_per_rank,
            num_experts,
            cumulative_local_expert_recv_stats,
            dispatch_wait_recv_cost_stats,
            use_fp8,
            round_scale,
            use_ue8m0,
            async_finish,
            return_recv_hook,
        )

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: LowLatencyHandle,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Optional[torch.Tensor] = None,
        combine_wait_recv_cost_stats: Optional[torch.Tensor] = None,
    ) -> Tuple[torch.Tensor, EventOverlap, Optional[Callable[[], None]]]:
        """Sums each token's rows, weighted.  Collective.

        Args:
            x: [L, N, H], the experts' outputs in the places of their inputs.
            topk_idx: as given to the dispatch.
            topk_weights: [T, K] of float32.
            handle: of the dispatch.
            use_logfmt: rows come back in LogFMT-10; see docs/formats.md.
            zero_copy: the outputs are in the tensor of
                ``get_next_low_latency_combine_buffer``; x is not looked at.
            async_finish, return_recv_hook: as in DeepEP; not both.
            out: [T, H] of bfloat16, where to write the sums.
            combine_wait_recv_cost_stats: as in the dispatch.

        Returns:
            sums [T, H], an event, and the hook, None unless it was asked for.
        """
        return self._low_latency.combine(
            x,
            topk_idx,
            topk_weights,
            handle,
            use_logfmt,
            zero_copy,
            async_finish,
            return_recv_hook,
            out,
            combine_wait_recv_cost_stats,
        )

    def get_next_low_latency_combine_buffer(
        self, handle: LowLatencyHandle
    ) -> torch.Tensor:
        """[L, N, H] of bfloat16, for the outputs of a zero_copy combine."""
        return handle.combine_buffer()

    # --- Going on without a rank --------------------------------------------

    def low_latency_update_mask_buffer(
        self, rank_to_mask: int, mask: bool = False
    ) -> None:
        """Goes on without a rank, and those that are lost.

        Collective over the ranks that remain, unlike DeepEP's.  A rank cannot
        be taken back.
        """
        if mask:
            for lane in self._lanes:
                lane.mask(rank_to_mask)
        elif rank_to_mask in self._masked():
            raise unsupported("to take a masked rank back")

    def low_latency_query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        """Writes [R] of int32: 1 for ranks that are masked, else 0."""
        mask_status.zero_()
        for rank in self._masked():
            mask_status[rank] = 1

    def low_latency_clean_mask_buffer(self) -> None:
        """Nothing, unless a rank is masked: then a new buffer is needed."""
        if self._masked():
            raise unsupported("to take masked ranks back")

    def _masked(self) -> Set[int]:
        return {rank for lane in self._lanes for rank in lane.group.masked()}

# SPDX-License-Identifier: MIT
"""The checks of DeepEP's own tests, at their shapes on a card: rows tell where
they come from, and sums come close."""

import dataclasses
from typing import List

import deep_ep
import pytest
import ranks
import torch
import torch.distributed as dist
from ranks import Rank
from reference import difference, experts_of, from_fp8, ranks_of_tokens, to_fp8

MARKED = 128  # columns that hold the token's number


@dataclasses.dataclass
class Shape:
    tokens: int
    hidden: int
    topk: int
    experts: int


SHAPES = {
    "cpu": (Shape(96, 512, 4, 32), Shape(24, 512, 4, 32)),
    "cuda": (Shape(4096, 7168, 8, 256), Shape(128, 7168, 8, 256)),
}


class Routing:
    """A batch's, and all ranks'; drawn on the device."""

    def __init__(self, me: Rank, shape: Shape) -> None:
        random = torch.Generator(me.device).manual_seed(77 + me.index)

        def rand(*extents: int) -> torch.Tensor:
            return torch.rand(*extents, generator=random, device=me.device)

        scores = rand(shape.tokens, shape.experts)
        self.weights, self.topk_idx = scores.topk(shape.topk, dim=1)
        hidden = rand(shape.tokens, shape.topk) < 0.05
        self.topk_idx[hidden] = -1
        self.weights[hidden] = 0
        self.noise = torch.randn(
            shape.tokens, shape.hidden, generator=random, device=me.device
        ).to(torch.bfloat16)
        mine = self.topk_idx.cpu()
        everyone = [torch.empty_like(mine) for _ in range(me.size)]
        dist.all_gather(everyone, mine)
        self.everyone = [it.to(me.device) for it in everyone]
        self.span = experts_of(me, shape.experts, me.index)

    def senders(self) -> List[torch.Tensor]:
        """The tokens of each rank that come here."""
        first, end = self.span
        return [
            ((it >= first) & (it < end)).any(dim=1).nonzero()[:, 0]
            for it in self.everyone
        ]

    def per_expert(self) -> List[int]:
        """What each expert here gets of all ranks."""
        everything = torch.stack(self.everyone)
        return [int((everything == it).sum()) for it in range(*self.span)]


def marked_rows(me: Rank, tokens: torch.Tensor, rank: int, hidden: int):
    """Rows of a rank that say whose they are."""
    rows = torch.full(
        (tokens.shape[0], hidden),
        rank + 1,
        dtype=torch.bfloat16,
        device=me.device,
    )
    rows[:, -MARKED:] = (tokens % 256).to(torch.bfloat16).unsqueeze(1)
    return rows


def high_throughput(me: Rank) -> None:
    shape = SHAPES[me.device][0]
    routing = Routing(me, shape)
    config = deep_ep.Buffer.get_dispatch_config(me.size)
    buffer = deep_ep.Buffer(
        me.group, config.get_nvl_buffer_size_hint(2 * shape.hidden, me.size)
    )
    layout = buffer.get_dispatch_layout(routing.topk_idx, shape.experts)
    args = {
        "topk_idx": routing.topk_idx,
        "topk_weights": routing.weights,
        "num_tokens_per_rank": layout[0],
        "is_token_in_rank": layout[3],
        "num_tokens_per_expert": layout[2],
        "config": config,
        "async_finish": True,
    }
    spread = ranks_of_tokens(me, routing.topk_idx, shape.experts)
    wanted = torch.cat(
        [
            marked_rows(me, tokens, rank, shape.hidden)
            for rank, tokens in enumerate(routing.senders())
        ]
    )
    every = torch.arange(shape.tokens, device=me.device)
    marked = marked_rows(me, every, me.index, shape.hidden)
    for x in (marked, routing.noise, to_fp8(routing.noise)):
        rows, idx, weights, counts, handle, event = buffer.dispatch(x, **args)
        event.current_stream_wait()
        assert counts == routing.per_expert()
        assert [int((idx == it).sum()) for it in range(len(counts))] == counts
        if x is marked:
            assert torch.equal(rows, wanted)
        sent = x
        if isinstance(x, tuple):
            sent, rows = (from_fp8(*it).bfloat16() for it in (x, rows))
        out, sums, event = buffer.combine(
            rows, handle, topk_weights=weights, async_finish=True
        )
        event.current_stream_wait()
        assert difference(out, sent.float() * spread.unsqueeze(1)) < 5e-6
        assert torch.equal(sums, routing.weights)


@pytest.mark.parametrize("size", [2, 8])
def test_high_throughput(size: int, device: str) -> None:
    ranks.run(size, high_throughput, device=device)


def low_latency(me: Rank) -> None:
    shape = SHAPES[me.device][1]
    routing = Routing(me, shape)
    most = shape.tokens
    hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(
        most, shape.hidden, me.size, shape.experts
    )
    buffer = deep_ep.Buffer(me.group, 0, hint, low_latency_mode=True)
    wanted = routing.noise.float() * routing.weights.sum(1, keepdim=True)
    for use_fp8 in (False, True):
        for hooked in (False, True):
            rows, counts, handle, event, hook = buffer.low_latency_dispatch(
                routing.noise,
                routing.topk_idx,
                most,
                shape.experts,
                use_fp8=use_fp8,
                async_finish=not hooked,
                return_recv_hook=hooked,
            )
            hook() if hooked else event.current_stream_wait()
            assert counts.tolist() == routing.per_expert()
            if use_fp8:
                rows = from_fp8(*rows).bfloat16()
            out, event, hook = buffer.low_latency_combine(
                rows,
                routing.topk_idx,
                routing.weights,
                handle,
                async_finish=not hooked,
                return_recv_hook=hooked,
            )
            hook() if hooked else event.current_stream_wait()
            worst = 7e-4 if use_fp8 else 1e-5
            assert difference(out, wanted) < worst


@pytest.mark.parametrize("size", [2, 8])
def test_low_latency(size: int, device: str) -> None:
    ranks.run(size, low_latency, device=device)

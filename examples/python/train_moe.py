# SPDX-License-Identifier: MIT
"""Trains a Mixture-of-Experts layer whose experts are spread over ranks.

    torchrun --nproc-per-node 4 examples/python/train_moe.py
    torchrun --nproc-per-node 4 examples/python/train_moe.py --device cuda

Every rank has tokens of its own, a copy of the router and its share of the
experts.  At the end rank 0 trains the same layer, whole, in plain PyTorch, and
compares: losses and weights must agree.
"""

import argparse
import os
from typing import List, Tuple

import epx
import torch
import torch.distributed as dist
from epx import autograd
from torch import nn

HIDDEN, WIDE, EXPERTS, TOPK = 64, 128, 16, 2
TOKENS, STEPS, RATE = 128, 30, 3e-3


def initial_weights() -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Router [E, H], and of each expert [H, W] and [W, H]."""
    random = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random) / shape[-2] ** 0.5

    return (
        normal(EXPERTS, HIDDEN),
        normal(EXPERTS, HIDDEN, WIDE),
        normal(EXPERTS, WIDE, HIDDEN),
    )


def batch(step: int, rank: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """What a rank sees in a step: tokens, and what to make of them."""
    random = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(TOKENS, HIDDEN, generator=random)
    return x, torch.sin(x.roll(1, dims=1)) + 0.5 * x.flip(1)


def choose(
    router: torch.Tensor, x: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Experts of each token [T, K], and their weights."""
    scores = (x @ router.t()).softmax(dim=1)
    weights, chosen = scores.topk(TOPK, dim=1)
    return chosen, weights / weights.sum(dim=1, keepdim=True)


def expert(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor):
    return nn.functional.gelu(x @ up) @ down


class ExpertParallel(nn.Module):
    """The layer of one rank: it holds the experts first .. end - 1."""

    def __init__(self, group: epx.Group) -> None:
        super().__init__()
        self.group = group
        router, up, down = initial_weights()
        first, count = group.local_experts(EXPERTS)
        mine = slice(first, first + count)
        self.router = nn.Parameter(router)
        self.up = nn.Parameter(up[mine].clone())
        self.down = nn.Parameter(down[mine].clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen, weights = choose(self.router, x)
        plan = self.group.plan(chosen, EXPERTS, "EXPERT_MAJOR")
        rows, _, _ = autograd.dispatch(plan, x)
        ends = plan.counts().expert_offsets
        outputs = [
            expert(rows[ends[e] : ends[e + 1]], self.up[e], self.down[e])
            for e in range(plan.num_local_experts)
        ]
        return autograd.combine(plan, torch.cat(outputs), weights)


class Whole(nn.Module):
    """The same layer on one rank, with nothing of EPX in it."""

    def __init__(self) -> None:
        super().__init__()
        weights = (nn.Parameter(it) for it in initial_weights())
        self.router, self.up, self.down = weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen, weights = choose(self.router, x)
        out = torch.zeros_like(x)
        for e in range(EXPERTS):
            token, k = (chosen == e).nonzero(as_tuple=True)
            y = expert(x[token], self.up[e], self.down[e])
            out = out.index_add(0, token, y * weights[token, k, None])
        return out


def train_spread(layer: ExpertParallel, device: str) -> List[float]:
    """Losses of the steps.  Gradients of experts need no exchange: all tokens
    of all ranks that chose an expert have been where it is."""
    optimizer = torch.optim.Adam(layer.parameters(), RATE)
    ranks = layer.group.num_ranks
    losses = []
    for step in range(STEPS):
        x, wanted = (it.to(device) for it in batch(step, layer.group.rank))
        # The mean over the tokens of all ranks.
        loss = nn.functional.mse_loss(layer(x), wanted) / ranks
        optimizer.zero_grad()
        loss.backward()
        dist.all_reduce(layer.router.grad)
        optimizer.step()
        dist.all_reduce(loss := loss.detach())
        losses.append(loss.item())
    return losses


def train_whole(layer: Whole, ranks: int) -> List[float]:
    optimizer = torch.optim.Adam(layer.parameters(), RATE)
    losses = []
    for step in range(STEPS):
        batches = [batch(step, rank) for rank in range(ranks)]
        x, wanted = (torch.cat(it) for it in zip(*batches))
        loss = nn.functional.mse_loss(layer(x), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def compare(layer: ExpertParallel, losses: List[float]) -> None:
    """What all ranks have trained, beside what one would have."""
    group = layer.group
    trained = [None] * group.num_ranks
    dist.all_gather_object(trained, (layer.up.cpu(), layer.down.cpu()))
    if group.rank != 0:
        return
    whole = Whole()
    alone = train_whole(whole, group.num_ranks)
    for step in (0, STEPS // 2, STEPS - 1):
        print(
            f"step {step:3}  loss {losses[step]:.6f} on {group.num_ranks} "
            f"ranks, {alone[step]:.6f} on one"
        )
    torch.testing.assert_close(losses, alone, rtol=1e-3, atol=1e-5)
    spread = [layer.router.cpu()] + [torch.cat(it) for it in zip(*trained)]
    for ours, theirs in zip(spread, (whole.router, whole.up, whole.down)):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)
    assert losses[-1] < 0.7 * losses[0], "the loss has not fallen"
    print("losses and weights agree")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device = options.parse_args().device
    if device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local % torch.cuda.device_count())
    else:
        torch.set_num_threads(1)
    # Ranks may share a card, which NCCL does not allow; gloo takes any tensor.
    dist.init_process_group("gloo")
    group = epx.Group.from_torch(device=device, heap_bytes=64 << 20)
    layer = ExpertParallel(group).to(device)
    losses = train_spread(layer, device)
    compare(layer, losses)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

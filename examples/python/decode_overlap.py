# SPDX-License-Identifier: MIT
"""Decodes two micro-batches that take turns: while one's tokens travel, the
other computes.

    torchrun --nproc-per-node 2 examples/python/decode_overlap.py
    torchrun --nproc-per-node 2 examples/python/decode_overlap.py --device cuda

Every call is DeepEP's: with return_recv_hook a dispatch or combine only sends,
and the hook that it returns receives.
"""

import argparse
import os
import time
from typing import Any, Callable, List

import deep_ep
import torch
import torch.distributed as dist

HIDDEN, EXPERTS, TOPK, TOKENS, LAYERS, STEPS = 256, 16, 4, 16, 4, 5


class Model:
    """Attention's stand-in, a router, and this rank's experts, per layer."""

    def __init__(self, rank: int, ranks: int, device: str) -> None:
        random = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> torch.Tensor:
            value = torch.randn(*shape, generator=random) / HIDDEN**0.5
            return value.to(torch.bfloat16).to(device)

        local = EXPERTS // ranks
        mine = slice(rank * local, (rank + 1) * local)
        self.dense = [normal(HIDDEN, HIDDEN) for _ in range(LAYERS)]
        self.router = [normal(HIDDEN, EXPERTS) for _ in range(LAYERS)]
        self.experts = [
            normal(EXPERTS, HIDDEN, HIDDEN)[mine] for _ in range(LAYERS)
        ]

    def attend(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(x @ self.dense[layer])

    def choose(self, layer: int, x: torch.Tensor) -> Any:
        scores = (x @ self.router[layer]).float().softmax(dim=1)
        weights, chosen = scores.topk(TOPK, dim=1)
        return chosen, weights

    def run_experts(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        return torch.tanh(torch.bmm(rows, self.experts[layer]))


def micro_batch(model: Model, buffer: deep_ep.Buffer, x: torch.Tensor) -> Any:
    """One micro-batch through all layers; yields when its rows travel.

    What is yielded is the hook that has to be called before going on.
    """
    for layer in range(LAYERS):
        x = model.attend(layer, x)
        chosen, weights = model.choose(layer, x)
        rows, _, handle, _, hook = buffer.low_latency_dispatch(
            x, chosen, TOKENS, EXPERTS, use_fp8=False, return_recv_hook=True
        )
        yield hook
        outputs = model.run_experts(layer, rows)
        combined, _, hook = buffer.low_latency_combine(
            outputs, chosen, weights, handle, return_recv_hook=True
        )
        yield hook
        x = x + combined
    yield x


def one_after_the_other(batches: List[Any]) -> List[torch.Tensor]:
    results = []
    for batch in batches:
        for said in batch:
            if isinstance(said, torch.Tensor):
                results.append(said)
            else:
                said()
    return results


def taking_turns(batches: List[Any]) -> List[torch.Tensor]:
    """Each computes while the rows of the other are on their way."""
    waiting = [next(batch) for batch in batches]
    results: List[torch.Tensor] = []
    while len(results) < len(batches):
        for index, batch in enumerate(batches):
            waiting[index]()
            said = next(batch)
            if isinstance(said, torch.Tensor):
                results.append(said)
            else:
                waiting[index] = said
    return results


def timed(
    schedule: Callable[[List[Any]], List[torch.Tensor]],
    model: Model,
    buffer: deep_ep.Buffer,
    inputs: List[torch.Tensor],
) -> Any:
    """The results, and milliseconds for one step."""
    for step in range(STEPS + 1):
        if step == 1:  # the first one warms up
            dist.barrier()
            start = time.perf_counter()
        results = schedule([micro_batch(model, buffer, x) for x in inputs])
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    return results, (time.perf_counter() - start) / STEPS * 1e3


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device = options.parse_args().device
    if device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local % torch.cuda.device_count())
    else:
        torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(
        TOKENS, HIDDEN, ranks, EXPERTS
    )
    buffer = deep_ep.Buffer(
        dist.group.WORLD,
        num_rdma_bytes=hint,
        low_latency_mode=True,
        explicitly_destroy=True,
    )
    model = Model(rank, ranks, device)
    random = torch.Generator().manual_seed(rank)
    inputs = [
        torch.randn(TOKENS, HIDDEN, generator=random)
        .to(torch.bfloat16)
        .to(device)
        for _ in range(2)
    ]
    alone, alone_ms = timed(one_after_the_other, model, buffer, inputs)
    turns, turns_ms = timed(taking_turns, model, buffer, inputs)
    for one, other in zip(alone, turns):
        assert torch.equal(one, other), "the schedule has changed a result"
    if rank == 0:
        print(
            f"{LAYERS} layers, 2 micro-batches of {TOKENS} tokens: "
            f"{alone_ms:.2f} ms one after the other, "
            f"{turns_ms:.2f} ms taking turns; the same bits"
        )
    buffer.destroy()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

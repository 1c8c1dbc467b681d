# SPDX-License-Identifier: MIT
"""Batches that every rank can make, and what should come of them."""

import dataclasses
from typing import List, Tuple

import torch
from ranks import Rank


@dataclasses.dataclass
class Batch:
    """The tokens of one rank."""

    x: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor

    def to(self, device: str) -> "Batch":
        return Batch(
            self.x.to(device),
            self.topk_idx.to(device),
            self.topk_weights.to(device),
        )


def make_batches(
    rank: Rank,
    tokens: List[int],
    hidden: int,
    num_experts: int,
    topk: int,
    dtype: torch.dtype = torch.bfloat16,
    masked: float = 0.1,
) -> List[Batch]:
    """The batches of all ranks, on the CPU; some entries are -1."""
    batches = []
    for index in range(rank.size):
        random = rank.generator(index)
        count = tokens[index % len(tokens)]
        x = torch.randn(count, hidden, generator=random).to(dtype)
        scores = torch.rand(count, num_experts, generator=random)
        weights, idx = scores.topk(topk, dim=1)
        idx[torch.rand(count, topk, generator=random) < masked] = -1
        batches.append(Batch(x, idx, weights.masked_fill(idx < 0, 0.0)))
    return batches


def experts_of(rank: Rank, num_experts: int, index: int) -> Tuple[int, int]:
    """First expert and the one after the last, of rank `index`."""
    few, wider = divmod(num_experts, rank.size)
    first = index * few + min(index, wider)
    return first, first + few + (index < wider)


def received_by_rank(
    rank: Rank, batches: List[Batch], num_experts: int
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, List[int]]:
    """Rows, local topk_idx and weights that arrive, and from each rank."""
    first, end = experts_of(rank, num_experts, rank.index)
    rows, idx, weights, counts = [], [], [], []
    for batch in batches:
        here = (batch.topk_idx >= first) & (batch.topk_idx < end)
        goes = here.any(dim=1)
        rows.append(batch.x[goes])
        idx.append(torch.where(here, batch.topk_idx - first, -1)[goes])
        weights.append(torch.where(here, batch.topk_weights, 0.0)[goes])
        counts.append(int(goes.sum()))
    return torch.cat(rows), torch.cat(idx), torch.cat(weights), counts


def ranks_of_tokens(
    rank: Rank, topk_idx: torch.Tensor, num_experts: int
) -> torch.Tensor:
    """On how many ranks each token has experts."""
    count = torch.zeros_like(topk_idx[:, 0])
    for index in range(rank.size):
        first, end = experts_of(rank, num_experts, index)
        count += ((topk_idx >= first) & (topk_idx < end)).any(dim=1)
    return count


def ranks_per_token(
    rank: Rank, batch: Batch, num_experts: int
) -> torch.Tensor:
    """The same of a batch."""
    return ranks_of_tokens(rank, batch.topk_idx, num_experts)


def to_fp8(x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """FP8 rows, and a scale for each 128 channels."""
    blocks = x.float().unflatten(1, (x.shape[1] // 128, 128))
    largest = blocks.abs().amax(dim=2, keepdim=True).clamp(1e-4)
    # 448 / largest would be PyTorch's reciprocal, rounded twice.
    factor = torch.full_like(largest, 448.0) / largest
    rows = (blocks * factor).to(torch.float8_e4m3fn)
    return rows.view(x.shape), (largest * (1 / 448.0)).squeeze(2)


def from_fp8(rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Values of FP8 rows; scales may be packed exponents."""
    if scales.dtype == torch.int32:
        parts = torch.stack([scales >> it & 255 for it in (0, 8, 16, 24)], -1)
        parts = parts.flatten(-2)
        scales = torch.exp2((parts - 127).float())
    scales = scales[..., : rows.shape[-1] // 128]
    blocks = rows.float().unflatten(-1, (rows.shape[-1] // 128, 128))
    return (blocks * scales.unsqueeze(-1)).flatten(-2)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """How unlike two tensors are: 0 when equal, as DeepEP's tests count."""
    if a.numel() == 0:
        return 0.0
    a, b = a.double() + 1, b.to(a.device).double() + 1
    return float(1 - 2 * (a * b).sum() / (a * a + b * b).sum())

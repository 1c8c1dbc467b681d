# SPDX-License-Identifier: MIT
"""Which ranks the tokens of a batch go to."""

from typing import Tuple

import torch


def rank_of_expert(
    topk_idx: torch.Tensor, num_experts: int, num_ranks: int
) -> torch.Tensor:
    """The rank of each expert, ``num_ranks`` where there is none.

    The first ``num_experts % num_ranks`` ranks hold one expert more.
    """
    few, wider = divmod(num_experts, num_ranks)
    in_wide = wider * (few + 1)
    rank = torch.div(topk_idx, few + 1, rounding_mode="floor")
    if few > 0:
        narrow = torch.div(topk_idx - in_wide, few, rounding_mode="floor")
        rank = torch.where(topk_idx < in_wide, rank, narrow + wider)
    return torch.where(topk_idx < 0, num_ranks, rank)


def dispatch_layout(
    topk_idx: torch.Tensor, num_experts: int, num_ranks: int
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens per rank [R] and per expert [E] (int32), and who goes where
    [T, R] (bool).

    Does not look at values on the host, so that it can be captured.
    """
    device = topk_idx.device
    num_tokens = topk_idx.shape[0]
    # One column more, for those that go nowhere.
    rank = rank_of_expert(topk_idx, num_experts, num_ranks).long()
    goes = torch.zeros(
        num_tokens, num_ranks + 1, dtype=torch.bool, device=device
    )
    goes.scatter_(1, rank, True)
    is_token_in_rank = goes[:, :num_ranks].contiguous()
    per_rank = is_token_in_rank.sum(0, dtype=torch.int32)
    expert = (topk_idx + 1).long().flatten()
    per_expert = torch.zeros(num_experts + 1, dtype=torch.int32, device=device)
    per_expert.scatter_add_(
        0, expert, torch.ones_like(expert, dtype=torch.int32)
    )
    return per_rank, per_expert[1:].contiguous(), is_token_in_rank


def tokens_per_node(
    is_token_in_rank: torch.Tensor, node_of_rank: torch.Tensor, num_nodes: int
) -> torch.Tensor:
    """Tokens [N] (int32) that go to each node, to however many ranks of it.

    As ``dispatch_layout``, it can be captured.
    """
    num_ranks_of_node = torch.zeros(
        is_token_in_rank.shape[0],
        num_nodes,
        dtype=torch.int32,
        device=is_token_in_rank.device,
    )
    num_ranks_of_node.index_add_(1, node_of_rank, is_token_in_rank.int())
    return (num_ranks_of_node > 0).sum(0, dtype=torch.int32)


def ranks_as_experts(
    is_token_in_rank: torch.Tensor, num_experts: int
) -> torch.Tensor:
    """Routing [T, R] by which tokens go to the ranks that are said.

    For want of experts, each rank's first stands for it.
    """
    num_ranks = is_token_in_rank.shape[1]
    few, wider = divmod(num_experts, num_ranks)
    firsts = [it * few + min(it, wider) for it in range(num_ranks)]
    column = torch.tensor(firsts, device=is_token_in_rank.device)
    return torch.where(is_token_in_rank, column, -1).contiguous()

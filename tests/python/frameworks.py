# SPDX-License-Identifier: MIT
"""The batches that the tests of frameworks' calls send."""

import torch
from ranks import Rank
from reference import Batch, make_batches, ranks_per_token

E, K, H, MOST = 8, 3, 512, 16


def batch_of(me: Rank, tokens=(MOST, 9)) -> Batch:
    return make_batches(me, list(tokens), H, E, K)[me.index].to(me.device)


def summed(me: Rank, batch: Batch) -> torch.Tensor:
    """What comes back of a batch whose rows are returned as they are."""
    spread = ranks_per_token(me, batch.to("cpu"), E).to(me.device)
    return batch.x.float() * spread.unsqueeze(1)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a.float(), b.float(), rtol=8e-3, atol=1e-6)

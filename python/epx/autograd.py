# SPDX-License-Identifier: MIT
"""Dispatch and combine that PyTorch differentiates.

The backward of each is the other, on the same plan: collective too, so that
all ranks must run it, in the same order.
"""

from typing import Any, Optional, Tuple

import torch

from .plan import Layout, Plan


def dispatch(
    plan: Plan, x: torch.Tensor, topk_weights: Optional[torch.Tensor] = None
) -> Tuple[torch.Tensor, Optional[torch.Tensor], Optional[torch.Tensor]]:
    """Sends tokens [T, H], and weights [T, K] if given, to their experts.

    Returns:
        rows and weights in the plan's layout, and in RANK_MAJOR the local
        topk_idx.  Rows that nobody sends are zero.
    """
    return _Dispatch.apply(plan, x, topk_weights)


def combine(
    plan: Plan, y: torch.Tensor, topk_weights: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """Sums the experts' outputs of each token, weighted with [T, K] if given.

    Weights are for the expert layouts; in RANK_MAJOR apply them to the rows.
    """
    return _Combine.apply(plan, y, topk_weights)


def _receive(
    plan: Plan, x: torch.Tensor, weights: Optional[torch.Tensor]
) -> Any:
    """A dispatch; where rows are fixed, those that do not arrive are zero."""
    recv_x = None
    if plan.is_fixed:
        recv_x = plan.group.empty((*plan.lead(), x.shape[-1]), x.dtype)
        recv_x.zero_()
    return plan.dispatch(
        x.contiguous(),
        topk_weights=None if weights is None else weights.contiguous(),
        with_topk_idx=plan.layout is Layout.RANK_MAJOR,
        recv_x=recv_x,
    )


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        x: torch.Tensor,
        topk_weights: Optional[torch.Tensor],
    ) -> Any:
        ctx.plan = plan
        ctx.with_weights = topk_weights is not None
        got = _receive(plan, x, topk_weights)
        if got.topk_idx is not None:
            ctx.mark_non_differentiable(got.topk_idx)
        return got.x, got.topk_weights, got.topk_idx

    @staticmethod
    def backward(
        ctx: Any, grad_x: torch.Tensor, grad_weights: torch.Tensor, _: Any
    ) -> Any:
        weights = grad_weights.contiguous() if ctx.with_weights else None
        done = ctx.plan.combine(grad_x.contiguous(), recv_topk_weights=weights)
        return None, done.x, done.topk_weights


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        y: torch.Tensor,
        topk_weights: Optional[torch.Tensor],
    ) -> torch.Tensor:
        ctx.plan = plan
        y = y.contiguous()
        if topk_weights is not None:
            topk_weights = topk_weights.contiguous()
            ctx.save_for_backward(y, topk_weights)
        return plan.combine(y, topk_weights=topk_weights).x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        plan = ctx.plan
        if not ctx.saved_tensors:
            return None, _receive(plan, grad, None).x, None
        y, weights = ctx.saved_tensors
        got = _receive(plan, grad, weights)
        grad_y = got.x * got.topk_weights.unsqueeze(-1).to(got.x.dtype)
        # What each row has to say of its weight goes home alone.
        products = (got.x.float() * y.float()).sum(-1)
        nothing = products.new_zeros((*products.shape, 4))
        done = plan.combine(nothing, recv_topk_weights=products)
        return None, grad_y, done.topk_weights

"""The router's auxiliary losses, one value a row, and how they reach the gradient from inside the stack."""

import torch
from torch import Tensor


def balance_loss(chance_BTE: Tensor, load_BE: Tensor, real_BT: Tensor, top_k: int) -> Tensor:
    """E * sum_e f_e P_e (Switch, arXiv 2101.03961, eq. 4): f_e share of slots, P_e mean chance. [B]; 1 is even."""
    tokens_B1 = real_BT.sum(1, keepdim=True).clamp(min=1)
    mean_BE = (chance_BTE * real_BT.unsqueeze(-1)).sum(1) / tokens_B1
    return chance_BTE.shape[-1] * (load_BE.to(mean_BE.dtype) / (tokens_B1 * top_k) * mean_BE).sum(-1)


def global_balance_loss(chance_BTE: Tensor, share_E: Tensor, real_BT: Tensor) -> Tensor:
    """The same against the whole batch's shares (Qiu et al. 2025, arXiv 2501.11873), those of the step before. [B].

    Under a pipeline a micro-batch runs backward before the step's last one runs forward, so its own step's are unknown.
    """
    mean_BE = (chance_BTE * real_BT.unsqueeze(-1)).sum(1) / real_BT.sum(1, keepdim=True).clamp(min=1)
    return chance_BTE.shape[-1] * (share_E.to(mean_BE.dtype) * mean_BE).sum(-1)


def z_loss(logits_BTE: Tensor, real_BT: Tensor) -> Tensor:
    """Mean of logsumexp(logits)^2 over the row's tokens (ST-MoE, arXiv 2202.08906, eq. 5). [B]."""
    return (logits_BTE.logsumexp(-1).square() * real_BT).sum(1) / real_BT.sum(1).clamp(min=1)


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype = loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return grads[0], torch.ones((), dtype=ctx.dtype, device=grads[0].device)


def attach_loss(x: Tensor, loss: Tensor) -> Tensor:
    """x, and in backward the gradient of `loss` besides: a layer adds to the loss without returning it.

    The loss rides the graph, so it works in any pipeline stage; its weight must already be in it.
    """
    return _AttachLoss.apply(x, loss)  # type: ignore[return-value]

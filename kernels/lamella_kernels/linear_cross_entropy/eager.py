"""The cross entropy's parts in plain torch, a piece of the vocabulary at a time."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lamella_kernels.linear_cross_entropy import pieces


def _see(logits_NP: Tensor, target_N: Tensor, largest_N: Tensor, sum_N: Tensor, picked_N: Tensor) -> None:
    wide_NP = logits_NP.to(sum_N.dtype)
    before_N = largest_N.clone()
    torch.maximum(before_N, wide_NP.amax(1), out=largest_N)
    own_N = (target_N >= 0) & (target_N < wide_NP.shape[1])
    picked_N += wide_NP.gather(1, torch.where(own_N, target_N, 0).long().unsqueeze(1)).squeeze(1) * own_N
    sum_N *= (before_N - largest_N).exp_()
    sum_N += (wide_NP - largest_N.unsqueeze(1)).exp_().sum(1)


def _turn(logits_NP: Tensor, target_N: Tensor, lse_N: Tensor, dlse_N: Tensor | None, dpicked_N: Tensor | None) -> None:
    wide_NP = logits_NP.to(lse_N.dtype)
    if dlse_N is None:
        wide_NP = torch.zeros_like(wide_NP)
    else:
        wide_NP = (wide_NP - lse_N.unsqueeze(1)).exp_().mul_(dlse_N.unsqueeze(1))
    if dpicked_N is not None:
        own_N = (target_N >= 0) & (target_N < wide_NP.shape[1])
        place_N1 = torch.where(own_N, target_N, 0).long().unsqueeze(1)
        wide_NP.scatter_add_(1, place_N1, (dpicked_N * own_N).unsqueeze(1))
    logits_NP.copy_(wide_NP)


class LinearLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_VD: Tensor, target_N: Tensor):
        lse_N, picked_N = pieces.forward(x_ND, weight_VD, target_N, _see)
        ctx.save_for_backward(x_ND, weight_VD, target_N, lse_N)
        ctx.set_materialize_grads(False)
        return lse_N, picked_N

    @staticmethod
    @once_differentiable
    def backward(ctx, dlse_N: Tensor | None, dpicked_N: Tensor | None):
        needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        x_ND, weight_VD, target_N, lse_N = ctx.saved_tensors
        found = pieces.backward(dlse_N, dpicked_N, x_ND, weight_VD, target_N, lse_N, _turn, needs)
        return *found, None


def linear_log_sum_exp(x: Tensor, weight_VD: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    found = LinearLogSumExp.apply(x.reshape(-1, x.shape[-1]), weight_VD, target.reshape(-1))
    lse_N, picked_N = found  # type: ignore[misc]
    return lse_N.view(target.shape), picked_N.view(target.shape)

"""A language model's head and its loss together; the logits are never whole.

    l_nv = x_n . W_v        lse_n = log sum over v of exp(l_nv)        nats_n = lse_n - l_{n, target_n}

N token, D model, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from lamella_kernels import forms
from lamella_kernels.linear_cross_entropy import eager

__all__ = ["linear_cross_entropy", "linear_log_sum_exp"]


def linear_cross_entropy(x: Tensor, weight_VD: Tensor, target: Tensor, *, z_loss: float = 0.0) -> Tensor:
    """-log softmax(x W^T) at the targets, plus z_loss * lse^2 (Chowdhery et al. 2022, arXiv 2204.02311), in nats.

    As `linear_log_sum_exp`, but a target below 0 is none: its token's result is 0, without a gradient.
    """
    lse, picked = linear_log_sum_exp(x, weight_VD, target)
    nats = lse - picked if z_loss == 0 else lse - picked + z_loss * lse.square()
    return torch.where(target >= 0, nats, 0)


def linear_log_sum_exp(x: Tensor, weight_VD: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The two parts of the loss, of these rows of the vocabulary.

    x: [..., D] in fp16, bf16, fp32 or fp64. weight_VD: any floating dtype, used in x's.
    target: [...], int32 or int64, the row of weight_VD; where it is none of them (another rank's, or no target) the
    second part is 0. Ranks that hold parts of the vocabulary add up the exponentials of the first and the second parts.

    Returns lse and the target's logit, [...] in fp32 (fp64 of fp64), both differentiable once, by x and the weight. The
    logits are made a piece of the vocabulary at a time, in x's dtype, and made again in backward; the sums are in fp32.

    Errors: ValueError for shapes or devices that disagree, or wrong dtypes.
    """
    op = "linear_log_sum_exp"
    for name, tensor in (("x", x), ("weight_VD", weight_VD)):
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{op}: {name} must be floating point, got {tensor.dtype}")
    if not x.dim() or weight_VD.dim() != 2 or x.shape[-1] != weight_VD.shape[1] or not len(weight_VD):
        raise ValueError(f"{op}: x needs [..., D] and weight_VD [V, D], got {tuple(x.shape)}, {tuple(weight_VD.shape)}")
    if target.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: target must be int32 or int64, got {target.dtype}")
    if target.shape != x.shape[:-1]:
        raise ValueError(f"{op}: target needs shape {tuple(x.shape[:-1])}, one for each x, got {tuple(target.shape)}")
    if not x.device == weight_VD.device == target.device:
        raise ValueError(f"{op}: x, weight_VD and target are on {x.device}, {weight_VD.device}, {target.device}")
    form: Any = eager
    if forms.on_gpu(x, weight_VD):
        from lamella_kernels.linear_cross_entropy import gpu as form
    return form.linear_log_sum_exp(x, weight_VD, target)

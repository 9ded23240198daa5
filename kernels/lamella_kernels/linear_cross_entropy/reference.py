"""The two parts of a cross entropy from whole logits.

l_nv = x_n . W_v        lse_n = log sum over v of exp(l_nv)        nats_n = lse_n - l_{n, target_n}
"""

import torch
from torch import Tensor


def linear_log_sum_exp(x: Tensor, weight_VD: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """lse and the target's logit; gradients come from autograd."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    logits = x.to(compute) @ weight_VD.to(x.dtype).to(compute).t()
    picked = torch.zeros_like(logits[..., 0])
    for v in range(len(weight_VD)):
        picked = torch.where(target == v, logits[..., v], picked)
    return logits.exp().sum(-1).log(), picked

"""The root mean square norm one group of channels at a time (Zhang & Sennrich 2019, arXiv 1910.07467).

norm(u) = u / sqrt(mean(u^2) + eps), the mean over each W channels that follow one another
"""

import torch
from torch import Tensor


def _norm(u: Tensor, weight_D: Tensor | None, width: int, eps: float) -> Tensor:
    groups = []
    for start in range(0, u.shape[-1], width):
        part = u[..., start : start + width]
        part = part / torch.sqrt((part * part).mean(-1, keepdim=True) + eps)
        groups.append(part if weight_D is None else part * weight_D[start : start + width].to(u.dtype))
    return torch.cat(groups, -1)


def _silu(gate: Tensor) -> Tensor:
    return gate * torch.sigmoid(gate)


def rmsnorm(
    x: Tensor, gate: Tensor | None, weight_D: Tensor | None, width: int, eps: float, gate_first: bool
) -> Tensor:
    """y in x's dtype; gradients come from autograd."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    if gate is None:
        y = _norm(x.to(compute), weight_D, width, eps)
    elif gate_first:
        y = _norm(x.to(compute) * _silu(gate.to(compute)), weight_D, width, eps)
    else:
        y = _norm(x.to(compute), weight_D, width, eps) * _silu(gate.to(compute))
    return y.to(x.dtype)


def add_rmsnorm(x: Tensor, residual: Tensor, weight_D: Tensor | None, width: int, eps: float) -> tuple[Tensor, Tensor]:
    """y and x + residual, both in x's dtype."""
    total = x + residual
    return rmsnorm(total, None, weight_D, width, eps, True), total

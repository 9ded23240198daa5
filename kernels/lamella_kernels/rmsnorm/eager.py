"""The root mean square norm by torch's own, in fp32 (fp64 where x is)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rmsnorm(
    x: Tensor, gate: Tensor | None, weight_D: Tensor | None, width: int, eps: float, gate_first: bool
) -> Tensor:
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    u, opened = x.to(compute), None if gate is None else F.silu(gate.to(compute))
    weight_D = None if weight_D is None else weight_D.to(compute)
    if opened is not None and gate_first:
        u = u * opened
    if width == x.shape[-1]:
        y = F.rms_norm(u, (width,), weight_D, eps)
    else:
        y = F.rms_norm(u.unflatten(-1, (-1, width)), (width,), None, eps).flatten(-2)
        y = y if weight_D is None else y * weight_D
    if opened is not None and not gate_first:
        y = y * opened
    return y.to(x.dtype)


def add_rmsnorm(x: Tensor, residual: Tensor, weight_D: Tensor | None, width: int, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rmsnorm(total, None, weight_D, width, eps, True), total

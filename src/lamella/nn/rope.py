"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), the halves of a head rotated against each other."""

import torch
from torch import Tensor


def rotary(position_BT: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, 1, head_dim / 2] in fp32 of the angles position * theta^(-2i / head_dim)."""
    i = torch.arange(0, head_dim, 2, device=position_BT.device, dtype=torch.float64)
    angle = position_BT[..., None, None].double() * theta ** (-i / head_dim)
    return angle.cos().float(), angle.sin().float()


def rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (x_i, x_{i + K/2}) turned by its angle."""
    a, b = x_BTHK.to(torch.promote_types(x_BTHK.dtype, cos.dtype)).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x_BTHK.dtype)

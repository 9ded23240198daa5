"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), the halves of a head rotated against each other."""

import torch
from torch import Tensor

from lamella.nn.shard import wide


def rotary(position_BT: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, 1, head_dim / 2] in fp64 of the angles position * theta^(-2i / head_dim)."""
    i = torch.arange(0, head_dim, 2, device=position_BT.device, dtype=torch.float64)
    angle = position_BT[..., None, None].double() * theta ** (-i / head_dim)
    return angle.cos(), angle.sin()


def rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (x_i, x_{i + R/2}) of the first R channels turned by its angle, in fp32 (fp64 where x is).

    cos and sin are [B, T, 1, R / 2]; channels behind R pass by.
    """
    half = cos.shape[-1]
    a, b, rest = wide(x_BTHK).split([half, half, x_BTHK.shape[-1] - 2 * half], dim=-1)
    cos, sin = cos.to(a.dtype), sin.to(a.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(x_BTHK.dtype)

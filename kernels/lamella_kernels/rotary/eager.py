"""The rotation in plain torch: angles in fp64, products in fp32 (fp64 of fp64), backward the rotation back."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def turn(x_BTHK: Tensor, position_BT: Tensor, theta: float, width: int, back: bool) -> Tensor:
    """y in x's dtype."""
    half = width // 2
    i = torch.arange(half, device=x_BTHK.device, dtype=torch.float64)
    angle = position_BT[..., None, None].double() * theta ** (-2 * i / width)
    compute = torch.float64 if x_BTHK.dtype == torch.float64 else torch.float32
    cos, sin = angle.cos().to(compute), angle.sin().to(compute)
    a, b, rest = x_BTHK.to(compute).split([half, half, x_BTHK.shape[-1] - width], -1)
    if back:
        sin = -sin
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1).to(x_BTHK.dtype)


class Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTHK: Tensor, position_BT: Tensor, theta: float, width: int) -> Tensor:
        ctx.save_for_backward(position_BT)
        ctx.theta, ctx.width = theta, width
        return turn(x_BTHK, position_BT, theta, width, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTHK: Tensor):
        (position_BT,) = ctx.saved_tensors
        return turn(dy_BTHK, position_BT, ctx.theta, ctx.width, back=True), None, None, None


def rotary(x_BTHK: Tensor, position_BT: Tensor, theta: float, width: int) -> Tensor:
    """y like x, differentiable once."""
    return Rotary.apply(x_BTHK, position_BT, theta, width)  # type: ignore[return-value]

"""silu(gate) up in plain torch, with a backward that keeps the arguments alone."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(_wide(gate)).mul_(_wide(up)).to(gate.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        gate, up = ctx.saved_tensors
        wide, dy = _wide(gate), _wide(dy)
        dgate = torch.ops.aten.silu_backward(dy * _wide(up), wide)
        return dgate.to(gate.dtype), F.silu(wide).mul_(dy).to(up.dtype)


def swiglu(gate: Tensor, up: Tensor | None) -> Tensor:
    """y like gate, differentiable once."""
    if up is None:
        gate, up = gate.chunk(2, -1)
    return SwiGlu.apply(gate, up)  # type: ignore[return-value]

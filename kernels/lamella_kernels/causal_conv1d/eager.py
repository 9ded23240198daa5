"""The causal depthwise convolution in plain torch: one shifted multiply-add per tap.

    y_t = act(bias + sum over j < K of w_{K-1-j} x_{t-j})        x_{t-j} := 0 where j > position_t

The channel stays the innermost dim, so a tap is one vectorised pass over x. A tap that would look past its document's
start is multiplied by an exact zero, so nothing of another document enters a sum (torch.where does the same five
times slower on the CPU). Backward saves the inputs alone and computes the value before the activation again.

B batch, T time, I channel, K width of the kernel, P = K-1+T: the initial state followed by the inputs.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def extend(x_BTI: Tensor, width: int, initial_state_BKI: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[B, K-1+T, I]: the K-1 inputs before the first token, then x."""
    if initial_state_BKI is None:
        return F.pad(x_BTI.to(dtype), (0, 0, width - 1, 0))
    return torch.cat((initial_state_BKI.to(dtype), x_BTI.to(dtype)), 1)


def look_back(v_BPI: Tensor, j: int, width: int) -> Tensor:
    """[B, T, I]: the inputs j tokens back."""
    first = width - 1 - j
    return v_BPI[:, first : v_BPI.shape[1] - j]


def masked(v_BTI: Tensor, position_BT: Tensor | None, j: int) -> Tensor:
    """v, but zero at tokens that have no token j back in their document."""
    if position_BT is None or j == 0:
        return v_BTI
    return v_BTI * (position_BT >= j).to(v_BTI.dtype).unsqueeze(-1)


def convolve(x_BPI: Tensor, weight_KI: Tensor, bias_I: Tensor | None, position_BT: Tensor | None) -> Tensor:
    """[B, T, I]: the value before the activation."""
    width = len(weight_KI)
    y_BTI = look_back(x_BPI, 0, width) * weight_KI[-1]
    if bias_I is not None:
        y_BTI += bias_I
    for j in range(1, width):
        y_BTI.addcmul_(masked(look_back(x_BPI, j, width), position_BT, j), weight_KI[width - 1 - j])
    return y_BTI


class CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTI, weight_IK, bias_I, activation, position_BT, initial_state_BKI):
        dtype = torch.float64 if x_BTI.dtype == torch.float64 else torch.float32
        weight_KI = weight_IK.to(dtype).t().contiguous()
        x_BPI = extend(x_BTI, len(weight_KI), initial_state_BKI, dtype)
        y_BTI = convolve(x_BPI, weight_KI, None if bias_I is None else bias_I.to(dtype), position_BT)
        if activation == "silu":
            F.silu(y_BTI, inplace=True)
        ctx.save_for_backward(x_BTI, weight_IK, bias_I, position_BT, initial_state_BKI)
        ctx.activation = activation
        state_BKI = x_BPI[:, x_BTI.shape[1] :].to(x_BTI.dtype, copy=True)
        return y_BTI.to(x_BTI.dtype), state_BKI

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTI, dstate_BKI):
        x_BTI, weight_IK, bias_I, position_BT, initial_state_BKI = ctx.saved_tensors
        dtype = torch.float64 if x_BTI.dtype == torch.float64 else torch.float32
        weight_KI = weight_IK.to(dtype).t().contiguous()
        width, time = len(weight_KI), x_BTI.shape[1]
        x_BPI = extend(x_BTI, width, initial_state_BKI, dtype)
        dy_BTI = dy_BTI.to(dtype)
        if ctx.activation == "silu":
            before_BTI = convolve(x_BPI, weight_KI, None if bias_I is None else bias_I.to(dtype), position_BT)
            dy_BTI = torch.ops.aten.silu_backward(dy_BTI, before_BTI)
        dx_BPI = torch.zeros_like(x_BPI)
        dx_BPI[:, time:] = dstate_BKI
        dweight_KI = torch.empty_like(weight_KI)
        product_BTI = torch.empty_like(dy_BTI)
        for j in range(width):
            seen_dy_BTI = masked(dy_BTI, position_BT, j)
            look_back(dx_BPI, j, width).addcmul_(seen_dy_BTI, weight_KI[width - 1 - j])
            torch.mul(seen_dy_BTI, look_back(x_BPI, j, width), out=product_BTI)
            torch.sum(product_BTI.flatten(0, 1), 0, out=dweight_KI[width - 1 - j])
        dbias_I = None if bias_I is None else dy_BTI.sum((0, 1)).to(bias_I.dtype)
        dinitial_BKI = None
        if initial_state_BKI is not None:
            dinitial_BKI = dx_BPI[:, : width - 1].to(initial_state_BKI.dtype, copy=True)
        dx_BTI = dx_BPI[:, width - 1 :].to(x_BTI.dtype).contiguous()
        return dx_BTI, dweight_KI.t().to(weight_IK.dtype), dbias_I, None, None, dinitial_BKI


def causal_conv1d(
    x_BTI: Tensor,
    weight_IK: Tensor,
    bias_I: Tensor | None,
    activation: str | None,
    position_BT: Tensor | None,
    initial_state_BKI: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The outputs and the last K-1 inputs, both in x's dtype, differentiable once."""
    return CausalConv1d.apply(x_BTI, weight_IK, bias_I, activation, position_BT, initial_state_BKI)

"""The causal depthwise convolution by the compiled kernel `cpu.c`: fp32 inside, activation fused, one pass over memory.

Backward saves the inputs alone. Isolation is exact: a tap beyond a document's start is skipped.

B batch, T time, I channel, K width of the kernel, P = K-1+T: the initial state followed by the inputs.
"""

import ctypes

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lamella_kernels.native import LANES, call, plain


class _Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "time", "channels", "width", "silu")]


class CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTI, weight_IK, bias_I, activation, position_BT, initial_state_BKI):
        batch, time, channels = x_BTI.shape
        width = weight_IK.shape[1]
        sizes = _Sizes(batch, time, channels, width, activation == "silu")
        x, weight_KI = plain(x_BTI), plain(weight_IK.t())
        bias = None if bias_I is None else plain(bias_I)
        position = None if position_BT is None else position_BT.to(torch.int32).contiguous()
        initial = None if initial_state_BKI is None else plain(initial_state_BKI)
        inputs = [x, weight_KI, bias, position, initial]
        y_BTI = torch.empty_like(x)
        tasks = batch * -(-channels // LANES)
        call("lamella_conv_forward", sizes, tasks, width + 1, [*inputs, y_BTI])
        ctx.save_for_backward(*inputs)
        ctx.sizes, ctx.tasks = sizes, tasks
        ctx.dtypes = [None if t is None else t.dtype for t in (x_BTI, weight_IK, bias_I, initial_state_BKI)]
        return y_BTI.to(x_BTI.dtype), _last(x_BTI, initial_state_BKI, width - 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTI, dstate_BKI):
        inputs, sizes = ctx.saved_tensors, ctx.sizes
        batch, time, channels, width = sizes.batch, sizes.time, sizes.channels, sizes.width
        dx_BPI = torch.zeros(batch, width - 1 + time, channels)
        dx_BPI[:, time:] = dstate_BKI
        dweight_BKI, dbias_BI = torch.empty(batch, width, channels), torch.empty(batch, channels)
        tensors = [*inputs, plain(dy_BTI), dx_BPI, dweight_BKI, dbias_BI]
        call("lamella_conv_backward", sizes, ctx.tasks, 2 * width + 2, tensors)
        found = [dx_BPI[:, width - 1 :], dweight_BKI.sum(0).t(), dbias_BI.sum(0), dx_BPI[:, : width - 1]]
        dx, dweight, dbias, dinitial = (
            None if d is None else g.to(d).contiguous() for g, d in zip(found, ctx.dtypes, strict=True)
        )
        return dx, dweight, dbias, None, None, dinitial


def _last(x_BTI: Tensor, initial_state_BKI: Tensor | None, count: int) -> Tensor:
    """The last `count` inputs, of the initial state where x has fewer."""
    time = x_BTI.shape[1]
    if time >= count:
        return x_BTI[:, time - count :].clone()
    before = x_BTI.new_zeros(len(x_BTI), count, x_BTI.shape[2]) if initial_state_BKI is None else initial_state_BKI
    return torch.cat((before.to(x_BTI.dtype), x_BTI), 1)[:, -count:]


def causal_conv1d(
    x_BTI: Tensor,
    weight_IK: Tensor,
    bias_I: Tensor | None,
    activation: str | None,
    position_BT: Tensor | None,
    initial_state_BKI: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The outputs and the last K-1 inputs, both in x's dtype, differentiable once."""
    return CausalConv1d.apply(x_BTI, weight_IK, bias_I, activation, position_BT, initial_state_BKI)  # type: ignore

"""Mamba's short convolution over time, depthwise and causal (Gu & Dao 2023, arXiv 2312.00752, figure 3).

    y_t = act(bias + sum over j < K of w_{K-1-j} x_{t-j})        x_{t-j} := 0 where j > position_t

B batch, T time, I channel, K width of the kernel; the state holds K-1 inputs.
"""

from typing import Any

import torch
from torch import Tensor

from lamella_kernels import forms, native
from lamella_kernels.causal_conv1d import cpu, eager
from lamella_kernels.shapes import match_shapes

__all__ = ["causal_conv1d"]

WIDEST = 4  # taps that the Triton kernels hold in registers


def causal_conv1d(
    x_BTI: Tensor,
    weight_IK: Tensor,
    bias_I: Tensor | None = None,
    *,
    activation: str | None = None,
    position_BT: Tensor | None = None,
    initial_state_BKI: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve every channel with its own kernel; weight_IK[:, K-1] meets the current token, as in torch's conv1d.

    x_BTI, weight_IK, bias_I: fp16, bf16, fp32 or fp64. The sum is in fp32, in fp64 when x is fp64.
    activation: None or "silu".
    position_BT: integers, the index of a token inside its document: a tap that looks back further sees zero.
    initial_state_BKI: the K-1 inputs before the first token, [B, K-1, I]; zero if absent. Positions go on counting.

    Returns y_BTI in x's dtype; with return_state also the last K-1 inputs, [B, K-1, I] in x's dtype, to be handed on
    as the next initial state. They may reach back past the current document's start: position masks such entries.
    Gradients reach all floating arguments, also from the returned state. Other documents of a row have no influence
    on a document's y and dx, not even by rounding.

    Errors: ValueError for shapes that disagree, a wrong dtype, tensors on two devices, an unknown activation, or no
    tokens.
    """
    op = "causal_conv1d"
    named = {"x_BTI": x_BTI, "weight_IK": weight_IK, "bias_I": bias_I}
    sizes = match_shapes(op, {**named, "position_BT": position_BT})
    if min(sizes.values()) < 1:
        raise ValueError(f"{op}: needs at least one token, channel and tap, got {sizes}")
    if initial_state_BKI is not None:
        expected = (sizes["B"], sizes["K"] - 1, sizes["I"])
        found = tuple(initial_state_BKI.shape)
        if found != expected:
            raise ValueError(f"{op}: initial_state_BKI must hold the last K-1 inputs, {expected}, got {found}")
        devices = initial_state_BKI.device, x_BTI.device
        if devices[0] != devices[1]:
            raise ValueError(f"{op}: initial_state_BKI is on {devices[0]}, but x_BTI is on {devices[1]}")
    for name, tensor in (*named.items(), ("initial_state_BKI", initial_state_BKI)):
        if tensor is not None and not tensor.dtype.is_floating_point:
            raise ValueError(f"{op}: {name} must be floating point, got {tensor.dtype}")
    if position_BT is not None and position_BT.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: position_BT must be int32 or int64, got {position_BT.dtype}")
    if activation not in (None, "silu"):
        raise ValueError(f"{op}: activation must be None or 'silu', got {activation!r}")
    tensors = (*named.values(), initial_state_BKI)
    form: Any = eager
    if sizes["K"] <= WIDEST and forms.on_gpu(*tensors):
        from lamella_kernels.causal_conv1d import gpu as form
    elif native.usable(*tensors):
        form = cpu
    y_BTI, state_BKI = form.causal_conv1d(x_BTI, weight_IK, bias_I, activation, position_BT, initial_state_BKI)
    return (y_BTI, state_BKI) if return_state else y_BTI

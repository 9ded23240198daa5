"""The causal depthwise convolution one token and one tap at a time (Mamba's conv1d, arXiv 2312.00752, figure 3).

    y_t = act(bias + sum over j < K of w_{K-1-j} x_{t-j})        x_{t-j} := 0 where j > position_t

B batch, T time, I channel, K width of the kernel; the state holds K-1 inputs.
"""

import torch
from torch import Tensor


def causal_conv1d(
    x_BTI: Tensor,
    weight_IK: Tensor,
    bias_I: Tensor | None,
    activation: str | None,
    position_BT: Tensor | None,
    initial_state_BKI: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The outputs and the last K-1 inputs, both in x's dtype; gradients come from autograd."""
    compute = torch.float64 if x_BTI.dtype == torch.float64 else torch.float32
    batch, time, channels = x_BTI.shape
    width = weight_IK.shape[1]
    if initial_state_BKI is None:
        initial_state_BKI = x_BTI.new_zeros(batch, width - 1, channels)
    inputs = [*initial_state_BKI.to(x_BTI.dtype).unbind(1), *x_BTI.unbind(1)]
    y = []
    for t in range(time):
        y_BI = torch.zeros(batch, channels, dtype=compute, device=x_BTI.device)
        for j in range(width):
            x_BI = inputs[t + width - 1 - j].to(compute)
            if position_BT is not None:
                x_BI = torch.where(position_BT[:, t, None] >= j, x_BI, torch.zeros_like(x_BI))
            y_BI = y_BI + weight_IK[:, width - 1 - j].to(compute) * x_BI
        if bias_I is not None:
            y_BI = y_BI + bias_I.to(compute)
        if activation == "silu":
            y_BI = y_BI * torch.sigmoid(y_BI)
        y.append(y_BI)
    state = inputs[len(inputs) - (width - 1) :]
    return torch.stack(y, 1).to(x_BTI.dtype), torch.stack(state, 1) if state else x_BTI[:, :0]

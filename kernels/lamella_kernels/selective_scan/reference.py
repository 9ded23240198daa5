"""The selective scan one token at a time (Gu & Dao 2023, arXiv 2312.00752, section 3.2, with Mamba's simplified B).

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = C_t . h_t + D x_t        h_{t-1} := 0 where a document starts

B batch, T time, I channel, N state; B_BTN and C_BTN are the paper's B and C.
"""

import torch
from torch import Tensor


def selective_scan(
    x_BTI: Tensor,
    dt_BTI: Tensor,
    A_IN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_I: Tensor | None,
    reset_BT: Tensor | None,
    initial_state_BIN: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The outputs (in x's dtype) and the final state (fp32, or fp64 where x is fp64); gradients come from autograd."""
    compute = torch.float64 if x_BTI.dtype == torch.float64 else torch.float32
    x, dt, A, B, C = (tensor.to(compute) for tensor in (x_BTI, dt_BTI, A_IN, B_BTN, C_BTN))
    batch, time, channels = x.shape
    h_BIN = x.new_zeros(batch, channels, A.shape[1])
    if initial_state_BIN is not None:
        h_BIN = initial_state_BIN.to(compute)
    y = []
    for t in range(time):
        if reset_BT is not None:
            h_BIN = torch.where(reset_BT[:, t, None, None], torch.zeros_like(h_BIN), h_BIN)
        decay_BIN = torch.exp(dt[:, t, :, None] * A)
        input_BIN = dt[:, t, :, None] * B[:, t, None, :] * x[:, t, :, None]
        h_BIN = decay_BIN * h_BIN + input_BIN
        y_BI = (C[:, t, None, :] * h_BIN).sum(-1)
        if D_I is not None:
            y_BI = y_BI + D_I.to(compute) * x[:, t]
        y.append(y_BI)
    return torch.stack(y, 1).to(x_BTI.dtype), h_BIN

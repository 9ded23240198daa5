"""SSD one token at a time (Dao & Gu 2024, arXiv 2405.21060, equation 2 with a scalar decay a head).

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        y_t = h_t C_t + D x_t        h_{t-1} := 0 where a document starts

B batch, T time, H head, P head size, G group of heads, N state; B_BTGN and C_BTGN are the paper's B and C.
"""

import torch
from torch import Tensor


def ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor | None,
    reset_BT: Tensor | None,
    initial_state_BHPN: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The outputs (in x's dtype) and the final state (fp32, or fp64 where x is fp64); gradients come from autograd."""
    compute = torch.float64 if x_BTHP.dtype == torch.float64 else torch.float32
    x, dt, A, B, C = (tensor.to(compute) for tensor in (x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN))
    batch, time, heads, size = x.shape
    share = heads // B.shape[2]
    h_BHPN = x.new_zeros(batch, heads, size, B.shape[3])
    if initial_state_BHPN is not None:
        h_BHPN = initial_state_BHPN.to(compute)
    y = []
    for t in range(time):
        if reset_BT is not None:
            h_BHPN = torch.where(reset_BT[:, t, None, None, None], torch.zeros_like(h_BHPN), h_BHPN)
        B_BHN, C_BHN = (v[:, t].repeat_interleave(share, 1) for v in (B, C))
        decay_BH = torch.exp(dt[:, t] * A)
        input_BHPN = (dt[:, t, :, None] * x[:, t])[..., None] * B_BHN[:, :, None, :]
        h_BHPN = decay_BH[..., None, None] * h_BHPN + input_BHPN
        y_BHP = (h_BHPN * C_BHN[:, :, None, :]).sum(-1)
        if D_H is not None:
            y_BHP = y_BHP + D_H.to(compute)[:, None] * x[:, t]
        y.append(y_BHP)
    return torch.stack(y, 1).to(x_BTHP.dtype), h_BHPN

"""RWKV-7's recurrence one token at a time (Peng et al. 2025, arXiv 2503.14456, section 4, the state's evolution).

    S_t = S_{t-1} (diag(w_t) + a_t b_t^T) + v_t k_t^T        y_t = S_t r_t        S_{t-1} := 0 at a reset

In RWKV-7 a = -kk and b = kk * (learning rate). B batch, T time, H head, K key channel, V value channel.
"""

import torch
from torch import Tensor


def wkv7(
    r_BTHK: Tensor,
    log_w_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    a_BTHK: Tensor,
    b_BTHK: Tensor,
    reset_BT: Tensor | None,
    initial_state_BHVK: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The outputs (in r's dtype) and the final state (fp32, or fp64 where r is fp64); gradients come from autograd."""
    compute = torch.float64 if r_BTHK.dtype == torch.float64 else torch.float32
    r, w, k, v, a, b = (x.to(compute) for x in (r_BTHK, log_w_BTHK.exp(), k_BTHK, v_BTHV, a_BTHK, b_BTHK))
    batch, time, heads, width = r.shape
    S_BHVK = r.new_zeros(batch, heads, v.shape[-1], width)
    if initial_state_BHVK is not None:
        S_BHVK = initial_state_BHVK.to(compute)
    y = []
    for t in range(time):
        if reset_BT is not None:
            S_BHVK = torch.where(reset_BT[:, t, None, None, None], torch.zeros_like(S_BHVK), S_BHVK)
        removed_BHV1 = (S_BHVK * a[:, t, :, None, :]).sum(-1, keepdim=True)
        added_BHVK = removed_BHV1 * b[:, t, :, None, :] + v[:, t, :, :, None] * k[:, t, :, None, :]
        S_BHVK = S_BHVK * w[:, t, :, None, :] + added_BHVK
        y.append((S_BHVK * r[:, t, :, None, :]).sum(-1))
    return torch.stack(y, 1).to(r_BTHK.dtype), S_BHVK

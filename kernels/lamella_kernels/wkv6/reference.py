"""RWKV-6's recurrence one token at a time (Peng et al. 2024, arXiv 2404.05892, equations 19 and 20).

    y_t = r_t (S_{t-1} + diag(u) k_t^T v_t)        S_t = diag(w_t) S_{t-1} + k_t^T v_t        S_{t-1} := 0 at a reset

B batch, T time, H head, K key channel, V value channel.
"""

import torch
from torch import Tensor


def wkv6(
    r_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_w_BTHK: Tensor,
    u_HK: Tensor,
    reset_BT: Tensor | None,
    initial_state_BHKV: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The outputs (in r's dtype) and the final state (fp32, or fp64 where r is fp64); gradients come from autograd."""
    compute = torch.float64 if r_BTHK.dtype == torch.float64 else torch.float32
    r, k, v, w, u = (x.to(compute) for x in (r_BTHK, k_BTHK, v_BTHV, log_w_BTHK.exp(), u_HK))
    batch, time, heads, width = r.shape
    S_BHKV = r.new_zeros(batch, heads, width, v.shape[-1])
    if initial_state_BHKV is not None:
        S_BHKV = initial_state_BHKV.to(compute)
    y = []
    for t in range(time):
        if reset_BT is not None:
            S_BHKV = torch.where(reset_BT[:, t, None, None, None], torch.zeros_like(S_BHKV), S_BHKV)
        bonus_BH1 = (r[:, t] * (k[:, t] * u)).sum(-1, keepdim=True)
        y.append((r[:, t, :, :, None] * S_BHKV).sum(2) + bonus_BH1 * v[:, t])
        S_BHKV = w[:, t, :, :, None] * S_BHKV + k[:, t, :, :, None] * v[:, t, :, None, :]
    return torch.stack(y, 1).to(r_BTHK.dtype), S_BHKV

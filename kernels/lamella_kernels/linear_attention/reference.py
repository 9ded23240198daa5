"""Linear attention with a scalar decay per head, one token at a time (equation 6 of arXiv 2307.08621).

    S_t = a_t S_{t-1} + k_t v_t^T        o_t = q_t S_t        S_{t-1} := 0 where a document starts

    normalised: y_t = o_t / max(sqrt(w_t), |q_t . z_t|)       z_t = a_t z_{t-1} + k_t        w_t = a_t w_{t-1} + 1

B batch, T time, H head, K size of a query and key, V size of a value.
"""

import torch
from torch import Tensor


def linear_attention(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay: Tensor,
    normalize: bool,
    reset_BT: Tensor | None,
    kv_BHKV: Tensor | None,
    keys_BHK: Tensor | None,
    weight_BH: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outputs (in q's dtype) and S, z, w at the end (fp32, or fp64 where q is); gradients come from autograd."""
    compute = torch.float64 if q_BTHK.dtype == torch.float64 else torch.float32
    q, k, v = (tensor.to(compute) for tensor in (q_BTHK, k_BTHK, v_BTHV))
    batch, time, heads, _ = q.shape
    a_BTH = log_decay.to(compute).exp().expand(batch, time, heads)
    S = q.new_zeros(batch, heads, q.shape[3], v.shape[3]) if kv_BHKV is None else kv_BHKV.to(compute)
    z = q.new_zeros(batch, heads, q.shape[3]) if keys_BHK is None else keys_BHK.detach().to(compute)
    w = q.new_zeros(batch, heads) if weight_BH is None else weight_BH.detach().to(compute)
    y = []
    for t in range(time):
        a_BH = a_BTH[:, t]
        if reset_BT is not None:
            a_BH = torch.where(reset_BT[:, t, None], 0.0, a_BH)
        S = a_BH[..., None, None] * S + k[:, t, :, :, None] * v[:, t, :, None, :]
        z = (a_BH[..., None] * z + k[:, t]).detach()
        w = (a_BH * w + 1).detach()
        y_BHV = (q[:, t, :, :, None] * S).sum(2)
        if normalize:
            divisor_BH = torch.maximum(w.sqrt(), (q[:, t].detach() * z).sum(-1).abs())
            y_BHV = y_BHV / divisor_BH[..., None]
        y.append(y_BHV)
    return torch.stack(y, 1).to(q_BTHK.dtype), S, z, w

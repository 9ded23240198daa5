"""The equation, with a mask over all tokens.

y_t = sum_s softmax_s(q_t . k_s / sqrt(K)) v_s        over s <= t of t's document (and s > t - window)

N token of all documents laid end to end, H query head, G key-value head, K head size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def packed_attention(
    q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, lengths: Sequence[int], window: int | None = None
) -> Tensor:
    """In fp64, rounded to q's dtype; gradients come from autograd."""
    tokens, heads, size = q_NHK.shape
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(list(lengths))).to(q_NHK.device)
    t, s = torch.arange(tokens, device=q_NHK.device)[:, None], torch.arange(tokens, device=q_NHK.device)
    seen = (s <= t) & (document[:, None] == document)
    if window is not None:
        seen &= s > t - window
    k, v = (x.double().repeat_interleave(heads // x.shape[1], 1) for x in (k_NGK, v_NGK))
    scores_HNN = torch.einsum("thk,shk->hts", q_NHK.double(), k) / size**0.5
    weights_HNN = scores_HNN.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hts,shk->thk", weights_HNN, v).to(q_NHK.dtype)

"""torch's attention, a document at a time.

L tokens at the end of a document, S >= L of it that are kept, H query head, G key-value head, K head size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_attention(
    q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, lengths: Sequence[int], window: int | None
) -> Tensor:
    pieces = [t.split(list(lengths)) for t in (q_NHK, k_NGK, v_NGK)]
    return torch.cat([attend(*document, window=window) for document in zip(*pieces, strict=True)])


def attend(q_LHK: Tensor, k_SGK: Tensor, v_SGK: Tensor, *, window: int | None = None) -> Tensor:
    """Causal attention of the last L tokens of a document to all its S >= L kept tokens. Returns [L, H, K]."""
    new, all_ = q_LHK.shape[0], k_SGK.shape[0]
    repeat = q_LHK.shape[1] // k_SGK.shape[1]
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q_LHK, k_SGK, v_SGK))  # [1, heads, tokens, K]
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    if window is not None and all_ > window:
        y = _banded(q, k, v, window)
    elif new == 1 or new == all_:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=new > 1)
    else:  # later tokens of a document whose first keys are kept: the mask is new x all, and only in generation
        mask = torch.ones(new, all_, dtype=torch.bool, device=q.device).tril(all_ - new)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return y[0].transpose(0, 1)


def _banded(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Sliding window by blocks of queries, each against the keys that it can see: length x window. [1, H, L, K]."""
    new, old = q.shape[2], k.shape[2] - q.shape[2]
    block = min(max(window, 64), 256)  # few calls where the window is narrow, small masks where it is wide
    pieces = []
    for start in range(0, new, block):
        stop, first = min(start + block, new), max(0, old + start - window + 1)
        query = torch.arange(old + start, old + stop, device=q.device)[:, None]
        key = torch.arange(first, old + stop, device=q.device)
        mask = ((key <= query) & (key > query - window))[None, None]  # 4-dim: other ranks miss torch's fused kernel
        seen = (t[:, :, first : old + stop] for t in (k, v))
        pieces.append(F.scaled_dot_product_attention(q[:, :, start:stop], *seen, attn_mask=mask))
    return torch.cat(pieces, dim=2)

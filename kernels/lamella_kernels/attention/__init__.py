"""Causal softmax attention (Vaswani et al. 2017) of packed documents: grouped queries, sliding window.

    y_t = sum_s softmax_s(q_t . k_s / sqrt(K)) v_s        over s <= t of t's document (and s > t - window)

Each document is attended by itself, so the cost is the sum of squared document lengths (or length x window), and no
mask over all tokens is ever made. Grouped queries: Ainslie et al. 2023 (arXiv 2305.13245).

N token of all documents laid end to end, H query head, G key-value head, K head size.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lamella_kernels.attention import eager, flash
from lamella_kernels.shapes import match_shapes

__all__ = ["packed_attention", "starts_of"]


def packed_attention(
    q_NHK: Tensor,
    k_NGK: Tensor,
    v_NGK: Tensor,
    lengths: Sequence[int],
    *,
    window: int | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """Attend every document.

    q_NHK, k_NGK, v_NGK: of one floating dtype; G divides H.
    lengths: tokens of each document, in order, 1 or more, of sum N.
    window: tokens that a query sees, itself included; absent: its whole document so far.
    starts: `starts_of(lengths, device)`, where a caller has it already.

    Returns y_NHK like q. On CUDA in half precision one call of torch's FlashAttention (Dao 2023, arXiv 2307.08691) for
    all documents; elsewhere torch's attention a document at a time.

    Errors: ValueError for shapes, dtypes or devices that disagree, heads that do not divide, lengths that are not N
    tokens, or a window below 1.
    """
    op = "packed_attention"
    sizes = match_shapes(op, {"q_NHK": q_NHK, "k_NGK": k_NGK, "v_NGK": v_NGK})
    if not q_NHK.dtype.is_floating_point or not q_NHK.dtype == k_NGK.dtype == v_NGK.dtype:
        found = f"{q_NHK.dtype}, {k_NGK.dtype}, {v_NGK.dtype}"
        raise ValueError(f"{op}: q, k and v must be of one floating dtype, got {found}")
    if sizes["H"] % sizes["G"]:
        raise ValueError(f"{op}: {sizes['H']} query heads are no multiple of {sizes['G']} key-value heads")
    if sum(lengths) != sizes["N"] or min(lengths, default=1) < 1:
        raise ValueError(f"{op}: lengths must be 1 or more and of sum {sizes['N']}, got {list(lengths)}")
    if window is not None and window < 1:
        raise ValueError(f"{op}: window must be 1 or more, got {window}")
    form: Any = flash if flash.usable(q_NHK) else eager
    if form is flash:
        starts = starts_of(lengths, q_NHK.device) if starts is None else starts
        return flash.packed_attention(q_NHK, k_NGK, v_NGK, starts, max(lengths, default=0), window)
    return eager.packed_attention(q_NHK, k_NGK, v_NGK, lengths, window)


def starts_of(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Where each document begins among all tokens, and where the last one ends: int32."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)

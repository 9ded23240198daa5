"""A cross entropy over pieces of the vocabulary: one [N, P] of logits at a time, whatever form looks at it.

Pieces of the vocabulary, not of the tokens: a piece of the weight's gradient is then written once, where pieces of
tokens would each add to the whole [V, D]; what is added up here is dx, [N, D] in fp32.

    dl_nv = dlse_n exp(l_nv - lse_n) + dpicked_n [v = target_n]        dx = sum over pieces of dl W        dW = dl^T x
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

COUNT, ALIGNED = 12, 128  # pieces at most; rows of the weight, of which a piece is a multiple

# (logits_NP, target_N counted from the piece, largest_N, sum_N, picked_N): the last three are brought up to date.
See = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
# (logits_NP, target_N, lse_N, dlse_N, dpicked_N): the logits are replaced by their gradient.
Turn = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], None]


def forward(x_ND: Tensor, weight_VD: Tensor, target_N: Tensor, see: See) -> tuple[Tensor, Tensor]:
    """lse and the targets' logits."""
    compute = torch.float64 if x_ND.dtype == torch.float64 else torch.float32
    largest_N, sum_N, picked_N = (
        torch.full((len(x_ND),), start, dtype=compute, device=x_ND.device) for start in (-torch.inf, 0, 0)
    )
    for start, piece_PD in _pieces(weight_VD):
        see(x_ND @ piece_PD.to(x_ND.dtype).t(), target_N - start, largest_N, sum_N, picked_N)
    return sum_N.log_().add_(largest_N), picked_N


def backward(
    dlse_N: Tensor | None,
    dpicked_N: Tensor | None,
    x_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    lse_N: Tensor,
    turn: Turn,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and the weight, as far as needed."""
    dx_ND = torch.zeros_like(x_ND, dtype=lse_N.dtype) if needs[0] else None
    dweight_VD = torch.empty(weight_VD.shape, dtype=weight_VD.dtype, device=x_ND.device) if needs[1] else None
    for start, piece_PD in _pieces(weight_VD):
        piece_PD = piece_PD.to(x_ND.dtype)
        logits_NP = x_ND @ piece_PD.t()
        turn(logits_NP, target_N - start, lse_N, dlse_N, dpicked_N)
        if dx_ND is not None:
            dx_ND += product(logits_NP, piece_PD)
        if dweight_VD is not None:
            dweight_VD[start : start + len(piece_PD)] = product(logits_NP.t(), x_ND)
    return None if dx_ND is None else dx_ND.to(x_ND.dtype), dweight_VD


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b as it is summed, not rounded to the factors' dtype, where torch can."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda and a.dtype.itemsize == 2 else a @ b


def _pieces(weight_VD: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Where each begins, and its rows."""
    size = -(-len(weight_VD) // (COUNT * ALIGNED)) * ALIGNED
    for start in range(0, len(weight_VD), size):
        yield start, weight_VD[start : start + size]

"""A matrix multiplication for each group in turn, each into its own rows of the result.

    y_e = x_e W_e^T        dx_e = dy_e W_e        dW_e = dy_e^T x_e

The weight is kept for backward as the tensor that was given, not as views of it: an engine that frees a parameter's
memory between forward and backward (ZeRO 3) can free this one's.

N row, E group, F width out, D width in.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_EFD: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x_ND, weight_EFD)
        ctx.counts = counts
        return _each(x_ND, weight_EFD.mT, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_NF: Tensor):
        x_ND, weight_EFD = ctx.saved_tensors
        dx_ND = dw_EFD = None
        if ctx.needs_input_grad[0]:
            dx_ND = _each(dy_NF, weight_EFD, ctx.counts)
        if ctx.needs_input_grad[1]:
            dw_EFD = torch.empty(weight_EFD.shape, dtype=x_ND.dtype, device=x_ND.device)
            parts = _split(dy_NF, ctx.counts), _split(x_ND, ctx.counts)
            for dy, x, out in zip(*parts, dw_EFD, strict=True):
                torch.mm(dy.t(), x, out=out)
            dw_EFD = dw_EFD.to(weight_EFD.dtype)
        return dx_ND, dw_EFD, None


def _each(x_ND: Tensor, weight_EDF: Tensor, counts: list[int]) -> Tensor:
    """[N, F]: each group's rows times its weight, 0 behind the last group."""
    y_NF = x_ND.new_empty(len(x_ND), weight_EDF.shape[2])
    for x, weight, out in zip(_split(x_ND, counts), weight_EDF, _split(y_NF, counts), strict=True):
        torch.mm(x, weight.to(x.dtype), out=out)
    y_NF[sum(counts) :] = 0
    return y_NF


def _split(rows: Tensor, counts: list[int]) -> tuple[Tensor, ...]:
    return rows[: sum(counts)].split(counts)


def grouped_gemm(x_ND: Tensor, weight_EFD: Tensor, counts: Sequence[int] | Tensor) -> Tensor:
    """The outputs in x's dtype, differentiable once."""
    known = counts.tolist() if isinstance(counts, Tensor) else list(counts)
    return GroupedGemm.apply(x_ND, weight_EFD, known)  # type: ignore[return-value]

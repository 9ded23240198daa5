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
    def forward(ctx, x_ND: Tensor, weight_EFD: Tensor, counts: Sequence[int]) -> Tensor:
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
            for dy, x, out in zip(dy_NF.split(ctx.counts), x_ND.split(ctx.counts), dw_EFD, strict=True):
                torch.mm(dy.t(), x, out=out)
            dw_EFD = dw_EFD.to(weight_EFD.dtype)
        return dx_ND, dw_EFD, None


def _each(x_ND: Tensor, weight_EDF: Tensor, counts: Sequence[int]) -> Tensor:
    """[N, F]: each group's rows times its weight."""
    y_NF = x_ND.new_empty(len(x_ND), weight_EDF.shape[2])
    for x, weight, out in zip(x_ND.split(counts), weight_EDF, y_NF.split(counts), strict=True):
        torch.mm(x, weight.to(x.dtype), out=out)
    return y_NF


def grouped_gemm(x_ND: Tensor, weight_EFD: Tensor, counts: Sequence[int]) -> Tensor:
    """The outputs in x's dtype, differentiable once."""
    return GroupedGemm.apply(x_ND, weight_EFD, list(counts))  # type: ignore[return-value]

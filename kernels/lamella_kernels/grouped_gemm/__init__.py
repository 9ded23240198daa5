"""One matrix multiplication for each group of rows: the linear layers of a mixture of experts.

    y_n = W_e(n) x_n        rows sorted by e, counts[e] of them for each e

N row, E group, F width out, D width in.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lamella_kernels import forms
from lamella_kernels.grouped_gemm import eager
from lamella_kernels.shapes import match_shapes

__all__ = ["grouped_gemm"]


def grouped_gemm(x_ND: Tensor, weight_EFD: Tensor, counts: Sequence[int] | Tensor) -> Tensor:
    """Multiply each group's rows with its own weight, which is used in x's dtype.

    counts: how many rows each group has, in order; 0 is allowed. Numbers sum to N; a tensor [E] of int32 or int64, on
    x's device, may sum to less: rows behind the last group give 0 and get a gradient of 0. On a GPU no host reads it.

    Returns y_NF in x's dtype. Gradients reach x and the weight; a group without rows gets a zero gradient. For backward
    only the two arguments themselves are kept, and the counts.

    Errors: ValueError for shapes that disagree, dtypes that are not floating point, tensors on two devices, or counts
    that are not E numbers of sum N, or E integers.
    """
    op = "grouped_gemm"
    named = {"x_ND": x_ND, "weight_EFD": weight_EFD}
    sizes = match_shapes(op, {**named, "counts_E": counts} if isinstance(counts, Tensor) else named)
    for name, tensor in named.items():
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{op}: {name} must be floating point, got {tensor.dtype}")
    if isinstance(counts, Tensor):
        if counts.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{op}: counts must be int32 or int64, got {counts.dtype}")
    elif len(counts) != sizes["E"] or sum(counts) != sizes["N"] or min(counts, default=0) < 0:
        raise ValueError(f"{op}: counts must be {sizes['E']} numbers of sum {sizes['N']}, got {list(counts)}")
    form: Any = eager
    if forms.on_gpu(x_ND, weight_EFD):
        from lamella_kernels.grouped_gemm import gpu as form
    return form.grouped_gemm(x_ND, weight_EFD, counts)

"""Tokens to the rows that experts work on, and back: what a mixture of experts does around `grouped_gemm`.

    moe_permute       x_m = x_n(m), 0 for a row without a token
    moe_unpermute     y_n = sum over choices s of w_ns y_place(n,s), over those that have a row

Slot n S + s is token n's choice s. `slot_M` tells each row's slot, `place_NS` each slot's row, -1 where there is none:
two ways to say the same, which nobody checks. No row has two tokens, so gradients are gathered, too, in a fixed order.

N token, S choice, M row, D channel.
"""

from typing import Any

import torch
from torch import Tensor

from lamella_kernels import forms
from lamella_kernels.moe_permute import eager
from lamella_kernels.shapes import match_shapes

__all__ = ["moe_permute", "moe_unpermute"]


def moe_permute(x_ND: Tensor, slot_M: Tensor, place_NS: Tensor) -> Tensor:
    """Each row's token: [M, D] in x's dtype. slot_M, place_NS: int32 or int64, as above; M is N S at most.

    A token's gradient is the sum of its rows', in fp32 (fp64 for fp64) and rounded once. The indices alone are kept.

    Errors: ValueError for shapes, dtypes or devices that disagree.
    """
    _check("moe_permute", {"x_ND": x_ND, "slot_M": slot_M, "place_NS": place_NS})
    form: Any = eager
    if forms.on_gpu(x_ND):
        from lamella_kernels.moe_permute import gpu as form
    return form.moe_permute(x_ND, slot_M, place_NS)


def moe_unpermute(y_MD: Tensor, weight_NS: Tensor, slot_M: Tensor, place_NS: Tensor) -> Tensor:
    """Each token's weighted sum over its rows: [N, D] in y's dtype, 0 for a token without any.

    weight_NS: of each choice, floating point; its gradient is 0 where there is no row. Sums are in fp32 (fp64 for
    fp64), from the first choice to the last, and rounded once; on the CPU the weights, too, are rounded to y's dtype.

    Gradients reach y and the weights. For backward the arguments are kept.

    Errors: ValueError for shapes, dtypes or devices that disagree.
    """
    named = {"y_MD": y_MD, "weight_NS": weight_NS, "slot_M": slot_M, "place_NS": place_NS}
    _check("moe_unpermute", named)
    form: Any = eager
    if forms.on_gpu(y_MD, weight_NS):
        from lamella_kernels.moe_permute import gpu as form
    return form.moe_unpermute(y_MD, weight_NS, slot_M, place_NS)


def _check(op: str, named: dict[str, Tensor]) -> None:
    sizes = match_shapes(op, named)
    for name, tensor in named.items():
        index = name in ("slot_M", "place_NS")
        if index and tensor.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{op}: {name} must be int32 or int64, got {tensor.dtype}")
        if not index and not tensor.dtype.is_floating_point:
            raise ValueError(f"{op}: {name} must be floating point, got {tensor.dtype}")
    if sizes["M"] > sizes["N"] * sizes["S"]:
        raise ValueError(f"{op}: slot_M has {sizes['M']} rows, but {sizes['N']} tokens have {sizes['S']} choices each")

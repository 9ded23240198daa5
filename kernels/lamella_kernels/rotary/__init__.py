"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), the halves of a head rotated against each other.

    (x_i, x_{i + R/2})  turned by  position * theta^(-2i / R)        i < R / 2

B batch, T time, H heads, K channels of a head, the first R of them turned.
"""

from typing import Any

import torch
from torch import Tensor

from lamella_kernels import forms
from lamella_kernels.rotary import eager
from lamella_kernels.shapes import match_shapes

__all__ = ["rotary"]


def rotary(x_BTHK: Tensor, position_BT: Tensor, *, theta: float, width: int | None = None) -> Tensor:
    """Turn each pair of channels by its token's angle; channels behind the first `width` (all if absent) pass by.

    x_BTHK: fp16, bf16, fp32 or fp64; slices of a fused projection are read in place.
    position_BT: int32 or int64, 0 or more. Angles are exact for any: no table ends, no digits are lost far out.
    theta: the base, above 0.

    Returns y like x, computed in fp32 (fp64 of fp64). The gradient is dy turned back; for backward only positions are
    kept.

    Errors: ValueError for shapes or devices that disagree, wrong dtypes, a theta not above 0, or a width that is odd or
    above K.
    """
    op = "rotary"
    channels = match_shapes(op, {"x_BTHK": x_BTHK, "position_BT": position_BT})["K"]
    width = channels if width is None else width
    if not x_BTHK.dtype.is_floating_point:
        raise ValueError(f"{op}: x_BTHK must be floating point, got {x_BTHK.dtype}")
    if position_BT.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: position_BT must be int32 or int64, got {position_BT.dtype}")
    if width % 2 or not 0 < width <= channels:
        raise ValueError(f"{op}: width must be even and at most the {channels} channels of a head, got {width}")
    if not theta > 0:
        raise ValueError(f"{op}: theta must be above 0, got {theta}")
    form: Any = eager
    if forms.on_gpu(x_BTHK):
        from lamella_kernels.rotary import gpu as form
    return form.rotary(x_BTHK, position_BT, theta, width)

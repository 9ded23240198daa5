"""Root mean square norm (Zhang & Sennrich 2019, arXiv 1910.07467), alone, behind a sum, or with a gate (Dao & Gu 2024).

    norm(u) = u / sqrt(mean(u^2) + eps), the mean over each W channels that follow one another

    y = norm(x) w                        s = x + residual,  y = norm(s) w
    y = norm(x silu(gate)) w             y = norm(x) w silu(gate)

D channels, W of them a group.
"""

from typing import Any

from torch import Tensor

from lamella_kernels import forms
from lamella_kernels.rmsnorm import eager

__all__ = ["rmsnorm"]

WIDEST, WIDEST_GATED = 16384, 8192  # channels of a group that the registers of a kernel's block hold


def rmsnorm(
    x: Tensor,
    weight_D: Tensor | None = None,
    *,
    eps: float,
    width: int | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    gate_first: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise x over its last dim, or over groups of `width` channels of it.

    x: [..., D] in fp16, bf16, fp32 or fp64; residual and gate like it, in shape and dtype. Computed in fp32, in fp64
    when x is fp64.
    weight_D: any floating dtype; absent it is 1.
    residual: added first; the sum, rounded to x's dtype, is what is normalised, and is returned too.
    gate: multiplies through SiLU before the norm (gate_first, as in Mamba-2) or behind it.

    Returns y in x's dtype and shape; with a residual (y, x + residual). Gradients reach all floating arguments. For
    backward the arguments are kept (the sum in place of x and residual) and one number a group.

    Errors: ValueError for shapes or dtypes that disagree, a width that does not divide D, or a residual with a gate.
    """
    op = "rmsnorm"
    if not x.dim() or not x.shape[-1] or not x.dtype.is_floating_point:
        raise ValueError(f"{op}: x must be floating point with at least one channel, got {x.dtype} {tuple(x.shape)}")
    channels = x.shape[-1]
    width = channels if width is None else width
    if width < 1 or channels % width:
        raise ValueError(f"{op}: width must divide the {channels} channels, got {width}")
    if residual is not None and gate is not None:
        raise ValueError(f"{op}: takes a residual or a gate, not both")
    for name, tensor in (("residual", residual), ("gate", gate)):
        if tensor is not None and (tensor.shape, tensor.dtype, tensor.device) != (x.shape, x.dtype, x.device):
            found, wanted = (f"{t.dtype} {tuple(t.shape)} on {t.device}" for t in (tensor, x))
            raise ValueError(f"{op}: {name} must be like x, {wanted}, got {found}")
    if weight_D is not None:
        if tuple(weight_D.shape) != (channels,) or not weight_D.dtype.is_floating_point:
            found = f"{weight_D.dtype} {tuple(weight_D.shape)}"
            raise ValueError(f"{op}: weight_D must be floating point of shape ({channels},), got {found}")
        if weight_D.device != x.device:
            raise ValueError(f"{op}: weight_D is on {weight_D.device}, but x is on {x.device}; move it there")
    form: Any = eager
    if forms.on_gpu(x, weight_D) and width <= (WIDEST if gate is None else WIDEST_GATED):
        from lamella_kernels.rmsnorm import gpu as form
    if residual is not None:
        return form.add_rmsnorm(x, residual, weight_D, width, eps)
    return form.rmsnorm(x, gate, weight_D, width, eps, gate_first)

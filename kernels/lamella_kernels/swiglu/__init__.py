"""The gate of a gated linear unit (Shazeer 2020, arXiv 2002.05202).

y = silu(gate) up        silu(g) = g / (1 + exp(-g))
"""

from typing import Any

from torch import Tensor

from lamella_kernels import forms
from lamella_kernels.swiglu import eager

__all__ = ["swiglu"]


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """Both [..., F] of one shape and dtype: fp16, bf16, fp32 or fp64; slices of a fused projection are read in place.

    Without up, gate is the whole [..., 2 F], gates first: its gradient is then written in one piece, where two slices
    would have theirs joined by a copy.

    Returns y [..., F] like gate, computed in fp32 (fp64 of fp64) and rounded once. For backward only the arguments are
    kept.

    Errors: ValueError for shapes, dtypes or devices that disagree, a dtype that is not floating point, or an odd width
    without up.
    """
    if not gate.dtype.is_floating_point or not gate.dim():
        raise ValueError(f"swiglu: gate must be floating point with at least one dim, got {gate.dtype} of {gate.shape}")
    if up is None and gate.shape[-1] % 2:
        raise ValueError(f"swiglu: without up, gate must be of an even width, got {tuple(gate.shape)}")
    if up is not None and (gate.shape, gate.dtype, gate.device) != (up.shape, up.dtype, up.device):
        found, wanted = (f"{t.dtype} {tuple(t.shape)} on {t.device}" for t in (up, gate))
        raise ValueError(f"swiglu: up must be like gate, {wanted}, got {found}")
    form: Any = eager
    if forms.on_gpu(gate):
        from lamella_kernels.swiglu import gpu as form
    return form.swiglu(gate, up)

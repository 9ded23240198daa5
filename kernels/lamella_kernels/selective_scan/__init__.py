"""Mamba-1's selective scan (Gu & Dao 2023, arXiv 2312.00752).

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = C_t . h_t + D x_t        h_{t-1} := 0 where reset_t

B batch, T time, I channel, N state; B_BTN and C_BTN are the paper's B and C.
"""

from typing import Any

import torch
from torch import Tensor

from lamella_kernels import forms, native
from lamella_kernels.selective_scan import cpu, eager
from lamella_kernels.shapes import match_shapes

__all__ = ["selective_scan"]

WIDEST = 128  # states of a channel that a warp of the Triton kernels holds


def selective_scan(
    x_BTI: Tensor,
    dt_BTI: Tensor,
    A_IN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_I: Tensor | None = None,
    *,
    reset_BT: Tensor | None = None,
    initial_state_BIN: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan every channel of x over time (arXiv 2312.00752, algorithm 2, with dt B for the discretised B).

    x_BTI, B_BTN, C_BTN: fp16, bf16, fp32 or fp64. The state is computed in fp32, in fp64 when x is fp64.
    dt_BTI: the step, after softplus, positive; A_IN negative; D_I the skip. These are fp32 or fp64.
    reset_BT: bool, True where a document starts: the state before this token is zero. At t = 0 it drops the initial
    state.
    initial_state_BIN: the state before the first token, zero if absent.

    Returns y_BTI in x's dtype; with return_state also the state after the last token, [B, I, N] in the computation's
    dtype. Gradients reach all floating arguments, also from the returned state. Other documents of a row have no
    influence on a document's y, dx, ddt, dB and dC, not even by rounding.

    Errors: ValueError for shapes that disagree, a wrong dtype, tensors on two devices, or no tokens.
    """
    op = "selective_scan"
    sizes = match_shapes(
        op,
        {
            "x_BTI": x_BTI,
            "dt_BTI": dt_BTI,
            "A_IN": A_IN,
            "B_BTN": B_BTN,
            "C_BTN": C_BTN,
            "D_I": D_I,
            "reset_BT": reset_BT,
            "initial_state_BIN": initial_state_BIN,
        },
    )
    if min(sizes.values()) < 1:
        raise ValueError(f"{op}: needs at least one token, channel and state, got {sizes}")
    for name, tensor in (
        ("x_BTI", x_BTI),
        ("B_BTN", B_BTN),
        ("C_BTN", C_BTN),
        ("initial_state_BIN", initial_state_BIN),
    ):
        if tensor is not None and not tensor.dtype.is_floating_point:
            raise ValueError(f"{op}: {name} must be floating point, got {tensor.dtype}")
    for name, tensor in (("dt_BTI", dt_BTI), ("A_IN", A_IN), ("D_I", D_I)):
        if tensor is not None and tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{op}: {name} must be float32 or float64, got {tensor.dtype}; convert it with .float()")
    if reset_BT is not None and reset_BT.dtype != torch.bool:
        raise ValueError(f"{op}: reset_BT must be bool, got {reset_BT.dtype}")
    floating = (x_BTI, dt_BTI, A_IN, B_BTN, C_BTN, D_I, initial_state_BIN)
    form: Any = eager
    if forms.on_gpu(*floating) and sizes["N"] <= WIDEST:
        from lamella_kernels.selective_scan import gpu as form
    elif native.usable(*floating):
        form = cpu
    y_BTI, state_BIN = form.selective_scan(x_BTI, dt_BTI, A_IN, B_BTN, C_BTN, D_I, reset_BT, initial_state_BIN)
    return (y_BTI, state_BIN) if return_state else y_BTI

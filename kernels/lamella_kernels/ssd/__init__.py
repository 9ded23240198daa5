"""Mamba-2's state space dual (SSD; Dao & Gu 2024, arXiv 2405.21060): one decay a head, matrix-valued states.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        y_t = h_t C_t + D x_t        h_{t-1} := 0 where reset_t

B batch, T time, H head, P head size, G group of heads, N state; B_BTGN and C_BTGN are the paper's B and C.
"""

from typing import Any

import torch
from torch import Tensor

from lamella_kernels import forms
from lamella_kernels.shapes import match_shapes
from lamella_kernels.ssd import eager

__all__ = ["ssd"]


def ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor | None = None,
    *,
    reset_BT: Tensor | None = None,
    initial_state_BHPN: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run every head over time (arXiv 2405.21060, section 6, the block decomposition of its equation 20).

    x_BTHP, B_BTGN, C_BTGN: fp16, bf16, fp32 or fp64; consecutive heads share a group's B and C. The state is computed
    in fp32, in fp64 when x is fp64.
    dt_BTH: the step, after softplus, not negative; A_H negative; D_H the skip. These are fp32 or fp64.
    reset_BT: bool, True where a document starts: the state before this token is zero. At t = 0 it drops the initial
    state.
    initial_state_BHPN: the state before the first token, zero if absent.

    Returns y_BTHP in x's dtype; with return_state also the state after the last token, [B, H, P, N] in the
    computation's dtype. Gradients reach all floating arguments, also from the returned state. Other documents of a row
    have no influence on a document's y, dx, ddt, dB and dC, not even by rounding.

    Errors: ValueError for shapes that disagree, heads that do not divide by groups, a wrong dtype, tensors on two
    devices, or no tokens.
    """
    op = "ssd"
    sizes = match_shapes(
        op,
        {
            "x_BTHP": x_BTHP,
            "dt_BTH": dt_BTH,
            "A_H": A_H,
            "B_BTGN": B_BTGN,
            "C_BTGN": C_BTGN,
            "D_H": D_H,
            "reset_BT": reset_BT,
            "initial_state_BHPN": initial_state_BHPN,
        },
    )
    if min(sizes.values()) < 1:
        raise ValueError(f"{op}: needs at least one token, head, group, channel and state, got {sizes}")
    if sizes["H"] % sizes["G"]:
        raise ValueError(f"{op}: {sizes['H']} heads cannot share {sizes['G']} groups evenly")
    for name, tensor in (
        ("x_BTHP", x_BTHP),
        ("B_BTGN", B_BTGN),
        ("C_BTGN", C_BTGN),
        ("initial_state_BHPN", initial_state_BHPN),
    ):
        if tensor is not None and not tensor.dtype.is_floating_point:
            raise ValueError(f"{op}: {name} must be floating point, got {tensor.dtype}")
    for name, tensor in (("dt_BTH", dt_BTH), ("A_H", A_H), ("D_H", D_H)):
        if tensor is not None and tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{op}: {name} must be float32 or float64, got {tensor.dtype}; convert it with .float()")
    if reset_BT is not None and reset_BT.dtype != torch.bool:
        raise ValueError(f"{op}: reset_BT must be bool, got {reset_BT.dtype}")
    form: Any = eager
    if forms.on_gpu(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, initial_state_BHPN):
        from lamella_kernels.ssd import gpu as form
    y_BTHP, state_BHPN = form.ssd(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, reset_BT, initial_state_BHPN)
    return (y_BTHP, state_BHPN) if return_state else y_BTHP

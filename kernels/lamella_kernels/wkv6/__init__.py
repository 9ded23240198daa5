"""RWKV-6's recurrence (Finch; Peng et al. 2024, arXiv 2404.05892): a matrix state that decays by channel and token.

    y_t = r_t (S_{t-1} + diag(u) k_t^T v_t)        S_t = diag(w_t) S_{t-1} + k_t^T v_t        S_{t-1} := 0 at a reset

B batch, T time, H head, K key channel, V value channel; r, k, v are rows.
"""

from typing import Any

import torch
from torch import Tensor

from lamella_kernels import forms
from lamella_kernels.shapes import match_shapes
from lamella_kernels.wkv6 import eager, reference

__all__ = ["wkv6"]


def wkv6(
    r_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_w_BTHK: Tensor,
    u_HK: Tensor,
    *,
    reset_BT: Tensor | None = None,
    initial_state_BHKV: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Runs every head over time (arXiv 2404.05892, equations 19 and 20).

    r_BTHK, k_BTHK, v_BTHV: fp16, bf16, fp32 or fp64. The state is computed in fp32, in fp64 when r is fp64.
    log_w_BTHK: log of the decay, at most 0 (minus infinity: a decay of 0); u_HK the bonus of the token itself. These
    are fp32 or fp64.
    reset_BT: bool, True where a document starts: the state before this token is zero. At t = 0 it drops the initial
    state.
    initial_state_BHKV: the state before the first token, zero if absent.

    Returns y_BTHV in r's dtype; with return_state also the state after the last token, [B, H, K, V] in the
    computation's dtype. Gradients reach all floating arguments, also from the returned state. Other documents of a row
    have no influence on a document's outputs and gradients, not even by rounding.

    Errors: ValueError for shapes that disagree, a wrong dtype, tensors on two devices, or no tokens.
    """
    op = "wkv6"
    sizes = match_shapes(
        op,
        {
            "r_BTHK": r_BTHK,
            "k_BTHK": k_BTHK,
            "v_BTHV": v_BTHV,
            "log_w_BTHK": log_w_BTHK,
            "u_HK": u_HK,
            "reset_BT": reset_BT,
            "initial_state_BHKV": initial_state_BHKV,
        },
    )
    if min(sizes.values()) < 1:
        raise ValueError(f"{op}: needs at least one token, head and channel, got {sizes}")
    for name, tensor in (
        ("r_BTHK", r_BTHK),
        ("k_BTHK", k_BTHK),
        ("v_BTHV", v_BTHV),
        ("initial_state_BHKV", initial_state_BHKV),
    ):
        if tensor is not None and not tensor.dtype.is_floating_point:
            raise ValueError(f"{op}: {name} must be floating point, got {tensor.dtype}")
    for name, tensor in (("log_w_BTHK", log_w_BTHK), ("u_HK", u_HK)):
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{op}: {name} must be float32 or float64, got {tensor.dtype}; convert it with .float()")
    if reset_BT is not None and reset_BT.dtype != torch.bool:
        raise ValueError(f"{op}: reset_BT must be bool, got {reset_BT.dtype}")
    form: Any = reference if sizes["T"] == 1 else eager
    if sizes["T"] > 1 and forms.on_gpu(r_BTHK, k_BTHK, v_BTHV, log_w_BTHK, u_HK, initial_state_BHKV):
        from lamella_kernels.wkv6 import gpu as form
    y_BTHV, state_BHKV = form.wkv6(r_BTHK, k_BTHK, v_BTHV, log_w_BTHK, u_HK, reset_BT, initial_state_BHKV)
    return (y_BTHV, state_BHKV) if return_state else y_BTHV

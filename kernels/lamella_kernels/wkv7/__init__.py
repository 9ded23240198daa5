"""RWKV-7's recurrence (Goose; Peng et al. 2025, arXiv 2503.14456): a matrix state under a generalised delta rule.

    S_t = S_{t-1} (diag(w_t) + a_t b_t^T) + v_t k_t^T        y_t = S_t r_t        S_{t-1} := 0 at a reset

In RWKV-7 a = -kk and b = kk * (learning rate). B batch, T time, H head, K key channel, V value channel.
"""

from typing import Any

import torch
from torch import Tensor

from lamella_kernels import forms
from lamella_kernels.shapes import match_shapes
from lamella_kernels.wkv7 import eager, reference

__all__ = ["wkv7"]

WIDEST = {2: 128, 4: 64, 8: 0}  # channels of a head that Triton's kernels take, by bytes a number; wider ones spill


def wkv7(
    r_BTHK: Tensor,
    log_w_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    a_BTHK: Tensor,
    b_BTHK: Tensor,
    *,
    reset_BT: Tensor | None = None,
    initial_state_BHVK: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Runs every head over time (arXiv 2503.14456, section 4).

    r_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK: fp16, bf16, fp32 or fp64. The state is computed in fp32, in fp64 when r is.
    log_w_BTHK: log of the decay, at most 0 (minus infinity: a decay of 0), fp32 or fp64.
    reset_BT: bool, True where a document starts: the state before this token is zero. At t = 0 it drops the initial
    state.
    initial_state_BHVK: the state before the first token, zero if absent.

    Returns y_BTHV in r's dtype; with return_state also the state after the last token, [B, H, V, K] in the
    computation's dtype. Gradients reach all floating arguments, also from the returned state. Other documents of a row
    have no influence on a document's outputs and gradients, not even by rounding.

    On CUDA inputs that are all of 16 bits are multiplied in 16 bits, added up in fp32; heads wider than `WIDEST` run in
    plain torch there.

    Errors: ValueError for shapes that disagree, a wrong dtype, tensors on two devices, or no tokens.
    """
    op = "wkv7"
    named = {
        "r_BTHK": r_BTHK,
        "log_w_BTHK": log_w_BTHK,
        "k_BTHK": k_BTHK,
        "v_BTHV": v_BTHV,
        "a_BTHK": a_BTHK,
        "b_BTHK": b_BTHK,
        "reset_BT": reset_BT,
        "initial_state_BHVK": initial_state_BHVK,
    }
    sizes = match_shapes(op, named)
    if min(sizes.values()) < 1:
        raise ValueError(f"{op}: needs at least one token, head and channel, got {sizes}")
    for name, tensor in named.items():
        if tensor is None or name == "reset_BT":
            continue
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{op}: {name} must be floating point, got {tensor.dtype}")
    if log_w_BTHK.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{op}: log_w_BTHK must be float32 or float64, got {log_w_BTHK.dtype}; convert with .float()")
    if reset_BT is not None and reset_BT.dtype != torch.bool:
        raise ValueError(f"{op}: reset_BT must be bool, got {reset_BT.dtype}")
    form: Any = reference if sizes["T"] == 1 else eager
    tokens = r_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK
    fits = max(sizes["K"], sizes["V"]) <= WIDEST[max(x.element_size() for x in tokens)]
    if sizes["T"] > 1 and fits and forms.on_gpu(*tokens, log_w_BTHK, initial_state_BHVK):
        from lamella_kernels.wkv7 import gpu as form
    y_BTHV, state_BHVK = form.wkv7(r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, reset_BT, initial_state_BHVK)
    return (y_BTHV, state_BHVK) if return_state else y_BTHV

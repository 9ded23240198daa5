"""Linear attention with a scalar decay per head, and the score normalisation of retention (arXiv 2307.08621).

    S_t = a_t S_{t-1} + k_t v_t^T        o_t = q_t S_t        S_{t-1} := 0 where reset_t

    normalised: y_t = o_t / max(sqrt(w_t), |q_t . z_t|)       z_t = a_t z_{t-1} + k_t        w_t = a_t w_{t-1} + 1

The divisor is the exact linear form of two steps that RetNet's parallel form takes on rows of scores: the decay matrix
D is divided by the root of its row sum, and the scores q k^T * D by max(1, |row sum|). The row sum of D is w_t, that of
the scores q_t . z_t / sqrt(w_t), and sqrt(w) max(1, |q . z| / sqrt(w)) = max(sqrt(w), |q . z|). Both sums are linear
recurrences, so the parallel, the recurrent and the chunkwise form give one number. No gradient passes the divisor.

B batch, T time, H head, K size of a query and key, V size of a value.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lamella_kernels import forms
from lamella_kernels.linear_attention import eager
from lamella_kernels.shapes import match_shapes

__all__ = ["State", "linear_attention"]


class State(NamedTuple):
    """What the next token needs: S, and for the normalisation z and w, all in the computation's dtype."""

    kv_BHKV: Tensor
    keys_BHK: Tensor | None = None
    weight_BH: Tensor | None = None


def linear_attention(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay: Tensor,
    *,
    normalize: bool = False,
    reset_BT: Tensor | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, State]:
    """The equation above for every head; the queries or keys come scaled.

    q_BTHK, k_BTHK, v_BTHV: fp16, bf16, fp32 or fp64. Computed in fp32, in fp64 when q is fp64.
    log_decay: log a_t <= 0, fp32 or fp64; [H] where a head's decay is constant, else [B, T, H]. -inf is a decay of 0.
    normalize: divide as above.
    reset_BT: bool, True where a document starts: the state before this token is zero. At t = 0 it drops the initial
    state.
    initial_state: the state before the first token, zero if absent; with `normalize` keys and weight too.

    Returns y_BTHV in q's dtype; with return_state also the state after the last token. Gradients reach q, k, v,
    log_decay and the initial kv, also from the returned kv. Other documents of a row have no influence on a document's
    outputs and gradients, not even by rounding, as long as products of any two tokens of a row are finite.

    Errors: ValueError for shapes that disagree, a wrong dtype, tensors on two devices, a state without what `normalize`
    needs, or no tokens.
    """
    op = "linear_attention"
    state = initial_state or State(None)  # type: ignore[arg-type]
    named = {"q_BTHK": q_BTHK, "k_BTHK": k_BTHK, "v_BTHV": v_BTHV}
    decays = {"log_decay_H" if log_decay.dim() == 1 else "log_decay_BTH": log_decay}
    states = {f"initial_state.{name}": value for name, value in state._asdict().items()}
    sizes = match_shapes(op, {**named, **decays, "reset_BT": reset_BT, **states})
    if min(sizes.values()) < 1:
        raise ValueError(f"{op}: needs at least one token, head, key and value, got {sizes}")
    for name, tensor in {**named, **states}.items():
        if tensor is not None and not tensor.dtype.is_floating_point:
            raise ValueError(f"{op}: {name} must be floating point, got {tensor.dtype}")
    if log_decay.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{op}: log_decay must be float32 or float64, got {log_decay.dtype}; convert it with .float()")
    if reset_BT is not None and reset_BT.dtype != torch.bool:
        raise ValueError(f"{op}: reset_BT must be bool, got {reset_BT.dtype}")
    if normalize and initial_state is not None and None in (state.keys_BHK, state.weight_BH):
        raise ValueError(f"{op}: normalize needs keys_BHK and weight_BH of the initial state")
    form: Any = eager
    if forms.on_gpu(q_BTHK, k_BTHK, v_BTHV, log_decay, *state):
        from lamella_kernels.linear_attention import gpu as form
    y_BTHV, kv_BHKV, keys_BHK, weight_BH = form.linear_attention(
        q_BTHK, k_BTHK, v_BTHV, log_decay, normalize, reset_BT, *state, return_state
    )
    if kv_BHKV is None:
        return y_BTHV
    return y_BTHV, State(kv_BHKV, keys_BHK, weight_BH)

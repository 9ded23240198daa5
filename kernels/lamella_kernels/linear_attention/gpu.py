"""Linear attention in Triton: the recurrence of `scalar_decay` with a key and query per head and the decay given.

B batch, T time, H head, K size of a query and key, V size of a value.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lamella_kernels.ops import absent, register
from lamella_kernels.scalar_decay.calls import Call


def _call(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, reset: Tensor | None) -> Call:
    constant = log_decay.dim() == 1
    return Call(q, k, v, None, None if constant else log_decay, log_decay if constant else None, reset)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, normalize: bool, reset: Tensor | None, initial: Tensor | None,
    sums: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    c = _call(q, k, v, log_decay, reset)
    y, state, before, last_sums, divisor = c.forward(None, initial, sums, normalize)
    return y, state, absent(last_sums, v), before, absent(divisor, v)


def _backward(
    dy: Tensor | None, dstate: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, normalize: bool,
    reset: Tensor | None, before: Tensor, divisor: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    c = _call(q, k, v, log_decay, reset)
    found = c.backward(dy, dstate, None, before, divisor if normalize else None)
    dlog = found.log_decay
    if log_decay.dim() == 1:
        dlog = dlog.sum((0, 1), dtype=torch.float64).float()
    assert found.initial is not None
    return found.q, found.k, found.v, dlog, found.initial


_op = register(
    "linear_attention", _forward, _backward,
    outputs=("y", "state", "last_sums", "before", "divisor"), gradients=("q", "k", "v", "log_decay", "initial"),
    hidden=("last_sums", "before", "divisor"),
)  # fmt: skip


def linear_attention(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay: Tensor,
    normalize: bool,
    reset_BT: Tensor | None,
    kv_BHKV: Tensor | None,
    keys_BHK: Tensor | None,
    weight_BH: Tensor | None,
    want_state: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The outputs (in q's dtype), then S, z, w after the last token where wanted (fp32). Differentiable once."""
    dtype = torch.promote_types(torch.promote_types(q_BTHK.dtype, k_BTHK.dtype), v_BTHV.dtype)
    q, k, v = (t.to(dtype) for t in (q_BTHK, k_BTHK, v_BTHV))
    initial = None if kv_BHKV is None else kv_BHKV.float().mT.contiguous()
    sums = None
    if normalize and keys_BHK is not None and weight_BH is not None:
        sums = torch.cat([keys_BHK.detach().float(), weight_BH.detach().float().unsqueeze(-1)], -1)
    y, state_BHVK, sums_BHX, *_ = _op(q, k, v, log_decay, normalize, reset_BT, initial, sums)
    y = y.to(q_BTHK.dtype)
    if not want_state:
        return y, None, None, None
    keys, weight = (sums_BHX[..., :-1], sums_BHX[..., -1]) if normalize else (None, None)
    return y, state_BHVK.mT, keys, weight


def examples() -> dict[str, Callable[[], object]]:
    """Calls on meta tensors, by name: what the report compiles."""

    def call(heads: int, keys: int, values: int, constant: bool, normalize: bool, dtype: torch.dtype) -> None:
        def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)

        q, k, v = (new(2, 4096, heads, size) for size in (keys, keys, values))
        log_decay = new(*((heads,) if constant else (2, 4096, heads)), dtype=torch.float32)
        reset = torch.empty(2, 4096, dtype=torch.bool, device="meta") if constant else None
        y, *_ = linear_attention(q, k, v, log_decay, normalize, reset, None, None, None)
        y.backward(torch.empty_like(y))

    half, wide = torch.bfloat16, torch.float32
    cases = [(8, 256, 512, True, True, half), (8, 256, 256, False, False, half), (16, 128, 128, True, False, half)]
    cases += [(32, 64, 64, False, False, torch.float16), (16, 64, 128, True, True, half), (8, 64, 64, True, True, wide)]
    names = ("H", "K", "V", "constant", "normalize", "dtype")
    named = {" ".join(f"{n}={v}" for n, v in zip(names, case, strict=True)): case for case in cases}
    return {name: lambda case=case: call(*case) for name, case in named.items()}

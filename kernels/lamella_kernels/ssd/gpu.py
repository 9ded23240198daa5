"""The state space dual in Triton: the recurrence of `scalar_decay` with q = C, k = B, v = x and log a = dt A.

B batch, T time, H head, P head size, G group, N state.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lamella_kernels.ops import absent, register
from lamella_kernels.scalar_decay.calls import Call


def _forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, reset: Tensor | None,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y, state, before, _, _ = Call(C, B, x, dt, dt, A, reset).forward(D, initial)
    return y, state, before


def _backward(
    dy: Tensor | None, dstate: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    reset: Tensor | None, before: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    found = Call(C, B, x, dt, dt, A, reset).backward(dy, dstate, D, before)
    assert found.dt is not None and found.initial is not None
    ddt = found.dt.addcmul_(found.log_decay, A)
    dA = (found.log_decay * dt).sum((0, 1), dtype=torch.float64).float()
    return found.v, ddt, dA, found.k, found.q, absent(found.D, x), found.initial


_op = register(
    "ssd", _forward, _backward,
    outputs=("y", "state", "before"), gradients=("x", "dt", "A", "B", "C", "D", "initial"), hidden=("before",),
)  # fmt: skip


def ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor | None,
    reset_BT: Tensor | None,
    initial_state_BHPN: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The outputs (in x's dtype) and the final state (fp32), differentiable once."""
    dtype = torch.promote_types(torch.promote_types(x_BTHP.dtype, B_BTGN.dtype), C_BTGN.dtype)
    x, B, C = (v.to(dtype) for v in (x_BTHP, B_BTGN, C_BTGN))
    initial = None if initial_state_BHPN is None else initial_state_BHPN.float()
    y, state, _ = _op(x, dt_BTH, A_H, B, C, D_H, reset_BT, initial)
    return y.to(x_BTHP.dtype), state


def examples() -> dict[str, Callable[[], object]]:
    """Calls on meta tensors, by name: what the report compiles."""

    def call(heads: int, size: int, groups: int, states: int, packed: bool, dtype: torch.dtype) -> None:
        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)

        x, B, C = new(2, 4096, heads, size, dtype=dtype), *(new(2, 4096, groups, states, dtype=dtype) for _ in "BC")
        reset = torch.empty(2, 4096, dtype=torch.bool, device="meta") if packed else None
        initial = None if packed else new(2, heads, size, states)
        results = ssd(x, new(2, 4096, heads), new(heads), B, C, new(heads) if packed else None, reset, initial)
        torch.autograd.backward(list(results), [torch.empty_like(t) for t in results])

    half, wide = torch.bfloat16, torch.float32
    cases = [(64, 64, 1, 128, True, half), (64, 64, 1, 128, False, half), (24, 64, 1, 64, True, half)]
    cases += [(24, 64, 1, 256, True, half), (16, 128, 8, 128, True, torch.float16), (8, 256, 2, 256, True, half)]
    cases += [(24, 64, 1, 128, True, wide)]
    names = ("H", "P", "G", "N", "packed", "dtype")
    named = {" ".join(f"{n}={v}" for n, v in zip(names, case, strict=True)): case for case in cases}
    return {name: lambda case=case: call(*case) for name, case in named.items()}

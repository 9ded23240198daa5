"""RWKV-7's recurrence in Triton: one product a chunk after the other, all else by chunk (`kernels.py`).

Forward keeps its arguments and the state before each chunk, in their dtype; backward computes the rest anew.

B batch, N chunk, C token of a chunk, H head, K key channel, V value channel.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lamella_kernels.ops import absent, cdiv, launch, power_of_2, register
from lamella_kernels.tiles import tiles
from lamella_kernels.wkv7 import kernels


class Call:
    """Sizes and tiles of a call, its arguments as the kernels read them, and every chunk's matrices."""

    def __init__(
        self, r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, reset: Tensor | None, back: bool
    ):
        self.batch, self.time = r.shape[:2]
        self.H, self.K, self.V = map(int, (*r.shape[2:], v.shape[3]))
        self.device, self.dtype = r.device, r.dtype
        self.sizes = {"BYTES": r.element_size(), "K": self.K, "V": self.V}
        C = self.tile("wkv7_transitions")["C"]
        self.chunks = cdiv(self.time, C)
        self.widths = {"H": self.H, "K": self.K, "C": C, "BK": self.least("K")}
        self.reset = None if reset is None else reset.contiguous().view(torch.uint8)
        self.r, self.log_w, self.k, self.v, self.a, self.b = (t.contiguous() for t in (r, log_w, k, v, a, b))
        self.Q, self.F, self.P, self.E = (self.new(C, self.K) if back or n < 2 else None for n in range(4))
        self.Y, self.Z, self.W = (self.new(C, C) if back or n < 1 else None for n in range(3))
        self.M, self.whole = self.new(self.K, self.K), self.new(self.K, dtype=torch.float32)
        self.launch(
            kernels.transitions, "wkv7_transitions",
            self.r, self.log_w, self.k, self.a, self.b, self.reset,
            self.Q, self.Y, self.M, self.F, self.whole, self.P, self.Z, self.E, self.W, self.time,
        )  # fmt: skip

    def new(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        """[B, N, H, sizes]."""
        return torch.empty(self.batch, self.chunks, self.H, *sizes, dtype=dtype or self.dtype, device=self.device)

    def state(self) -> Tensor:
        return torch.empty(self.batch, self.H, self.V, self.K, dtype=torch.float32, device=self.device)

    def least(self, width: str) -> int:
        """The smallest block of a product that holds it."""
        return max(power_of_2(self.sizes[width]), 16)

    def tile(self, kernel: str) -> dict[str, int]:
        found = tiles(kernel, **self.sizes)
        return found | {f"B{w}": min(found[f"B{w}"], self.least(w)) for w in "KV" if f"B{w}" in found}

    def launch(self, kernel: object, name: str, *arguments: object, **options: object) -> None:
        """For each head of each chunk of each row."""
        options |= self.widths | {"LEVELS": self.widths["C"].bit_length() - 1} | self.tile(name)
        launch(kernel, (self.H * self.chunks, self.batch), *arguments, **options)

    def scan(self, v: Tensor, first: Tensor | None, last: Tensor | None, y: Tensor, dx: Tensor | None = None) -> Tensor:
        """[B, N, H, V, K]: S before each chunk; with dx D behind it."""
        found, tile = self.new(self.V, self.K), self.tile("wkv7_scan")
        first = None if first is None else first.contiguous()
        launch(
            kernels.scan, (cdiv(self.V, tile["BV"]), self.H, self.batch),
            v, self.Q, self.Y, self.M, self.F, self.whole, self.E, self.W, first, found, last, y, dx, self.time,
            self.chunks, V=self.V, **self.widths, **tile,
        )  # fmt: skip
        return found


def _forward(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, reset: Tensor | None, initial: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    c = Call(r, log_w, k, v, a, b, reset, back=False)
    y, state = torch.empty(v.shape, dtype=v.dtype, device=v.device), c.state()
    return y, state, c.scan(c.v, initial, state, y)


def _backward(
    dy: Tensor | None, dstate: Tensor | None, r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor,
    reset: Tensor | None, before: Tensor, needs_initial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    c = Call(r, log_w, k, v, a, b, reset, back=True)
    dy = torch.zeros_like(c.v) if dy is None else dy.contiguous()
    like = r, log_w, k, v, a, b, v
    dr, dlog_w, dk, dv, da, db, dx = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in like)
    dinitial = c.state() if needs_initial else None
    behind = c.scan(dy, dstate, dinitial, dv, dx)
    c.launch(
        kernels.gradients, "wkv7_gradients",
        dy, dx, c.r, c.log_w, c.k, c.v, c.a, c.b, c.reset, c.P, c.Z, before, behind, dr, dlog_w, dk, da, db, c.time,
        V=c.V, BV=c.least("V"),
    )  # fmt: skip
    return dr, dlog_w, dk, dv, da, db, absent(dinitial, r)


_op = register(
    "wkv7", _forward, _backward,
    outputs=("y", "state", "before"), gradients=("r", "log_w", "k", "v", "a", "b", "initial"), hidden=("before",),
)  # fmt: skip


def wkv7(
    r_BTHK: Tensor,
    log_w_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    a_BTHK: Tensor,
    b_BTHK: Tensor,
    reset_BT: Tensor | None,
    initial_state_BHVK: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The outputs (in r's dtype) and the final state (fp32), differentiable once."""
    dtype = r_BTHK.dtype
    for x in (k_BTHK, v_BTHV, a_BTHK, b_BTHK):
        dtype = torch.promote_types(dtype, x.dtype)
    r, k, v, a, b = (x.to(dtype) for x in (r_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK))
    initial = None if initial_state_BHVK is None else initial_state_BHVK.float()
    y, state, _ = _op(r, log_w_BTHK, k, v, a, b, reset_BT, initial)
    return y.to(r_BTHK.dtype), state


def examples() -> dict[str, Callable[[], object]]:
    """Calls on meta tensors, by name: what the report compiles."""

    def call(heads: int, keys: int, values: int, packed: bool, dtype: torch.dtype) -> None:
        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)

        r, k, a, b = (new(2, 4096, heads, keys, dtype=dtype) for _ in "rkab")
        v = new(2, 4096, heads, values, dtype=dtype)
        reset = torch.empty(2, 4096, dtype=torch.bool, device="meta") if packed else None
        initial = None if packed else new(2, heads, values, keys)
        results = wkv7(r, new(2, 4096, heads, keys), k, v, a, b, reset, initial)
        torch.autograd.backward(list(results), [torch.empty_like(t) for t in results])

    half, wide = torch.bfloat16, torch.float32
    cases = [(32, 64, 64, True, half), (32, 64, 64, False, half), (16, 128, 128, True, half)]
    cases += [(64, 32, 32, True, half), (32, 64, 64, True, torch.float16), (32, 64, 64, True, wide)]
    names = ("H", "K", "V", "packed", "dtype")
    named = {" ".join(f"{n}={v}" for n, v in zip(names, case, strict=True)): case for case in cases}
    return {name: lambda case=case: call(*case) for name, case in named.items()}

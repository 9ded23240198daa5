"""RWKV-6's recurrence in Triton: the states between chunks one after the other, all else by chunk (`kernels.py`).

Forward keeps its arguments and the state before each chunk, in r's dtype; backward computes the rest anew, and adds up
what chunks and rows contribute to u's gradient in a fixed order.

B batch, T time, H head, K key channel, V value channel, N chunk.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lamella_kernels.ops import absent, cdiv, launch, power_of_2, register, rows_of
from lamella_kernels.tiles import tiles
from lamella_kernels.wkv6 import kernels

# Pieces of bf16 that a log and a log's gradient are cut into: 8 bits each.
PARTS = {torch.bfloat16: (2, 1), torch.float16: (2, 2), torch.float32: (3, 3)}


class Call:
    """Sizes, rows and tiles of a call, and the kernels' launches."""

    def __init__(self, r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, reset: Tensor | None):
        self.batch, self.time = r.shape[:2]
        self.H, self.K, self.V = int(r.shape[2]), int(r.shape[3]), int(v.shape[3])
        self.device, self.dtype = r.device, r.dtype
        self.sizes = {"BYTES": r.element_size(), "K": self.K, "V": self.V}
        self.C = tiles("wkv6_states", **self.sizes)["C"]
        self.parts, self.gradient_parts = PARTS[r.dtype]
        self.chunks = cdiv(self.time, self.C)
        self.r, self.k, self.v, self.log_w = (self.rows(t) for t in (r, k, v, log_w))
        self.u = u.contiguous()
        self.reset = None if reset is None else reset.contiguous().view(torch.uint8)
        self.levels = int(math.log2(self.C))
        self.ways = self.new(self.levels + 2, self.C, self.C, dtype=torch.bfloat16)
        launch(kernels.matrices, (self.levels + 2,), self.ways, C=self.C, LEVELS=self.levels)

    def new(self, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=self.device)

    def rows(self, v: Tensor) -> Tensor:
        return rows_of(v.flatten(2))

    def tile(self, kernel: str) -> dict[str, int]:
        """Blocks that are no wider than what they cut."""
        found = tiles(kernel, **self.sizes)
        return found | {f"B{w}": min(found[f"B{w}"], max(power_of_2(self.sizes[w]), 16)) for w in "KV"}

    def launch(
        self, kernel: Any, grid: tuple[int, ...], *arguments: Any, rows: tuple[Tensor, ...], **options: Any
    ) -> None:
        options |= {"H": self.H, "K": self.K, "V": self.V, "C": self.C, "LEVELS": self.levels, "PARTS": self.parts}
        launch(kernel, grid, *arguments, self.time, self.chunks, *(t.stride(0) for t in rows), **options)

    def states(self, k: Tensor, v: Tensor, first: Tensor | None, last: Tensor | None, back: bool) -> Tensor:
        """[B, N, H, K, V] before each chunk; back: the gradients of those after it."""
        tile = self.tile("wkv6_states")
        blocks = cdiv(self.K, tile["BK"]) * cdiv(self.V, tile["BV"])
        found = self.new(self.batch, self.chunks, self.H, self.K, self.V, dtype=self.dtype)
        first = None if first is None else first.contiguous()
        self.launch(
            kernels.states, (blocks, self.H, self.batch), k, v, self.log_w, self.reset, self.ways, first, found, last,
            rows=(k, v, self.log_w), BACK=back, **tile,
        )  # fmt: skip
        return found

    def outputs(self, v: Tensor, state: Tensor, shape: torch.Size, back: bool) -> Tensor:
        """y, or the gradient of v."""
        tile = self.tile("wkv6_outputs")
        y = self.new(*shape, dtype=self.dtype)
        self.launch(
            kernels.outputs, (self.H * cdiv(self.V, tile["BV"]), self.chunks, self.batch),
            self.r, self.k, v, self.log_w, self.u, self.reset, self.ways, state, y,
            rows=(self.r, self.k, v, self.log_w), BACK=back, **tile,
        )  # fmt: skip
        return y


def _forward(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, reset: Tensor | None, initial: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    c = Call(r, k, v, log_w, u, reset)
    state = c.new(c.batch, c.H, c.K, c.V)
    before = c.states(c.k, c.v, initial, state, False)
    return c.outputs(c.v, before, v.shape, False), state, before


def _backward(
    dy: Tensor | None, dstate: Tensor | None, r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor,
    reset: Tensor | None, before: Tensor, needs_initial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    c = Call(r, k, v, log_w, u, reset)
    dy = c.rows(torch.zeros_like(v) if dy is None else dy)
    dinitial = c.new(c.batch, c.H, c.K, c.V) if needs_initial else None
    after = c.states(c.r, dy, dstate, dinitial, True)
    dr, dk, dlog_w = c.new(*r.shape, dtype=r.dtype), c.new(*k.shape, dtype=k.dtype), c.new(*log_w.shape)
    du = c.new(c.batch, c.chunks, c.H, c.K)
    tile = c.tile("wkv6_keys")
    c.launch(
        kernels.key_gradients, (c.H * cdiv(c.K, tile["BK"]), c.chunks, c.batch),
        dy, c.r, c.k, c.v, c.log_w, c.u, c.reset, c.ways, before, after, dr, dk, dlog_w, du,
        rows=(dy, c.r, c.k, c.v, c.log_w),
        GRADIENT_PARTS=c.gradient_parts, **tile,
    )  # fmt: skip
    dv = c.outputs(dy, after, v.shape, True)
    return dr, dk, dv, dlog_w, du.sum((0, 1), dtype=torch.float64).float(), absent(dinitial, r)


_op = register(
    "wkv6", _forward, _backward,
    outputs=("y", "state", "before"), gradients=("r", "k", "v", "log_w", "u", "initial"), hidden=("before",),
)  # fmt: skip


def wkv6(
    r_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_w_BTHK: Tensor,
    u_HK: Tensor,
    reset_BT: Tensor | None,
    initial_state_BHKV: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The outputs (in r's dtype) and the final state (fp32), differentiable once."""
    dtype = torch.promote_types(torch.promote_types(r_BTHK.dtype, k_BTHK.dtype), v_BTHV.dtype)
    r, k, v = (x.to(dtype) for x in (r_BTHK, k_BTHK, v_BTHV))
    initial = None if initial_state_BHKV is None else initial_state_BHKV.float()
    y, state, _ = _op(r, k, v, log_w_BTHK, u_HK, reset_BT, initial)
    return y.to(r_BTHK.dtype), state


def examples() -> dict[str, Callable[[], object]]:
    """Calls on meta tensors, by name: what the report compiles."""

    def call(heads: int, size: int, packed: bool, dtype: torch.dtype) -> None:
        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)

        tokens = 2, 4096, heads, size
        reset = torch.empty(2, 4096, dtype=torch.bool, device="meta") if packed else None
        initial = None if packed else new(2, heads, size, size)
        r, k, v = (new(*tokens, dtype=dtype) for _ in "rkv")
        results = wkv6(r, k, v, new(*tokens), new(heads, size), reset, initial)
        torch.autograd.backward(list(results), [torch.empty_like(t) for t in results])

    half, wide = torch.bfloat16, torch.float32
    cases = [(32, 64, True, half), (32, 64, False, half), (64, 32, True, half), (16, 128, True, half)]
    cases += [(32, 64, True, torch.float16), (32, 64, True, wide), (16, 128, True, wide)]
    names = ("H", "K", "packed", "dtype")
    named = {" ".join(f"{n}={v}" for n, v in zip(names, case, strict=True)): case for case in cases}
    return {name: lambda case=case: call(*case) for name, case in named.items()}

"""silu(gate) up in Triton: one pass over memory each way.

    s = 1 / (1 + exp(-g))       y = g s u       dg = dy u s (1 + g (1 - s))       du = dy g s

N row, F its channels.
"""

# pyright: reportMissingImports=false, reportUnboundVariable=false, reportOperatorIssue=false

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from lamella_kernels.ops import absent, cdiv, launch, power_of_2, register, rows_of
from lamella_kernels.tiles import tiles


@triton.jit(do_not_specialize=["rows"])
def _forward(gate, up, y, rows, gate_stride, up_stride, F: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < F)
    g = tl.load(gate + row * gate_stride + column, inside, 0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, inside, 0.0).to(tl.float32)
    tl.store(y + row * F + column, (g * tl.sigmoid(g) * u).to(y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows"])
def _backward(
    dy, gate, up, dgate, dup, rows, dy_stride, gate_stride, up_stride, out_stride,
    F: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < F)
    d = tl.load(dy + row * dy_stride + column, inside, 0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + column, inside, 0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, inside, 0.0).to(tl.float32)
    s = tl.sigmoid(g)
    dg = d * u * s * (1 + g * (1 - s))
    tl.store(dgate + row * out_stride + column, dg.to(dgate.dtype.element_ty), inside)
    tl.store(dup + row * out_stride + column, (d * g * s).to(dup.dtype.element_ty), inside)


def _blocks(rows: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid; the tile's elements as rows of blocks no wider than the row."""
    tile = tiles("swiglu")
    size = tile.pop("SIZE")
    block = min(power_of_2(width), tile.pop("BLOCK"))
    return (cdiv(rows, size // block), cdiv(width, block)), {"ROWS": size // block, "BLOCK": block, "F": width, **tile}


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, ...]:
    return rows_of(gate).chunk(2, 1) if up is None else (rows_of(gate), rows_of(up))


def _run(gate: Tensor, up: Tensor | None) -> Tensor:
    gate_NF, up_NF = _halves(gate, up)
    width = gate_NF.shape[1]
    y = torch.empty((*gate.shape[:-1], width), dtype=gate.dtype, device=gate.device)
    grid, tile = _blocks(*gate_NF.shape)
    launch(_forward, grid, gate_NF, up_NF, y, len(gate_NF), gate_NF.stride(0), up_NF.stride(0), **tile)
    return y


def _run_backward(dy: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    dy_NF, (gate_NF, up_NF) = rows_of(dy), _halves(gate, up)
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = None if up is None else torch.empty(up.shape, dtype=up.dtype, device=up.device)
    dgate_NF, dup_NF = _halves(dgate, dup)
    grid, tile = _blocks(*gate_NF.shape)
    strides = dy_NF.stride(0), gate_NF.stride(0), up_NF.stride(0), dgate_NF.stride(0)
    launch(_backward, grid, dy_NF, gate_NF, up_NF, dgate_NF, dup_NF, len(gate_NF), *strides, **tile)
    return dgate, absent(dup, gate)


_op = register("swiglu", _run, _run_backward, outputs=("y",), gradients=("gate", "up"))


def swiglu(gate: Tensor, up: Tensor | None) -> Tensor:
    """y like gate, differentiable once."""
    return _op(gate, up)


def examples() -> dict[str, Callable[[], object]]:
    """Calls on meta tensors, by name: what the report compiles."""

    def call(width: int, dtype: torch.dtype) -> None:
        both = torch.empty(8, 512, 2 * width, dtype=dtype, device="meta", requires_grad=True)
        y = swiglu(both, None)
        y.backward(torch.empty_like(y))

    types = (torch.bfloat16, torch.float32)
    return {f"F={width} {dtype}": lambda f=width, d=dtype: call(f, d) for width in (5632, 64) for dtype in types}

"""The grouped products in Triton. Counts stay on the device: a plan, made there, tells each tile its group and rows.

    y_n = W_e x_n        dx_n = W_e^T dy_n        dW_e = sum over the group's rows of dy_n x_n^T

Rows behind the last group are zero in y and dx and take no part in dW; a group without rows has dW_e = 0. From sm_90 on
16-bit operands whose rows are multiples of 16 bytes come by tensor descriptors; tiles are dealt to as many programs as
run at once, so that one tile's first loads run while the last one is stored. fp32 is multiplied as such (no TF32).

N row, E group, F width out, D width in; K what a product sums over, C its columns.
"""

# pyright: reportMissingImports=false, reportUnboundVariable=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lamella_kernels import ops
from lamella_kernels.tiles import architecture, tiles


@triton.jit(do_not_specialize=["rows"])
def _plan(
    counts, plan, out, rows,
    C: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """plan: how many tiles there are; then for each its group, its first row, and where the group ends."""
    tile, group = tl.program_id(0), tl.arange(0, BLOCK_E)
    count = tl.load(counts + group, group < E, 0).to(tl.int32)
    tiles_of = (count + ROWS - 1) // ROWS
    behind = tl.cumsum(tiles_of, 0) <= tile
    own = tl.sum(behind.to(tl.int32), 0)
    start = tl.sum(tl.where(behind, count, 0), 0)
    end = start + tl.sum(tl.where(group == own, count, 0), 0)
    first = start + (tile - tl.sum(tl.where(behind, tiles_of, 0), 0)) * ROWS
    if tl.program_id(1) == 0:
        if tile == 0:
            tl.store(plan, tl.sum(tiles_of, 0))
        entry = plan + 1 + 3 * tile
        tl.store(entry, own)
        tl.store(entry + 1, first)
        tl.store(entry + 2, end)
    row = tile * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    unused = (row >= tl.sum(count, 0)) & (row < rows)
    place = row.to(tl.int64)[:, None] * C + column[None, :]
    tl.store(out + place, tl.zeros([ROWS, BLOCK], out.dtype.element_ty), unused[:, None] & (column < C)[None, :])


@triton.jit
def _place(tile, row_tiles, COLUMN_TILES: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of a tile, GROUP rows of tiles at a time: what runs together shares its operands."""
    across = GROUP * COLUMN_TILES
    first = tile // across * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    return first + tile % across % height, tile % across // height


@triton.jit
def _rows_times(
    out, a, weight, plan, a_stride,
    K: tl.constexpr, C: tl.constexpr, BY_C: tl.constexpr, DESCRIBED: tl.constexpr, FLATTEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out = a times the group's weight, [C, K] where BY_C (y = W x), else [K, C] (dx = W^T dy)."""
    column_tiles: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    row_tiles = tl.load(plan)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=FLATTEN):
        row_tile, column_tile = _place(tile, row_tiles, column_tiles, GROUP)
        group = tl.load(plan + 1 + 3 * row_tile)
        first = tl.load(plan + 2 + 3 * row_tile)
        column = column_tile * COLUMNS
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, K, DEPTH):
            if DESCRIBED:
                block = a.load([first, k])
                if BY_C:
                    other = weight.load([group, column, k]).reshape(COLUMNS, DEPTH).T
                else:
                    other = weight.load([group, k, column]).reshape(DEPTH, COLUMNS)
            else:
                row = first + tl.arange(0, ROWS)
                end = tl.load(plan + 3 + 3 * row_tile)
                depth, c = k + tl.arange(0, DEPTH), column + tl.arange(0, COLUMNS)
                at = a + row.to(tl.int64)[:, None] * a_stride + depth[None, :]
                block = tl.load(at, (row < end)[:, None] & (depth < K)[None, :], 0.0)
                if BY_C:
                    at = weight + group.to(tl.int64) * (C * K) + c[None, :] * K + depth[:, None]
                else:
                    at = weight + group.to(tl.int64) * (C * K) + depth[:, None] * C + c[None, :]
                other = tl.load(at, (depth < K)[:, None] & (c < C)[None, :], 0.0)
            total = tl.dot(block, other, total, input_precision="ieee")
        row, c = first + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        inside = (row < tl.load(plan + 3 + 3 * row_tile))[:, None] & (c < C)[None, :]
        tl.store(out + row.to(tl.int64)[:, None] * C + c[None, :], total.to(out.dtype.element_ty), inside)


@triton.jit
def _rows_with(
    dweight, dy, x, dy_of, x_of, counts, dy_stride, x_stride,
    F: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, DESCRIBED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dweight[e] = dy^T x over the rows of group e. dy_of, x_of: descriptors of dy and x where DESCRIBED."""
    own, group = tl.program_id(1), tl.arange(0, BLOCK_E)
    count = tl.load(counts + group, group < E, 0).to(tl.int32)
    start = tl.sum(tl.where(group < own, count, 0), 0)
    end = start + tl.sum(tl.where(group == own, count, 0), 0)
    f_tile, d_tile = _place(tl.program_id(0), (F + ROWS - 1) // ROWS, (D + COLUMNS - 1) // COLUMNS, GROUP)
    f, d = f_tile * ROWS + tl.arange(0, ROWS), d_tile * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    whole = start
    if DESCRIBED:
        whole = start + (end - start) // DEPTH * DEPTH
        for n in range(start, whole, DEPTH):
            total = tl.dot(dy_of.load([n, f_tile * ROWS]).T, x_of.load([n, d_tile * COLUMNS]), total)
    for n in range(whole, end, DEPTH):
        row = n + tl.arange(0, DEPTH)
        place = row.to(tl.int64)
        block = tl.load(dy + place[None, :] * dy_stride + f[:, None], (row < end)[None, :] & (f < F)[:, None], 0.0)
        other = tl.load(x + place[:, None] * x_stride + d[None, :], (row < end)[:, None] & (d < D)[None, :], 0.0)
        total = tl.dot(block, other, total, input_precision="ieee")
    at = dweight + own.to(tl.int64) * (F * D) + f[:, None] * D + d[None, :]
    tl.store(at, total.to(dweight.dtype.element_ty), (f < F)[:, None] & (d < D)[None, :])


def _described(tensor: Tensor, block: Sequence[int]) -> Tensor | TensorDescriptor:
    """Its blocks by the hardware's copies."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))


def _loads(*tensors: Tensor) -> int:
    """How their blocks come: 2 by tensor descriptors, for which rows of 16-bit numbers must be multiples of 16 bytes; 1
    from rows that are multiples of 128 bytes, without masks inside a row; 0 else.
    """
    size = tensors[0].dtype.itemsize
    steps = [stride * size for t in tensors for stride in t.stride()[:-1]]
    able = architecture() >= 90 and size == 2 and not any(step % 16 for step in steps)
    if able and not any(ops.is_fake(t) or not t.numel() or t.data_ptr() % 16 for t in tensors):
        return 2
    return int(not any(step % 128 for step in steps))


def _rows(tensor: Tensor) -> Tensor:
    """[N, K] whose rows follow one another, maybe apart."""
    return tensor if tensor.stride(1) == 1 and tensor.stride(0) >= tensor.shape[1] else tensor.contiguous()


def _multiply(a: Tensor, weight: Tensor, counts_E: Tensor, by_c: bool) -> Tensor:
    """[N, C]: each group's rows times its weight, [E, C, K] if by_c, else [E, K, C]."""
    a_NK, weight = _rows(a), weight.to(a.dtype).contiguous()
    (count, depth), groups, columns = a_NK.shape, len(weight), weight.shape[1 if by_c else 2]
    loads = _loads(a_NK, weight)
    tile = tiles("grouped_gemm_rows", BYTES=a.dtype.itemsize, LOADS=loads)
    rows, width, deep, each = tile["ROWS"], tile["COLUMNS"], tile["DEPTH"], tile.pop("PERSISTENT")
    most = ops.cdiv(count, rows) + groups
    out_NC = torch.empty(count, columns, dtype=a.dtype, device=a.device)
    plan = torch.empty(3 * most + 1, dtype=torch.int32, device=a.device)
    ops.launch(
        _plan, (most if columns else 0, ops.cdiv(columns, 1024)), counts_E, plan, out_NC, count,
        C=columns, E=groups, BLOCK_E=ops.power_of_2(groups), ROWS=rows, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    from_a, from_weight = a_NK, weight
    if loads == 2:
        from_a = _described(a_NK, (rows, deep))
        from_weight = _described(weight, (1, width, deep) if by_c else (1, deep, width))
    programs = most * ops.cdiv(columns, width)
    ops.launch(
        _rows_times, (min(programs, each * _multiprocessors(a.device)) if each else programs,),
        out_NC, from_a, from_weight, plan, a_NK.stride(0),
        K=depth, C=columns, BY_C=by_c, DESCRIBED=loads == 2, FLATTEN=each > 0, **tile,
    )  # fmt: skip
    return out_NC


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _weigh(dy: Tensor, x: Tensor, counts_E: Tensor, dtype: torch.dtype) -> Tensor:
    """[E, F, D]: the weight's gradient."""
    dy_NF, x_ND = _rows(dy), _rows(x)
    groups, width, channels = len(counts_E), dy.shape[1], x.shape[1]
    loads = _loads(dy_NF, x_ND)
    tile = tiles("grouped_gemm_weight", BYTES=x.dtype.itemsize, LOADS=loads)
    dweight_EFD = torch.empty(groups, width, channels, dtype=dtype, device=x.device)
    dy_of = _described(dy_NF, (tile["DEPTH"], tile["ROWS"])) if loads == 2 else None
    x_of = _described(x_ND, (tile["DEPTH"], tile["COLUMNS"])) if loads == 2 else None
    ops.launch(
        _rows_with, (ops.cdiv(width, tile["ROWS"]) * ops.cdiv(channels, tile["COLUMNS"]), groups),
        dweight_EFD, dy_NF, x_ND, dy_of, x_of, counts_E, dy_NF.stride(0), x_ND.stride(0),
        F=width, D=channels, E=groups, BLOCK_E=ops.power_of_2(groups), DESCRIBED=loads == 2, **tile,
    )  # fmt: skip
    return dweight_EFD


def _forward(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return _multiply(x, weight, counts, True)


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, counts: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    dx = _multiply(dy, weight, counts, False) if needs_x else None
    dweight = _weigh(dy, x, counts, weight.dtype) if needs_weight else None
    return ops.absent(dx, x), ops.absent(dweight, x)


_op = ops.register("grouped_gemm", _forward, _backward, outputs=("y",), gradients=("x", "weight"))


def grouped_gemm(x_ND: Tensor, weight_EFD: Tensor, counts: Sequence[int] | Tensor) -> Tensor:
    """y_NF in x's dtype, differentiable once."""
    if not isinstance(counts, Tensor):
        counts = torch.tensor(counts, dtype=torch.int32, device=x_ND.device)
    return _op(x_ND, weight_EFD, counts)


def examples() -> dict[str, Callable[[], object]]:
    """Calls on meta tensors, by name: what the report compiles."""

    def call(width: int, channels: int, groups: int, dtype: torch.dtype) -> None:
        x, weight = (
            torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
            for shape in ((4096, channels), (groups, width, channels))
        )
        y = grouped_gemm(x, weight, torch.empty(groups, dtype=torch.int64, device="meta"))
        y.backward(torch.empty_like(y))

    cases: dict[str, tuple[Any, ...]] = {
        "2048 -> 5632": (5632, 2048, 8, torch.bfloat16),
        "1024 -> 512, 64 groups": (512, 1024, 64, torch.bfloat16),
        "1000 -> 300": (300, 1000, 8, torch.float16),
        "fp32 1024 -> 512": (512, 1024, 8, torch.float32),
    }
    return {name: lambda case=case: call(*case) for name, case in cases.items()}

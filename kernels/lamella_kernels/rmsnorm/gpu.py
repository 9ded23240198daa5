"""The root mean square norm in Triton: one pass over memory each way, the group's channels held at once.

    r = 1 / sqrt(mean(u^2) + eps)       n = u r       y = n w
    u = x,  s = x + residual,  or x silu(z); or the gate behind the norm, y = n w silu(z)

    dn = dy w       du = r (dn - n mean(n dn))       dw = sum over rows of dy n

Each program of backward sums dw over rows that follow one another; the programs' sums are added in order.

N row, G group, W its channels, D = G W.
"""

# pyright: reportMissingImports=false, reportUnboundVariable=false, reportOperatorIssue=false

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from lamella_kernels.ops import absent, cdiv, launch, power_of_2, register, rows_of
from lamella_kernels.rmsnorm import WIDEST, WIDEST_GATED
from lamella_kernels.tiles import tiles


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x, residual, z, weight, y, total, rstd, rows, x_stride, residual_stride, z_stride, eps,
    G: tl.constexpr, W: tl.constexpr, GATE_FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group, column = tl.program_id(1), tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None] & (column < W)[None, :]
    channel = (group * W + column)[None, :]
    u = tl.load(x + row[:, None] * x_stride + channel, inside, 0.0).to(tl.float32)
    if residual is not None:
        u += tl.load(residual + row[:, None] * residual_stride + channel, inside, 0.0).to(tl.float32)
        kept = u.to(total.dtype.element_ty)
        tl.store(total + row[:, None] * (G * W) + channel, kept, inside)
        u = kept.to(tl.float32)
    if z is not None:
        gate = tl.load(z + row[:, None] * z_stride + channel, inside, 0.0).to(tl.float32)
        gate *= tl.sigmoid(gate)
        if GATE_FIRST:
            u *= gate
    r = 1 / tl.sqrt_rn(tl.sum(u * u, 1) / W + eps)
    n = u * r[:, None]
    if weight is not None:
        n *= tl.load(weight + channel, (column < W)[None, :], 0.0).to(tl.float32)
    if z is not None and not GATE_FIRST:
        n *= gate
    tl.store(y + row[:, None] * (G * W) + channel, n.to(y.dtype.element_ty), inside)
    tl.store(rstd + row * G + group, r, row < rows)


@triton.jit(do_not_specialize=["rows", "share"])
def _backward(
    dy, dtotal, x, z, weight, rstd, dx, dz, dweight, rows, share, dy_stride, dtotal_stride, x_stride, z_stride,
    G: tl.constexpr, W: tl.constexpr, GATE_FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group, column = tl.program_id(1), tl.arange(0, BLOCK)
    channel = (group * W + column)[None, :]
    start = tl.program_id(0) * share
    if dweight is not None:
        sum_dw = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in range(0, share, ROWS):
        row = start.to(tl.int64) + step + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < W)[None, :]
        at = row[:, None] * (G * W) + channel
        u = tl.load(x + row[:, None] * x_stride + channel, inside, 0.0).to(tl.float32)
        dn = tl.load(dy + row[:, None] * dy_stride + channel, inside, 0.0).to(tl.float32)
        r = tl.load(rstd + row * G + group, row < rows, 0.0)
        if z is not None:
            gate = tl.load(z + row[:, None] * z_stride + channel, inside, 0.0).to(tl.float32)
            open = tl.sigmoid(gate)
            slope = open * (1 + gate * (1 - open))
            gate *= open
        n = u * r[:, None]
        if z is not None and GATE_FIRST:
            n *= gate
        if z is not None and not GATE_FIRST:
            dgate = dn * n
            dn *= gate
        if dweight is not None:
            sum_dw += dn * n
        if weight is not None:
            w = tl.load(weight + channel, (column < W)[None, :], 0.0).to(tl.float32)
            dn *= w
            if z is not None and not GATE_FIRST:
                dgate *= w
        du = r[:, None] * (dn - n * (tl.sum(n * dn, 1) / W)[:, None])
        if dtotal is not None:
            du += tl.load(dtotal + row[:, None] * dtotal_stride + channel, inside, 0.0).to(tl.float32)
        if z is not None and GATE_FIRST:
            dgate = du * u
            du *= gate
        if z is not None:
            tl.store(dz + at, (dgate * slope).to(dz.dtype.element_ty), inside)
        tl.store(dx + at, du.to(dx.dtype.element_ty), inside)
    if dweight is not None:
        place = tl.program_id(0).to(tl.int64) * (G * W) + group * W + column
        tl.store(dweight + place, tl.sum(sum_dw, 0), column < W)


def _run_forward(
    x: Tensor, residual: Tensor | None, z: Tensor | None, weight_D: Tensor | None, width: int, eps: float, first: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    x_ND, residual_ND, z_ND = (None if t is None else rows_of(t) for t in (x, residual, z))
    assert x_ND is not None
    count, groups = len(x_ND), x_ND.shape[1] // width
    tile = tiles("rmsnorm_forward", W=width)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd_NG = torch.empty(count, groups, dtype=torch.float32, device=x.device)
    launch(
        _forward, (cdiv(count, tile["ROWS"]), groups),
        x_ND, residual_ND, z_ND, weight_D, y, total, rstd_NG, count, *map(_stride, (x_ND, residual_ND, z_ND)), eps,
        G=groups, W=width, GATE_FIRST=first, BLOCK=power_of_2(width), **tile,
    )  # fmt: skip
    return y, total, rstd_NG


def _run_backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, z: Tensor | None, weight_D: Tensor | None, rstd_NG: Tensor,
    width: int, first: bool, needs_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    dy_ND, dtotal_ND, x_ND, z_ND = (None if t is None else rows_of(t) for t in (dy, dtotal, x, z))
    assert x_ND is not None
    count, groups = len(x_ND), x_ND.shape[1] // width
    tile = tiles("rmsnorm_backward", W=width, GATED=int(z is not None))
    rows, programs = tile["ROWS"], cdiv(tile.pop("PROGRAMS"), groups)
    share = cdiv(cdiv(count, programs), rows) * rows
    programs = cdiv(count, share) if share else 0
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dz = None if z is None else torch.empty(z.shape, dtype=z.dtype, device=z.device)
    dweight_PD = None
    if weight_D is not None and needs_weight:
        dweight_PD = torch.empty(programs, groups * width, dtype=torch.float32, device=x.device)
    launch(
        _backward, (programs, groups),
        dy_ND, dtotal_ND, x_ND, z_ND, weight_D, rstd_NG, dx, dz, dweight_PD, count, share,
        *map(_stride, (dy_ND, dtotal_ND, x_ND, z_ND)),
        G=groups, W=width, GATE_FIRST=first, BLOCK=power_of_2(width), **tile,
    )  # fmt: skip
    dweight_D = None if dweight_PD is None or weight_D is None else dweight_PD.sum(0).to(weight_D.dtype)
    return dx, dweight_D, dz


def _stride(rows: Tensor | None) -> int:
    return 0 if rows is None else rows.stride(0)


def _plain(
    x: Tensor, z: Tensor | None, weight: Tensor | None, width: int, eps: float, first: bool
) -> tuple[Tensor, Tensor]:
    y, _, rstd = _run_forward(x, None, z, weight, width, eps, first)
    return y, rstd


def _plain_backward(
    dy: Tensor, x: Tensor, z: Tensor | None, weight: Tensor | None, rstd: Tensor, width: int, first: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx, dweight, dz = _run_backward(dy, None, x, z, weight, rstd, width, first, needs_weight)
    return dx, absent(dweight, x), absent(dz, x)


def _added(x: Tensor, residual: Tensor, weight: Tensor | None, width: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, total, rstd = _run_forward(x, residual, None, weight, width, eps, False)
    return y, absent(total, x), rstd


def _added_backward(
    dy: Tensor | None, dtotal: Tensor | None, total: Tensor, weight: Tensor | None, rstd: Tensor, width: int,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dy = torch.zeros_like(total) if dy is None else dy
    dx, dweight, _ = _run_backward(dy, dtotal, total, None, weight, rstd, width, False, needs_weight)
    return dx, absent(dweight, total)


_plain_op = register(
    "rmsnorm", _plain, _plain_backward, outputs=("y", "rstd"), gradients=("x", "weight", "z"), hidden=("rstd",)
)
_added_op = register(
    "add_rmsnorm", _added, _added_backward,
    outputs=("y", "total", "rstd"), gradients=(("x", "residual"), "weight"), hidden=("rstd",),
)  # fmt: skip


def rmsnorm(
    x: Tensor, gate: Tensor | None, weight_D: Tensor | None, width: int, eps: float, gate_first: bool
) -> Tensor:
    """y in x's dtype, differentiable once."""
    return _plain_op(x, gate, weight_D, width, eps, gate_first)[0]


def add_rmsnorm(x: Tensor, residual: Tensor, weight_D: Tensor | None, width: int, eps: float) -> tuple[Tensor, Tensor]:
    """y and x + residual, both in x's dtype, differentiable once."""
    return _added_op(x, residual, weight_D, width, eps)[:2]


def examples() -> dict[str, Callable[[], object]]:
    """Calls on meta tensors, by name: what the report compiles."""

    def call(channels: int, width: int, kind: str) -> None:
        shapes = (4, 512, channels), (4, 512, channels), (channels,)
        x, other, weight = (
            torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True) for shape in shapes
        )
        if kind == "residual":
            results = add_rmsnorm(x, other, weight, width, 1e-6)
        else:
            results = [rmsnorm(x, None if kind == "plain" else other, weight, width, 1e-6, kind == "gate first")]
        torch.autograd.backward(list(results), [torch.empty_like(t) for t in results])

    plain = [(channels, channels) for channels in (64, 1024, 2048, 4096, 8192, WIDEST)]
    gated = [(8192, 256), (8192, 1024), (2048, 2048), (4096, 4096), (WIDEST_GATED, WIDEST_GATED)]
    kinds = {"plain": plain, "residual": plain, "gate first": gated, "gate last": gated}
    cases = [(kind, d, w) for kind, sizes in kinds.items() for d, w in sizes]
    return {f"{kind} D={d} W={w}": lambda d=d, w=w, k=kind: call(d, w, k) for kind, d, w in cases}

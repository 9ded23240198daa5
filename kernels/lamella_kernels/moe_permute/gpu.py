"""Both ways in Triton, a program for each token: it is read or written once, its rows where they lie.

    spread    out_m = w_ns x_n             dw_ns = <x_n, y_m>        m = place(n,s)
    collect   y_n = sum over s of w_ns y_place(n,s)

Each is the other's backward; moe_permute has no weights. Rows of no slot are dealt to the tokens' programs in turn.

N token, S choice, M row, D channel.
"""

# pyright: reportMissingImports=false, reportUnboundVariable=false, reportOperatorIssue=false

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from lamella_kernels.ops import absent, cdiv, launch, register, rows_of
from lamella_kernels.tiles import tiles


@triton.jit(do_not_specialize=["rows", "share"])
def _spread(
    out, x, y, weight, dweight, slot, place, rows, share, x_stride, y_stride,
    S: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    for s in range(S):
        row = tl.load(place + token * S + s).to(tl.int64)
        if row >= 0:
            w = 1.0
            if weight is not None:
                w = tl.load(weight + token * S + s).to(tl.float32)
            product = tl.zeros([BLOCK], tl.float32)
            for start in range(0, D, BLOCK):
                column = start + tl.arange(0, BLOCK)
                value = tl.load(x + token * x_stride + column, column < D, 0.0).to(tl.float32)
                if dweight is not None:
                    product += value * tl.load(y + row * y_stride + column, column < D, 0.0).to(tl.float32)
                tl.store(out + row * D + column, (w * value).to(out.dtype.element_ty), column < D)
            if dweight is not None:
                tl.store(dweight + token * S + s, tl.sum(product, 0).to(dweight.dtype.element_ty))
        elif dweight is not None:
            tl.store(dweight + token * S + s, tl.zeros([], dweight.dtype.element_ty))
    first = token * share
    for row in range(first, tl.minimum(first + share, rows)):
        if tl.load(slot + row) < 0:
            for start in range(0, D, BLOCK):
                column = start + tl.arange(0, BLOCK)
                tl.store(out + row * D + column, tl.zeros([BLOCK], out.dtype.element_ty), column < D)


@triton.jit
def _collect(out, y, weight, place, y_stride, S: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for s in range(S):
        row = tl.load(place + token * S + s).to(tl.int64)
        if row >= 0:
            value = tl.load(y + row * y_stride + column, column < D, 0.0).to(tl.float32)
            if weight is not None:
                value *= tl.load(weight + token * S + s).to(tl.float32)
            total += value
    tl.store(out + token * D + column, total.to(out.dtype.element_ty), column < D)


def _spread_out(
    x: Tensor, y: Tensor | None, weight: Tensor | None, slot_M: Tensor, place: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """[M, D], and the weights' gradient where y and the weights are given."""
    x_ND, y_MD = rows_of(x), None if y is None else rows_of(y)
    (tokens, width), rows, choices = x_ND.shape, len(slot_M), place.shape[1]
    out_MD = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    dweight_NS = None
    if weight is not None and needs_weight:
        dweight_NS = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
    launch(
        _spread, (tokens,),
        out_MD, x_ND, y_MD, None if weight is None else weight.contiguous(), dweight_NS, slot_M.contiguous(),
        place.contiguous(), rows, cdiv(rows, max(tokens, 1)), x_ND.stride(0), 0 if y_MD is None else y_MD.stride(0),
        S=choices, D=width, **tiles("moe_permute"),
    )  # fmt: skip
    return out_MD, dweight_NS


def _collected(y: Tensor, weight: Tensor | None, place: Tensor) -> Tensor:
    """[N, D]."""
    y_MD, (tokens, choices), width = rows_of(y), place.shape, y.shape[1]
    tile = tiles("moe_permute")
    out_ND = torch.empty(tokens, width, dtype=y.dtype, device=y.device)
    launch(
        _collect, (tokens, cdiv(width, tile["BLOCK"])),
        out_ND, y_MD, None if weight is None else weight.contiguous(), place.contiguous(), y_MD.stride(0),
        S=choices, D=width, **tile,
    )  # fmt: skip
    return out_ND


def _permute(x: Tensor, slot: Tensor, place: Tensor) -> Tensor:
    return _spread_out(x, None, None, slot, place, False)[0]


def _permute_backward(dout: Tensor, place: Tensor) -> Tensor:
    return _collected(dout, None, place)


def _unpermute(y: Tensor, weight: Tensor, slot: Tensor, place: Tensor) -> Tensor:
    return _collected(y, weight, place)


def _unpermute_backward(
    dout: Tensor, y: Tensor, weight: Tensor, slot: Tensor, place: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    dy, dweight = _spread_out(dout, y, weight, slot, place, needs_weight)
    return dy, absent(dweight, y)


_permute_op = register("moe_permute", _permute, _permute_backward, outputs=("out",), gradients=("x",))
_unpermute_op = register(
    "moe_unpermute", _unpermute, _unpermute_backward, outputs=("out",), gradients=("y", "weight")
)  # fmt: skip


def moe_permute(x_ND: Tensor, slot_M: Tensor, place_NS: Tensor) -> Tensor:
    """The rows in x's dtype, differentiable once."""
    return _permute_op(x_ND, slot_M, place_NS)


def moe_unpermute(y_MD: Tensor, weight_NS: Tensor, slot_M: Tensor, place_NS: Tensor) -> Tensor:
    """The sums in y's dtype, differentiable once."""
    return _unpermute_op(y_MD, weight_NS, slot_M, place_NS)


def examples() -> dict[str, Callable[[], object]]:
    """Calls on meta tensors, by name: what the report compiles."""

    def call(width: int, choices: int, dtype: torch.dtype) -> None:
        x = torch.empty(512, width, dtype=dtype, device="meta", requires_grad=True)
        weight = torch.empty(512, choices, device="meta", requires_grad=True)
        place = torch.empty(512, choices, dtype=torch.int64, device="meta")
        slot = torch.empty(512 * choices, dtype=torch.int64, device="meta")
        y = moe_unpermute(moe_permute(x, slot, place), weight, slot, place)
        y.backward(torch.empty_like(y))

    cases = [(2048, 2, torch.bfloat16), (4096, 8, torch.bfloat16), (1000, 64, torch.float32)]
    return {f"D={d} S={s} {dtype}": lambda d=d, s=s, t=dtype: call(d, s, t) for d, s, dtype in cases}

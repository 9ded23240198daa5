"""The cross entropy's parts on CUDA: matmuls by torch, and one pass over each piece of logits in Triton.

    forward, over a piece's columns:   m' = max(m, l)    s' = s exp(m - m') + sum of exp(l - m')
    backward, in place:                dl = dlse exp(l - lse) + dpicked [v = target]

N token, P columns of a piece.
"""

# pyright: reportMissingImports=false, reportUnboundVariable=false, reportOperatorIssue=false

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from lamella_kernels import ops
from lamella_kernels.linear_cross_entropy import pieces
from lamella_kernels.tiles import tiles


@triton.jit(do_not_specialize=["width"])
def _see(logits, target, largest, sums, picked, width, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    m, s = tl.load(largest + row), tl.load(sums + row)
    of_column_m = tl.full([BLOCK], float("-inf"), tl.float32)
    of_column_s = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        v = tl.load(logits + row * stride + column, column < width, float("-inf")).to(tl.float32)
        higher = tl.maximum(of_column_m, v)
        # of a column that has seen nothing yet, -inf less -inf would be no number
        floor = tl.where(higher == float("-inf"), 0.0, higher)
        of_column_s = of_column_s * tl.exp(of_column_m - floor) + tl.exp(v - floor)
        of_column_m = higher
    higher = tl.maximum(m, tl.max(of_column_m, 0))
    total = s * tl.exp(m - higher) + tl.sum(of_column_s * tl.exp(of_column_m - higher), 0)
    tl.store(largest + row, higher)
    tl.store(sums + row, total)
    at = tl.load(target + row)
    own = (at >= 0) & (at < width)
    tl.store(picked + row, tl.load(logits + row * stride + at, own, 0.0).to(tl.float32), own)


@triton.jit(do_not_specialize=["width"])
def _turn(logits, target, lse, dlse, dpicked, width, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = logits + row * stride + column
    dl = tl.zeros([BLOCK], tl.float32)
    if dlse is not None:
        v = tl.load(place, column < width, 0.0).to(tl.float32)
        dl = tl.exp(v - tl.load(lse + row)) * tl.load(dlse + row)
    if dpicked is not None:
        dl += tl.where(column == tl.load(target + row), tl.load(dpicked + row), 0.0)
    tl.store(place, dl.to(logits.dtype.element_ty), column < width)


def _seen(logits_NP: Tensor, target_N: Tensor, largest_N: Tensor, sum_N: Tensor, picked_N: Tensor) -> None:
    rows, width = logits_NP.shape
    tile = tiles("linear_cross_entropy_forward")
    tensors = logits_NP, target_N, largest_N, sum_N, picked_N
    ops.launch(_see, (rows,), *tensors, width, logits_NP.stride(0), **tile)


def _turned(
    logits_NP: Tensor, target_N: Tensor, lse_N: Tensor, dlse_N: Tensor | None, dpicked_N: Tensor | None
) -> None:
    rows, width = logits_NP.shape
    tile = tiles("linear_cross_entropy_backward")
    tensors = logits_NP, target_N, lse_N, dlse_N, dpicked_N
    ops.launch(_turn, (rows, ops.cdiv(width, tile["BLOCK"])), *tensors, width, logits_NP.stride(0), **tile)


def _forward(x: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if ops.is_fake(x):
        lse, picked = (torch.empty(len(x), dtype=torch.float32, device=x.device) for _ in range(2))
        return lse, picked
    return pieces.forward(x, weight, target, _seen)


def _backward(
    dlse: Tensor | None, dpicked: Tensor | None, x: Tensor, weight: Tensor, target: Tensor, lse: Tensor,
    needs_x: bool, needs_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if ops.is_fake(x):
        found = torch.empty_like(x) if needs_x else None, torch.empty_like(weight) if needs_weight else None
    else:
        dlse, dpicked = (None if d is None else d.contiguous() for d in (dlse, dpicked))
        needs = needs_x, needs_weight
        found = pieces.backward(dlse, dpicked, x, weight, target, lse, _turned, needs)
    return ops.absent(found[0], x), ops.absent(found[1], x)


_op = ops.register(
    "linear_log_sum_exp", _forward, _backward, outputs=("lse", "picked"), gradients=("x", "weight")
)  # fmt: skip


def linear_log_sum_exp(x: Tensor, weight_VD: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """lse and the target's logit, differentiable once."""
    lse_N, picked_N = _op(x.reshape(-1, x.shape[-1]), weight_VD, target.reshape(-1))
    return lse_N.view(target.shape), picked_N.view(target.shape)


def examples() -> dict[str, Callable[[], object]]:
    """Calls on meta tensors, by name: what the report compiles."""

    def call(vocabulary: int, dtype: torch.dtype) -> None:
        x, weight = (
            torch.empty(rows, 1024, dtype=dtype, device="meta", requires_grad=True) for rows in (512, vocabulary)
        )
        results = linear_log_sum_exp(x, weight, torch.empty(512, dtype=torch.int32, device="meta"))
        torch.autograd.backward(results, [torch.empty_like(t) for t in results])

    types = (torch.bfloat16, torch.float32)
    return {f"V=50304 {dtype}": lambda d=dtype: call(50304, d) for dtype in types}

"""The rotation in Triton: one pass over memory; an angle's sine and cosine are found once for all heads of a block.

Angles are whole turns in 64-bit fixed point, so that position * turns drops whole turns exactly by overflowing; the
remainder after quarters goes through the power series on [-pi/4, pi/4], where the terms taken leave less than 1e-9.

N token, H heads, K channels of a head, the first R of them turned.
"""

# pyright: reportMissingImports=false, reportUnboundVariable=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from lamella_kernels.ops import cdiv, launch, power_of_2, register
from lamella_kernels.tiles import tiles


@triton.jit
def _turned(position, turns):
    """cos, sin of 2 pi position turns / 2^64."""
    part = position * turns >> 32  # a quarter is 2^30
    nearest = part + (1 << 29) >> 30
    a = (part - (nearest << 30)).to(tl.float32) * (1.5707963267948966 / (1 << 30))
    s = a * a
    sine = a * (1 + s * (-1 / 6 + s * (1 / 120 + s * (-1 / 5040 + s * (1 / 362880)))))
    cosine = 1 + s * (-1 / 2 + s * (1 / 24 + s * (-1 / 720 + s * (1 / 40320 + s * (-1 / 3628800)))))
    odd = (nearest & 1) != 0
    cos = tl.where(odd, sine, cosine)
    sin = tl.where(odd, cosine, sine)
    return tl.where((nearest + 1 & 2) != 0, -cos, cos), tl.where((nearest & 2) != 0, -sin, sin)


@triton.jit(do_not_specialize=["tokens"])
def _turn(
    x, position, y, tokens, token_stride, head_stride,
    H: tl.constexpr, K: tl.constexpr, R: tl.constexpr, LOG_THETA: tl.constexpr, BACK: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    there = token < tokens
    i = tl.arange(0, HALF)
    turns = tl.exp2(i.to(tl.float64) * (-2 * LOG_THETA / R)) / 6.283185307179586
    turns = (turns - tl.floor(turns + 0.5)) * 18446744073709551616.0
    at = tl.load(position + token, there, 0).to(tl.int64)
    cos, sin = _turned(at[:, None], turns.to(tl.int64)[None, :])
    if BACK:
        sin = -sin
    inside = there[:, None] & (i < R // 2)[None, :]
    for head in range(tl.program_id(1) * HEADS, min(H, tl.program_id(1) * HEADS + HEADS)):
        read = token[:, None] * token_stride + head * head_stride + i[None, :]
        written = token[:, None] * (H * K) + head * K + i[None, :]
        a = tl.load(x + read, inside, 0.0).to(tl.float32)
        b = tl.load(x + read + R // 2, inside, 0.0).to(tl.float32)
        tl.store(y + written, (a * cos - b * sin).to(y.dtype.element_ty), inside)
        tl.store(y + written + R // 2, (b * cos + a * sin).to(y.dtype.element_ty), inside)
        if REST:
            j = R + tl.arange(0, REST)[None, :]
            behind = there[:, None] & (j < K)
            rest = tl.load(x + token[:, None] * token_stride + head * head_stride + j, behind, 0.0)
            tl.store(y + token[:, None] * (H * K) + head * K + j, rest, behind)


def _run(x: Tensor, position: Tensor, theta: float, width: int, back: bool) -> Tensor:
    x_NHK = x.flatten(0, 1)
    x_NHK = x_NHK if x_NHK.stride(2) == 1 else x_NHK.contiguous()
    count, heads, channels = x_NHK.shape
    half, rest = power_of_2(width // 2), channels - width
    tile = tiles("rotary", HALF=half)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        _turn, (cdiv(count, tile["TOKENS"]), cdiv(heads, tile["HEADS"])),
        x_NHK, position.contiguous(), y, count, x_NHK.stride(0), x_NHK.stride(1),
        H=heads, K=channels, R=width, LOG_THETA=math.log2(theta), BACK=back,
        HALF=half, REST=power_of_2(rest) if rest else 0, **tile,
    )  # fmt: skip
    return y


def _forward(x: Tensor, position: Tensor, theta: float, width: int) -> Tensor:
    return _run(x, position, theta, width, False)


def _backward(dy: Tensor, position: Tensor, theta: float, width: int) -> Tensor:
    return _run(dy, position, theta, width, True)


_op = register("rotary", _forward, _backward, outputs=("y",), gradients=("x",))


def rotary(x_BTHK: Tensor, position_BT: Tensor, theta: float, width: int) -> Tensor:
    """y like x, differentiable once."""
    return _op(x_BTHK, position_BT, theta, width)


def examples() -> dict[str, Callable[[], object]]:
    """Calls on meta tensors, by name: what the report compiles."""

    def call(heads: int, channels: int, width: int) -> None:
        x = torch.empty(4, 512, heads, channels, dtype=torch.bfloat16, device="meta", requires_grad=True)
        y = rotary(x, torch.empty(4, 512, dtype=torch.int32, device="meta"), 10000.0, width)
        y.backward(torch.empty_like(y))

    cases = [(32, 128, 128), (8, 128, 128), (16, 64, 64), (16, 256, 256), (32, 80, 32)]
    return {f"H={h} K={k} R={r}": lambda h=h, k=k, r=r: call(h, k, r) for h, k, r in cases}

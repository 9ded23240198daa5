"""The causal depthwise convolution in Triton: forward by tiles of tokens, backward token by token along each channel.

    a_t = bias + sum over j < K of w_{K-1-j} x_{t-j}        y_t = a_t or silu(a_t)
    dx_s = sum over j < K of w_{K-1-j} da_{s+j}             dw_{K-1-j} = sum over t of da_t x_{t-j}

    x_{t-j} := 0 where j > position_t

Backward computes a anew and holds the last inputs and the unfinished gradients of a channel in registers, so that
everything is read and written once; a program looks K-1 tokens beyond its own. Its sums over tokens are added in order.

B batch, T time, I channel, K <= 4 taps; the state holds K-1 inputs.
"""

# pyright: reportMissingImports=false, reportUnboundVariable=false, reportOperatorIssue=false

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from lamella_kernels.ops import absent, cdiv, launch, power_of_2, register
from lamella_kernels.tiles import tiles


@triton.jit(do_not_specialize=["time"])
def _forward(
    x, weight, bias, position, initial, y, state, time, x_row, x_token,
    CHANNELS: tl.constexpr, K: tl.constexpr, SILU: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = i < CHANNELS
    inside = (t < time)[:, None] & here[None, :]
    if position is not None:
        back = tl.load(position + row * time + t, t < time, 0)
    a = tl.zeros([TOKENS, BLOCK], tl.float32)
    if bias is not None:
        a += tl.load(bias + i, here, 0.0).to(tl.float32)[None, :]
    for j in tl.static_range(K):
        seen = inside
        if position is not None:
            seen &= (back >= j)[:, None]
        at = x + row * x_row + (t - j).to(tl.int64)[:, None] * x_token + i[None, :]
        v = tl.load(at, seen & (t >= j)[:, None], 0.0)
        if initial is not None and j > 0:
            before = initial + (row * (K - 1) + K - 1 + t - j)[:, None] * CHANNELS + i[None, :]
            v += tl.load(before, seen & (t < j)[:, None], 0.0).to(v.dtype)
        w = tl.load(weight + i * K + (K - 1 - j), here, 0.0).to(tl.float32)
        a += w[None, :] * v.to(tl.float32)
        if j == 0 and K > 1:
            kept = state + (row * (K - 1) + K - 1 - time + t)[:, None] * CHANNELS + i[None, :]
            tl.store(kept, v, inside & (t > time - K)[:, None])
    if SILU:
        a *= tl.sigmoid(a)
    tl.store(y + (row * time + t)[:, None] * CHANNELS + i[None, :], a.to(y.dtype.element_ty), inside)
    if K > 1 and tl.program_id(0) == 0:
        for k in tl.static_range(K - 1):
            old = tl.zeros([BLOCK], state.dtype.element_ty)
            if initial is not None:
                old = tl.load(initial + (row * (K - 1) + k + time) * CHANNELS + i, here & (k + time < K - 1), 0.0)
            tl.store(
                state + (row * (K - 1) + k) * CHANNELS + i, old.to(state.dtype.element_ty), here & (k + time < K - 1)
            )


@triton.jit
def _seen(v, back, j: tl.constexpr, PACKED: tl.constexpr):
    """What lies j tokens back, as a token sees it that has `back` before it in its document."""
    return tl.where(back >= j, v, 0.0) if PACKED else v


@triton.jit
def _input(x, initial, row, t, i, here, time, x_row, x_token, CHANNELS: tl.constexpr, K: tl.constexpr):
    """x_t; before the first token, of the initial state."""
    v = tl.load(x + row * x_row + t.to(tl.int64) * x_token + i, here & (t >= 0) & (t < time), 0.0).to(tl.float32)
    if initial is not None:
        before = initial + (row * (K - 1) + K - 1 + t) * CHANNELS + i
        v += tl.load(before, here & (t < 0) & (t > -K), 0.0).to(tl.float32)
    return v


@triton.jit
def _output(dy, row, t, i, here, time, dy_row, dy_token):
    return tl.load(dy + row * dy_row + t.to(tl.int64) * dy_token + i, here & (t < time), 0.0).to(tl.float32)


@triton.jit
def _tap(weight, i, here, j: tl.constexpr, K: tl.constexpr):
    """The weight of the input j tokens back, 0 where there are fewer taps."""
    return tl.load(weight + i * K + (K - 1 - j), here & (j < K), 0.0).to(tl.float32)


@triton.jit(do_not_specialize=["time", "share"])
def _backward(
    dy, dstate, x, weight, bias, position, initial, dx, dinitial, dweight, dbias, time, share,
    dy_row, dy_token, x_row, x_token, CHANNELS: tl.constexpr, K: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = i < CHANNELS
    start = tl.program_id(0) * share
    end = tl.minimum(start + share, time)
    w0, w1 = _tap(weight, i, here, 0, K), _tap(weight, i, here, 1, K)
    w2, w3 = _tap(weight, i, here, 2, K), _tap(weight, i, here, 3, K)
    b = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        b = tl.load(bias + i, here, 0.0).to(tl.float32)
    x1 = _input(x, initial, row, start - 1, i, here, time, x_row, x_token, CHANNELS, K)
    x2 = _input(x, initial, row, start - 2, i, here, time, x_row, x_token, CHANNELS, K)
    x3 = _input(x, initial, row, start - 3, i, here, time, x_row, x_token, CHANNELS, K)
    none = tl.zeros([BLOCK], tl.float32)
    dx1, dx2, dx3 = none, none, none
    dw0, dw1, dw2, dw3, db = none, none, none, none, none
    next_x = _input(x, initial, row, start, i, here, time, x_row, x_token, CHANNELS, K)
    next_dy = _output(dy, row, start, i, here, time, dy_row, dy_token)
    for t in range(start, end + 3):
        x0, da = next_x, next_dy
        more = here & (t < end + 2)
        next_x = _input(x, None, row, t + 1, i, more, time, x_row, x_token, CHANNELS, K)
        next_dy = _output(dy, row, t + 1, i, more, time, dy_row, dy_token)
        back = tl.load(position + row * time + t, t < time, 0) if PACKED else 0
        s1 = _seen(x1, back, 1, PACKED)
        s2 = _seen(x2, back, 2, PACKED)
        s3 = _seen(x3, back, 3, PACKED)
        if SILU:
            a = b + w0 * x0 + w1 * s1 + w2 * s2 + w3 * s3
            open = tl.sigmoid(a)
            da *= open * (1 + a * (1 - open))
        own = tl.where(t < end, da, 0.0)
        dw0 += own * x0
        dw1 += own * s1
        dw2 += own * s2
        dw3 += own * s3
        db += own
        dx0 = w0 * da
        dx1 += _seen(w1 * da, back, 1, PACKED)
        dx2 += _seen(w2 * da, back, 2, PACKED)
        dx3 += _seen(w3 * da, back, 3, PACKED)
        s = t - 3
        if dstate is not None and K > 1:
            last = here & (s > time - K) & (s < end)
            dx3 += tl.load(dstate + (row * (K - 1) + K - 1 - time + s) * CHANNELS + i, last, 0.0).to(tl.float32)
        out = dx + (row * time + s) * CHANNELS + i
        tl.store(out, dx3.to(dx.dtype.element_ty), here & (s >= start) & (s < end))
        if dinitial is not None:
            out = dinitial + (row * (K - 1) + K - 1 + s) * CHANNELS + i
            tl.store(out, dx3.to(dinitial.dtype.element_ty), here & (start == 0) & (s < 0) & (s > -K))
        x3, x2, x1 = x2, x1, x0
        dx3, dx2, dx1 = dx2, dx1, dx0
    place = (row * tl.num_programs(0) + tl.program_id(0)) * CHANNELS + i
    tl.store(dweight + place * K + (K - 1), dw0, here)
    tl.store(dweight + place * K + (K - 2), dw1, here & (K > 1))
    tl.store(dweight + place * K + (K - 3), dw2, here & (K > 2))
    tl.store(dweight + place * K + (K - 4), dw3, here & (K > 3))
    if bias is not None:
        tl.store(dbias + place, db, here)


def _channels_last(v_BTI: Tensor) -> Tensor:
    return v_BTI if v_BTI.stride(2) == 1 else v_BTI.contiguous()


def _run(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, position: Tensor | None, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    (batch, time, channels), width = x.shape, weight.shape[1]
    x = _channels_last(x)
    y = torch.empty((batch, time, channels), dtype=x.dtype, device=x.device)
    state = torch.empty((batch, width - 1, channels), dtype=x.dtype, device=x.device)
    tile = tiles("causal_conv1d_forward")
    tile["BLOCK"] = min(tile["BLOCK"], power_of_2(channels))
    launch(
        _forward, (cdiv(time, tile["TOKENS"]), cdiv(channels, tile["BLOCK"]), batch),
        x, weight.contiguous(), bias, _contiguous(position), _contiguous(initial), y, state,
        time, x.stride(0), x.stride(1), CHANNELS=channels, K=width, SILU=silu, **tile,
    )  # fmt: skip
    return y, state


def _run_backward(
    dy: Tensor | None, dstate: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool,
    position: Tensor | None, initial: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, time, channels), width = x.shape, weight.shape[1]
    x, dy = _channels_last(x), _channels_last(torch.zeros_like(x) if dy is None else dy)
    tile = tiles("causal_conv1d_backward")
    tile["BLOCK"], share = min(tile["BLOCK"], power_of_2(channels)), tile.pop("TOKENS")
    parts = cdiv(time, share)
    dx = torch.empty((batch, time, channels), dtype=x.dtype, device=x.device)
    dinitial = None if initial is None else torch.empty(initial.shape, dtype=initial.dtype, device=x.device)
    dweight = torch.empty((batch * parts, channels, width), dtype=torch.float32, device=x.device)
    dbias = None if bias is None else torch.empty((batch * parts, channels), dtype=torch.float32, device=x.device)
    launch(
        _backward, (parts, cdiv(channels, tile["BLOCK"]), batch),
        dy, _contiguous(dstate), x, weight.contiguous(), bias, _contiguous(position), _contiguous(initial),
        dx, dinitial, dweight, dbias, time, share, dy.stride(0), dy.stride(1), x.stride(0), x.stride(1),
        CHANNELS=channels, K=width, SILU=silu, PACKED=position is not None, **tile,
    )  # fmt: skip
    of_bias = None if dbias is None or bias is None else dbias.sum(0).to(bias.dtype)
    return dx, dweight.sum(0).to(weight.dtype), absent(of_bias, x), absent(dinitial, x)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


_op = register(
    "causal_conv1d", _run, _run_backward,
    outputs=("y", "state"), gradients=("x", "weight", "bias", "initial"),
)  # fmt: skip


def causal_conv1d(
    x_BTI: Tensor,
    weight_IK: Tensor,
    bias_I: Tensor | None,
    activation: str | None,
    position_BT: Tensor | None,
    initial_state_BKI: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The outputs and the last K-1 inputs, both in x's dtype, differentiable once."""
    return _op(x_BTI, weight_IK, bias_I, activation == "silu", position_BT, initial_state_BKI)


def examples() -> dict[str, Callable[[], object]]:
    """Calls on meta tensors, by name: what the report compiles."""

    def call(channels: int, width: int, activation: str | None, packed: bool, handed: bool) -> None:
        shapes = (4, 512, channels), (channels, width), (channels,), (4, width - 1, channels)
        x, weight, bias, initial = (
            torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True) for shape in shapes
        )
        position = torch.empty(4, 512, dtype=torch.int32, device="meta") if packed else None
        results = causal_conv1d(x, weight, bias, activation, position, initial if handed else None)
        results = results if handed else results[:1]
        torch.autograd.backward(results, [torch.empty_like(t) for t in results])

    cases = [(4096, 4, "silu", True, False), (4096, 4, "silu", True, True), (5120, 2, None, False, False)]
    return {
        f"I={i} K={k} {a or 'linear'}{' packed' * p}{' states' * h}": lambda c=(i, k, a, p, h): call(*c)
        for i, k, a, p, h in cases
    }

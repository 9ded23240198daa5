"""The selective scan in Triton: states in registers, time in segments that run side by side.

    a_t = 2^(dt_t A log2 e), 0 at a reset       h_t = a_t h_{t-1} + dt_t B_t x_t        y_t = C_t . h_t + D x_t
    g_t = C_t dy_t + a_{t+1} g_{t+1}            dx = dt (B . g) + D dy                  ddt = x (B . g) + A . w
    w_t = g_t a_t h_{t-1}       dA = sum_t dt w,  dD = sum_t dy x
    dB = sum_I dt x g           dC = sum_I dy h

A program is one warp with a block of channels and their N states of one row's segment; it walks token by token, STEPS
of them unrolled with their loads in front. A thread holds four states of four channels, so that B and C are one load
each a token and few numbers cross lanes: 9 instructions a state and token in forward (5 of them the recurrence), 30 in
backward, where dB and dC are summed over channels; exp2, a sixteenth of a clock, is next. A scan across lanes would
do twice the arithmetic, and one channel a program would read B and C anew for each. The sums of dB and dC by block
of channels, and those of dA and dD by segment, are added by a later call, in order.

With few rows and channels time is cut into segments: `_local` finds each one's decay and what it adds, from zero;
`_joined` walks over segments; then all run with their true starts. Forward keeps the state before each EVERY-th
token; backward goes through EVERY tokens at a time, notes the state before each STEPS of them, and recomputes those.

Isolation: a reset zeroes the decay itself, exp2(.. - inf), and 0 times a finite number is 0; no sum crosses tokens.

B batch, T time, I channel, N state, S segment, K kept state, P block of channels.
"""

# pyright: reportMissingImports=false, reportUnboundVariable=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# ruff: noqa: E741, RUF005, SIM102, SIM108 (I is a size; the compiler knows no unpacking, and branches while it compiles)

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from lamella_kernels.ops import cdiv, launch, power_of_2, register
from lamella_kernels.tiles import tiles

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))


@triton.jit
def _tokens(tensor, row, count, column, inside, W: tl.constexpr, STEPS: tl.constexpr):
    """STEPS rows of [.., W] in fp32, 0 from the count-th on."""
    found = ()
    at = tensor + row * W + column
    for k in tl.static_range(STEPS):
        found = found + (tl.load(at + k * W, inside & (k < count), 0.0).to(tl.float32),)
    return found


@triton.jit
def _borders(reset, row, count, STEPS: tl.constexpr):
    """What is added to the logs of STEPS tokens' decays."""
    found = ()
    for k in tl.static_range(STEPS):
        if reset is None:
            found = found + (0.0,)
        else:
            found = found + (tl.where(tl.load(reset + row + k, k < count, 0) != 0, float("-inf"), 0.0),)
    return found


@triton.jit(do_not_specialize=["time", "segments", "share"])
def _local(
    x, dt, A, other, reset, decay, found, time, segments, share,
    I: tl.constexpr, N: tl.constexpr, BACK: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """A segment from zero: other is B, found its last state; BACK: x is dy, other C, found the gradient before it."""
    batch, segment = tl.program_id(1) // (segments - 1), tl.program_id(1) % (segments - 1)
    if BACK:
        segment += 1
    channel, n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDE)[None, :]
    inside, states = channel < I, n < N
    at, whole = channel[:, None] * N + n, inside[:, None] & states
    A2 = tl.load(A + at, whole, 0.0).to(tl.float32) * LOG2_E
    h = tl.zeros([BLOCK, WIDE], tl.float32)
    steps, border = tl.zeros([BLOCK], tl.float32), 0.0
    first = segment * share
    last = tl.minimum(first + share, time)
    for step in range(0, last - first, STEPS):
        t = first + step
        if BACK:
            t = first + (last - first - 1) // STEPS * STEPS - step
        row, count = batch.to(tl.int64) * time + t, last - t
        xs = _tokens(x, row, count, channel, inside, I, STEPS)
        dts = _tokens(dt, row, count, channel, inside, I, STEPS)
        others = _tokens(other, row, count, n, states, N, STEPS)
        borders = _borders(reset, row, count, STEPS)
        for k in tl.static_range(STEPS - 1 if BACK else 0, -1 if BACK else STEPS, -1 if BACK else 1):
            a = tl.exp2(dts[k][:, None] * A2 + borders[k])
            if BACK:
                h = (h + xs[k][:, None] * others[k]) * a
            else:
                h = a * h + (dts[k] * xs[k])[:, None] * others[k]
            steps += dts[k]
            border += borders[k]
    place = tl.program_id(1).to(tl.int64) * (I * N) + at
    tl.store(decay + place, tl.exp2(steps[:, None] * A2 + border), whole)
    tl.store(found + place, h, whole)


@triton.jit(do_not_specialize=["segments"])
def _joined(decay, found, start, states, segments, SIZE: tl.constexpr, BACK: tl.constexpr, BLOCK: tl.constexpr):
    """The state before each segment, from that before the first; BACK: the gradient behind each, from the last."""
    batch, at = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    h = tl.zeros([BLOCK], tl.float32)
    if start is not None:
        h += tl.load(start + batch * SIZE + at, inside, 0.0).to(tl.float32)
    for step in range(0, segments):
        s = step
        if BACK:
            s = segments - 1 - step
        tl.store(states + (batch * segments + s) * SIZE + at, h, inside)
        if BACK:
            s -= 1
        there = inside & (step < segments - 1)
        place = (batch * (segments - 1) + s) * SIZE + at
        h = tl.load(decay + place, there, 0.0) * h + tl.load(found + place, there, 0.0)


@triton.jit(do_not_specialize=["time", "segments", "share"])
def _forward(
    x, dt, A, B, C, D, reset, start, y, final, kept, time, segments, share,
    I: tl.constexpr, N: tl.constexpr, EVERY: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    batch, segment = tl.program_id(1) // segments, tl.program_id(1) % segments
    channel, n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDE)[None, :]
    inside, states = channel < I, n < N
    at, whole = channel[:, None] * N + n, inside[:, None] & states
    A2 = tl.load(A + at, whole, 0.0).to(tl.float32) * LOG2_E
    h = tl.load(start + tl.program_id(1).to(tl.int64) * (I * N) + at, whole, 0.0)
    if D is not None:
        d = tl.load(D + channel, inside, 0.0).to(tl.float32)
    first = segment * share
    last = tl.minimum(first + share, time)
    for t in range(first, last, STEPS):
        row, count = batch.to(tl.int64) * time + t, last - t
        if kept is not None:
            if t % EVERY == 0:
                place = batch.to(tl.int64) * tl.cdiv(time, EVERY) + t // EVERY
                tl.store(kept + place * (I * N) + at, h, whole)
        xs = _tokens(x, row, count, channel, inside, I, STEPS)
        dts = _tokens(dt, row, count, channel, inside, I, STEPS)
        Bs = _tokens(B, row, count, n, states, N, STEPS)
        Cs = _tokens(C, row, count, n, states, N, STEPS)
        borders = _borders(reset, row, count, STEPS)
        for k in tl.static_range(STEPS):
            h = tl.exp2(dts[k][:, None] * A2 + borders[k]) * h + (dts[k] * xs[k])[:, None] * Bs[k]
            y_now = tl.sum(h * Cs[k], 1)
            if D is not None:
                y_now += d * xs[k]
            tl.store(y + row * I + channel + k * I, y_now.to(y.dtype.element_ty), inside & (k < count))
    if last == time:
        tl.store(final + batch.to(tl.int64) * (I * N) + at, h, whole)


@triton.jit(do_not_specialize=["rows", "time", "segments", "share"])
def _backward(
    dy, x, dt, A, B, C, D, reset, kept, end, notes, dx, ddt, dA, dB, dC, dD, dstart, rows, time, segments, share,
    I: tl.constexpr, N: tl.constexpr, EVERY: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    batch, segment = tl.program_id(1) // segments, tl.program_id(1) % segments
    channel, n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDE)[None, :]
    inside, states = channel < I, n < N
    at, whole = channel[:, None] * N + n, inside[:, None] & states
    place = tl.program_id(1).to(tl.int64) * (I * N) + at
    A2 = tl.load(A + at, whole, 0.0).to(tl.float32) * LOG2_E
    g = tl.load(end + place, whole, 0.0)
    sum_dA = tl.zeros([BLOCK, WIDE], tl.float32)
    sum_dD = tl.zeros([BLOCK], tl.float32)
    if D is not None:
        d = tl.load(D + channel, inside, 0.0).to(tl.float32)
    note = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * (EVERY // STEPS * BLOCK * WIDE)
    note += tl.arange(0, BLOCK)[:, None] * WIDE + n
    first = segment * share
    last = tl.minimum(first + share, time)
    chunks = tl.cdiv(last - first, EVERY)
    for back in range(0, chunks):
        begin = first + (chunks - 1 - back) * EVERY
        parts = tl.cdiv(tl.minimum(last - begin, EVERY), STEPS)
        keep = batch.to(tl.int64) * tl.cdiv(time, EVERY) + begin // EVERY
        h = tl.load(kept + keep * (I * N) + at, whole, 0.0)
        for part in range(0, parts - 1):
            tl.store(notes + note + part * (BLOCK * WIDE), h)
            t = begin + part * STEPS
            row, count = batch.to(tl.int64) * time + t, last - t
            xs = _tokens(x, row, count, channel, inside, I, STEPS)
            dts = _tokens(dt, row, count, channel, inside, I, STEPS)
            Bs = _tokens(B, row, count, n, states, N, STEPS)
            borders = _borders(reset, row, count, STEPS)
            for k in tl.static_range(STEPS):
                h = tl.exp2(dts[k][:, None] * A2 + borders[k]) * h + (dts[k] * xs[k])[:, None] * Bs[k]
        for step in range(0, parts):
            part = parts - 1 - step
            if step > 0:
                h = tl.load(notes + note + part * (BLOCK * WIDE))
            t = begin + part * STEPS
            row, count = batch.to(tl.int64) * time + t, last - t
            xs = _tokens(x, row, count, channel, inside, I, STEPS)
            dts = _tokens(dt, row, count, channel, inside, I, STEPS)
            dys = _tokens(dy, row, count, channel, inside, I, STEPS)
            Bs = _tokens(B, row, count, n, states, N, STEPS)
            Cs = _tokens(C, row, count, n, states, N, STEPS)
            borders = _borders(reset, row, count, STEPS)
            of_block = (tl.program_id(0).to(tl.int64) * rows + row) * N + n
            decays, befores = (), ()
            for k in tl.static_range(STEPS):
                a = tl.exp2(dts[k][:, None] * A2 + borders[k])
                decays = decays + (a,)
                befores = befores + (h,)
                h = a * h + (dts[k] * xs[k])[:, None] * Bs[k]
                tl.store(dC + of_block + k * N, tl.sum(dys[k][:, None] * h, 0)[None, :], states & (k < count))
            for k in tl.static_range(STEPS - 1, -1, -1):
                g += dys[k][:, None] * Cs[k]
                tl.store(dB + of_block + k * N, tl.sum((dts[k] * xs[k])[:, None] * g, 0)[None, :], states & (k < count))
                du = tl.sum(g * Bs[k], 1)
                g *= decays[k]
                w = g * befores[k]
                ddt_now = tl.sum(w * A2, 1) * LN_2 + du * xs[k]
                sum_dA += w * dts[k][:, None]
                du *= dts[k]
                if D is not None:
                    du += d * dys[k]
                    sum_dD += dys[k] * xs[k]
                real = inside & (k < count)
                tl.store(dx + row * I + channel + k * I, du.to(dx.dtype.element_ty), real)
                tl.store(ddt + row * I + channel + k * I, ddt_now.to(ddt.dtype.element_ty), real)
    tl.store(dA + place, sum_dA, whole)
    if D is not None:
        tl.store(dD + tl.program_id(1).to(tl.int64) * I + channel, sum_dD, inside)
    if segment == 0:
        tl.store(dstart + batch.to(tl.int64) * (I * N) + at, g, whole)


def _tile(name: str, x: Tensor, A: Tensor) -> tuple[dict[str, int], int, int, int]:
    """The kernel's constants, and how many blocks of channels, segments, and tokens in a segment there are."""
    batch, time, _ = x.shape
    channels, states = map(int, A.shape)
    every = tiles("selective_scan_forward", N=states)["EVERY"]
    tile = tiles(name, N=states)
    tile |= {"EVERY": every, "I": channels, "N": states, "WIDE": power_of_2(states)}
    tile["BLOCK"] = max(1, tile.pop("SIZE") // tile["WIDE"])
    blocks = cdiv(channels, tile["BLOCK"])
    share = cdiv(cdiv(time, cdiv(tile.pop("PROGRAMS"), batch * blocks)), every) * every
    return tile, blocks, cdiv(time, share), share


def _empty(*shape: int, like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _starts(
    start: Tensor | None, operands: tuple[Tensor, ...], reset: Tensor | None, back: bool, tile: dict[str, int],
    blocks: int, segments: int, share: int,
) -> Tensor:  # fmt: skip
    """The states before all segments, or the gradients behind them: [B, S, I, N]."""
    x, _, A, _ = operands
    (batch, time, channels), states = x.shape, A.shape[1]
    decay, found = (_empty(batch, segments - 1, channels, states, like=x) for _ in range(2))
    launch(
        _local, (blocks, batch * (segments - 1)),
        *operands, reset, decay, found, time, segments, share,
        BACK=back, **{name: size for name, size in tile.items() if name != "EVERY"},
    )  # fmt: skip
    result = _empty(batch, segments, channels, states, like=x)
    join = tiles("selective_scan_join")
    launch(
        _joined, (cdiv(channels * states, join["BLOCK"]), batch),
        decay, found, start, result, segments, SIZE=channels * states, BACK=back, **join,
    )  # fmt: skip
    return result


def _run(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, reset: Tensor | None,
    initial: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, time, channels), states = x.shape, A.shape[1]
    tile, blocks, segments, share = _tile("selective_scan_forward", x, A)
    start = _starts(initial, (x, dt, A, B), reset, False, tile, blocks, segments, share)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final = _empty(batch, channels, states, like=x)
    kept = _empty(batch if keep else 0, cdiv(time, tile["EVERY"]), channels, states, like=x)
    launch(
        _forward, (blocks, batch * segments),
        x, dt, A, B, C, D, reset, start, y, final, kept if keep else None, time, segments, share, **tile,
    )  # fmt: skip
    return y, final, kept


def _run_backward(
    dy: Tensor | None, dfinal: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    reset: Tensor | None, kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, time, channels), states = x.shape, A.shape[1]
    tile, blocks, segments, share = _tile("selective_scan_backward", x, A)
    dy = torch.zeros_like(x) if dy is None else dy.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()
    end = _starts(dfinal, (dy, dt, A, C), reset, True, tile, blocks, segments, share)
    noted = tile["EVERY"] // tile["STEPS"] * tile["BLOCK"] * tile["WIDE"]
    notes = _empty(batch * segments, blocks, noted, like=x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    ddt = torch.empty(dt.shape, dtype=dt.dtype, device=x.device)
    dA = _empty(batch * segments, channels, states, like=x)
    dB, dC = (_empty(blocks, batch, time, states, like=x) for _ in range(2))
    dD = _empty(batch * segments, 0 if D is None else channels, like=x)
    dinitial = _empty(batch, channels, states, like=x)
    launch(
        _backward, (blocks, batch * segments),
        dy, x, dt, A, B, C, D, reset, kept, end, notes, dx, ddt, dA, dB, dC, dD, dinitial,
        batch * time, time, segments, share, **tile,
    )  # fmt: skip
    return dx, ddt, dA.sum(0), dB.sum(0), dC.sum(0), dD.sum(0), dinitial


_op = register(
    "selective_scan", _run, _run_backward,
    outputs=("y", "final", "kept"), gradients=("x", "dt", "A", "B", "C", "D", "initial"), hidden=("kept",),
)  # fmt: skip


def selective_scan(
    x_BTI: Tensor,
    dt_BTI: Tensor,
    A_IN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_I: Tensor | None,
    reset_BT: Tensor | None,
    initial_state_BIN: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The outputs (in x's dtype) and the final state (fp32), differentiable once."""
    # B and C in fp32: a hundredth of x's memory, and no conversion at each of their I readings.
    floats = [t if t is None else t.float().contiguous() for t in (dt_BTI, A_IN, B_BTN, C_BTN, D_I)]
    initial = None if initial_state_BIN is None else initial_state_BIN.float().contiguous()
    reset = None if reset_BT is None else reset_BT.contiguous()
    given = (x_BTI, *floats, initial)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    return _op(x_BTI.contiguous(), *floats, reset, initial, keep)[:2]


def examples() -> dict[str, Callable[[], object]]:
    """Calls on meta tensors, by name: what the report compiles."""
    half, full = torch.bfloat16, torch.float32

    def call(channels: int, states: int, dtype: torch.dtype, packed: bool) -> None:
        batch, time = 8, 2048
        wide = (batch, time, channels)
        shapes = wide, wide, (channels, states), (batch, time, states), (batch, time, states), (channels,)
        kinds = dtype, full, full, dtype, dtype, full
        x, dt, A, B, C, D = (
            torch.empty(shape, dtype=kind, device="meta", requires_grad=True)
            for shape, kind in zip(shapes, kinds, strict=True)
        )
        reset = torch.empty(batch, time, dtype=torch.bool, device="meta") if packed else None
        results = selective_scan(x, dt, A, B, C, D, reset, None)
        torch.autograd.backward(list(results), [torch.empty_like(t) for t in results])

    cases = [(4096, 16, half, True), (4096, 16, half, False), (1536, 16, full, True)]
    cases += [(2048, states, half, True) for states in (8, 32, 64, 128)]
    return {
        f"I={i} N={n} {str(t)[6:]}{' packed' if p else ''}": lambda i=i, n=n, t=t, p=p: call(i, n, t, p)
        for i, n, t, p in cases
    }

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

With few rows and channels time is cut into segments: `local` finds each one's decay and what it adds, from zero;
`joined` walks over segments; then all run with their true starts. Forward keeps the state before each EVERY-th
token; backward goes through EVERY tokens at a time, notes the state before each STEPS of them, and recomputes those.

Isolation: a reset zeroes the decay itself, exp2(.. - inf), and 0 times a finite number is 0; no sum crosses tokens.

B batch, T time, I channel, N state, S segment, K kept state, P block of channels.
"""

# pyright: reportMissingImports=false, reportUnboundVariable=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# ruff: noqa: E741, RUF005, SIM102, SIM108 (I is a size; the compiler knows no unpacking, and branches while it compiles)

import math

import triton
import triton.language as tl

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
def local(
    x, dt, A, other, reset, decay, found, time, segments, share,
    I: tl.constexpr, N: tl.constexpr, BACK: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """A segment from zero: other is B, found its last state; BACK: x is dy, other C, found the gradient before it."""
    # In one dimension of the grid: CUDA's others end at 65535.
    blocks: tl.constexpr = (I + BLOCK - 1) // BLOCK
    block, run = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    batch, segment = run // (segments - 1), (run % (segments - 1)).to(tl.int32)
    if BACK:
        segment += 1
    channel, n = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDE)[None, :]
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
        row, count = batch * time + t, last - t
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
    place = run * (I * N) + at
    tl.store(decay + place, tl.exp2(steps[:, None] * A2 + border), whole)
    tl.store(found + place, h, whole)


@triton.jit(do_not_specialize=["segments"])
def joined(decay, found, start, states, segments, SIZE: tl.constexpr, BACK: tl.constexpr, BLOCK: tl.constexpr):
    """The state before each segment, from that before the first; BACK: the gradient behind each, from the last."""
    batch, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
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
def forward(
    x, dt, A, B, C, D, reset, start, y, final, kept, time, segments, share,
    I: tl.constexpr, N: tl.constexpr, EVERY: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (I + BLOCK - 1) // BLOCK
    block, run = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    batch, segment = run // segments, (run % segments).to(tl.int32)
    channel, n = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDE)[None, :]
    inside, states = channel < I, n < N
    at, whole = channel[:, None] * N + n, inside[:, None] & states
    A2 = tl.load(A + at, whole, 0.0).to(tl.float32) * LOG2_E
    h = tl.load(start + run * (I * N) + at, whole, 0.0)
    if D is not None:
        d = tl.load(D + channel, inside, 0.0).to(tl.float32)
    first = segment * share
    last = tl.minimum(first + share, time)
    for t in range(first, last, STEPS):
        row, count = batch * time + t, last - t
        if kept is not None:
            if t % EVERY == 0:
                place = batch * tl.cdiv(time, EVERY) + t // EVERY
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
        tl.store(final + batch * (I * N) + at, h, whole)


@triton.jit(do_not_specialize=["rows", "time", "segments", "share"])
def backward(
    dy, x, dt, A, B, C, D, reset, kept, end, notes, dx, ddt, dA, dB, dC, dD, dstart, rows, time, segments, share,
    I: tl.constexpr, N: tl.constexpr, EVERY: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (I + BLOCK - 1) // BLOCK
    block, run = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    batch, segment = run // segments, (run % segments).to(tl.int32)
    channel, n = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDE)[None, :]
    inside, states = channel < I, n < N
    at, whole = channel[:, None] * N + n, inside[:, None] & states
    place = run * (I * N) + at
    A2 = tl.load(A + at, whole, 0.0).to(tl.float32) * LOG2_E
    g = tl.load(end + place, whole, 0.0)
    sum_dA = tl.zeros([BLOCK, WIDE], tl.float32)
    sum_dD = tl.zeros([BLOCK], tl.float32)
    if D is not None:
        d = tl.load(D + channel, inside, 0.0).to(tl.float32)
    note = (run * blocks + block) * (EVERY // STEPS * BLOCK * WIDE)
    note += tl.arange(0, BLOCK)[:, None] * WIDE + n
    first = segment * share
    last = tl.minimum(first + share, time)
    chunks = tl.cdiv(last - first, EVERY)
    for back in range(0, chunks):
        begin = first + (chunks - 1 - back) * EVERY
        parts = tl.cdiv(tl.minimum(last - begin, EVERY), STEPS)
        keep = batch * tl.cdiv(time, EVERY) + begin // EVERY
        h = tl.load(kept + keep * (I * N) + at, whole, 0.0)
        for part in range(0, parts - 1):
            tl.store(notes + note + part * (BLOCK * WIDE), h)
            t = begin + part * STEPS
            row, count = batch * time + t, last - t
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
            row, count = batch * time + t, last - t
            xs = _tokens(x, row, count, channel, inside, I, STEPS)
            dts = _tokens(dt, row, count, channel, inside, I, STEPS)
            dys = _tokens(dy, row, count, channel, inside, I, STEPS)
            Bs = _tokens(B, row, count, n, states, N, STEPS)
            Cs = _tokens(C, row, count, n, states, N, STEPS)
            borders = _borders(reset, row, count, STEPS)
            of_block = (block.to(tl.int64) * rows + row) * N + n
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
        tl.store(dD + run * I + channel, sum_dD, inside)
    if segment == 0:
        tl.store(dstart + batch * (I * N) + at, g, whole)

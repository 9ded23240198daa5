"""The Triton kernels of RWKV-6's recurrence: chunks of C tokens, each one block of tensor-core products.

    y_t = sum over s < t of (r_t pair(s, t) . k_s) v_s + (r_t . u k_t) v_t + (r_t before_t) S
    S' = whole S + sum_s (k_s behind_s)^T v_s               R = whole R' + sum_t (r_t before_t)^T dy_t

`pair(s, t)` is the product of the decays between two tokens, `before` and `behind` those of a token's predecessors and
successors in the chunk, `whole` that of all: each channel its own. S is the state before a chunk, R' the gradient of
the one after it. Where time runs back, r and k, v and dy, `before` and `behind`, S and R' change places: the gradient
of v is what `outputs` finds, and R what `states` finds.

Halving: two tokens s < t stand in the left and right half of one block of 2^(l+1) tokens; that is their level l, and

    pair(s, t) = way_s way_t        way: the product of the decays between a token and its block's middle

so with w = r way for right tokens and w = k way for left ones, all pairs of a level stand in w w^T. There is no
quotient, and no exponent above 0.

Exactness: an exponent is M log2(decay) with M of 0 and 1, by tensor cores: logs are cut into PARTS of bf16, whose
products with 0 and 1 are exact; 2 have 16 bits, 3 all of fp32's. The gradient of the logs is M^T times that of the
exponents: sums alone, no differences. 2^-256 stands for smaller decays and at a document's start: 0 as it is raised.

i token of a chunk, K and V channels, H head; rows of r, k and log_w are [H K], those of v, y and dy [H V]; states are
[B, chunks, H, K, V].
"""

# pyright: reportMissingImports=false, reportUnboundVariable=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
LEAST = tl.constexpr(-256.0)


@triton.jit
def _rows(first, row, i, column, real_C, width: tl.constexpr):
    """[C, columns] from the chunk's first token on, 0 outside."""
    return tl.load(first + (i[:, None] * row + column[None, :]), real_C[:, None] & (column < width)[None, :], 0.0)


@triton.jit
def _halves(right, right_row, right_C, left, left_row, left_C, level, column, width: tl.constexpr, C: tl.constexpr):
    """The rows of `right` for the right tokens of a level, those of `left` for the left ones."""
    i = tl.arange(0, C)
    is_right = ((i >> level) & 1) != 0
    first = tl.where(is_right, right, left) + i * tl.where(is_right, right_row, left_row)
    real_C = tl.where(is_right, right_C, left_C)
    return tl.load(first[:, None] + column[None, :], real_C[:, None] & (column < width)[None, :], 0.0)


@triton.jit
def _log2(first, row, reset, i, column, real_C, width: tl.constexpr):
    log_CK = _rows(first, row, i, column, real_C, width) * LOG2_E
    log_CK = tl.where(log_CK < LEAST, LEAST, log_CK)
    if reset is not None:
        log_CK = tl.where((tl.load(reset + i, real_C, 0) != 0)[:, None], LEAST, log_CK)
    return log_CK


@triton.jit
def _seen(reset, i, real_C):
    """The tokens whose queries see what was before them: not a document's first."""
    if reset is not None:
        real_C &= tl.load(reset + i, real_C, 1) == 0
    return real_C


@triton.jit
def _sums(M_CC, x_CK, PARTS: tl.constexpr):
    """M x: row by row the sum of the tokens that are chosen."""
    part_CK = x_CK.to(tl.bfloat16)
    sums_CK = tl.dot(M_CC, part_CK)
    for _ in tl.static_range(1, PARTS):
        x_CK -= part_CK.to(tl.float32)
        part_CK = x_CK.to(tl.bfloat16)
        sums_CK += tl.dot(M_CC, part_CK)
    return sums_CK


@triton.jit
def matrices(ways, C: tl.constexpr, LEVELS: tl.constexpr):
    """[LEVELS + 2, C, C]: of each token those on the way to the middle of a level, those before it, those behind it."""
    level, i = tl.program_id(0), tl.arange(0, C)
    first = tl.where(level < LEVELS, (i >> level) << level, 0)
    right = tl.where(level < LEVELS, ((i >> level) & 1) != 0, level == LEVELS)
    end = tl.where(level < LEVELS, first + (1 << level), C)
    begin, end = tl.where(right, first, i + 1), tl.where(right, i, end)
    chosen_CC = (i[None, :] >= begin[:, None]) & (i[None, :] < end[:, None])
    tl.store(ways + _cells(level, C), tl.where(chosen_CC, 1.0, 0.0).to(tl.bfloat16))


@triton.jit
def _cells(level, C: tl.constexpr):
    i = tl.arange(0, C)
    return level * (C * C) + i[:, None] * C + i[None, :]


@triton.jit
def _across(i, level):
    """The pairs of a level."""
    return ((i >> level)[:, None] ^ (i >> level)[None, :]) == 1


@triton.jit(do_not_specialize=["time", "chunks"])
def states(
    k, v, log_w, reset, ways, first, found, last, time, chunks, k_row, v_row, w_row,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, PARTS: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """The state before each chunk and after the last; with BACK the gradients R', k being r and v dy."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    head, row, i = tl.program_id(1), tl.program_id(2), tl.arange(0, C)
    channel = tl.program_id(0) // blocks * BK + tl.arange(0, BK)
    value = tl.program_id(0) % blocks * BV + tl.arange(0, BV)
    cell, real = channel[:, None] * V + value[None, :], (channel < K)[:, None] & (value < V)[None, :]
    whole = (row.to(tl.int64) * H + head) * (K * V)
    state_KV = tl.zeros([BK, BV], tl.float32)
    if first is not None:
        state_KV += tl.load(first + whole + cell, real, 0.0)
    far_CC = tl.load(ways + _cells(LEVELS + (1 - BACK), C))
    for step in range(0, chunks):
        chunk = step
        if BACK:
            chunk = chunks - 1 - step
        place = ((row.to(tl.int64) * chunks + chunk) * H + head) * (K * V)
        tl.store(found + place + cell, state_KV.to(found.dtype.element_ty), real)
        at, real_C = row.to(tl.int64) * time + chunk * C, i < time - chunk * C
        starts = None
        if reset is not None:
            starts = reset + at
        v_CV = _rows(v + at * v_row + head * V, v_row, i, value, real_C, V)
        log_CK = _log2(log_w + at * w_row + head * K, w_row, starts, i, channel, real_C, K)
        if BACK:
            real_C = _seen(starts, i, real_C)
        k_CK = _rows(k + at * k_row + head * K, k_row, i, channel, real_C, K)
        far_CK = (k_CK.to(tl.float32) * tl.exp2(_sums(far_CC, log_CK, PARTS))).to(k_CK.dtype)
        state_KV *= tl.exp2(tl.sum(log_CK, 0))[:, None]
        state_KV += tl.dot(tl.trans(far_CK), v_CV, input_precision="ieee")
    if last is not None:
        tl.store(last + whole + cell, state_KV, real)


@triton.jit(do_not_specialize=["time", "chunks"])
def outputs(
    r, k, v, log_w, u, reset, ways, state, y, time, chunks, r_row, k_row, v_row, w_row,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, PARTS: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """y from S; with BACK the gradient of v from R', v being dy."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    head, chunk, row = tl.program_id(0) // blocks, tl.program_id(1), tl.program_id(2)
    value, i = tl.program_id(0) % blocks * BV + tl.arange(0, BV), tl.arange(0, C)
    at, real_C = row.to(tl.int64) * time + chunk * C, i < time - chunk * C
    place = ((row.to(tl.int64) * chunks + chunk) * H + head) * (K * V)
    starts = None
    if reset is not None:
        starts = reset + at
    seen_C = _seen(starts, i, real_C)
    scores_CC, now_C, y_CV = tl.zeros([C, C], tl.float32), tl.zeros([C], tl.float32), tl.zeros([C, BV], tl.float32)
    r_first, k_first = r + at * r_row + head * K, k + at * k_row + head * K
    far_CC = tl.load(ways + _cells(LEVELS + BACK, C))
    for begin in range(0, K, BK):
        channel = begin + tl.arange(0, BK)
        r_CK = _rows(r_first, r_row, i, channel, real_C, K)
        k_CK = _rows(k_first, k_row, i, channel, real_C, K)
        log_CK = _log2(log_w + at * w_row + head * K, w_row, starts, i, channel, real_C, K)
        u_K = tl.load(u + head * K + channel, channel < K, 0.0)
        now_C += tl.sum(r_CK.to(tl.float32) * k_CK.to(tl.float32) * u_K[None, :], 1)
        far_CK = tl.exp2(_sums(far_CC, log_CK, PARTS))
        if BACK:
            far_CK *= k_CK.to(tl.float32)
        else:
            far_CK *= tl.where(seen_C[:, None], r_CK.to(tl.float32), 0.0)
        cell, real = channel[:, None] * V + value[None, :], (channel < K)[:, None] & (value < V)[None, :]
        state_KV = tl.load(state + place + cell, real, 0.0)
        y_CV += tl.dot(far_CK.to(r_CK.dtype), state_KV, input_precision="ieee")
        w_CK = _halves(r_first, r_row, seen_C, k_first, k_row, real_C, 0, channel, K, C)
        scores_CC += tl.where(_across(i, 0), tl.dot(w_CK, tl.trans(w_CK), input_precision="ieee"), 0.0)
        for level in range(1, LEVELS):
            way_CK = tl.exp2(_sums(tl.load(ways + _cells(level, C)), log_CK, PARTS))
            w_CK = _halves(r_first, r_row, seen_C, k_first, k_row, real_C, level, channel, K, C)
            w_CK = (w_CK.to(tl.float32) * way_CK).to(w_CK.dtype)
            scores_CC += tl.where(_across(i, level), tl.dot(w_CK, tl.trans(w_CK), input_precision="ieee"), 0.0)
    earlier = i[None, :] < i[:, None]
    if BACK:
        earlier = i[None, :] > i[:, None]
    scores_CC = tl.where(earlier, scores_CC, tl.where(i[None, :] == i[:, None], now_C[:, None], 0.0))
    v_CV = _rows(v + at * v_row + head * V, v_row, i, value, real_C, V)
    y_CV += tl.dot(scores_CC.to(v_CV.dtype), v_CV, input_precision="ieee")
    there = i[:, None] * (H * V) + value[None, :]
    tl.store(y + at * (H * V) + head * V + there, y_CV.to(y.dtype.element_ty), real_C[:, None] & (value < V)[None, :])


@triton.jit(do_not_specialize=["time", "chunks"])
def key_gradients(
    dy, r, k, v, log_w, u, reset, ways, before, after, dr, dk, dlog_w, du, time, chunks,
    dy_row, r_row, k_row, v_row, w_row,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, PARTS: tl.constexpr,
    GRADIENT_PARTS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Of r, k, log_w, and the chunk's share in that of u."""
    blocks: tl.constexpr = (K + BK - 1) // BK
    head, chunk, row = tl.program_id(0) // blocks, tl.program_id(1), tl.program_id(2)
    channel, i = tl.program_id(0) % blocks * BK + tl.arange(0, BK), tl.arange(0, C)
    at, real_C = row.to(tl.int64) * time + chunk * C, i < time - chunk * C
    place = (row.to(tl.int64) * chunks + chunk) * H + head
    starts = None
    if reset is not None:
        starts = reset + at
    seen_C = _seen(starts, i, real_C)
    r_first, k_first = r + at * r_row + head * K, k + at * k_row + head * K
    dy_first, v_first = dy + at * dy_row + head * V, v + at * v_row + head * V
    now_C, passed_K = tl.zeros([C], tl.float32), tl.zeros([BK], tl.float32)
    for begin in range(0, V, BV):
        value = begin + tl.arange(0, BV)
        dy_CV = _rows(dy_first, dy_row, i, value, real_C, V)
        v_CV = _rows(v_first, v_row, i, value, real_C, V)
        now_C += tl.sum(dy_CV.to(tl.float32) * v_CV.to(tl.float32), 1)
        cell, real = channel[:, None] * V + value[None, :], (channel < K)[:, None] & (value < V)[None, :]
        S_KV = tl.load(before + place * (K * V) + cell, real, 0.0)
        R_KV = tl.load(after + place * (K * V) + cell, real, 0.0)
        passed_K += tl.sum(S_KV.to(tl.float32) * R_KV.to(tl.float32), 1)
    r_CK = _rows(r_first, r_row, i, channel, real_C, K)
    k_CK = _rows(k_first, k_row, i, channel, real_C, K)
    u_K = tl.load(u + head * K + channel, channel < K, 0.0)
    dk_CK = now_C[:, None] * r_CK.to(tl.float32)
    tl.store(du + place * K + channel, tl.sum(dk_CK * k_CK.to(tl.float32), 0), channel < K)
    dk_CK *= u_K[None, :]
    dr_CK = now_C[:, None] * u_K[None, :] * k_CK.to(tl.float32)
    log_CK = _log2(log_w + at * w_row + head * K, w_row, starts, i, channel, real_C, K)
    dlog_CK = tl.zeros([C, BK], tl.float32) + (passed_K * tl.exp2(tl.sum(log_CK, 0)))[None, :]

    for side in range(0, 2):  # queries of what was before the chunk, keys of what comes behind it
        way_CC = tl.load(ways + _cells(LEVELS + side, C))
        way_CK = tl.exp2(_sums(way_CC, log_CK, PARTS))
        x, x_row = tl.where(side == 0, dy_first, v_first), tl.where(side == 0, dy_row, v_row)
        w, w_step = tl.where(side == 0, r_first, k_first), tl.where(side == 0, r_row, k_row)
        state, side_C = tl.where(side == 0, before, after) + place * (K * V), tl.where(side == 0, seen_C, real_C)
        dw_CK = tl.zeros([C, BK], tl.float32)
        for begin in range(0, V, BV):
            value = begin + tl.arange(0, BV)
            cell, real = channel[:, None] * V + value[None, :], (channel < K)[:, None] & (value < V)[None, :]
            state_KV = tl.load(state + cell, real, 0.0)
            dw_CK += tl.dot(_rows(x, x_row, i, value, side_C, V), tl.trans(state_KV), input_precision="ieee")
        dw_CK *= way_CK
        w_CK = _rows(w, w_step, i, channel, side_C, K)
        dlog_CK += _sums(tl.trans(way_CC), dw_CK * w_CK.to(tl.float32), GRADIENT_PARTS)
        dr_CK += tl.where(side == 0, dw_CK, 0.0)
        dk_CK += tl.where(side == 0, 0.0, dw_CK)
    for level in range(0, LEVELS):
        way_CC = tl.load(ways + _cells(level, C))
        way_CK = tl.exp2(_sums(way_CC, log_CK, PARTS))
        w_CK = _halves(r_first, r_row, seen_C, k_first, k_row, real_C, level, channel, K, C)
        decayed_CK = (w_CK.to(tl.float32) * way_CK).to(w_CK.dtype)
        pairs_CC = tl.zeros([C, C], tl.float32)
        for begin in range(0, V, BV):
            value = begin + tl.arange(0, BV)
            x_CV = _halves(dy_first, dy_row, seen_C, v_first, v_row, real_C, level, value, V, C)
            pairs_CC += tl.dot(x_CV, tl.trans(x_CV), input_precision="ieee")
        pairs_CC = tl.where(_across(i, level), pairs_CC, 0.0)
        dw_CK = tl.dot(pairs_CC.to(w_CK.dtype), decayed_CK, input_precision="ieee") * way_CK
        dlog_CK += _sums(tl.trans(way_CC), dw_CK * w_CK.to(tl.float32), GRADIENT_PARTS)
        right = ((i >> level) & 1) != 0
        dr_CK += tl.where(right[:, None], dw_CK, 0.0)
        dk_CK += tl.where(right[:, None], 0.0, dw_CK)
    real = real_C[:, None] & (channel < K)[None, :]
    there = at * (H * K) + head * K + (i[:, None] * (H * K) + channel[None, :])
    tl.store(dlog_w + there, dlog_CK, real)
    tl.store(dr + there, dr_CK.to(dr.dtype.element_ty), real)
    tl.store(dk + there, dk_CK.to(dk.dtype.element_ty), real)

"""The Triton kernels of forward, and of the gradients of states, which run as states do (equations: `__init__.py`)."""

# pyright: reportMissingImports=false, reportUnboundVariable=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false

import math

import triton
import triton.language as tl

from lamella_kernels.scalar_decay.blocks import between, rows, series

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _restart(starts, total, later_starts, later_total):
    return starts | later_starts, tl.where(later_starts != 0, later_total, total + later_total)


@triton.jit(do_not_specialize=["time"])
def decays(
    high, fine, document, rate, scale, reset, time, rate_row, H: tl.constexpr, L: tl.constexpr, BH: tl.constexpr
):
    """Of exp(rate scale); either may be absent."""
    chunk, row, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head, token = block * BH + tl.arange(0, BH), chunk * L + tl.arange(0, L)
    at, padded = row.to(tl.int64) * time + token, tl.num_programs(0) * L
    inside = (token < time)[:, None] & (head < H)[None, :]
    log_LH = tl.full([L, BH], LOG2_E, tl.float64)
    if rate is not None:
        log_LH *= tl.load(rate + at[:, None] * rate_row + head[None, :], inside, 0.0).to(tl.float64)
    if scale is not None:
        log_LH *= tl.load(scale + head, head < H, 0.0).to(tl.float64)[None, :]
    log_LH = tl.where(inside, tl.maximum(log_LH, -256.0), 0.0)  # 2^-256 is 0 in fp32
    if reset is not None:
        starts_L = tl.load(reset + at, token < time, 0).to(tl.int32)
        if block == 0:
            tl.store(document + row.to(tl.int64) * padded + token, tl.cumsum(starts_L, 0))
        starts_LH = tl.broadcast_to(starts_L[:, None], [L, BH])
        starts_LH, log_LH = tl.associative_scan((starts_LH, log_LH), 0, _restart)
    else:
        log_LH = tl.cumsum(log_LH, 0)
    place = (row.to(tl.int64) * H + head[None, :]) * padded + token[:, None]
    high_LH = log_LH.to(tl.float32)
    tl.store(high + place, high_LH, (head < H)[None, :])
    tl.store(fine + place, (log_LH - high_LH.to(tl.float64)).to(tl.float32), (head < H)[None, :])


@triton.jit(do_not_specialize=["time", "chunks"])
def states(
    v, k, dt, divisor, high, fine, document, first, found, last, before, passed, first_sums, sums, last_sums,
    time, chunks, v_row, k_row, dt_row,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """The state, and where asked z and w, before each chunk and after the last.

    With BACK the gradients R', from dy and q in place of v and k, and <R', e h>, the states h being known.
    """
    blocks: tl.constexpr = (K + BK - 1) // BK
    head, row = tl.program_id(1), tl.program_id(2)
    value = tl.program_id(0) // blocks * BV + tl.arange(0, BV)
    key = tl.program_id(0) % blocks * BK + tl.arange(0, BK)
    i, real = tl.arange(0, L), (value < V)[:, None] & (key < K)[None, :]
    cell = value[:, None] * K + key[None, :]
    whole = (row.to(tl.int64) * H + head) * (V * K)
    state_VK = tl.zeros([BV, BK], tl.float32)
    if first is not None:
        state_VK += tl.load(first + whole + cell, real, 0.0)
    if sums is not None:
        z_K, w = tl.zeros([BK], tl.float32), 0.0
        summed, alone = (key < K) & (tl.program_id(0) < blocks), tl.program_id(0) == 0
        of_row = (row.to(tl.int64) * H + head) * (K + 1)
        if first_sums is not None:
            z_K += tl.load(first_sums + of_row + key, key < K, 0.0)
            w += tl.load(first_sums + of_row + K)
    for step in range(0, chunks):
        chunk = step
        if BACK:
            chunk = chunks - 1 - step
        place = (row.to(tl.int64) * chunks + chunk) * H + head
        tl.store(found + place * (V * K) + cell, state_VK.to(found.dtype.element_ty), real)
        at, real_L = row.to(tl.int64) * time + chunk * L, i < time - chunk * L
        v_LV = rows(v + at * v_row + head * V, v_row, i, value, real_L, V)
        k_LK = rows(k + at * k_row + head // (H // G) * K, k_row, i, key, real_L, K)
        high_L, fine_L, high_1, fine_1, document_L, document_1 = series(
            high, fine, document, row, head, chunk, chunks, H, L
        )
        whole_1 = between(high_1, fine_1, 0.0, 0.0, document_1 == 0)
        if BACK:
            weight_L = between(high_L, fine_L, 0.0, 0.0, document_L == 0)
            if divisor is not None:
                weight_L /= tl.load(divisor + at * H + head + i * H, real_L, 1.0)
        else:
            weight_L = between(high_1, fine_1, high_L, fine_L, document_L == document_1)
            if dt is not None:
                weight_L *= tl.load(dt + at * dt_row + head + i * dt_row, real_L, 0.0)
        if sums is not None:
            tl.store(sums + place * (K + 1) + key, z_K, summed)
            tl.store(sums + place * (K + 1) + K, w, alone)
            z_K = z_K * whole_1 + tl.sum(k_LK.to(tl.float32) * weight_L[:, None], 0)
            w = w * whole_1 + tl.sum(tl.where(real_L, weight_L, 0.0), 0)
        weighed_LV = (v_LV.to(tl.float32) * weight_L[:, None]).to(v.dtype.element_ty)
        state_VK *= whole_1
        if BACK:
            h_VK = tl.load(before + place * (V * K) + cell, real, 0.0).to(tl.float32)
            tl.store(passed + place * tl.num_programs(0) + tl.program_id(0), tl.sum(state_VK * h_VK))
        state_VK += tl.dot(tl.trans(weighed_LV), k_LK, input_precision="ieee")
    if last is not None:
        tl.store(last + whole + cell, state_VK, real)
    if last_sums is not None:
        tl.store(last_sums + of_row + key, z_K, summed)
        tl.store(last_sums + of_row + K, w, alone)


@triton.jit(do_not_specialize=["time", "chunks"])
def outputs(
    q, k, v, dt, D, high, fine, document, before, sums, y, divisor, time, chunks, q_row, k_row, v_row, dt_row,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """y, and its divisor where there are sums. Pairs are [i, j]."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    head, chunk, row = tl.program_id(0) // blocks, tl.program_id(1), tl.program_id(2)
    value = tl.program_id(0) % blocks * BV + tl.arange(0, BV)
    i = tl.arange(0, L)
    at, real_L = row.to(tl.int64) * time + chunk * L, i < time - chunk * L
    group, place = head // (H // G) * K, (row.to(tl.int64) * chunks + chunk) * H + head
    pairs_LL, y_LV, total_L = tl.zeros([L, L], tl.float32), tl.zeros([L, BV], tl.float32), tl.zeros([L], tl.float32)
    for start in range(0, K, BK):
        key = start + tl.arange(0, BK)
        q_LK = rows(q + at * q_row + group, q_row, i, key, real_L, K)
        k_LK = rows(k + at * k_row + group, k_row, i, key, real_L, K)
        real = (value < V)[:, None] & (key < K)[None, :]
        h_VK = tl.load(before + place * (V * K) + (value[:, None] * K + key[None, :]), real, 0.0)
        pairs_LL += tl.dot(q_LK, tl.trans(k_LK), input_precision="ieee")
        y_LV += tl.dot(q_LK, tl.trans(h_VK), input_precision="ieee")
        if sums is not None:
            z_K = tl.load(sums + place * (K + 1) + key, key < K, 0.0)
            total_L += tl.sum(q_LK.to(tl.float32) * z_K[None, :], 1)
    high_L, fine_L, _, _, document_L, _ = series(high, fine, document, row, head, chunk, chunks, H, L)
    inside = (i[:, None] >= i[None, :]) & (document_L[:, None] == document_L[None, :])
    decays_LL = between(high_L[:, None], fine_L[:, None], high_L[None, :], fine_L[None, :], inside)
    start_L = between(high_L, fine_L, 0.0, 0.0, document_L == 0)
    pairs_LL *= decays_LL
    if sums is not None:
        total_L = total_L * start_L + tl.sum(pairs_LL, 1)
        weight_L = start_L * tl.load(sums + place * (K + 1) + K) + tl.sum(decays_LL, 1)
        divisor_L = tl.maximum(tl.sqrt_rn(weight_L), tl.abs(total_L))
        tl.store(divisor + at * H + head + i * H, divisor_L, real_L & (tl.program_id(0) % blocks == 0))
        pairs_LL /= divisor_L[:, None]
        start_L /= divisor_L
    if dt is not None:
        pairs_LL *= tl.load(dt + at * dt_row + head + i * dt_row, real_L, 0.0)[None, :]
    v_LV = rows(v + at * v_row + head * V, v_row, i, value, real_L, V)
    y_LV *= start_L[:, None]
    y_LV += tl.dot(pairs_LL.to(v.dtype.element_ty), v_LV, input_precision="ieee")
    if D is not None:
        y_LV += tl.load(D + head) * v_LV.to(tl.float32)
    there = at * (H * V) + head * V + (i[:, None] * (H * V) + value[None, :])
    tl.store(y + there, y_LV.to(y.dtype.element_ty), real_L[:, None] & (value < V)[None, :])

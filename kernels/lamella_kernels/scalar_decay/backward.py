"""The Triton kernels of backward, by chunk (equations: `__init__.py`). Pairs of tokens are [j, i]."""

# pyright: reportMissingImports=false, reportUnboundVariable=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from lamella_kernels.scalar_decay.blocks import between, rows, series


@triton.jit
def _state(states, place, value, key, V: tl.constexpr, K: tl.constexpr):
    cell, real = value[:, None] * K + key[None, :], (value < V)[:, None] & (key < K)[None, :]
    return tl.load(states + place * (V * K) + cell, real, 0.0)


@triton.jit
def _inside(high_L, fine_L, document_L, L: tl.constexpr):
    """L_ij."""
    i = tl.arange(0, L)
    inside = (i[:, None] <= i[None, :]) & (document_L[:, None] == document_L[None, :])
    return between(high_L[None, :], fine_L[None, :], high_L[:, None], fine_L[:, None], inside)


@triton.jit(do_not_specialize=["time", "chunks"])
def head_gradients(
    dy, q, k, v, dt, D, divisor, high, fine, document, before, after, passed, dq, dk, dv, ddt, dlog, dD,
    time, chunks, dy_row, q_row, k_row, v_row, dt_row,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, PASSED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Of v, the logs of decays, dt as a factor, D by chunk; of q and k where a head has its own."""
    head, chunk, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i = tl.arange(0, L)
    at, real_L = row.to(tl.int64) * time + chunk * L, i < time - chunk * L
    group, place = head // (H // G) * K, (row.to(tl.int64) * chunks + chunk) * H + head
    near_LL, pairs_LL = tl.zeros([L, L], tl.float32), tl.zeros([L, L], tl.float32)
    for start in range(0, K, BK):
        key = start + tl.arange(0, BK)
        q_LK = rows(q + at * q_row + group, q_row, i, key, real_L, K)
        k_LK = rows(k + at * k_row + group, k_row, i, key, real_L, K)
        near_LL += tl.dot(k_LK, tl.trans(q_LK), input_precision="ieee")
    for first in range(0, V, BV):
        value = first + tl.arange(0, BV)
        v_LV = rows(v + at * v_row + head * V, v_row, i, value, real_L, V)
        dy_LV = rows(dy + at * dy_row + head * V, dy_row, i, value, real_L, V)
        pairs_LL += tl.dot(v_LV, tl.trans(dy_LV), input_precision="ieee")
    high_L, fine_L, high_1, fine_1, document_L, document_1 = series(
        high, fine, document, row, head, chunk, chunks, H, L
    )
    decays_LL = _inside(high_L, fine_L, document_L, L)
    start_L = between(high_L, fine_L, 0.0, 0.0, document_L == 0)
    end_L = between(high_1, fine_1, high_L, fine_L, document_L == document_1)
    if divisor is not None:
        divisor_L = tl.load(divisor + at * H + head + i * H, real_L, 1.0)
        decays_LL /= divisor_L[None, :]
        start_L /= divisor_L
    dt_L = tl.full([L], 1.0, tl.float32)
    if dt is not None:
        dt_L = tl.load(dt + at * dt_row + head + i * dt_row, real_L, 0.0)
    near_LL *= decays_LL
    pairs_LL *= dt_L[:, None]
    from_LL = (i[:, None] >= i[None, :]).to(v.dtype.element_ty)  # i and k
    paths_LL = tl.dot((pairs_LL * near_LL).to(v.dtype.element_ty), from_LL, input_precision="ieee")
    dlog_L = tl.sum(tl.where(i[:, None] < i[None, :], paths_LL, 0.0), 0)  # j < k
    dpairs_LL = (pairs_LL * decays_LL).to(v.dtype.element_ty)
    near_LL = near_LL.to(v.dtype.element_ty)
    out_L, into_L, direct_L = tl.zeros([L], tl.float32), tl.zeros([L], tl.float32), tl.zeros([L], tl.float32)
    skipped = 0.0
    for first in range(0, V, BV):
        value = first + tl.arange(0, BV)
        v_LV = rows(v + at * v_row + head * V, v_row, i, value, real_L, V)
        dy_LV = rows(dy + at * dy_row + head * V, dy_row, i, value, real_L, V)
        seen_LV, du_LV = tl.zeros([L, BV], tl.float32), tl.zeros([L, BV], tl.float32)
        for start in range(0, K, BK):
            key = start + tl.arange(0, BK)
            k_LK = rows(k + at * k_row + group, k_row, i, key, real_L, K)
            du_LV += tl.dot(k_LK, tl.trans(_state(after, place, value, key, V, K)), input_precision="ieee")
            if dq is None:
                q_LK = rows(q + at * q_row + group, q_row, i, key, real_L, K)
                seen_LV += tl.dot(q_LK, tl.trans(_state(before, place, value, key, V, K)), input_precision="ieee")
        if dq is None:
            out_L += tl.sum(seen_LV * dy_LV.to(tl.float32), 1)
        du_LV *= end_L[:, None]
        into_L += tl.sum(du_LV * v_LV.to(tl.float32), 1)
        du_LV += tl.dot(near_LL, dy_LV, input_precision="ieee")
        if dt is not None:
            direct_L += tl.sum(du_LV * v_LV.to(tl.float32), 1)
            du_LV *= dt_L[:, None]
        if D is not None:
            du_LV += tl.load(D + head) * dy_LV.to(tl.float32)
            skipped += tl.sum(v_LV.to(tl.float32) * dy_LV.to(tl.float32))
        there = at * (H * V) + head * V + (i[:, None] * (H * V) + value[None, :])
        tl.store(dv + there, du_LV.to(dv.dtype.element_ty), real_L[:, None] & (value < V)[None, :])
    if dq is not None:
        for start in range(0, K, BK):
            key = start + tl.arange(0, BK)
            dk_LK, dq_LK = tl.zeros([L, BK], tl.float32), tl.zeros([L, BK], tl.float32)
            for first in range(0, V, BV):
                value = first + tl.arange(0, BV)
                v_LV = rows(v + at * v_row + head * V, v_row, i, value, real_L, V)
                dy_LV = rows(dy + at * dy_row + head * V, dy_row, i, value, real_L, V)
                dk_LK += tl.dot(v_LV, _state(after, place, value, key, V, K), input_precision="ieee")
                dq_LK += tl.dot(dy_LV, _state(before, place, value, key, V, K), input_precision="ieee")
            q_LK = rows(q + at * q_row + group, q_row, i, key, real_L, K)
            k_LK = rows(k + at * k_row + group, k_row, i, key, real_L, K)
            out_L += tl.sum(dq_LK * q_LK.to(tl.float32), 1)
            dk_LK *= (end_L * dt_L)[:, None]
            dq_LK *= start_L[:, None]
            dk_LK += tl.dot(dpairs_LL, q_LK, input_precision="ieee")
            dq_LK += tl.dot(tl.trans(dpairs_LL), k_LK, input_precision="ieee")
            there = at * (G * K) + group + (i[:, None] * (G * K) + key[None, :])
            real = real_L[:, None] & (key < K)[None, :]
            tl.store(dk + there, dk_LK.to(dk.dtype.element_ty), real)
            tl.store(dq + there, dq_LK.to(dq.dtype.element_ty), real)
    # h is a j before all tokens, h' an i behind them
    dlog_L += tl.sum(tl.where(i[:, None] < i[None, :], (into_L * dt_L)[:, None], (out_L * start_L)[:, None]), 0)
    part = tl.arange(0, WIDE)
    dlog_L += tl.sum(tl.load(passed + place * PASSED + part, part < PASSED, 0.0), 0)
    tl.store(dlog + at * H + head + i * H, dlog_L, real_L)
    if dt is not None:
        tl.store(ddt + at * H + head + i * H, direct_L, real_L)
    if D is not None:
        tl.store(dD + place, skipped)


@triton.jit(do_not_specialize=["time", "chunks"])
def group_gradients(
    dy, q, k, v, dt, high, fine, document, before, after, dq, dk, time, chunks, dy_row, q_row, k_row, v_row, dt_row,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Of q and k, one of PARTS sums over a group's heads."""
    blocks: tl.constexpr = (K + BK - 1) // BK
    many: tl.constexpr = (H // G + PARTS - 1) // PARTS
    part, chunk, row = tl.program_id(0) // blocks % PARTS, tl.program_id(1), tl.program_id(2)
    group = tl.program_id(0) // (blocks * PARTS)
    key = tl.program_id(0) % blocks * BK + tl.arange(0, BK)
    i = tl.arange(0, L)
    at, real_L = row.to(tl.int64) * time + chunk * L, i < time - chunk * L
    dpairs_LL = tl.zeros([L, L], tl.float32)
    dk_LK, dq_LK = tl.zeros([L, BK], tl.float32), tl.zeros([L, BK], tl.float32)
    begin = group * (H // G) + part * many
    for head in range(begin, tl.minimum(begin + many, (group + 1) * (H // G))):
        high_L, fine_L, high_1, fine_1, document_L, document_1 = series(
            high, fine, document, row, head, chunk, chunks, H, L
        )
        start_L = between(high_L, fine_L, 0.0, 0.0, document_L == 0)
        dt_L = tl.load(dt + at * dt_row + head + i * dt_row, real_L, 0.0)
        end_L = between(high_1, fine_1, high_L, fine_L, document_L == document_1) * dt_L
        place = (row.to(tl.int64) * chunks + chunk) * H + head
        pairs_LL = tl.zeros([L, L], tl.float32)
        for first in range(0, V, BV):
            value = first + tl.arange(0, BV)
            v_LV = rows(v + at * v_row + head * V, v_row, i, value, real_L, V)
            dy_LV = rows(dy + at * dy_row + head * V, dy_row, i, value, real_L, V)
            pairs_LL += tl.dot(v_LV, tl.trans(dy_LV), input_precision="ieee")
            v_LV = (v_LV.to(tl.float32) * end_L[:, None]).to(v.dtype.element_ty)
            dy_LV = (dy_LV.to(tl.float32) * start_L[:, None]).to(v.dtype.element_ty)
            dk_LK += tl.dot(v_LV, _state(after, place, value, key, V, K), input_precision="ieee")
            dq_LK += tl.dot(dy_LV, _state(before, place, value, key, V, K), input_precision="ieee")
        dpairs_LL += pairs_LL * _inside(high_L, fine_L, document_L, L) * dt_L[:, None]
    pairs_LL = dpairs_LL.to(q.dtype.element_ty)
    q_LK = rows(q + at * q_row + group * K, q_row, i, key, real_L, K)
    k_LK = rows(k + at * k_row + group * K, k_row, i, key, real_L, K)
    dk_LK += tl.dot(pairs_LL, q_LK, input_precision="ieee")
    dq_LK += tl.dot(tl.trans(pairs_LL), k_LK, input_precision="ieee")
    tokens = tl.num_programs(2).to(tl.int64) * time
    there = (part * tokens + at) * (G * K) + group * K + (i[:, None] * (G * K) + key[None, :])
    real = real_L[:, None] & (key < K)[None, :]
    tl.store(dk + there, dk_LK.to(dk.dtype.element_ty), real)
    tl.store(dq + there, dq_LK.to(dq.dtype.element_ty), real)

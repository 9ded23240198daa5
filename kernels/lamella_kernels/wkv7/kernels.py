"""The Triton kernels of RWKV-7: chunks of C tokens, all of them side by side but for one product a chunk.

With u_t = S_{t-1} a_t a chunk is linear in the state at its start, and T = (I - AB)^-1 solves for u (`eager.py`):

    u = Z v + P S^T                        Z = T AK        P = T A
    y = Y v + Q S^T                        Y = RK + RB Z   Q = R + RB P
    S' = S diag(whole) + S M + v^T F       F = K + Z^T B   M = P^T B

`transitions` finds these matrices for every chunk, `scan` goes over the chunks with them. Backward is the same scan the
other way round, with D the gradient of a state, dx that of what T is applied to, and M^T in place of M:

    dx = W^T dy + E D'^T                   W = RB T        E = T^T B
    dv = Y^T dy + F D'^T
    D = D' diag(whole) + D' M^T + dy^T Q

`gradients` finds all else of every chunk from S, D' and dx.

A, R are the queries a and r w decayed since the chunk's start; B, K the keys b and k decayed to its end; AB_ts = a_t .
pair(s, t) b_s for s < t and so on, RB and RK also for s = t (`pairs.py`). Beside inputs of 16 bits all that enters a
product has 16 bits, but tf32 in the inverse and what it is multiplied by: where keys are alike, that cancels. Sums,
exponents, S and D between chunks are fp32.

Q, F, P, E [B, N, H, C, K], Y, Z, W [B, N, H, C, C], M [B, N, H, K, K], whole [B, N, H, K], S, D [B, N, H, V, K] for N
chunks; t token of a chunk.
"""

# pyright: reportMissingImports=false, reportUnboundVariable=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from lamella_kernels.wkv7.pairs import (
    decays,
    documents,
    dot,
    factor,
    inverse,
    on_level,
    precise,
    scores,
    summed,
    sums,
    tile,
)


@triton.jit
def _edges(until_CK, high_CK, low_CK, t, document_C, document_last):
    """Decays since the chunk's start and to its end; 0 past a document's start."""
    since_CK = sums(t[None, :] < t[:, None], high_CK, low_CK)
    since_CK = tl.where((document_C == 0)[:, None], since_CK, float("-inf"))
    until_CK = tl.where((document_C == document_last)[:, None], until_CK, 0.0)
    return tl.exp2(since_CK), until_CK


@triton.jit(do_not_specialize=["time"])
def transitions(
    r, log_w, k, a, b, reset, Q, Y, M, F, whole, P, Z, E, W, time,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """In backward also P, Z, E and W, and M^T in place of M."""
    head, chunk, row = tl.program_id(0) % H, tl.program_id(0) // H, tl.program_id(1)
    t, channel = tl.arange(0, C), tl.arange(0, BK)
    dtype: tl.constexpr = r.dtype.element_ty
    at, real_C, real_K = row.to(tl.int64) * time + chunk * C, t < time - chunk * C, channel < K
    real_CK, cell_CK = real_C[:, None] & real_K[None, :], t[:, None] * (H * K) + channel[None, :]
    here = at * (H * K) + head * K
    r_CK, k_CK = tl.load(r + here + cell_CK, real_CK, 0.0), tl.load(k + here + cell_CK, real_CK, 0.0)
    a_CK, b_CK = tl.load(a + here + cell_CK, real_CK, 0.0), tl.load(b + here + cell_CK, real_CK, 0.0)
    log_CK, high_CK, low_CK = decays(tl.load(log_w + here + cell_CK, real_CK, 0.0), dtype)
    rw_CK = r_CK.to(tl.float32) * tl.exp2(log_CK)
    document_C, document_last, same = documents(None if reset is None else reset + at, t, real_C)
    whole_K = tl.exp2(tl.where(document_last == 0, tl.sum(log_CK, 0), float("-inf")))
    place = row.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(whole + place * K + channel, whole_K, real_K)
    AB, AK, RB, RK, until_CK = scores(r_CK, rw_CK, k_CK, a_CK, b_CK, t, same, high_CK, low_CK, LEVELS)
    since_CK, until_CK = _edges(until_CK, high_CK, low_CK, t, document_C, document_last)
    A_CK, B_CK = a_CK.to(tl.float32) * since_CK, b_CK.to(tl.float32) * until_CK
    Q_CK, F_CK = rw_CK * since_CK, k_CK.to(tl.float32) * until_CK
    T = inverse(AB, t, dtype, LEVELS)
    cell_CC, cell_CK = t[:, None] * C + t[None, :], t[:, None] * K + channel[None, :]
    if W is not None:
        W_CC, E_CK = precise(RB, T, None, dtype), precise(tl.trans(T), B_CK, None, dtype)
        tl.store(W + place * (C * C) + cell_CC, W_CC.to(dtype))
        tl.store(E + place * (C * K) + cell_CK, E_CK.to(dtype), real_K[None, :])
    Z_CC, P_CK = precise(T, AK, None, dtype).to(dtype), precise(T, A_CK, None, dtype).to(dtype)
    B_CK, RB = B_CK.to(dtype), RB.to(dtype)
    if W is not None:
        tl.store(Z + place * (C * C) + cell_CC, Z_CC)
        tl.store(P + place * (C * K) + cell_CK, P_CK, real_K[None, :])
        M_KK = dot(tl.trans(B_CK), P_CK)
    else:
        M_KK = dot(tl.trans(P_CK), B_CK)
    cell_KK = channel[:, None] * K + channel[None, :]
    tl.store(M + place * (K * K) + cell_KK, M_KK.to(dtype), real_K[:, None] & real_K[None, :])
    Y_CC = dot(RB, Z_CC, RK)
    tl.store(Y + place * (C * C) + cell_CC, Y_CC.to(dtype))
    F_CK = dot(tl.trans(Z_CC), B_CK, F_CK)
    tl.store(F + place * (C * K) + cell_CK, F_CK.to(dtype), real_K[None, :])
    Q_CK = dot(RB, P_CK, Q_CK)
    tl.store(Q + place * (C * K) + cell_CK, Q_CK.to(dtype), real_K[None, :])


@triton.jit(do_not_specialize=["time", "chunks"])
def scan(
    v, Q, Y, M, F, whole, E, W, first, found, last, y, dx, time, chunks,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """S before each chunk, the last one, and y. With dx (in backward) D, v being dy and y dv."""
    head, row, t = tl.program_id(1), tl.program_id(2), tl.arange(0, C)
    value, channel = tl.program_id(0) * BV + tl.arange(0, BV), tl.arange(0, BK)
    real_K, real_V = channel < K, value < V
    real_VK, cell_VK = real_V[:, None] & real_K[None, :], value[:, None] * K + channel[None, :]
    cell_CK, cell_KK = t[:, None] * K + channel[None, :], channel[:, None] * K + channel[None, :]
    cell_CC, cell_CV = t[:, None] * C + t[None, :], t[:, None] * (H * V) + value[None, :]
    edge = (row.to(tl.int64) * H + head) * (V * K)
    S_VK = tl.zeros([BV, BK], tl.float32)
    if first is not None:
        S_VK += tl.load(first + edge + cell_VK, real_VK, 0.0)
    for step in range(0, chunks):
        chunk = step
        if dx is not None:
            chunk = chunks - 1 - step
        place = (row.to(tl.int64) * chunks + chunk) * H + head
        here, real_C = (row.to(tl.int64) * time + chunk * C) * (H * V) + head * V, t < time - chunk * C
        held_VK = S_VK.to(v.dtype.element_ty)
        tl.store(found + place * (V * K) + cell_VK, held_VK, real_VK)
        v_CV = tl.load(v + here + cell_CV, real_C[:, None] & real_V[None, :], 0.0)
        Q_CK = tl.load(Q + place * (C * K) + cell_CK, real_K[None, :], 0.0)
        F_CK = tl.load(F + place * (C * K) + cell_CK, real_K[None, :], 0.0)
        Y_CC = tl.load(Y + place * (C * C) + cell_CC)
        M_KK = tl.load(M + place * (K * K) + cell_KK, real_K[:, None] & real_K[None, :], 0.0)
        S_VK *= tl.load(whole + place * K + channel, real_K, 0.0)[None, :]
        S_VK = dot(held_VK, M_KK, S_VK)
        real_VC, cell_VC = real_V[:, None] & real_C[None, :], t[None, :] * (H * V) + value[:, None]
        if dx is None:
            S_VK = dot(tl.trans(v_CV), F_CK, S_VK)
            y_VC = dot(held_VK, tl.trans(Q_CK))
            y_VC = dot(tl.trans(v_CV), tl.trans(Y_CC), y_VC)
        else:
            S_VK = dot(tl.trans(v_CV), Q_CK, S_VK)
            y_VC = dot(held_VK, tl.trans(F_CK))
            y_VC = dot(tl.trans(v_CV), Y_CC, y_VC)
            E_CK = tl.load(E + place * (C * K) + cell_CK, real_K[None, :], 0.0)
            dx_VC = dot(held_VK, tl.trans(E_CK))
            dx_VC = dot(tl.trans(v_CV), tl.load(W + place * (C * C) + cell_CC), dx_VC)
            tl.store(dx + here + cell_VC, dx_VC.to(dx.dtype.element_ty), real_VC)
        tl.store(y + here + cell_VC, y_VC.to(y.dtype.element_ty), real_VC)
    if last is not None:
        tl.store(last + edge + cell_VK, S_VK, real_VK)


@triton.jit(do_not_specialize=["time"])
def gradients(
    dy, dx, r, log_w, k, v, a, b, reset, P, Z, before, behind, dr, dlog_w, dk, da, db, time,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    LEVELS: tl.constexpr,
):  # fmt: skip
    """Of a chunk's inputs, from S before and D behind it, by blocks of channels."""
    head, chunk, row = tl.program_id(0) % H, tl.program_id(0) // H, tl.program_id(1)
    t, value = tl.arange(0, C), tl.arange(0, BV)
    dtype: tl.constexpr = r.dtype.element_ty
    at, real_C = row.to(tl.int64) * time + chunk * C, t < time - chunk * C
    place = row.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    P, before, behind = P + place * (C * K), before + place * (V * K), behind + place * (V * K)
    document_C, document_last, same = documents(None if reset is None else reset + at, t, real_C)
    here, cell_CV = at * (H * V) + head * V, t[:, None] * (H * V) + value[None, :]
    real_CV = real_C[:, None] & (value < V)[None, :]
    v_CV, dy_CV = tl.load(v + here + cell_CV, real_CV, 0.0), tl.load(dy + here + cell_CV, real_CV, 0.0)
    dx_CV = tl.load(dx + here + cell_CV, real_CV, 0.0)
    Z_CC = tl.load(Z + place * (C * C) + t[:, None] * C + t[None, :])
    u_CV = dot(Z_CC, v_CV)
    for start in range(0, K, BK):
        channel = start + tl.arange(0, BK)
        P_CK = tl.load(P + t[:, None] * K + channel[None, :], (channel < K)[None, :], 0.0)
        real_VK, cell_VK = (value < V)[:, None] & (channel < K)[None, :], value[:, None] * K + channel[None, :]
        S_VK = tl.load(before + cell_VK, real_VK, 0.0)
        u_CV = dot(P_CK, tl.trans(S_VK), u_CV)
    u_CV = u_CV.to(dtype)
    earlier, now = (t[None, :] < t[:, None]) & same, t[None, :] == t[:, None]
    dAB = tl.where(earlier, dot(dx_CV, tl.trans(u_CV)), 0.0).to(dtype)
    dAK = tl.where(earlier, dot(dx_CV, tl.trans(v_CV)), 0.0).to(dtype)
    dRB = dot(dy_CV, tl.trans(u_CV))
    dRK = dot(dy_CV, tl.trans(v_CV))
    now_RB, now_RK = tl.sum(tl.where(now, dRB, 0.0), 1)[:, None], tl.sum(tl.where(now, dRK, 0.0), 1)[:, None]
    dRB, dRK = tl.where(earlier, dRB, 0.0).to(dtype), tl.where(earlier, dRK, 0.0).to(dtype)
    one_one, one_two, two_two = dAB + tl.trans(dAB), dAK + tl.trans(dRB), dRK + tl.trans(dRK)

    here = at * (H * K) + head * K
    for start in range(0, K, BK):
        channel = start + tl.arange(0, BK)
        real_CK, cell_CK = real_C[:, None] & (channel < K)[None, :], t[:, None] * (H * K) + channel[None, :]
        real_VK, cell_VK = (value < V)[:, None] & (channel < K)[None, :], value[:, None] * K + channel[None, :]
        S_VK, D_VK = tl.load(before + cell_VK, real_VK, 0.0), tl.load(behind + cell_VK, real_VK, 0.0)
        log_CK, high_CK, low_CK = decays(tl.load(log_w + here + cell_CK, real_CK, 0.0), dtype)
        whole_K = tl.exp2(tl.where(document_last == 0, tl.sum(log_CK, 0), float("-inf")))
        passed_K = tl.sum(S_VK.to(tl.float32) * D_VK.to(tl.float32), 0) * whole_K
        until_CK = factor(t, high_CK, low_CK, LEVELS)
        since_CK, until_CK = _edges(until_CK, high_CK, low_CK, t, document_C, document_last)
        r_CK, k_CK = tl.load(r + here + cell_CK, real_CK, 0.0), tl.load(k + here + cell_CK, real_CK, 0.0)
        a_CK, b_CK = tl.load(a + here + cell_CK, real_CK, 0.0), tl.load(b + here + cell_CK, real_CK, 0.0)
        rw_CK = r_CK.to(tl.float32) * tl.exp2(log_CK)
        dA_CK = dot(dx_CV, S_VK) * since_CK
        dR_CK = dot(dy_CV, S_VK) * since_CK
        past_CK = (dA_CK * a_CK.to(tl.float32) + dR_CK * rw_CK).to(dtype)
        dlog_CK = sums(t[None, :] > t[:, None], past_CK, None) + passed_K[None, :]
        dB_CK = dot(u_CV, D_VK) * until_CK
        dK_CK = dot(v_CV, D_VK) * until_CK
        rest_CK = (dB_CK * b_CK.to(tl.float32) + dK_CK * k_CK.to(tl.float32)).to(dtype)
        dlog_CK += sums(t[None, :] < t[:, None], rest_CK, None)
        for level in range(LEVELS):
            decay_CK = factor(t, high_CK, low_CK, level)
            one, two = tile(a_CK, b_CK, t, level).to(tl.float32), tile(rw_CK, k_CK.to(tl.float32), t, level)
            near, far, between = (one * decay_CK).to(dtype), (two * decay_CK).to(dtype), on_level(one_two, t, level)
            done = dot(on_level(one_one, t, level), near)
            done = dot(between, far, done) * decay_CK
            dtwo = dot(on_level(two_two, t, level), far)
            dtwo = dot(tl.trans(between), near, dtwo) * decay_CK
            along_CK = (done * one + dtwo * two).to(dtype)
            dlog_CK += sums(tl.trans(summed(t, level)), along_CK, None)
            right = ((t >> level) & 1 == 1)[:, None]
            dA_CK, dB_CK = dA_CK + tl.where(right, done, 0.0), dB_CK + tl.where(right, 0.0, done)
            dR_CK, dK_CK = dR_CK + tl.where(right, dtwo, 0.0), dK_CK + tl.where(right, 0.0, dtwo)
        tl.store(dlog_w + here + cell_CK, dlog_CK + dR_CK * rw_CK, real_CK)
        b_CK, k_CK, r_CK = b_CK.to(tl.float32), k_CK.to(tl.float32), r_CK.to(tl.float32)
        dR_CK = dR_CK * tl.exp2(log_CK) + now_RB * b_CK + now_RK * k_CK
        tl.store(da + here + cell_CK, dA_CK.to(da.dtype.element_ty), real_CK)
        tl.store(dr + here + cell_CK, dR_CK.to(dr.dtype.element_ty), real_CK)
        tl.store(db + here + cell_CK, (dB_CK + now_RB * r_CK).to(db.dtype.element_ty), real_CK)
        tl.store(dk + here + cell_CK, (dK_CK + now_RK * r_CK).to(dk.dtype.element_ty), real_CK)

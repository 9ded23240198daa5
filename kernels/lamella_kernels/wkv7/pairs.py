"""What both passes of RWKV-7's kernels find inside a chunk: sums of log decays, products of pairs, the inverse.

    pair(s, t) = prod_{s < j < t} w_j = prod_{s < j < m} w_j prod_{m <= j < t} w_j        for s < m <= t

m is the middle of the smallest aligned block of 2 h tokens that holds both, h the highest bit of s xor t. On the level
of h a token of a block's right half is a query, decayed since m, one of its left half a key, decayed up to m: one tile
times itself gives all pairs of a level, as in `decays.py` without a quotient or an exponent above 0. The exponents are
products with matrices of 0 and 1, in half precision of two parts of log2 w: sums over the tokens in question alone.

A start of a document between s and t makes their product exactly 0, and nothing of the one enters the other's sums.

C tokens t, s of a chunk, K channels; `same`: whether one document holds both.
"""

# pyright: reportMissingImports=false, reportUnboundVariable=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false

import triton
import triton.language as tl

EMPTY = tl.constexpr(-256.0)  # 2^-256 is 0 in fp32


@triton.jit
def dot(x, y, total=None):
    """total + x y, of fp32 blocks in fp32."""
    return tl.dot(x, y, total, input_precision="ieee")


@triton.jit
def decays(log_w, dtype: tl.constexpr):
    """log2 of the decays in fp32, and in parts for `sums`."""
    log_CK = tl.maximum(log_w * 1.4426950408889634, EMPTY)
    high_CK, low_CK = log_CK.to(dtype), None
    if dtype != tl.float32:
        low_CK = (log_CK - high_CK.to(tl.float32)).to(dtype)
    return log_CK, high_CK, low_CK


@triton.jit
def sums(chosen, high_CK, low_CK):
    """[C, K] over the tokens j that are chosen[t, j]."""
    chosen_CC = chosen.to(high_CK.dtype)
    sum_CK = dot(chosen_CC, high_CK)
    if low_CK is not None:
        sum_CK = dot(chosen_CC, low_CK, sum_CK)
    return sum_CK


@triton.jit
def documents(reset, t, real_C):
    """How many start in the chunk up to each token; of the last token; which pairs are within one."""
    document_C = tl.zeros_like(t)
    if reset is not None:
        document_C = tl.cumsum(tl.load(reset + t, real_C, 0).to(tl.int32), 0)
    return document_C, tl.max(document_C, 0), document_C[:, None] == document_C[None, :]


@triton.jit
def on_level(x_CC, t, level, elsewhere=0.0):
    """The pairs of a level."""
    block = t >> level
    return tl.where((block[:, None] ^ block[None, :]) == 1, x_CC, elsewhere)


@triton.jit
def summed(t, level):
    """[t, j]: the tokens j between t and the middle of its block on this level."""
    block = t >> level
    order = (block & 1) - 1  # 0 in a right half, else -1, which turns the order round
    return (block[:, None] == block[None, :]) & ((t[None, :] ^ order[:, None]) < (t ^ order)[:, None])


@triton.jit
def factor(t, high_CK, low_CK, level):
    """Every token's decay to the middle of its block."""
    return tl.exp2(sums(summed(t, level), high_CK, low_CK))


@triton.jit
def tile(query_CK, key_CK, t, level):
    """Queries in right halves, keys in left."""
    return tl.where(((t >> level) & 1 == 1)[:, None], query_CK, key_CK)


@triton.jit
def scores(r, rw, k, a, b, t, same, high_CK, low_CK, LEVELS: tl.constexpr):
    """AB, AK (s < t), RB, RK (s <= t): [t, s], fp32; then the decay to the chunk's end."""
    AB, AK = tl.zeros(same.shape, tl.float32), tl.zeros(same.shape, tl.float32)
    RB, RK = tl.zeros(same.shape, tl.float32), tl.zeros(same.shape, tl.float32)
    now_RB = tl.sum(r.to(tl.float32) * b.to(tl.float32), 1)
    now_RK = tl.sum(r.to(tl.float32) * k.to(tl.float32), 1)
    decay_CK = tl.full(rw.shape, 1.0, tl.float32)
    for level in range(LEVELS):
        one, two = tile(a, b, t, level).to(tl.float32), tile(rw, k.to(tl.float32), t, level)
        one, two = (one * decay_CK).to(a.dtype), (two * decay_CK).to(a.dtype)
        AB = on_level(dot(one, tl.trans(one)), t, level, AB)
        AK = on_level(dot(one, tl.trans(two)), t, level, AK)
        RB = on_level(dot(two, tl.trans(one)), t, level, RB)
        RK = on_level(dot(two, tl.trans(two)), t, level, RK)
        decay_CK = factor(t, high_CK, low_CK, level + 1)
    earlier = (t[None, :] < t[:, None]) & same
    AB, AK = tl.where(earlier, AB, 0.0), tl.where(earlier, AK, 0.0)
    RB, RK = tl.where(earlier, RB, 0.0), tl.where(earlier, RK, 0.0)
    RB = tl.where(t[:, None] == t[None, :], now_RB[:, None], RB)
    RK = tl.where(t[:, None] == t[None, :], now_RK[:, None], RK)
    return AB, AK, RB, RK, decay_CK


@triton.jit
def precise(x, y, total, dtype: tl.constexpr):
    """total + x y of fp32 blocks beside inputs of this dtype."""
    precision: tl.constexpr = "ieee" if dtype == tl.float32 else "tf32"
    return tl.dot(x, y, total, input_precision=precision)


@triton.jit
def inverse(AB, t, dtype: tl.constexpr, LEVELS: tl.constexpr):
    """(I - AB)^-1 by blocks of twice the size each: [[X, 0], [Y N X, Y]] from X and Y."""
    T = tl.where(t[:, None] == t[None, :], 1.0, on_level(AB, t, 0))
    for level in tl.static_range(1, LEVELS):
        T = precise(T, precise(on_level(AB, t, level), T, None, dtype), T, dtype)
    return T

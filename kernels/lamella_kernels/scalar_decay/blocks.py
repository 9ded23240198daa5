"""What the kernels of both directions read: rows of tokens, and products of decays between them."""

# pyright: reportMissingImports=false, reportUnboundVariable=false, reportOperatorIssue=false

import triton
import triton.language as tl


@triton.jit
def rows(first, row, i, column, real_L, width: tl.constexpr):
    """[L, columns] from the chunk's first token on, 0 outside."""
    return tl.load(first + (i[:, None] * row + column[None, :]), real_L[:, None] & (column < width)[None, :], 0.0)


@triton.jit
def series(high, fine, document, row, head, chunk, chunks, H: tl.constexpr, L: tl.constexpr):
    """high, fine and document of the chunk's tokens and of its last; documents count from 0, the one that goes on."""
    token = chunk * L + tl.arange(0, L)
    here = (row.to(tl.int64) * H + head) * chunks * L
    high_L, fine_L = tl.load(high + here + token), tl.load(fine + here + token)
    last = here + chunk * L + L - 1
    document_L, document_last = tl.zeros([L], tl.int32), chunk - chunk
    if document is not None:
        here = row.to(tl.int64) * chunks * L
        document_L = tl.load(document + here + token)
        document_last = tl.load(document + here + chunk * L + L - 1)
    return high_L, fine_L, tl.load(high + last), tl.load(fine + last), document_L, document_last


@triton.jit
def between(high_i, fine_i, high_j, fine_j, inside):
    """The decays behind j up to i."""
    return tl.exp2(tl.where(inside, (high_i - high_j) + (fine_i - fine_j), float("-inf")))

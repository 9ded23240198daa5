"""Products of decays between the tokens of a chunk, by halving: no quotient, and no exponent above 0.

    pair(s, t) = prod_{s < j < t} w_j = prod_{s < j < m} w_j * prod_{m <= j < t} w_j        for s < m <= t

with m the middle of the smallest aligned block of 2^i tokens that holds both, so that every pair of a chunk is a
product of two numbers in [0, 1] and all pairs of a level are one batched matmul. Exponents are sums of log2 w; a decay
of 0 (a document's start) is minus infinity there, which no sum turns into a NaN and exp2 into an exact 0. exp2 and not
exp: it is fast where the result is 0, and results below the smallest normal number, slow everywhere, are made 0.

N rows, C tokens of a chunk (a power of 2), K channels, I and J kinds of queries and keys.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LOG2_E = math.log2(math.e)


def exp2(x: Tensor) -> Tensor:
    """2^x for x <= 0; what would be subnormal is 0."""
    return torch.exp2(F.threshold(x, math.log2(torch.finfo(x.dtype).tiny), -math.inf))


class Decays:
    """The products of a chunk's decays, from their log2 [N, C, K].

    `start_NCK`: over the tokens before t; `end_NCK`: over those behind t; `whole_NK`: over all.
    """

    def __init__(self, log2_NCK: Tensor):
        rows, self.length, channels = log2_NCK.shape
        self.rows, self.channels = rows, channels
        before, behind, total = torch.zeros_like(log2_NCK), torch.zeros_like(log2_NCK), log2_NCK
        self.levels: list[tuple[int, Tensor | None, Tensor | None]] = []  # half a block, left and right factors
        half = 1
        while half < self.length:
            right, left = self._halves(before, half)[:, 1], self._halves(behind, half)[:, 0]
            self.levels.append((half, None, None) if half == 1 else (half, exp2(left), exp2(right)))
            pair = total.unflatten(1, (-1, 2)).flatten(0, 1)
            right += pair[:, :1]
            left += pair[:, 1:]
            total = pair.sum(1).unflatten(0, (rows, -1))
            half *= 2
        self.start_NCK, self.end_NCK, self.whole_NK = exp2(before), exp2(behind), exp2(total[:, 0])

    def _halves(self, x: Tensor, half: int) -> Tensor:
        """[N, C, ...] -> a view [N * blocks, 2, half, ...]."""
        return x.unflatten(1, (-1, 2, half)).flatten(0, 1)

    def _block(self, x_NCICJ: Tensor, half: int) -> Tensor:
        """A view of the pairs with s in a block's left and t in its right half, [N, blocks, half * I, half * J]."""
        kinds_i, kinds_j = x_NCICJ.shape[2], x_NCICJ.shape[4]
        blocks = self.length // (2 * half)
        x = x_NCICJ.view(self.rows, blocks, 2, half * kinds_i, blocks, 2, half * kinds_j)
        return x.diagonal(dim1=1, dim2=4)[:, 1, :, 0].permute(0, 3, 1, 2)

    def _factors(self, q_NCIK: Tensor, k_NCJK: Tensor, level: tuple) -> tuple[Tensor, Tensor]:
        """The right halves' queries and the left halves' keys, decayed to the middle, [N * blocks, half * kinds, K]."""
        half, left, right = level
        q, k = self._halves(q_NCIK, half)[:, 1], self._halves(k_NCJK, half)[:, 0]
        if left is not None and right is not None:
            q, k = q * right.unsqueeze(2), k * left.unsqueeze(2)
        return q.flatten(1, 2), k.flatten(1, 2)

    def scores(self, q_NCIK: Tensor, k_NCJK: Tensor) -> Tensor:
        """[N, C, I, C, J]: sum over channels of q_t pair(s, t) k_s for s < t, else 0."""
        x = q_NCIK.new_zeros(*q_NCIK.shape[:3], self.length, k_NCJK.shape[2])
        for level in self.levels:
            q, k = self._factors(q_NCIK, k_NCJK, level)
            self._block(x, level[0]).copy_((q @ k.mT).unflatten(0, (self.rows, -1)))
        return x

    def gradients(
        self,
        q_NCIK: Tensor,
        k_NCJK: Tensor,
        dscores_NCICJ: Tensor,
        dstart_NCK: Tensor,
        dend_NCK: Tensor,
        dwhole_NK: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of q, of k and of the natural log of the decays, from that of `scores`.

        `dstart`, `dend`, `dwhole` are the gradients of the logs of the three products; the first two are overwritten.
        A sum over later or earlier tokens is exactly 0 where a document's start lies between.
        """
        dq_NCIK, dk_NCJK = torch.zeros_like(q_NCIK), torch.zeros_like(k_NCJK)
        dtotal = dwhole_NK.unsqueeze(1)
        for level in reversed(self.levels):
            half, left, right = level
            dbefore, dbehind = self._halves(dstart_NCK, half), self._halves(dend_NCK, half)
            across = torch.stack([dbefore[:, 1].sum(1), dbehind[:, 0].sum(1)], 1)
            dtotal = (dtotal.flatten(0, 1).unsqueeze(1) + across).flatten(0, 1).unflatten(0, (self.rows, -1))
            q, k = self._factors(q_NCIK, k_NCJK, level)
            dx = self._block(dscores_NCICJ, half).flatten(0, 1)
            dq, dk = (dx @ k).unflatten(1, (half, -1)), (dx.mT @ q).unflatten(1, (half, -1))
            if left is None or right is None:
                self._halves(dq_NCIK, half)[:, 1] += dq
                self._halves(dk_NCJK, half)[:, 0] += dk
                continue
            self._halves(dq_NCIK, half)[:, 1].addcmul_(dq, right.unsqueeze(2))
            self._halves(dk_NCJK, half)[:, 0].addcmul_(dk, left.unsqueeze(2))
            dbefore[:, 1] += (dq * q.view_as(dq)).sum(2)
            dbehind[:, 0] += (dk * k.view_as(dk)).sum(2)
        return dq_NCIK, dk_NCJK, dtotal


class Chunks:
    """Rows of time cut into chunks: [B, T, H, X] <-> [chunks * B * H, C, X], chunk outermost, in the op's dtype."""

    def __init__(self, like_BTHX: Tensor, most: int):
        self.dtype = torch.float64 if like_BTHX.dtype == torch.float64 else torch.float32
        self.batch, self.time, self.heads = like_BTHX.shape[:3]
        self.length = min(most, 1 << (self.time - 1).bit_length())
        self.count = -(-self.time // self.length)

    def fold(self, x_BTHX: Tensor, out_NCX: Tensor | None = None) -> Tensor:
        """The tokens that fill up the last chunk are 0."""
        x_BTHX = F.pad(x_BTHX, (0, 0, 0, 0, 0, self.count * self.length - self.time))
        x = x_BTHX.unflatten(1, (self.count, self.length)).permute(1, 0, 3, 2, 4)
        if out_NCX is None:
            out_NCX = torch.empty(x.shape, dtype=self.dtype, device=x.device).flatten(0, 2)
        out_NCX.unflatten(0, x.shape[:3]).copy_(x)
        return out_NCX

    def unfold(self, x_NCX: Tensor, dtype: torch.dtype) -> Tensor:
        x = x_NCX.unflatten(0, (self.count, self.batch, self.heads)).permute(1, 0, 3, 2, 4)
        out = torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x)
        return out.flatten(1, 2)[:, : self.time].contiguous()

    def log2(self, log_w_BTHK: Tensor) -> Tensor:
        """log2 of the decays, [N, C, K]."""
        return self.fold(log_w_BTHK).mul_(LOG2_E)

    def resets(self, reset_BT: Tensor | None) -> Tensor | None:
        """[N, C, 1] bool: where a document starts."""
        if reset_BT is None:
            return None
        reset_BTHX = reset_BT[:, :, None, None].expand(-1, -1, self.heads, 1)
        out_NC1 = torch.empty(
            self.count * self.batch * self.heads, self.length, 1, dtype=torch.bool, device=reset_BT.device
        )
        return self.fold(reset_BTHX, out_NC1)

    def by_chunk(self, x_NX: Tensor) -> Tensor:
        """[N, ...] -> [chunks, B * H, ...]."""
        return x_NX.unflatten(0, (self.count, -1))

"""Linear attention with a scalar decay per head in plain torch: matmuls inside chunks, a recurrence over chunks.

    inside a chunk after S:   o_t = sum over s <= t of D_ts (q_t . k_s) v_s + d_t q_t S
    after the chunk:          S' = e S + sum over s of e_s k_s v_s^T

with D_ts = a_{s+1} ... a_t, d_t = a_1 ... a_t, e_s = D_Ls, e = d_L. The normalisation's q . z is the row sum of these
scores and d_t q_t . z, its w the row sum of D and d_t w (`__init__.py`). Backward, with R the gradient of S':

    dq_t = sum D_ts (dy_t . v_s) k_s + d_t S dy_t        dk_s = sum D_ts (dy_t . v_s) q_t + e_s R v_s
    dv_s = sum D_ts (q_t . k_s) dy_t + e_s R^T k_s       dS = e R + sum d_t q_t dy_t^T

and the gradient of log a_r is the sum of what passed it, never a difference of totals, which would cancel: over t >= r
and s < r of D_ts (q_t . k_s)(dy_t . v_s), over t >= r of d_t q_t S dy_t, over s < r of e_s k_s R v_s, and e <R, S>.

Cost, multiply-adds a token and head: forward L (K + V) + 2 K V, backward L (3 K + 2 V) + 4 K V. Memory, numbers a token
and head: L of scores, K V / L of states, which are kept for backward.

Isolation: what a reset separates meets with a factor of exactly 0, and logarithms are summed inside documents, in fp64.

B batch, T time, H head, K size of a key, V of a value, C chunk, L time in a chunk, N = C*B*H (chunk outermost).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LEAST = -800.0  # the logarithm of a decay that is 0 in fp64 too; sums of it stay finite


def chunk_size(time: int, keys: int, values: int) -> int:
    """Tokens in a chunk: near sqrt(K V), where there are as many scores as states, up to 128; short rows stay whole."""
    size = min(max(16 * round(math.sqrt(keys * values) / 16), 32), 128)
    return time if time <= 2 * size else math.ceil(time / math.ceil(time / size))


class Decays(NamedTuple):
    """Products of decays, 0 across a document's start."""

    inner: list[Tensor]  # factors of D, each broadcasts to [C, B, H, L, L]
    weight_CBHL: Tensor  # row sums of D
    start_CBHL: Tensor  # d
    end_CBHL: Tensor  # e_s
    whole_CBH: Tensor  # e
    added_CBH: Tensor  # row sum of D at a chunk's last token


class Chunks:
    """Rows cut into chunks, in the computation's dtype. A slice of N or C takes some of the chunks."""

    def __init__(self, q_BTHK: Tensor, v_BTHV: Tensor):
        self.dtype = torch.float64 if q_BTHK.dtype == torch.float64 else torch.float32
        self.device = q_BTHK.device
        self.batch, self.time, self.heads, self.keys = q_BTHK.shape
        self.values = v_BTHV.shape[3]
        self.length = chunk_size(self.time, self.keys, self.values)
        self.chunks = math.ceil(self.time / self.length)
        self.padding = self.chunks * self.length - self.time

    def empty(self, *sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=self.dtype, device=self.device)

    def cut(self, x_BTX: Tensor) -> Tensor:
        """[B, T, ...] -> [C, B, L, ...]. Padding tokens are zero."""
        if self.padding:
            x_BTX = F.pad(x_BTX, (*[0] * (2 * x_BTX.dim() - 4), 0, self.padding))
        return x_BTX.unflatten(1, (self.chunks, self.length)).transpose(0, 1)

    def fold(self, x_BTHX: Tensor) -> Tensor:
        """[B, T, H, X] -> [N, L, X]"""
        x_CBHLX = self.cut(x_BTHX).transpose(2, 3)
        return self.empty(*x_CBHLX.shape).copy_(x_CBHLX).flatten(0, 2)

    def unfold(self, x_CBHLX: Tensor, dtype: torch.dtype) -> Tensor:
        """[C, B, H, L, ...] -> [B, T, H, ...] without the padding."""
        x_BCLHX = x_CBHLX.transpose(2, 3).transpose(0, 1)
        out_BCLHX = torch.empty(x_BCLHX.shape, dtype=dtype, device=self.device)
        return out_BCLHX.copy_(x_BCLHX).flatten(1, 2)[:, : self.time].contiguous()

    def split(self, x_NX: Tensor) -> Tensor:
        """[N, ...] -> [C, B, H, ...]"""
        return x_NX.unflatten(0, (-1, self.batch, self.heads))

    def rows(self, first: int, last: int) -> slice:
        """The chunks from `first` up to `last` in a dim N."""
        return slice(first * self.batch * self.heads, last * self.batch * self.heads)

    def scale(self, x_NLX: Tensor, factor_CBHL: Tensor) -> Tensor:
        """Each token times its factor."""
        return (self.split(x_NLX) * factor_CBHL.unsqueeze(-1)).flatten(0, 2)

    def bmm(self, a_NXY: Tensor, b_NYZ: Tensor) -> Tensor:
        """a b. With an `out`, autocast leaves it in the dtype of its inputs."""
        return torch.bmm(a_NXY, b_NYZ, out=self.empty(*a_NXY.shape[:2], b_NYZ.shape[2]))

    def decayed(self, pairs_NLL: Tensor, inner: list[Tensor]) -> Tensor:
        """In place: D times a number for each pair of tokens."""
        for factor in inner:
            self.split(pairs_NLL).mul_(factor)
        return pairs_NLL

    def run(self, states: Tensor, whole_CBH: Tensor) -> None:
        """In place: states [C + 1, B, H, ...] hold the first state and what each chunk adds, then the sums so far."""
        for before, after, whole_BH in zip(states[:-1], states[1:], whole_CBH, strict=False):
            after.addcmul_(whole_BH.view(self.batch, self.heads, *[1] * (states.dim() - 3)), before)

    def run_back(self, states: Tensor, whole_CBH: Tensor) -> None:
        """In place: the same from the last to the first, whole_CBH[c] from states[c + 1] to states[c]."""
        for c in range(len(states) - 2, -1, -1):
            whole_BH = whole_CBH[c]
            states[c].addcmul_(whole_BH.view(self.batch, self.heads, *[1] * (states.dim() - 3)), states[c + 1])

    def decays(self, log_decay: Tensor, reset_BT: Tensor | None) -> Decays:
        log_decay = log_decay.detach().double().clamp(min=LEAST)
        at_L = torch.arange(self.length, device=self.device)
        back_LL = at_L[:, None] - at_L
        first_CBL = open_CBL = None
        sees_CBLL = (back_LL >= 0)[None, None]
        if reset_BT is not None:
            reset_CBL = self.cut(reset_BT)
            first_CBL = torch.where(reset_CBL, at_L, 0).cummax(-1).values  # of the token's document, in the chunk
            open_CBL = reset_CBL.cummax(-1).values.logical_not()  # no document starts before it in the chunk
            sees_CBLL = sees_CBLL & (at_L >= first_CBL.unsqueeze(-1))
        if log_decay.dim() == 1:  # powers of a number: tables, whatever the rows hold
            log_H1 = log_decay[:, None]
            table_HLL = (log_H1[..., None] * back_LL.clamp(min=0)).exp() * (back_LL >= 0)
            inner = [table_HLL, *([] if reset_BT is None else [sees_CBLL.unsqueeze(2)])]
            powers_HL = (log_H1 * at_L).exp()
            since_CBL = at_L[None, None] if first_CBL is None else at_L - first_CBL
            weight = powers_HL.cumsum(-1)[:, since_CBL].permute(1, 2, 0, 3)
            ends_C = torch.full((self.chunks,), self.length, device=self.device)
            ends_C[-1] -= self.padding
            sums = log_H1 * torch.minimum(at_L + 1, ends_C[:, None])[:, None, None]
        else:
            log_CBLH = self.cut(log_decay)
            sees = sees_CBLL.double().expand(self.chunks, self.batch, -1, -1).flatten(0, 1)
            sums_NLH = torch.bmm(sees, log_CBLH.flatten(0, 1), out=log_CBLH.new_empty(log_CBLH.shape).flatten(0, 1))
            sums = sums_NLH.unflatten(0, (self.chunks, self.batch)).mT
            logs_CBHLL = (sums.unsqueeze(-1) - sums.unsqueeze(-2)).to(self.dtype)
            inner = [logs_CBHLL.masked_fill_(~sees_CBLL.unsqueeze(2), -math.inf).exp_()]
            weight = inner[0].sum(-1)
        start, end = sums.exp(), (sums[..., -1:] - sums).clamp(max=0).exp()
        if open_CBL is not None:
            start, end = start * open_CBL.unsqueeze(2), end * sees_CBLL[..., -1:, :]
        vectors = [
            t.to(self.dtype).expand(self.chunks, self.batch, self.heads, -1) for t in (weight, start, end)
        ]
        weight, start, end = vectors
        real = self.length - 1 - self.padding
        added_CBH = torch.cat([weight[:-1, ..., -1], weight[-1:, ..., real]])
        return Decays([f.to(self.dtype) for f in inner], weight, start, end, start[..., -1], added_CBH)


class LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BTHK, k_BTHK, v_BTHV, log_decay, normalize, reset_BT, kv_BHKV, keys_BHK, weight_BH, want_state):
        c = Chunks(q_BTHK, v_BTHV)
        decays = c.decays(log_decay, reset_BT)
        q_NLK, k_NLK, v_NLV = c.fold(q_BTHK), c.fold(k_BTHK), c.fold(v_BTHV)
        # A state reaches the chunks from `first` on; the chunks up to `last` add to one that is needed.
        first, last = int(kv_BHKV is None), c.chunks - int(not want_state)
        late, early = c.rows(first, c.chunks), c.rows(0, last)
        pairs_NLL = c.decayed(c.bmm(q_NLK, k_NLK.mT), decays.inner)
        y_NLV = c.bmm(pairs_NLL, v_NLV)
        k_end_NLK = c.scale(k_NLK[early], decays.end_CBHL[:last])
        q_start_NLK = c.scale(q_NLK[late], decays.start_CBHL[first:])
        states = c.empty(last + 1, c.batch, c.heads, c.keys, c.values)
        states[0] = 0.0 if kv_BHKV is None else kv_BHKV
        torch.bmm(k_end_NLK.mT, v_NLV[early], out=states[1:].flatten(0, 2))
        c.run(states, decays.whole_CBH)
        reach_NKV = states[first : c.chunks].flatten(0, 2)
        torch.baddbmm(y_NLV[late], q_start_NLK, reach_NKV, out=y_NLV[late])
        divisor_CBHL, keys, weight = None, states[:0], states[:0]
        if normalize:
            keys = c.empty(last + 1, c.batch, c.heads, c.keys)
            keys[0] = 0.0 if keys_BHK is None else keys_BHK
            keys[1:] = c.split(k_end_NLK.sum(1))
            c.run(keys, decays.whole_CBH)
            weight = c.empty(last + 1, c.batch, c.heads)
            weight[0] = 0.0 if weight_BH is None else weight_BH
            weight[1:] = decays.added_CBH[:last]
            c.run(weight, decays.whole_CBH)
            sums_NL1 = pairs_NLL.sum(-1, keepdim=True)
            seen_NK1 = keys[first : c.chunks].flatten(0, 2).unsqueeze(-1)
            torch.baddbmm(sums_NL1[late], q_start_NLK, seen_NK1, out=sums_NL1[late])
            before_CBH1 = weight[: c.chunks].unsqueeze(-1)
            root_CBHL = (decays.weight_CBHL + decays.start_CBHL * before_CBH1).sqrt()
            divisor_CBHL = torch.maximum(root_CBHL, c.split(sums_NL1.squeeze(-1)).abs())
            c.split(y_NLV).div_(divisor_CBHL.unsqueeze(-1))
        ctx.save_for_backward(q_BTHK, k_BTHK, v_BTHV, log_decay, reset_BT, reach_NKV, divisor_CBHL)
        ctx.first, ctx.initial_dtype = first, None if kv_BHKV is None else kv_BHKV.dtype
        ctx.set_materialize_grads(False)
        after = [s[-1].clone() if want_state and len(s) else None for s in (states, keys, weight)]
        ctx.mark_non_differentiable(*[s for s in after[1:] if s is not None])
        return c.unfold(c.split(y_NLV), q_BTHK.dtype), *after

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTHV, dkv_BHKV, *_):
        q_BTHK, k_BTHK, v_BTHV, log_decay, reset_BT, reach_NKV, divisor_CBHL = ctx.saved_tensors
        c, first = Chunks(q_BTHK, v_BTHV), ctx.first
        decays = c.decays(log_decay, reset_BT)
        q_NLK, k_NLK, v_NLV = c.fold(q_BTHK), c.fold(k_BTHK), c.fold(v_BTHV)
        dy_NLV = torch.zeros_like(v_NLV) if dy_BTHV is None else c.fold(dy_BTHV)
        if divisor_CBHL is not None:
            c.split(dy_NLV).div_(divisor_CBHL.unsqueeze(-1))
        last = c.chunks - int(dkv_BHKV is None)  # a gradient of the state after it reaches the chunks up to `last`
        late, early = c.rows(first, c.chunks), c.rows(0, last)

        pairs_NLL = c.decayed(c.bmm(q_NLK, k_NLK.mT), decays.inner)
        dv_NLV = c.bmm(pairs_NLL.mT, dy_NLV)
        dpairs_NLL = c.bmm(dy_NLV, v_NLV.mT)
        passed_CBHL = c.split(_passed(c, pairs_NLL.mul_(dpairs_NLL))) if ctx.needs_input_grad[3] else None
        c.decayed(dpairs_NLL, decays.inner)
        dq_NLK, dk_NLK = c.bmm(dpairs_NLL, k_NLK), c.bmm(dpairs_NLL.mT, q_NLK)

        # The gradients of the states before chunks first, first + 1, ..., and of the one after all.
        q_start_NLK = c.scale(q_NLK[late], decays.start_CBHL[first:])
        dstates = c.empty(c.chunks - first + 1, c.batch, c.heads, c.keys, c.values)
        torch.bmm(q_start_NLK.mT, dy_NLV[late], out=dstates[:-1].flatten(0, 2))
        dstates[-1] = 0.0 if dkv_BHKV is None else dkv_BHKV
        c.run_back(dstates, decays.whole_CBH[first:])
        dreach_NKV = dstates[1 - first : last + 1 - first].flatten(0, 2)
        from_state_NLK = c.scale(c.bmm(dy_NLV[late], reach_NKV.mT), decays.start_CBHL[first:])
        to_state_NLK = c.scale(c.bmm(v_NLV[early], dreach_NKV.mT), decays.end_CBHL[:last])
        dq_NLK[late] += from_state_NLK
        dk_NLK[early] += to_state_NLK
        k_end_NLK = c.scale(k_NLK[early], decays.end_CBHL[:last])
        torch.baddbmm(dv_NLV[early], k_end_NLK, dreach_NKV, out=dv_NLV[early])

        dlog = None
        if passed_CBHL is not None:
            left_CBHL = c.split((q_NLK[late] * from_state_NLK).sum(-1))
            came_CBHL = c.split((k_NLK[early] * to_state_NLK).sum(-1))
            passed_CBHL[first:] += left_CBHL.flip(-1).cumsum(-1).flip(-1)
            passed_CBHL[:last, ..., 1:] += came_CBHL.cumsum(-1)[..., :-1]
            both = dstates[1 : last + 1 - first] * c.split(reach_NKV)[: last - first]
            passed_CBHL[first:last] += (both.sum((-1, -2)) * decays.whole_CBH[first:last]).unsqueeze(-1)
            dlog_BTH = c.unfold(passed_CBHL, log_decay.dtype)
            dlog = dlog_BTH.sum((0, 1)) if log_decay.dim() == 1 else dlog_BTH
        found = [
            c.unfold(c.split(d), like.dtype)
            for d, like in ((dq_NLK, q_BTHK), (dk_NLK, k_BTHK), (dv_NLV, v_BTHV))
        ]
        dinitial = None if ctx.initial_dtype is None else dstates[0].to(ctx.initial_dtype)
        return *found, dlog, None, None, dinitial, None, None, None


def _passed(c: Chunks, pairs_NLL: Tensor) -> Tensor:
    """[N, L]: at r the sum over t >= r and s < r of pairs_ts."""
    before_LL = torch.ones(c.length, c.length, dtype=c.dtype, device=c.device).triu(1)
    return c.bmm(pairs_NLL, before_LL.expand(len(pairs_NLL), -1, -1)).tril().sum(1)


def linear_attention(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay: Tensor,
    normalize: bool,
    reset_BT: Tensor | None,
    kv_BHKV: Tensor | None,
    keys_BHK: Tensor | None,
    weight_BH: Tensor | None,
    want_state: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The outputs (in q's dtype), then S, z, w after the last token where wanted (fp32, or fp64 where q is).

    Differentiable once.
    """
    return LinearAttention.apply(  # type: ignore[return-value]
        q_BTHK, k_BTHK, v_BTHV, log_decay, normalize, reset_BT, kv_BHKV, keys_BHK, weight_BH, want_state
    )

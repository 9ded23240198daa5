"""SSD in plain torch by matmuls: the block decomposition of Dao & Gu 2024 (arXiv 2405.21060, section 6).

    h_t = a_t h_{t-1} + u_t B_t^T        y_t = h_t C_t + D x_t        u_t = dt_t x_t, a_t = exp(dt_t A), 0 at a reset

Time is cut into K chunks of Q tokens. With s_i the product of the decays from the chunk's start to token i, e_j that
from j to the chunk's end, L_ij that from j to i, and h the state before the chunk:

    y_i = sum over j <= i of L_ij (C_i . B_j) u_j + s_i h C_i        next h = e_0 a_0 h + sum over j of e_j u_j B_j^T

The first is the product of a [Q, Q] matrix a head, the other two are products over all heads of a group at once. With
W_ij what the path from j to i contributes to the loss (h before the chunk counts as a j, the state after it as an i),
the gradient of log a_k is the sum of W_ij over j < k <= i: only sums, no differences, so that it keeps its digits where
decays vanish.

Memory: forward saves the inputs and each chunk's first state; some chunks at a time are worked on, so that a block's
[Q, Q] matrices fit the processor's second-level cache.

Exactness: exponents are sums over a document's own tokens, in fp64; what is lost by rounding them (`fine`) is made up
for in u and y. A [Q, Q] matrix is 0 outside documents, and s, e are 0 where a reset lies between: 0 times a finite
number is 0, so nothing of another document reaches a sum. A product of decays below 2^-100 (in fp64 2^-900) counts as
0: subnormal numbers would make exponentials and matmuls many times slower on the CPU.

B batch, T time, H head, P head size, G group, N state, K chunk, Q time in a chunk, R = K*B chunk rows (chunk outermost;
of a block, where it is one's), J heads of a group, V = J*P. B_* and C_* are the paper's B and C.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

WORK = 2**18  # numbers in the [Q, Q] matrices of a block
LEAST = {torch.float32: -100.0, torch.float64: -900.0}  # exponent of the smallest product of decays that is not 0


def chunk_sizes(time: int, batch: int, heads: int, size: int, state: int) -> tuple[int, int, int]:
    """Chunks, tokens in a chunk and chunks in a block. A chunk's matrices are about as large as its state."""
    wanted = min(max(2 ** round(math.log2(size * state) / 2), 32), 256)
    chunks = math.ceil(time / wanted)
    length = math.ceil(time / chunks)
    return chunks, length, min(max(WORK // (batch * heads * length * length), 1), chunks)


class Block(NamedTuple):
    """The inputs of some chunks, and what their decays are."""

    chunks: slice
    x_RGQV: Tensor
    u_RGQV: Tensor
    B_RGQN: Tensor
    C_RGQN: Tensor
    dt_RGQJ: Tensor
    high_RGJQ: Tensor  # the exponents of the products of decays from the document's or the chunk's start, rounded
    fine_RGQJ: Tensor  # 2^(what the rounding left)
    from_start_RGQJ: Tensor  # s
    to_end_RGQJ: Tensor  # e
    across_KBGJ: Tensor  # the product of all decays
    outside_RGQQ: Tensor  # where j > i or in another document

    def decays(self, out_RGJQQ: Tensor) -> Tensor:
        """L / fine_i * fine_j where j <= i in one document, at most 1 elsewhere."""
        least = LEAST[out_RGJQQ.dtype]
        torch.sub(self.high_RGJQ.unsqueeze(-1), self.high_RGJQ.unsqueeze(-2), out=out_RGJQQ)
        return torch.threshold_(out_RGJQQ.clamp_(least - 1, 0.0).exp2_(), 2.0**least, 0.0)

    def products(self) -> Tensor:
        """[R, G, Q, Q]: C_i . B_j, 0 outside."""
        return batched(self.C_RGQN, self.B_RGQN.mT).masked_fill_(self.outside_RGQQ, 0.0)


class Chunks:
    """The inputs cut into chunks, in the computation's dtype."""

    def __init__(self, x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, reset_BT):
        self.dtype = torch.float64 if x_BTHP.dtype == torch.float64 else torch.float32
        self.device = x_BTHP.device
        self.batch, self.time, self.heads, self.size = x_BTHP.shape
        self.groups, self.states = B_BTGN.shape[2:]
        self.share = self.heads // self.groups
        self.chunks, self.length, self.block = chunk_sizes(
            self.time, self.batch, self.heads, self.size, self.states
        )
        self.x, self.dt, self.B, self.C = (self.fold(v) for v in (x_BTHP, dt_BTH, B_BTGN, C_BTGN))
        self.A_GJ = A_H.to(torch.float64).view(self.groups, self.share)
        self.reset_KBQ = None
        if reset_BT is not None:
            padding = self.chunks * self.length - self.time
            padded_BT = torch.nn.functional.pad(reset_BT, (0, padding))
            self.reset_KBQ = padded_BT.unflatten(1, (self.chunks, self.length)).transpose(0, 1)

    def fold(self, v: Tensor) -> Tensor:
        """[B, T, H or G, ...] -> [K, B, G, Q, ...]. Padding tokens are 0: they decay by 1 and add nothing."""
        padding = self.chunks * self.length - self.time
        if padding:
            v = torch.nn.functional.pad(v, (0, 0) * (v.dim() - 2) + (0, padding))
        v = v.flatten(2).unflatten(2, (self.groups, -1)).unflatten(1, (self.chunks, self.length))
        v = v.permute(1, 0, 3, 2, 4)
        return torch.empty(v.shape, dtype=self.dtype, device=self.device).copy_(v)

    def unfold(self, v_KBGQX: Tensor, like: Tensor) -> Tensor:
        """[K, B, G, Q, X] -> like's shape and dtype, without the padding."""
        v = v_KBGQX.permute(1, 0, 3, 2, 4)
        out = torch.empty(v.shape, dtype=like.dtype, device=self.device).copy_(v)
        return out.flatten(1, 2)[:, : self.time].reshape(like.shape)

    def per_head(self, v_RGQV: Tensor) -> Tensor:
        """[R, G, Q, J*P] -> [R, G, Q, J, P]."""
        return v_RGQV.unflatten(-1, (self.share, self.size))

    def scaled(self, v_RGQV: Tensor, by_RGQJ: Tensor) -> Tensor:
        return (self.per_head(v_RGQV) * by_RGQJ.unsqueeze(-1)).flatten(-2)

    def by_heads(self, v_RGQV: Tensor, by_RGQJ: Tensor) -> Tensor:
        """The scaled value as [R, G, J, Q, P]."""
        v = self.per_head(v_RGQV).transpose(2, 3)
        return torch.mul(v, by_RGQJ.transpose(2, 3).unsqueeze(-1), out=v.new_empty(v.shape))

    def matrices(self, block: Block) -> Tensor:
        rows = block.u_RGQV.shape[0]
        return torch.empty(
            rows, self.groups, self.share, self.length, self.length, dtype=self.dtype, device=self.device
        )

    def new_states(self, *leading: int) -> Tensor:
        sizes = (*leading, self.batch, self.groups, self.share, self.size, self.states)
        return torch.empty(sizes, dtype=self.dtype, device=self.device)

    def blocks(self, backwards: bool = False) -> Iterator[Block]:
        starts = range(0, self.chunks, self.block)
        for start in reversed(starts) if backwards else starts:
            yield self.make(slice(start, min(start + self.block, self.chunks)))

    def make(self, chunks: slice) -> Block:
        x, dt, B, C = (v[chunks].flatten(0, 1) for v in (self.x, self.dt, self.B, self.C))
        length, count = self.length, chunks.stop - chunks.start
        earlier_QQ = torch.ones(length, length, dtype=torch.bool, device=self.device).tril_()
        if self.reset_KBQ is None:
            inside_RQQ = earlier_QQ.expand(len(x), length, length)
            first_RQ = last_RQ = torch.ones(len(x), length, dtype=torch.bool, device=self.device)
        else:
            document_RQ = self.reset_KBQ[chunks].flatten(0, 1).cumsum(1)
            inside_RQQ = (document_RQ.unsqueeze(2) == document_RQ.unsqueeze(1)) & earlier_QQ
            first_RQ, last_RQ = document_RQ == 0, document_RQ == document_RQ[:, -1:]
        least = LEAST[self.dtype]
        exponent_RGQJ = (dt.double() * (self.A_GJ.unsqueeze(1) * math.log2(math.e))).clamp_(min=2 * least)
        flat_RQH = exponent_RGQJ.transpose(1, 2).flatten(2)
        sum_RQH = torch.bmm(inside_RQQ.double(), flat_RQH)
        sum_RGQJ = sum_RQH.unflatten(2, (self.groups, self.share)).transpose(1, 2)

        def decay(exponent: Tensor, reaches: Tensor) -> Tensor:
            return exponent.clamp(max=0.0).exp2_().mul_(reaches & (exponent >= least)).to(self.dtype)

        high_RGQJ = sum_RGQJ.to(self.dtype)
        across_RGJ = decay(sum_RGQJ[:, :, -1], first_RQ[:, -1, None, None])
        return Block(
            chunks,
            x,
            self.scaled(x, dt),
            B,
            C,
            dt,
            high_RGQJ.transpose(2, 3).contiguous(),
            (sum_RGQJ - high_RGQJ).exp2_().to(self.dtype),
            decay(sum_RGQJ, first_RQ[:, None, :, None]),
            decay(sum_RGQJ[:, :, -1:] - sum_RGQJ, last_RQ[:, None, :, None]),
            across_RGJ.unflatten(0, (count, self.batch)),
            ~inside_RQQ.unsqueeze(1),
        )

    def starts(self, block: Block, start_BGJPN: Tensor) -> Tensor:
        """[K + 1, B, G, J, P, N]: the state before each of the block's chunks, and after the last."""
        count = block.chunks.stop - block.chunks.start
        states = self.new_states(count + 1)
        states[0] = start_BGJPN
        own = batched(self.scaled(block.u_RGQV, block.to_end_RGQJ).mT, block.B_RGQN)
        own = own.view_as(states[1:])
        for k, across_BGJ in enumerate(block.across_KBGJ.unbind(0)):
            torch.addcmul(own[k], across_BGJ[..., None, None], states[k], out=states[k + 1])
        return states

    def ends(self, block: Block, dy_RGQV: Tensor, end_BGJPN: Tensor) -> Tensor:
        """[K + 1, B, G, J, P, N]: the gradient of the state before the block, and after each of its chunks.

        `dy_RGQV` is already scaled by s.
        """
        count = block.chunks.stop - block.chunks.start
        gradients = self.new_states(count + 1)
        gradients[count] = end_BGJPN
        own = batched(dy_RGQV.mT, block.C_RGQN).view_as(gradients[:-1])
        for k in range(count - 1, -1, -1):
            torch.addcmul(own[k], block.across_KBGJ[k, ..., None, None], gradients[k + 1], out=gradients[k])
        return gradients


def batched(a: Tensor, b: Tensor) -> Tensor:
    """a @ b over equal leading dims, always as bmm: a model's count of its projections is that of mm."""
    lead = a.shape[:-2]
    return torch.bmm(a.flatten(0, -3), b.flatten(0, -3)).unflatten(0, lead)


def grouped(states_KBGJPN: Tensor) -> Tensor:
    """[K*B, G, J*P, N]."""
    return states_KBGJPN.flatten(0, 1).flatten(2, 3)


class Ssd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, reset_BT, initial_state_BHPN):
        with torch.autocast(x_BTHP.device.type, enabled=False):
            k = Chunks(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, reset_BT)
            save = any(ctx.needs_input_grad)
            saved_KBGJPN = k.new_states(k.chunks) if save else None
            if initial_state_BHPN is None:
                state_BGJPN = k.new_states().zero_()
            else:
                state_BGJPN = initial_state_BHPN.unflatten(1, (k.groups, k.share))
            y = torch.empty_like(k.x)
            for block in k.blocks():
                states_KBGJPN = k.starts(block, state_BGJPN)
                if saved_KBGJPN is not None:
                    saved_KBGJPN[block.chunks] = states_KBGJPN[:-1]
                state_BGJPN = states_KBGJPN[-1]
                far_RGQV = batched(block.C_RGQN, grouped(states_KBGJPN[:-1]).mT)
                y_RGQV = k.scaled(far_RGQV, block.from_start_RGQJ)
                M_RGJQQ = block.decays(k.matrices(block)).mul_(block.products().unsqueeze(2))
                near_RGJQP = batched(M_RGJQQ, k.by_heads(block.u_RGQV, block.fine_RGQJ.reciprocal()))
                near_RGQJP = near_RGJQP.transpose(2, 3)
                k.per_head(y_RGQV).addcmul_(near_RGQJP, block.fine_RGQJ.unsqueeze(-1))
                y[block.chunks] = y_RGQV.unflatten(0, (-1, k.batch))
            if D_H is not None:
                k.per_head(y).addcmul_(k.per_head(k.x), D_H.to(k.dtype).view(k.groups, 1, k.share, 1))
            ctx.save_for_backward(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, reset_BT, saved_KBGJPN)
            ctx.initial_dtype = None if initial_state_BHPN is None else initial_state_BHPN.dtype
            return k.unfold(y, x_BTHP), state_BGJPN.flatten(1, 2).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTHP, dstate_BHPN):
        x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, reset_BT, saved_KBGJPN = ctx.saved_tensors
        with torch.autocast(x_BTHP.device.type, enabled=False):
            k = Chunks(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, reset_BT)
            dy_all = k.fold(dy_BTHP)
            dx, ddt, dlog = torch.empty_like(k.x), torch.empty_like(k.dt), torch.empty_like(k.dt)
            dB, dC = torch.empty_like(k.B), torch.empty_like(k.C)
            end_BGJPN = dstate_BHPN.unflatten(1, (k.groups, k.share))
            ones_QQ = torch.ones(k.length, k.length, dtype=k.dtype, device=k.device)
            before_QQ, from_QQ = ones_QQ.tril(-1), ones_QQ.triu()  # of token k: j < k, i >= k
            for block in k.blocks(backwards=True):
                dy_RGQV = dy_all[block.chunks].flatten(0, 1)
                far_dy_RGQV = k.scaled(dy_RGQV, block.from_start_RGQJ)
                far_u_RGQV = k.scaled(block.u_RGQV, block.to_end_RGQJ)
                before_KBGJPN = saved_KBGJPN[block.chunks]
                gradients_KBGJPN = k.ends(block, far_dy_RGQV, end_BGJPN)
                end_BGJPN, after_KBGJPN = gradients_KBGJPN[0], gradients_KBGJPN[1:]
                before_RGVN, after_RGVN = grouped(before_KBGJPN), grouped(after_KBGJPN)
                # From and to the states at the chunk's borders.
                du_RGQV = batched(block.B_RGQN, after_RGVN.mT)
                into_RGQJ = k.per_head(far_u_RGQV * du_RGQV).sum(-1)
                du_RGQV = k.scaled(du_RGQV, block.to_end_RGQJ)
                seen_RGQV = batched(block.C_RGQN, before_RGVN.mT)
                out_RGQJ = k.per_head(far_dy_RGQV * seen_RGQV).sum(-1)
                through_KBGJ = (before_KBGJPN * after_KBGJPN).flatten(-2).sum(-1) * block.across_KBGJ
                dC_RGQN, dB_RGQN = batched(far_dy_RGQV, before_RGVN), batched(far_u_RGQV, after_RGVN)
                # Inside the chunk.
                CB_RGQQ, L_RGJQQ = block.products(), block.decays(k.matrices(block))
                u_RGJQP = k.by_heads(block.u_RGQV, block.fine_RGQJ.reciprocal())
                dy_RGJQP = k.by_heads(dy_RGQV, block.fine_RGQJ)
                W_RGJQQ = batched(dy_RGJQP, u_RGJQP.mT).mul_(L_RGJQQ)
                dCB_RGQQ = W_RGJQQ.sum(2).masked_fill_(block.outside_RGQQ, 0.0)
                M_RGJQQ = L_RGJQQ.mul_(CB_RGQQ.unsqueeze(2))
                near_RGQJP = batched(M_RGJQQ.mT, dy_RGJQP).transpose(2, 3)
                k.per_head(du_RGQV).addcmul_(near_RGQJP, block.fine_RGQJ.reciprocal().unsqueeze(-1))
                dC_RGQN += batched(dCB_RGQQ, block.B_RGQN)
                dB_RGQN += batched(dCB_RGQQ.mT, block.C_RGQN)
                W_RGJQQ.mul_(CB_RGQQ.unsqueeze(2))
                paths_RGJQQ = batched(from_QQ.expand_as(W_RGJQQ), W_RGJQQ)
                dlog_RGQJ = paths_RGJQQ.mul_(before_QQ).sum(-1).transpose(2, 3)
                dlog_RGQJ = dlog_RGQJ + batched(from_QQ.expand_as(CB_RGQQ), out_RGQJ)
                dlog_RGQJ += batched(before_QQ.expand_as(CB_RGQQ), into_RGQJ)
                dlog_RGQJ += through_KBGJ.flatten(0, 1).unsqueeze(2)
                dlog[block.chunks] = dlog_RGQJ.unflatten(0, (-1, k.batch))
                ddt[block.chunks] = k.per_head(du_RGQV * block.x_RGQV).sum(-1).unflatten(0, (-1, k.batch))
                dx[block.chunks] = k.scaled(du_RGQV, block.dt_RGQJ).unflatten(0, (-1, k.batch))
                dB[block.chunks] = dB_RGQN.unflatten(0, (-1, k.batch))
                dC[block.chunks] = dC_RGQN.unflatten(0, (-1, k.batch))
            A_G1J = k.A_GJ.to(k.dtype).unsqueeze(1)
            dA_H = (dlog * k.dt).sum((0, 1, 3), dtype=torch.float64).flatten().to(A_H.dtype)
            ddt.addcmul_(dlog, A_G1J)
            dD_H = None
            if D_H is not None:
                dD_KBGQJ = k.per_head(dy_all * k.x).sum(-1)
                dD_H = dD_KBGQJ.sum((0, 1, 3), dtype=torch.float64).flatten().to(D_H.dtype)
                k.per_head(dx).addcmul_(k.per_head(dy_all), D_H.to(k.dtype).view(k.groups, 1, k.share, 1))
            dinitial = None if ctx.initial_dtype is None else end_BGJPN.flatten(1, 2).to(ctx.initial_dtype)
            found = [k.unfold(v, like) for v, like in ((dx, x_BTHP), (ddt, dt_BTH), (dB, B_BTGN), (dC, C_BTGN))]
            return found[0], found[1], dA_H, found[2], found[3], dD_H, None, dinitial


def ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor | None,
    reset_BT: Tensor | None,
    initial_state_BHPN: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The outputs (in x's dtype) and the final state (fp32, or fp64 where x is fp64), differentiable once."""
    return Ssd.apply(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, reset_BT, initial_state_BHPN)  # type: ignore

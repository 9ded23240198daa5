"""RWKV-6's recurrence by batched matmuls over chunks of time, in plain torch, with its own backward.

    inside a chunk    y_t = sum_{s<t} (r_t . pair(s, t) k_s) v_s + (r_t . u k_t) v_t + (r_t start_t) S
    from chunk to chunk    S' = diag(whole) S + sum_s (end_s k_s)^T v_s

`pair`, `start`, `end` and `whole` are products of decays, all in [0, 1] and never divided by (`decays.py`). Chunks run
side by side; a loop over them hands the state on, two calls a chunk. Backward keeps the inputs and the states at the
chunks' starts and computes the rest again.

Isolation: a document's start has a decay of exactly 0, and its own query does not see the state; what another document
adds to a sum is 0 times a finite number.

B batch, T time, H head, K key channel, V value channel, C time in a chunk, N = chunks * B * H.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lamella_kernels.decays import Chunks, Decays

CHUNK = 64  # tokens at most


class Parts:
    """The inputs cut into chunks, and what both passes need of them."""

    def __init__(
        self,
        r_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHV: Tensor,
        log_w_BTHK: Tensor,
        u_HK: Tensor,
        reset_BT: Tensor | None,
    ):
        self.chunks = chunks = Chunks(r_BTHK, CHUNK)
        self.r_NCK, self.k_NCK, self.v_NCV = (chunks.fold(x) for x in (r_BTHK, k_BTHK, v_BTHV))
        log2_NCK = chunks.log2(log_w_BTHK)
        self.reset_NC1 = chunks.resets(reset_BT)
        self.seeing_NCK = self.r_NCK  # the queries of what was before their token
        if self.reset_NC1 is not None:
            log2_NCK.masked_fill_(self.reset_NC1, -math.inf)
            self.seeing_NCK = self.r_NCK.masked_fill(self.reset_NC1, 0)
        self.u_H1K = u_HK.to(chunks.dtype).unsqueeze(1)
        self.decays = Decays(log2_NCK)
        self.scores_NCC = self.decays.scores(self.seeing_NCK.unsqueeze(2), self.k_NCK.unsqueeze(2))[:, :, 0, :, 0]
        self.uk_NCK = (self.k_NCK.unflatten(0, (-1, chunks.heads)) * self.u_H1K).flatten(0, 1)
        self.scores_NCC.diagonal(dim1=1, dim2=2).copy_((self.r_NCK * self.uk_NCK).sum(-1))
        self.start_NCK = self.seeing_NCK * self.decays.start_NCK
        self.end_NCK = self.k_NCK * self.decays.end_NCK
        self.whole_NK1 = self.decays.whole_NK.unsqueeze(-1)


class Wkv6(torch.autograd.Function):
    @staticmethod
    def forward(ctx, r_BTHK, k_BTHK, v_BTHV, log_w_BTHK, u_HK, reset_BT, initial_state_BHKV):
        with torch.autocast(r_BTHK.device.type, enabled=False):
            p = Parts(r_BTHK, k_BTHK, v_BTHV, log_w_BTHK, u_HK, reset_BT)
            added, whole = p.chunks.by_chunk(p.end_NCK.mT @ p.v_NCV), p.chunks.by_chunk(p.whole_NK1)
            state = added.new_empty(p.chunks.count + 1, *added.shape[1:])
            state[0] = 0 if initial_state_BHKV is None else initial_state_BHKV.flatten(0, 1)
            for c in range(p.chunks.count):
                torch.addcmul(added[c], whole[c], state[c], out=state[c + 1])
            y_NCV = torch.baddbmm(p.scores_NCC @ p.v_NCV, p.start_NCK, state[:-1].flatten(0, 1))
        ctx.save_for_backward(r_BTHK, k_BTHK, v_BTHV, log_w_BTHK, u_HK, reset_BT, state[:-1])
        ctx.initial_dtype = None if initial_state_BHKV is None else initial_state_BHKV.dtype
        final_BHKV = state[-1].unflatten(0, (p.chunks.batch, p.chunks.heads)).clone()
        return p.chunks.unfold(y_NCV, r_BTHK.dtype), final_BHKV

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTHV, dfinal_BHKV):
        *inputs, state = ctx.saved_tensors
        with torch.autocast(dy_BTHV.device.type, enabled=False):
            p = Parts(*inputs)
            chunks, decays = p.chunks, p.decays
            dy_NCV, state_NKV = chunks.fold(dy_BTHV), state.flatten(0, 1)
            seen, whole = chunks.by_chunk(p.start_NCK.mT @ dy_NCV), chunks.by_chunk(p.whole_NK1)
            dstate = torch.cat([seen, dfinal_BHKV.to(chunks.dtype).flatten(0, 1).unsqueeze(0)])
            for c in range(chunks.count - 1, -1, -1):
                dstate[c].addcmul_(whole[c], dstate[c + 1])
            after_NKV = dstate[1:].flatten(0, 1)
            dscores_NCC = dy_NCV @ p.v_NCV.mT
            dv_NCV = torch.baddbmm(p.scores_NCC.mT @ dy_NCV, p.end_NCK, after_NKV)
            dstart_NCK, dend_NCK = dy_NCV @ state_NKV.mT, p.v_NCV @ after_NKV.mT
            dwhole_NK = (state_NKV * after_NKV).sum(-1) * decays.whole_NK
            dseeing_NCIK, dk_NCJK, dlog_w_NCK = decays.gradients(
                p.seeing_NCK.unsqueeze(2),
                p.k_NCK.unsqueeze(2),
                dscores_NCC[:, :, None, :, None],
                dstart_NCK * p.start_NCK,
                dend_NCK * p.end_NCK,
                dwhole_NK,
            )
            dr_NCK = dseeing_NCIK.squeeze(2).addcmul_(dstart_NCK, decays.start_NCK)
            if p.reset_NC1 is not None:
                dr_NCK.masked_fill_(p.reset_NC1, 0)
            dk_NCK = dk_NCJK.squeeze(2).addcmul_(dend_NCK, decays.end_NCK)
            dnow_NC1 = dscores_NCC.diagonal(dim1=1, dim2=2).unsqueeze(-1)
            dr_NCK.addcmul_(dnow_NC1, p.uk_NCK)
            dnow_r = (dnow_NC1 * p.r_NCK).unflatten(0, (-1, chunks.heads))
            dk_NCK += (dnow_r * p.u_H1K).flatten(0, 1)
            du_HK = (dnow_r * p.k_NCK.view_as(dnow_r)).sum((0, 2))
        r_BTHK, k_BTHK, v_BTHV, log_w_BTHK, u_HK, _ = inputs
        dinitial = None
        if ctx.initial_dtype is not None:
            dinitial = dstate[0].unflatten(0, (chunks.batch, chunks.heads)).to(ctx.initial_dtype, copy=True)
        return (
            chunks.unfold(dr_NCK, r_BTHK.dtype),
            chunks.unfold(dk_NCK, k_BTHK.dtype),
            chunks.unfold(dv_NCV, v_BTHV.dtype),
            chunks.unfold(dlog_w_NCK, log_w_BTHK.dtype),
            du_HK.to(u_HK.dtype),
            None,
            dinitial,
        )


def wkv6(
    r_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_w_BTHK: Tensor,
    u_HK: Tensor,
    reset_BT: Tensor | None,
    initial_state_BHKV: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The outputs (in r's dtype) and the final state (fp32, or fp64 where r is fp64), differentiable once."""
    return Wkv6.apply(r_BTHK, k_BTHK, v_BTHV, log_w_BTHK, u_HK, reset_BT, initial_state_BHKV)  # type: ignore

"""RWKV-7's recurrence by batched matmuls over chunks of time (WY form, UT transform), in plain torch, own backward.

With u_t = S_{t-1} a_t every state of a chunk is the decayed S at its start plus decayed u_s b_s^T and v_s k_s^T, so

    u = (I - AB)^-1 (A S^T + AK v)        y = R S^T + RB u + RK v        S' = S diag(whole) + u^T B + v^T K

where AB_ts = a_t . pair(s, t) b_s for s < t and so on, RB and RK also for s = t; A and R are the queries decayed from
the chunk's start, B and K the keys decayed to its end. AB is strictly lower triangular: the inverse is a substitution
without a division. All decays are products in [0, 1], never divided by (`decays.py`). Put together, S' = S G + F with G
and F of all chunks found side by side; the loop over chunks is one matmul each. Backward keeps the inputs and the
states at the chunks' starts, computes the rest again, and has the same loop the other way round.

Isolation: a document's start has a decay of exactly 0, and its own queries do not see the state; what another document
adds to a sum is 0 times a finite number.

B batch, T time, H head, K key channel, V value channel, C time in a chunk, N = chunks * B * H. I: the queries a and
r w; J: the keys b and k.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lamella_kernels.decays import Chunks, Decays, exp2

CHUNK = 32  # tokens at most


class Parts:
    """The inputs cut into chunks, and what both passes need of them."""

    def __init__(
        self,
        r_BTHK: Tensor,
        log_w_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHV: Tensor,
        a_BTHK: Tensor,
        b_BTHK: Tensor,
        reset_BT: Tensor | None,
    ):
        self.chunks = chunks = Chunks(r_BTHK, CHUNK)
        self.r_NCK, self.v_NCV, log2_NCK = chunks.fold(r_BTHK), chunks.fold(v_BTHV), chunks.log2(log_w_BTHK)
        rows, length, width = self.r_NCK.shape
        self.q_NCIK, self.k_NCJK = (self.r_NCK.new_empty(rows, length, 2, width) for _ in range(2))
        chunks.fold(a_BTHK, self.q_NCIK[:, :, 0])
        chunks.fold(b_BTHK, self.k_NCJK[:, :, 0])
        chunks.fold(k_BTHK, self.k_NCJK[:, :, 1])
        self.w_NCK = exp2(log2_NCK)
        torch.mul(self.r_NCK, self.w_NCK, out=self.q_NCIK[:, :, 1])
        reset_NC1 = chunks.resets(reset_BT)
        self.reset_NC11 = None if reset_NC1 is None else reset_NC1.unsqueeze(2)
        if reset_NC1 is not None and self.reset_NC11 is not None:
            log2_NCK.masked_fill_(reset_NC1, -math.inf)
            self.q_NCIK.masked_fill_(self.reset_NC11, 0)
        self.decays = Decays(log2_NCK)
        self.scores = scores_NCICJ = self.decays.scores(self.q_NCIK, self.k_NCJK)
        now_NCJ = (self.r_NCK.unsqueeze(2) * self.k_NCJK).sum(-1)
        scores_NCICJ[:, :, 1].diagonal(dim1=1, dim2=2).copy_(now_NCJ.mT)
        self.solve_NCC = -scores_NCICJ[:, :, 0, :, 0]
        self.start_NCIK = self.q_NCIK * self.decays.start_NCK.unsqueeze(2)
        self.end_NCJK = self.k_NCJK * self.decays.end_NCK.unsqueeze(2)
        # Without the state: u = z + p S^T.
        width_v = self.v_NCV.shape[-1]
        both = torch.cat([scores_NCICJ[:, :, 0, :, 1] @ self.v_NCV, self.start_NCIK[:, :, 0]], -1)
        self.z_NCV, self.p_NCK = self.solve(both).split([width_v, width], -1)
        self.step_NKK = self.p_NCK.mT @ self.end_NCJK[:, :, 0]
        self.step_NKK.diagonal(dim1=1, dim2=2).add_(self.decays.whole_NK)

    def solve(self, x_NCX: Tensor) -> Tensor:
        """(I - AB)^-1 x."""
        return torch.linalg.solve_triangular(self.solve_NCC, x_NCX, upper=False, unitriangular=True)

    def solve_transposed(self, x_NCX: Tensor) -> Tensor:
        """(I - AB)^-T x."""
        return torch.linalg.solve_triangular(self.solve_NCC.mT, x_NCX, upper=True, unitriangular=True)

    def removed_and_values(self, state_NVK: Tensor) -> Tensor:
        """[N, 2 C, V]: u and v of every token, beside each other."""
        return torch.stack([torch.baddbmm(self.z_NCV, self.p_NCK, state_NVK.mT), self.v_NCV], 2).flatten(1, 2)


class Wkv7(torch.autograd.Function):
    @staticmethod
    def forward(ctx, r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, reset_BT, initial_state_BHVK):
        with torch.autocast(r_BTHK.device.type, enabled=False):
            p = Parts(r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, reset_BT)
            chunks = p.chunks
            without_NSV = torch.stack([p.z_NCV, p.v_NCV], 2).flatten(1, 2)
            added = chunks.by_chunk(without_NSV.mT @ p.end_NCJK.flatten(1, 2))
            step = chunks.by_chunk(p.step_NKK)
            state = added.new_empty(chunks.count + 1, *added.shape[1:])
            state[0] = 0 if initial_state_BHVK is None else initial_state_BHVK.flatten(0, 1)
            for c in range(chunks.count):
                torch.baddbmm(added[c], state[c], step[c], out=state[c + 1])
            state_NVK = state[:-1].flatten(0, 1)
            uv_NSV = p.removed_and_values(state_NVK)
            y_NCV = torch.baddbmm(p.scores.flatten(3)[:, :, 1] @ uv_NSV, p.start_NCIK[:, :, 1], state_NVK.mT)
        ctx.save_for_backward(r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, reset_BT, state[:-1])
        ctx.initial_dtype = None if initial_state_BHVK is None else initial_state_BHVK.dtype
        final_BHVK = state[-1].unflatten(0, (chunks.batch, chunks.heads)).clone()
        return chunks.unfold(y_NCV, r_BTHK.dtype), final_BHVK

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTHV, dfinal_BHVK):
        *inputs, state = ctx.saved_tensors
        with torch.autocast(dy_BTHV.device.type, enabled=False):
            p = Parts(*inputs)
            chunks, decays = p.chunks, p.decays
            dy_NCV, state_NVK = chunks.fold(dy_BTHV), state.flatten(0, 1)
            width_v, width = dy_NCV.shape[-1], p.r_NCK.shape[-1]
            A_NCK, R_NCK = p.start_NCIK.unbind(2)
            B_NCK = p.end_NCJK[:, :, 0]
            # The gradient of (I - AB) u, apart from what comes by the next chunk's state: dx = dx0 + e dS'^T.
            both = torch.cat([p.scores[:, :, 1, :, 0].mT @ dy_NCV, B_NCK], -1)
            dx0_NCV, e_NCK = p.solve_transposed(both).split([width_v, width], -1)
            seen = chunks.by_chunk(torch.baddbmm(dy_NCV.mT @ R_NCK, dx0_NCV.mT, A_NCK))
            step = chunks.by_chunk(p.step_NKK)
            dstate = torch.cat([seen, dfinal_BHVK.to(chunks.dtype).flatten(0, 1).unsqueeze(0)])
            for c in range(chunks.count - 1, -1, -1):
                dstate[c].baddbmm_(dstate[c + 1], step[c].mT)
            after_NVK = dstate[1:].flatten(0, 1)
            dx_NCV = torch.baddbmm(dx0_NCV, e_NCK, after_NVK.mT)
            uv_NSV = p.removed_and_values(state_NVK)
            dxy_NSV = torch.stack([dx_NCV, dy_NCV], 2).flatten(1, 2)
            dscores = (dxy_NSV @ uv_NSV.mT).view_as(p.scores)
            dv_NCV = torch.baddbmm(p.scores[..., 1].flatten(1, 2).mT @ dxy_NSV, p.end_NCJK[:, :, 1], after_NVK.mT)
            dstart_NCIK = (dxy_NSV @ state_NVK).view_as(p.q_NCIK)
            dend_NCJK = (uv_NSV @ after_NVK).view_as(p.k_NCJK)
            dq_NCIK, dk_NCJK, dlog_w_NCK = decays.gradients(
                p.q_NCIK,
                p.k_NCJK,
                dscores,
                (dstart_NCIK * p.start_NCIK).sum(2),
                (dend_NCJK * p.end_NCJK).sum(2),
                (state_NVK * after_NVK).sum(1) * decays.whole_NK,
            )
            dq_NCIK.addcmul_(dstart_NCIK, decays.start_NCK.unsqueeze(2))
            if p.reset_NC11 is not None:
                dq_NCIK.masked_fill_(p.reset_NC11, 0)
            dk_NCJK.addcmul_(dend_NCJK, decays.end_NCK.unsqueeze(2))
            dlog_w_NCK = torch.addcmul(dlog_w_NCK, dq_NCIK[:, :, 1], p.q_NCIK[:, :, 1])
            dnow_NCJ1 = dscores[:, :, 1].diagonal(dim1=1, dim2=2).mT.unsqueeze(-1)
            dr_NCK = (dnow_NCJ1 * p.k_NCJK).sum(2).addcmul_(dq_NCIK[:, :, 1], p.w_NCK)
            dk_NCJK.addcmul_(dnow_NCJ1, p.r_NCK.unsqueeze(2))
        gradients = (dr_NCK, dlog_w_NCK, dk_NCJK[:, :, 1], dv_NCV, dq_NCIK[:, :, 0], dk_NCJK[:, :, 0])
        dinitial = None
        if ctx.initial_dtype is not None:
            dinitial = dstate[0].unflatten(0, (chunks.batch, chunks.heads)).to(ctx.initial_dtype, copy=True)
        return *(chunks.unfold(g, x.dtype) for g, x in zip(gradients, inputs[:6], strict=True)), None, dinitial


def wkv7(
    r_BTHK: Tensor,
    log_w_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    a_BTHK: Tensor,
    b_BTHK: Tensor,
    reset_BT: Tensor | None,
    initial_state_BHVK: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The outputs (in r's dtype) and the final state (fp32, or fp64 where r is fp64), differentiable once."""
    return Wkv7.apply(r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, reset_BT, initial_state_BHVK)  # type: ignore

"""The selective scan in plain torch, forward and backward in O(sqrt T) Python iterations.

    h_t = a_t h_{t-1} + dt_t B_t x_t        a_t = exp(dt_t A), 0 at a reset        y_t = C_t . h_t + D x_t
    g_t = C_t dy_t + a_{t+1} g_{t+1}        the gradient of h_t; every input's gradient is a product with g_t

Time is cut into C chunks of L tokens that run side by side: with more than one chunk a first pass gives each chunk's
end state from a zero start, a short loop over chunks gives the true starts, a second pass gives y. Rows of up to 256
tokens are one chunk, so they pay for one pass only. Inside a pass the work goes block by block: a block of S tokens
has its decays and inputs made by a few large calls, then one fused multiply-add per token. Blocks are small enough for
the processor's second-level cache, and I is the innermost dim: memory traffic is what this costs on a CPU.

Memory, in states of one batch row (I*N numbers): forward holds 2 C S, backward 3 C S, and ceil(L / S) C states at
block starts are saved in between beside the inputs. C grows with T^(1/2), S with T^(1/4) at least.

Isolation: nothing is summed across a reset. A decay is 2^(dt A log2 e + bias) with a bias of -inf at a reset, so it
is exactly 0 there, and 0 times a finite number is 0. exp2 and not exp: where the result is subnormal or 0, torch's
exp on the CPU is up to 70 times slower than elsewhere, exp2 at most 13 times.

B batch, T time, I channel, N state, C chunk, L time in a chunk, R = C*B chunk rows (chunk outermost), S time in a
block, F = S*R. B_BTN and C_BTN are the paper's B and C.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def chunk_sizes(time: int, batch: int, state: int) -> tuple[int, int, int]:
    """Chunks, tokens in a chunk and tokens in a block, for `state` = I*N numbers."""
    chunks = math.ceil(time / max(256, 8 * math.isqrt(time)))
    length = math.ceil(time / chunks)
    in_cache = 2**17 // (chunks * batch * state)
    return chunks, length, min(length, max(2 * math.ceil(time**0.25), min(in_cache, 32)))


class Inputs(NamedTuple):
    """One block's inputs, shaped to broadcast to [S, R, N, I]."""

    dt_SR1I: Tensor
    u_SR1I: Tensor
    B_SRN1: Tensor
    bias_SR11: Tensor | None


class Block:
    """A working buffer of one block, cut once into the views that every block needs."""

    def __init__(self, whole_SRNI: Tensor):
        self.whole_SRNI = whole_SRNI
        self.tokens_RNI = whole_SRNI.unbind(0)
        self.rows_FNI = whole_SRNI.flatten(0, 1)
        self.columns_FIN = self.rows_FNI.mT


class Chunks:
    """The inputs cut into chunks, time outermost, in the computation's dtype, and the recurrences over them."""

    def __init__(self, x_BTI: Tensor, dt_BTI: Tensor, A_IN: Tensor, B_BTN: Tensor, reset_BT: Tensor | None):
        self.dtype = torch.float64 if x_BTI.dtype == torch.float64 else torch.float32
        self.device = x_BTI.device
        self.batch, self.time, self.channels = x_BTI.shape
        self.num_states = A_IN.shape[1]
        self.chunks, self.length, self.block = chunk_sizes(self.time, self.batch, self.channels * self.num_states)
        self.rows = self.chunks * self.batch
        self.x_LRI, self.dt_LRI, self.B_LRN = (self.fold(v) for v in (x_BTI, dt_BTI, B_BTN))
        self.u_LRI = self.dt_LRI * self.x_LRI
        self.A_NI = A_IN.to(self.dtype).t().contiguous()
        self.log2_A_NI = self.A_NI * math.log2(math.e)
        self.bias_LR11 = None
        if reset_BT is not None:
            bias_BT1 = torch.zeros_like(reset_BT, dtype=self.dtype).masked_fill_(reset_BT, -math.inf).unsqueeze(-1)
            self.bias_LR11 = self.fold(bias_BT1).unsqueeze(-1)

    def fold(self, v_BTX: Tensor) -> Tensor:
        """[B, T, X] -> [L, C*B, X]. Padding tokens are zero: they decay by 1 and add nothing, the state passes them."""
        padding = self.chunks * self.length - self.time
        if padding:
            v_BTX = torch.nn.functional.pad(v_BTX, (0, 0, 0, padding))
        v_LCBX = v_BTX.unflatten(1, (self.chunks, self.length)).permute(2, 1, 0, 3)
        out_LCBX = torch.empty(v_LCBX.shape, dtype=self.dtype, device=self.device)
        return out_LCBX.copy_(v_LCBX).flatten(1, 2)

    def unfold(self, v_LRX: Tensor, dtype: torch.dtype) -> Tensor:
        """[L, C*B, X] -> [B, T, X] without the padding."""
        v_BCLX = v_LRX.unflatten(1, (self.chunks, self.batch)).permute(2, 1, 0, 3)
        out_BCLX = torch.empty(v_BCLX.shape, dtype=dtype, device=self.device)
        return out_BCLX.copy_(v_BCLX).flatten(1, 2)[:, : self.time].contiguous()

    def empty(self, *sizes: int) -> Tensor:
        return torch.empty(*sizes, self.num_states, self.channels, dtype=self.dtype, device=self.device)

    def inputs(self, rows: slice) -> list[Inputs]:
        """The inputs of every block, for some of the chunk rows."""
        columns = (self.dt_LRI.unsqueeze(2), self.u_LRI.unsqueeze(2), self.B_LRN.unsqueeze(3))
        split = [column[:, rows].split(self.block) for column in columns]
        count = len(split[0])
        bias = [None] * count if self.bias_LR11 is None else self.bias_LR11[:, rows].split(self.block)
        return [Inputs(*views) for views in zip(*split, bias, strict=True)]

    def buffers(self, number: int, rows: int) -> list[list[Block]]:
        """For every block its buffers; they share memory, the last block may be short."""
        whole = self.empty(number, self.block, rows)
        full = [Block(buffer) for buffer in whole]
        tail = self.length % self.block
        short = [[Block(buffer[:tail]) for buffer in whole]] if tail else []
        return [full] * (self.length // self.block) + short

    def decay(self, inputs: Inputs, a: Block) -> None:
        if inputs.bias_SR11 is None:
            torch.mul(inputs.dt_SR1I, self.log2_A_NI, out=a.whole_SRNI)
        else:
            torch.addcmul(inputs.bias_SR11, inputs.dt_SR1I, self.log2_A_NI, out=a.whole_SRNI)
        a.whole_SRNI.exp2_()

    def states(self, inputs: Inputs, h_RNI: Tensor, a: Block, h: Block) -> None:
        """The decays and the states of a block, from the state before it."""
        self.decay(inputs, a)
        torch.mul(inputs.u_SR1I, inputs.B_SRN1, out=h.whole_SRNI)
        for a_RNI, next_RNI in zip(a.tokens_RNI, h.tokens_RNI, strict=True):
            h_RNI = next_RNI.addcmul_(a_RNI, h_RNI)

    def gradients(self, dy_SR1I: Tensor, C_SRN1: Tensor, end_RNI: Tensor, a: Block, g: Block) -> None:
        """The gradients g of a block's states, from its decays; end becomes a g of its first token."""
        torch.mul(dy_SR1I, C_SRN1, out=g.whole_SRNI)
        g_RNI = g.tokens_RNI[-1].add_(end_RNI)
        for a_RNI, before_RNI in zip(a.tokens_RNI[:0:-1], g.tokens_RNI[-2::-1], strict=True):
            g_RNI = before_RNI.addcmul_(a_RNI, g_RNI)
        torch.mul(a.tokens_RNI[0], g_RNI, out=end_RNI)

    def chunk_decay(self) -> Tensor:
        """[C, B, N, I]: the product of a chunk's decays, 0 if a document starts in it."""
        log_RNI = self.dt_LRI.sum(0).unsqueeze(1) * self.log2_A_NI
        if self.bias_LR11 is not None:
            log_RNI += self.bias_LR11.sum(0)
        return log_RNI.exp2_().unflatten(0, (self.chunks, self.batch))

    def chunk_starts(self, initial_BNI: Tensor | float) -> Tensor:
        """[R, N, I]: the state before each chunk."""
        start_CBNI = self.empty(self.chunks, self.batch)
        start_CBNI[0] = initial_BNI
        if self.chunks > 1:
            early = slice(0, self.rows - self.batch)
            end_RNI = start_CBNI[1:].flatten(0, 1).zero_()
            for inputs, (a, h) in zip(self.inputs(early), self.buffers(2, early.stop), strict=True):
                self.states(inputs, end_RNI, a, h)
                end_RNI.copy_(h.tokens_RNI[-1])
            decay_CBNI = self.chunk_decay()
            for c in range(1, self.chunks):
                start_CBNI[c].addcmul_(decay_CBNI[c - 1], start_CBNI[c - 1])
        return start_CBNI.flatten(0, 1)

    def chunk_ends(self, dy_LR1I: Tensor, C_LRN1: Tensor, final_BNI: Tensor) -> Tensor:
        """[R, N, I]: the gradient that reaches each chunk's last state from the tokens after the chunk."""
        end_CBNI = self.empty(self.chunks, self.batch)
        end_CBNI[-1] = final_BNI
        if self.chunks > 1:
            late = slice(self.batch, self.rows)
            start_RNI = end_CBNI[:-1].flatten(0, 1).zero_()
            blocks = (self.inputs(late), dy_LR1I[:, late].split(self.block), C_LRN1[:, late].split(self.block))
            buffers = self.buffers(2, self.rows - self.batch)
            for inputs, dy_SR1I, C_SRN1, (a, g) in reversed(list(zip(*blocks, buffers, strict=True))):
                self.decay(inputs, a)
                self.gradients(dy_SR1I, C_SRN1, start_RNI, a, g)
            decay_CBNI = self.chunk_decay()
            for c in range(self.chunks - 2, -1, -1):
                end_CBNI[c].addcmul_(decay_CBNI[c + 1], end_CBNI[c + 1])
        return end_CBNI.flatten(0, 1)

    def factors(self, v_LRX: Tensor) -> tuple[Tensor, ...]:
        """[F, 1, X] per block: one row vector per token for bmm, so that no token's rounding depends on another.

        A vector times a matrix is twice as fast on the CPU as a matrix times a vector. bmm is always given its `out`:
        autocast then leaves it in the dtype of its inputs.
        """
        return v_LRX.flatten(0, 1).unsqueeze(1).split(self.block * self.rows)


class SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTI, dt_BTI, A_IN, B_BTN, C_BTN, D_I, reset_BT, initial_state_BIN):
        k = Chunks(x_BTI, dt_BTI, A_IN, B_BTN, reset_BT)
        inputs, buffers = k.inputs(slice(None)), k.buffers(2, k.rows)
        save = any(ctx.needs_input_grad)
        saved_KRNI = k.empty(len(inputs) if save else 1, k.rows)
        h_RNI = k.chunk_starts(0.0 if initial_state_BIN is None else initial_state_BIN.mT)
        y_LRI = torch.empty_like(k.x_LRI)
        y, C = k.factors(y_LRI), k.factors(k.fold(C_BTN))
        for index, (a, h) in enumerate(buffers):
            start_RNI = saved_KRNI[index if save else 0].copy_(h_RNI)
            k.states(inputs[index], start_RNI, a, h)
            torch.bmm(C[index], h.rows_FNI, out=y[index])
            h_RNI = h.tokens_RNI[-1]
        if D_I is not None:
            y_LRI.addcmul_(k.x_LRI, D_I.to(k.dtype))
        ctx.save_for_backward(x_BTI, dt_BTI, A_IN, B_BTN, C_BTN, D_I, reset_BT, saved_KRNI if save else None)
        ctx.initial_dtype = None if initial_state_BIN is None else initial_state_BIN.dtype
        return k.unfold(y_LRI, x_BTI.dtype), h_RNI[-k.batch :].mT.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTI, dstate_BIN):
        x_BTI, dt_BTI, A_IN, B_BTN, C_BTN, D_I, reset_BT, saved_KRNI = ctx.saved_tensors
        k = Chunks(x_BTI, dt_BTI, A_IN, B_BTN, reset_BT)
        inputs, buffers = k.inputs(slice(None)), k.buffers(3, k.rows)
        dy_LRI, C_LRN = k.fold(dy_BTI), k.fold(C_BTN)
        dy_LR1I, C_LRN1 = dy_LRI.unsqueeze(2), C_LRN.unsqueeze(3)
        end_RNI = k.chunk_ends(dy_LR1I, C_LRN1, dstate_BIN.mT)
        dys, Cs = dy_LR1I.split(k.block), C_LRN1.split(k.block)
        du_LRI, ddt_LRI = torch.empty_like(dy_LRI), torch.empty_like(dy_LRI)
        dB_LRN, dC_LRN = torch.empty_like(C_LRN), torch.empty_like(C_LRN)
        dy, u, B = k.factors(dy_LRI), k.factors(k.u_LRI), k.factors(k.B_LRN)
        du, dB, dC = k.factors(du_LRI), k.factors(dB_LRN), k.factors(dC_LRN)
        ddts = ddt_LRI.split(k.block)
        dA_NI = torch.zeros_like(k.A_NI)
        for index in range(len(inputs) - 1, -1, -1):
            a, h, g = buffers[index]
            k.states(inputs[index], saved_KRNI[index], a, h)
            torch.bmm(dy[index], h.columns_FIN, out=dC[index])
            k.gradients(dys[index], Cs[index], end_RNI, a, g)
            torch.bmm(B[index], g.rows_FNI, out=du[index])
            torch.bmm(u[index], g.columns_FIN, out=dB[index])
            # g becomes g a h_{t-1}, the gradient of dt A; a is free after that and takes its product with A.
            w_SRNI = g.whole_SRNI.mul_(a.whole_SRNI)
            w_SRNI[0].mul_(saved_KRNI[index])
            w_SRNI[1:].mul_(h.whole_SRNI[:-1])
            torch.sum(torch.mul(w_SRNI, k.A_NI, out=a.whole_SRNI), 2, out=ddts[index])
            dA_NI += w_SRNI.mul_(inputs[index].dt_SR1I).flatten(0, 1).sum(0)
        ddt_LRI.addcmul_(du_LRI, k.x_LRI)
        dx_LRI = du_LRI.mul_(k.dt_LRI)
        dD_I = None
        if D_I is not None:
            dD_I = (dy_LRI * k.x_LRI).sum((0, 1)).to(D_I.dtype)
            dx_LRI.addcmul_(dy_LRI, D_I.to(k.dtype))
        dinitial_BIN = None if ctx.initial_dtype is None else end_RNI[: k.batch].mT.to(ctx.initial_dtype)
        dx_BTI, ddt_BTI = k.unfold(dx_LRI, x_BTI.dtype), k.unfold(ddt_LRI, dt_BTI.dtype)
        dB_BTN, dC_BTN = k.unfold(dB_LRN, B_BTN.dtype), k.unfold(dC_LRN, C_BTN.dtype)
        return dx_BTI, ddt_BTI, dA_NI.t().to(A_IN.dtype), dB_BTN, dC_BTN, dD_I, None, dinitial_BIN


def selective_scan(
    x_BTI: Tensor,
    dt_BTI: Tensor,
    A_IN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_I: Tensor | None,
    reset_BT: Tensor | None,
    initial_state_BIN: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The outputs (in x's dtype) and the final state (fp32, or fp64 where x is fp64), differentiable once."""
    return SelectiveScan.apply(x_BTI, dt_BTI, A_IN, B_BTN, C_BTN, D_I, reset_BT, initial_state_BIN)

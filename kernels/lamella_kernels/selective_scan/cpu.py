"""The selective scan by the compiled kernel `cpu.c`: fp32 inside, one pass over memory, states in the cache.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, h_{t-1} := 0 at a reset        y_t = C_t . h_t + D x_t

Memory: forward saves the states before every `EVERY`-th token; backward recomputes those in between, task by task.
Isolation is exact: a reset zeroes the state itself, and every sum is over the channels or states of one token.

B batch, T time, I channel, N state, K saved states, M blocks of channels.
"""

import ctypes
import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lamella_kernels.native import LANES, call, plain

EVERY = 16  # tokens between two saved states


class _Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "time", "channels", "states", "every")]


class SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTI, dt_BTI, A_IN, B_BTN, C_BTN, D_I, reset_BT, initial_state_BIN):
        batch, time, channels = x_BTI.shape
        states = A_IN.shape[1]
        sizes = _Sizes(batch, time, channels, states, EVERY)
        A2_NI = (plain(A_IN) * math.log2(math.e)).t().contiguous()
        inputs = [plain(x_BTI), plain(dt_BTI), A2_NI, plain(B_BTN), plain(C_BTN)]
        inputs += [None if D_I is None else plain(D_I), None if reset_BT is None else reset_BT.contiguous()]
        initial_BNI = None if initial_state_BIN is None else plain(initial_state_BIN.mT)
        y_BTI, final_BNI = torch.empty_like(inputs[0]), torch.empty(batch, states, channels)
        saved_BKNI = None
        if any(ctx.needs_input_grad):
            saved_BKNI = torch.empty(batch, -(-time // EVERY), states, channels)
        blocks = -(-channels // LANES)
        tensors = [*inputs, initial_BNI, y_BTI, final_BNI, saved_BKNI]
        call("lamella_scan_forward", sizes, batch * blocks, 2 * states, tensors)
        ctx.save_for_backward(*inputs, saved_BKNI)
        ctx.sizes, ctx.blocks = sizes, blocks
        ctx.dtypes = [None if t is None else t.dtype for t in (x_BTI, dt_BTI, A_IN, B_BTN, C_BTN, D_I)]
        ctx.initial_dtype = None if initial_state_BIN is None else initial_state_BIN.dtype
        return y_BTI.to(x_BTI.dtype), final_BNI.mT.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTI, dstate_BIN):
        *inputs, saved_BKNI = ctx.saved_tensors
        sizes, blocks = ctx.sizes, ctx.blocks
        batch, time, channels, states = sizes.batch, sizes.time, sizes.channels, sizes.states
        dx_BTI, ddt_BTI = torch.empty_like(inputs[0]), torch.empty_like(inputs[0])
        dA_BNI, dinitial_BNI = torch.empty(batch, states, channels), torch.empty(batch, states, channels)
        dB_MBTN, dC_MBTN = (torch.empty(blocks, batch, time, states) for _ in range(2))
        dD_BI = torch.empty(batch, channels)
        outputs = [dx_BTI, ddt_BTI, dA_BNI, dB_MBTN, dC_MBTN, dD_BI, dinitial_BNI]
        tensors = [*inputs, saved_BKNI, plain(dy_BTI), plain(dstate_BIN.mT), *outputs]
        call("lamella_scan_backward", sizes, batch * blocks, (2 * EVERY + 5) * states, tensors)
        found = [dx_BTI, ddt_BTI, dA_BNI.sum(0).t(), dB_MBTN.sum(0), dC_MBTN.sum(0), dD_BI.sum(0)]
        grads = [None if d is None else g.to(d) for g, d in zip(found, ctx.dtypes, strict=True)]
        return *grads, None, None if ctx.initial_dtype is None else dinitial_BNI.mT.to(ctx.initial_dtype)


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
    """The outputs (in x's dtype) and the final state (fp32), differentiable once."""
    return SelectiveScan.apply(x_BTI, dt_BTI, A_IN, B_BTN, C_BTN, D_I, reset_BT, initial_state_BIN)  # type: ignore

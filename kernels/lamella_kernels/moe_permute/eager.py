"""Rows are copied by `index_select` and added up as bags of rows: torch's fastest ways on the CPU.

    spread    out_m = w_ns x_n             dw_ns = <x_n, y_m>        m = place(n,s)
    collect   y_n = sum over s of w_ns y_place(n,s)

Each is the other's backward; moe_permute has no weights.

N token, S choice, M row, D channel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, slot_M: Tensor, place_NS: Tensor) -> Tensor:
        ctx.save_for_backward(place_NS)
        return _spread(x_ND, slot_M, place_NS.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_MD: Tensor):
        (place_NS,) = ctx.saved_tensors
        return _collect(dout_MD, None, place_NS), None, None


class Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_MD: Tensor, weight_NS: Tensor, slot_M: Tensor, place_NS: Tensor) -> Tensor:
        ctx.save_for_backward(y_MD, weight_NS, slot_M)
        return _collect(y_MD, weight_NS, place_NS)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_ND: Tensor):
        y_MD, weight_NS, slot_M = ctx.saved_tensors
        dout_MD = _spread(dout_ND, slot_M, weight_NS.shape[1])
        dy_MD = dweight_NS = None
        if ctx.needs_input_grad[1]:
            dweight_M, used = (dout_MD * y_MD).sum(-1), (slot_M >= 0).nonzero().flatten()
            flat = torch.zeros(weight_NS.numel(), dtype=weight_NS.dtype, device=weight_NS.device)
            flat.index_copy_(0, slot_M[used].long(), dweight_M[used].to(flat.dtype))
            dweight_NS = flat.view(weight_NS.shape)
        if ctx.needs_input_grad[0]:
            weight_M = weight_NS.reshape(-1).index_select(0, slot_M.clamp(min=0))
            dy_MD = dout_MD.mul_(weight_M.to(dout_MD.dtype).unsqueeze(-1))
        return dy_MD, dweight_NS, None, None


def _spread(x_ND: Tensor, slot_M: Tensor, choices: int) -> Tensor:
    """[M, D]: each row's token, 0 where there is none."""
    if not len(slot_M):
        return x_ND.new_empty(0, x_ND.shape[1])
    rows_MD = x_ND.index_select(0, slot_M.clamp(min=0) // choices)
    return rows_MD.index_fill_(0, (slot_M < 0).nonzero().flatten(), 0)


def _collect(y_MD: Tensor, weight_NS: Tensor | None, place_NS: Tensor) -> Tensor:
    """[N, D]: each token's sum over its rows, in the order of its choices."""
    kept_NS = place_NS >= 0
    count_N = kept_NS.sum(1)
    weight = None if weight_NS is None else weight_NS[kept_NS].to(y_MD.dtype)
    start_N = count_N.cumsum(0) - count_N
    return F.embedding_bag(place_NS[kept_NS].long(), y_MD, offsets=start_N, mode="sum", per_sample_weights=weight)


def moe_permute(x_ND: Tensor, slot_M: Tensor, place_NS: Tensor) -> Tensor:
    """The rows in x's dtype, differentiable once."""
    return Permute.apply(x_ND, slot_M, place_NS)  # type: ignore[return-value]


def moe_unpermute(y_MD: Tensor, weight_NS: Tensor, slot_M: Tensor, place_NS: Tensor) -> Tensor:
    """The sums in y's dtype, differentiable once."""
    return Unpermute.apply(y_MD, weight_NS, slot_M, place_NS)  # type: ignore[return-value]

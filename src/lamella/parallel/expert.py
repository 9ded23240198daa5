"""Experts dealt whole to the ranks of the expert group: tokens travel to them and back, as many as there are.

The group runs across the tensor and the data group. Every rank joins every exchange, also with no token to send.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings
from torch import Tensor
from torch.distributed import ProcessGroup

from lamella.nn.shard import Exchange
from lamella_kernels.moe_permute import moe_permute


class AllToAll(Exchange):
    def __init__(self, group: ProcessGroup):
        super().__init__(group.rank(), group.size())
        self.group = group

    def through(
        self, experts: Callable[[Tensor, Tensor, Tensor], Tensor], x_ND: Tensor, where_N: Tensor, counts_E: Tensor
    ) -> Tensor:
        wanted_RE = counts_E.view(self.size, -1)  # for the experts of each rank
        coming_RE = torch.empty_like(wanted_RE)  # from each rank
        dist.all_to_all_single(coming_RE, wanted_RE, group=self.group)
        sent, received = wanted_RE.sum(1).tolist(), coming_RE.sum(1).tolist()
        x_MD = mappings.all_to_all(self.group, x_ND, received, sent)
        local = torch.arange(coming_RE.shape[1], device=x_ND.device).repeat(self.size)
        order_M = local.repeat_interleave(coming_RE.flatten(), output_size=sum(received)).argsort(stable=True)
        back_M = torch.empty_like(order_M).scatter_(0, order_M, torch.arange(len(order_M), device=x_ND.device))
        where_M = mappings.all_to_all(self.group, where_N, received, sent)
        x_MD = moe_permute(x_MD, order_M, back_M.unsqueeze(1))
        y_MD = moe_permute(experts(x_MD, where_M[order_M], coming_RE.sum(0)), back_M, order_M.unsqueeze(1))
        return mappings.all_to_all(self.group, y_MD, sent, received)

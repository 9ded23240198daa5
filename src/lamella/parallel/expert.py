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


class AllToAll(Exchange):
    def __init__(self, group: ProcessGroup):
        super().__init__(group.rank(), group.size())
        self.group = group

    def through(
        self, experts: Callable[[Tensor, Tensor, list[int]], Tensor], x_ND: Tensor, where_N: Tensor, counts: list[int]
    ) -> Tensor:
        wanted_RE = torch.tensor(counts, device=x_ND.device).view(self.size, -1)  # for the experts of each rank
        coming_RE = torch.empty_like(wanted_RE)  # from each rank
        dist.all_to_all_single(coming_RE, wanted_RE, group=self.group)
        sent, received = wanted_RE.sum(1).tolist(), coming_RE.sum(1).tolist()
        x_MD = mappings.all_to_all(self.group, x_ND, received, sent)
        local = torch.arange(coming_RE.shape[1], device=x_ND.device).repeat(self.size)
        order_M = local.repeat_interleave(coming_RE.flatten()).argsort(stable=True)
        where_M = mappings.all_to_all(self.group, where_N, received, sent)
        y_MD = experts(x_MD[order_M], where_M[order_M], coming_RE.sum(0).tolist())
        back_M = torch.empty_like(order_M).scatter_(0, order_M, torch.arange(len(order_M), device=x_ND.device))
        return mappings.all_to_all(self.group, y_MD[back_M], sent, received)

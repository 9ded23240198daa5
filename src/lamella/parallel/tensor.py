"""The seam's Megatron implementation (Shoeybi et al. 2019, arXiv 1909.08053; sequence parallelism: 2205.05198).

On megatron-core's fused linear, sequence mappings and vocabulary-parallel cross entropy. Its sequence mappings work on
dim 0, so the stream travels as [T, B, D] there and is [B, T, D] everywhere else. `copy` and `sum` are our own:
megatron's reduce in place what is contiguous and silently nothing where it is not.
"""

from typing import Literal

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lamella.nn.shard import Exchange, Shard, wide


class TensorShard(Shard):
    def __init__(
        self,
        group: ProcessGroup,
        sequence_parallel: bool,
        dtype: torch.dtype,
        init_std: float,
        num_layers: int,
        exchange: Exchange | None = None,
    ):
        super().__init__(group.rank(), group.size(), dtype, init_std, num_layers, exchange)
        self.group, self.sequence_parallel = group, sequence_parallel
        # Megatron warns that this wants CUDA_DEVICE_MAX_CONNECTIONS=1 to overlap; `launch/torchrun.sh` sets it.
        linear_with_grad_accumulation_and_async_allreduce.warned = True  # type: ignore[attr-defined]

    def enter(self, x: Tensor) -> Tensor:
        if not self.sequence_parallel:
            return self.copy(x)
        return mappings.gather_from_sequence_parallel_region(x.transpose(0, 1), group=self.group).transpose(0, 1)

    def leave(self, y_BTD: Tensor) -> Tensor:
        if not self.sequence_parallel:
            return self.sum(y_BTD)
        y_TBD = mappings.reduce_scatter_to_sequence_parallel_region(y_BTD.transpose(0, 1), group=self.group)
        return y_TBD.transpose(0, 1)

    def enter_linear(self, x: Tensor, weight: nn.Parameter, bias: Tensor | None) -> Tensor:
        """Keeps only the stream's slice of x, and gathers it again in backward."""
        if self.deferred is not None:
            return super().enter_linear(x, weight, bias)
        over_time = self.sequence_parallel
        y = linear_with_grad_accumulation_and_async_allreduce(
            input=x.transpose(0, 1).contiguous() if over_time else x,
            weight=weight.to(x.dtype),
            bias=None if bias is None else bias.to(x.dtype),
            gradient_accumulation_fusion=False,
            allreduce_dgrad=not over_time,
            sequence_parallel=over_time,
            tp_group=self.group,
        )
        return y.transpose(0, 1) if over_time else y

    def copy(self, x: Tensor) -> Tensor:
        return _Copy.apply(x, self.group)  # type: ignore[return-value]

    def sum(self, x: Tensor) -> Tensor:
        return _Sum.apply(x, self.group)  # type: ignore[return-value]

    def shared(self, weight: Tensor, where: Literal["stream", "branch"]) -> Tensor:
        return weight if where == "stream" and not self.sequence_parallel else self.copy(weight)

    def stream(self, x_BT: Tensor) -> Tensor:
        return x_BT.chunk(self.size, dim=1)[self.rank] if self.sequence_parallel else x_BT

    def log_sum_exp(self, lse_BT: Tensor) -> Tensor:
        largest_BT = lse_BT.detach().clone()
        dist.all_reduce(largest_BT, dist.ReduceOp.MAX, group=self.group)
        return largest_BT + self.sum((lse_BT - largest_BT).exp()).log()

    def cross_entropy(self, logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
        # It overwrites fp32 logits, so it gets a copy where `wide` made none.
        logits = wide(logits_BTV)
        logits = logits.clone() if logits is logits_BTV else logits
        return vocab_parallel_cross_entropy(logits.contiguous(), targets_BT.long().contiguous())


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return grads[0], None

"""From rows to experts and back: sort the filled slots by expert, and add their weighted outputs up again."""

import dataclasses

import torch
from torch import Tensor

from lamella.channels.moe.router import Routing


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """`token_N`: for each filled slot, sorted by expert, its token among B * T; `counts`: slots of each expert."""

    token_N: Tensor
    weight_N: Tensor
    counts: list[int]

    def gather(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.flatten(0, 1)[self.token_N]

    def scatter(self, y_ND: Tensor, like_BTD: Tensor) -> Tensor:
        """The weighted sum over each token's slots; tokens with none get 0."""
        weighted = y_ND * self.weight_N.unsqueeze(-1).to(y_ND.dtype)
        flat = torch.zeros_like(like_BTD).flatten(0, 1)
        return flat.index_add(0, self.token_N, weighted).view_as(like_BTD)


def dispatch(routing: Routing, num_experts: int, rank: int = 0, ranks: int = 1) -> Dispatch:
    """The filled slots of all tokens, or of the share that falls to one of several ranks: every `ranks`-th token."""
    expert_N = routing.expert_BTS.flatten()
    if ranks > 1:
        token_N = torch.arange(len(expert_N), device=expert_N.device) // routing.expert_BTS.shape[-1]
        expert_N = torch.where(token_N % ranks == rank, expert_N, num_experts)
    counts = torch.bincount(expert_N, minlength=num_experts + 1).tolist()[:num_experts]
    order_N = expert_N.argsort(stable=True)[: sum(counts)]  # the empty slots carry number E and sort last
    return Dispatch(order_N // routing.expert_BTS.shape[-1], routing.weight_BTS.flatten()[order_N], counts)

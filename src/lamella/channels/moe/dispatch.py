"""From tokens to experts and back: the filled slots sorted by expert, their weighted outputs added up again."""

import dataclasses

import torch
from torch import Tensor

from lamella.channels.moe.router import Routing
from lamella_kernels.moe_permute import moe_permute, moe_unpermute


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """Rows sorted by expert, `counts_E` of them for each, as `moe_permute` takes them: M rows, N = B T tokens.

    `slot_M`: which slot each row is for, `place_NS`: which row each slot has, -1 for none.
    """

    slot_M: Tensor
    place_NS: Tensor
    weight_NS: Tensor
    counts_E: Tensor

    def gather(self, x_BTD: Tensor) -> Tensor:
        return moe_permute(x_BTD.flatten(0, 1), self.slot_M, self.place_NS)

    def names(self, where_BT: Tensor) -> Tensor:
        """What names each row's token, int64."""
        return where_BT.flatten()[self.slot_M // self.place_NS.shape[1]]

    def scatter(self, y_MD: Tensor, like_BTD: Tensor) -> Tensor:
        """The weighted sum over each token's slots; tokens with none get 0."""
        return moe_unpermute(y_MD, self.weight_NS, self.slot_M, self.place_NS).view_as(like_BTD)


def dispatch(routing: Routing, num_experts: int, rank: int = 0, ranks: int = 1, exact: bool = True) -> Dispatch:
    """The filled slots of all tokens, or of the share that falls to one of several ranks: every `ranks`-th token.

    exact: as many rows as there are filled slots, a number that the host has to wait for; else as many as there may be.
    """
    expert_NS = routing.expert_BTS.flatten(0, 1)
    device = expert_NS.device
    if ranks > 1:
        token_N1 = torch.arange(len(expert_NS), device=device).unsqueeze(1)
        expert_NS = torch.where(token_N1 % ranks == rank, expert_NS, num_experts)
    in_order, slot = expert_NS.flatten().int().sort(stable=True)  # the empty slots carry number E and sort last
    row = torch.arange(len(slot), device=device)
    place_NS = torch.empty_like(slot).scatter_(0, slot, row).view_as(expert_NS).where(expert_NS < num_experts, -1)
    experts = torch.arange(num_experts, dtype=in_order.dtype, device=device)
    end_E = torch.searchsorted(in_order, experts, right=True)
    counts_E = end_E.diff(prepend=end_E.new_zeros(1))
    slot_M = slot[: int(end_E[-1])] if exact else slot.where(row < end_E[-1], -1)[: routing.most]
    return Dispatch(slot_M, place_NS, routing.weight_BTS.flatten(0, 1), counts_E)

"""The router: which experts see which token, decided over the whole row in fp32.

Top-k softmax routing (Shazeer et al. 2017; Switch, Fedus et al. 2021, arXiv 2101.03961), its auxiliary losses, and the
capacity of an expert. Everything nonlinear in the batch is per row, so no micro-batch or layout changes it.

Shapes: B rows, T time, D model, E experts, S = top_k slots a token.
"""

import dataclasses
import math

import torch
from torch import Tensor, nn

from lamella.channels.moe.losses import attach_loss, balance_loss, z_loss
from lamella.nn.rows import Rows
from lamella.nn.shard import Shard, wide


@dataclasses.dataclass(frozen=True)
class Routing:
    """`expert_BTS`: the chosen experts, E in an empty slot (padding, or dropped); `weight_BTS`: in fp32, 0 there."""

    expert_BTS: Tensor
    weight_BTS: Tensor


@dataclasses.dataclass(frozen=True)
class RouterOptions:
    num_experts: int
    top_k: int
    capacity_factor: float | None
    renormalize: bool
    aux_loss: float
    z_loss: float
    jitter: float


class Router(nn.Module):
    def __init__(self, options: RouterOptions, d_model: int, shard: Shard, place: str):
        super().__init__()
        self.options, self.shard, self.place = options, shard, place
        self.weight = shard.parameter((options.num_experts, d_model), shard.normal, decay=True)

    def logits(self, x_BTD: Tensor, rows: Rows) -> Tensor:
        """[B, T, E]. Jitter, as in Switch: in training x is multiplied by a draw from [1 - jitter, 1 + jitter)."""
        x, jitter = wide(x_BTD), self.options.jitter
        if jitter and rows.draw is not None:
            x = x * (1 + jitter * (2 * rows.draw.uniform(self.place, rows.time_T, x.shape[-1]).to(x.dtype) - 1))
        return x @ self.shard.shared(self.weight, "branch").to(x.dtype).t()

    def forward(self, x_BTD: Tensor, rows: Rows) -> Routing:
        o = self.options
        logits_BTE = self.logits(x_BTD, rows)
        chance_BTE = logits_BTE.softmax(-1)
        weight_BTS, expert_BTS = chance_BTE.topk(o.top_k, dim=-1)
        if o.renormalize:
            weight_BTS = weight_BTS / weight_BTS.sum(-1, keepdim=True)
        real_BT1 = rows.real_BT.unsqueeze(-1)
        chosen_BTS = torch.where(real_BT1, expert_BTS, o.num_experts)
        load_BE = count(chosen_BTS, o.num_experts)
        aux_B = balance_loss(chance_BTE, load_BE, rows.real_BT, o.top_k)
        z_B = z_loss(logits_BTE, rows.real_BT)
        loss = (o.aux_loss * aux_B + o.z_loss * z_B).sum() * rows.loss_scale / self.shard.size
        if o.capacity_factor is not None:
            limit = math.ceil(o.capacity_factor * o.top_k * x_BTD.shape[1] / o.num_experts)
            chosen_BTS = drop_overflow(chosen_BTS, o.num_experts, limit)
        kept_BTS = chosen_BTS < o.num_experts
        if rows.record is not None:
            self._record(rows, load_BE, kept_BTS, chance_BTE, aux_B, z_B)
        weight_BTS = attach_loss(weight_BTS, loss)
        return Routing(chosen_BTS, torch.where(kept_BTS, weight_BTS, 0))

    @torch.no_grad()
    def _record(self, rows: Rows, load_BE: Tensor, kept_BTS: Tensor, chance_BTE: Tensor, aux_B: Tensor, z_B: Tensor):
        assert rows.record is not None
        entropy = -(chance_BTE * (chance_BTE + 1e-9).log()).sum(-1)
        rows.record.add(f"{self.place}/load", load_BE.sum(0))
        rows.record.add(f"{self.place}/kept", kept_BTS.sum())
        rows.record.add(f"{self.place}/entropy", (entropy * rows.real_BT).sum())
        rows.record.add(f"{self.place}/aux_loss", aux_B.sum())
        rows.record.add(f"{self.place}/z_loss", z_B.sum())


def count(expert_BTS: Tensor, num_experts: int) -> Tensor:
    """How often each row chose each expert, [B, E] fp32."""
    rows = torch.zeros(len(expert_BTS), num_experts + 1, device=expert_BTS.device)
    flat = expert_BTS.flatten(1)
    return rows.scatter_add_(1, flat, torch.ones_like(flat, dtype=rows.dtype))[:, :num_experts]


def drop_overflow(expert_BTS: Tensor, num_experts: int, limit: int) -> Tensor:
    """Empties the slots beyond the first `limit` of a row's expert: first choices before second ones, in time."""
    order_BN = expert_BTS.transpose(1, 2).flatten(1)  # [B, S * T]
    onehot = nn.functional.one_hot(order_BN, num_experts + 1)
    rank_BN = (onehot.cumsum(1) * onehot).sum(-1)  # 1 for the first in line
    order_BN = torch.where(rank_BN <= limit, order_BN, num_experts)
    return order_BN.unflatten(1, (expert_BTS.shape[2], -1)).transpose(1, 2)

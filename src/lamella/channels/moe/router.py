"""The router: which experts see which token, decided over the whole row in fp32.

Two routings. `top_k`: each token takes its k likeliest experts (Shazeer et al. 2017; Switch, Fedus et al. 2021, arXiv
2101.03961), where a bias may even out the loads without touching the weights (Wang et al. 2024, 2408.15664), and an
expert may have a capacity. `expert_choice`: each expert takes its likeliest tokens of the row (Zhou et al. 2022,
2202.09368). Everything nonlinear in the batch is per row, so no micro-batch or layout changes it; what looks at the
batch, the bias and the global loss, looks at the step before.

Shapes: B rows, T time, D model, E experts, S slots a token (top_k; E in expert choice).
"""

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor, nn

from lamella.channels.moe.losses import attach_loss, balance_loss, global_balance_loss, z_loss
from lamella.nn.initializers import scaled
from lamella.nn.rows import Rows
from lamella.nn.shard import Shard, wide


@dataclasses.dataclass(frozen=True)
class Routing:
    """`expert_BTS`: the chosen experts, E in an empty slot (padding, or dropped); `weight_BTS`: in fp32, 0 there.

    `most`: how many slots are filled at most, known without a look at them.
    """

    expert_BTS: Tensor
    weight_BTS: Tensor
    most: int


@dataclasses.dataclass(frozen=True)
class RouterOptions:
    num_experts: int
    top_k: int
    routing: Literal["top_k", "expert_choice"]
    capacity_factor: float | None
    renormalize: bool
    aux_loss: float
    global_aux_loss: float
    z_loss: float
    bias_rate: float
    jitter: float
    init_scale: float


class Router(nn.Module):
    """`bias_E` and `load_E` (the share of the last step's slots) are what a step leaves to the next; whoever runs the
    steps sets them.
    """

    bias_E: Tensor
    load_E: Tensor

    def __init__(self, options: RouterOptions, d_model: int, shard: Shard, place: str):
        super().__init__()
        self.options, self.shard, self.place = options, shard, place
        init = scaled(shard.normal, options.init_scale**0.5)
        self.weight = shard.parameter((options.num_experts, d_model), init, decay=True)
        for name in ("bias_E", "load_E"):
            self.register_buffer(name, torch.zeros(options.num_experts), persistent=False)

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
        if o.routing == "top_k":
            expert_BTS = self._score(chance_BTE).topk(o.top_k, dim=-1).indices
            weight_BTS = chance_BTE.gather(-1, expert_BTS)
            if o.renormalize:
                weight_BTS = weight_BTS / weight_BTS.sum(-1, keepdim=True)
            chosen_BTS = torch.where(rows.real_BT.unsqueeze(-1), expert_BTS, o.num_experts)
        else:
            taken_BTE = take_tokens(chance_BTE.detach(), rows.real_BT, self._share())
            chosen_BTS = torch.where(taken_BTE, torch.arange(o.num_experts, device=taken_BTE.device), o.num_experts)
            weight_BTS = chance_BTE
        load_BE = count(chosen_BTS, o.num_experts)
        aux_B, z_B = balance_loss(chance_BTE, load_BE, rows.real_BT, o.top_k), z_loss(logits_BTE, rows.real_BT)
        loss_B = o.z_loss * z_B
        if o.routing == "top_k":  # experts that choose have even loads
            loss_B = loss_B + o.aux_loss * aux_B
            if o.global_aux_loss:
                loss_B = loss_B + o.global_aux_loss * global_balance_loss(chance_BTE, self.load_E, rows.real_BT)
        loss = loss_B.sum() * rows.loss_scale / self.shard.size
        (length, slots), most = chosen_BTS.shape[1:], chosen_BTS.numel()
        if o.routing == "expert_choice":
            most = len(x_BTD) * slots * min(length, math.ceil(self._share() * length) + 1)  # that one: it is in fp32
        elif o.capacity_factor is not None:
            limit = math.ceil(o.capacity_factor * o.top_k * length / o.num_experts)
            chosen_BTS = drop_overflow(chosen_BTS, o.num_experts, limit)
            most = min(most, len(x_BTD) * o.num_experts * limit)
        kept_BTS = chosen_BTS < o.num_experts
        if rows.record is not None:
            self._record(rows, load_BE, kept_BTS, chance_BTE, aux_B, z_B)
        weight_BTS = attach_loss(weight_BTS, loss)
        return Routing(chosen_BTS, torch.where(kept_BTS, weight_BTS, 0), most)

    @torch.no_grad()
    def margin(self, x_BTD: Tensor, rows: Rows) -> Tensor:
        """By how much each choice was made: what was taken last before what was not, infinite where all is taken."""
        score_BTE = self._score(self.logits(x_BTD, rows).softmax(-1))
        if self.options.routing == "top_k":
            k = self.options.top_k
            best = score_BTE.topk(min(k + 1, self.options.num_experts), dim=-1).values
            gap = best[..., k - 1] - best[..., k] if best.shape[-1] > k else best[..., 0] + math.inf
            return gap.where(rows.real_BT, math.inf)
        taken_BTE = take_tokens(score_BTE, rows.real_BT, self._share())
        open_BTE = rows.real_BT.unsqueeze(-1) & ~taken_BTE
        return score_BTE.where(taken_BTE, math.inf).amin(1) - score_BTE.where(open_BTE, -math.inf).amax(1)

    def _score(self, chance_BTE: Tensor) -> Tensor:
        """What is compared; the weights stay the chances."""
        return chance_BTE + self.bias_E.to(chance_BTE.dtype) if self.options.bias_rate else chance_BTE

    def _share(self) -> float:
        """Of a row's tokens, how many an expert takes."""
        o = self.options
        return (o.capacity_factor or 1.0) * o.top_k / o.num_experts

    @torch.no_grad()
    def _record(self, rows: Rows, load_BE: Tensor, kept_BTS: Tensor, chance_BTE: Tensor, aux_B: Tensor, z_B: Tensor):
        assert rows.record is not None
        entropy = -(chance_BTE * (chance_BTE + 1e-9).log()).sum(-1)
        rows.record.add(f"{self.place}/load", load_BE.sum(0))
        rows.record.add(f"{self.place}/kept", kept_BTS.sum())
        rows.record.add(f"{self.place}/missed", ((kept_BTS.sum(-1) == 0) & rows.real_BT).sum())
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


def take_tokens(chance_BTE: Tensor, real_BT: Tensor, share: float) -> Tensor:
    """Which tokens each expert takes: its likeliest `share` (rounded up) of a row's real ones. Bool [B, T, E]."""
    limit_B11 = (real_BT.sum(1) * share).ceil()[:, None, None]
    best_BTE = chance_BTE.where(real_BT.unsqueeze(-1), -1).argsort(dim=1, descending=True, stable=True)
    place_BTE = best_BTE.argsort(dim=1)  # 0 for the likeliest
    return (place_BTE < limit_B11) & real_BT.unsqueeze(-1)

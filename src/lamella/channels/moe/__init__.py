"""Mixture of experts: Switch (top-1 with capacity), top-k, dropless or not, expert choice, with shared experts.

    y = sum over the token's chosen experts e of p_e(x) expert_e(x)  +  shared(x)

Capacity (`capacity_factor` set) and expert choice look at the whole row by definition: a token beyond its expert's
capacity, or that no expert takes, passes by the residual. Otherwise no token is dropped. `router.py` decides,
`dispatch.py` moves, `experts.py` computes.
"""

from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from lamella.channels.base import Channel, ChannelConfig
from lamella.channels.mlp import Activation, activate, hidden_segments, mlp_flops
from lamella.channels.moe.dispatch import dispatch
from lamella.channels.moe.experts import Experts, ExpertSizes
from lamella.channels.moe.router import Router, RouterOptions
from lamella.config import Count, Positive, Share, change
from lamella.errors import UserError
from lamella.nn.flops import Flops
from lamella.nn.linear import Column, Row
from lamella.nn.rows import Rows
from lamella.nn.shard import Shard

Coefficient = Annotated[float, Field(ge=0)]


class Config(ChannelConfig):
    channel: Literal["moe"]
    num_experts: Positive
    d_ff: Positive  # of one expert
    top_k: Positive = 2
    activation: Activation = "swiglu"
    routing: Literal["top_k", "expert_choice"] = "top_k"  # experts that choose take T * top_k / num_experts tokens
    capacity_factor: Annotated[float, Field(gt=0)] | None = None  # None: dropless; of expert_choice: 1
    renormalize: bool = False  # the chosen experts' weights sum to 1
    aux_loss: Coefficient = 0.01  # balance within a row; top_k only, as the next
    global_aux_loss: Coefficient = 0.0  # balance against the last step's loads
    z_loss: Coefficient = 0.0
    bias_rate: Coefficient = 0.0  # how far a step moves the choice's bias against the loads; 0: no bias
    jitter: Share = 0.0
    dropout: Share = 0.0  # on the experts' hidden channels
    init_scale: Annotated[float, Field(gt=0)] = 1.0  # of the initial variance, experts and router; Switch: 0.1
    shared_d_ff: Count = 0  # width of the experts that see every token

    def build(self, d_model: int, shard: Shard, place: str) -> "MoE":
        return MoE(self, d_model, shard, place)

    def flops(self, d_model: int, length: int) -> Flops:
        router = Flops(matmul=2 * length * d_model * self.num_experts)
        routed = mlp_flops(self.activation, d_model, self.d_ff, length * self.top_k)
        return router + routed + mlp_flops(self.activation, d_model, self.shared_d_ff, length)

    def shrink(self, tensor: int, expert: int) -> "Config":
        return change(
            self,
            num_experts=min(self.num_experts, -(-max(4, self.top_k + 1) // expert) * expert),
            d_ff=8 * tensor,
            shared_d_ff=8 * tensor if self.shared_d_ff else 0,
            jitter=self.jitter or 0.1,
            aux_loss=self.aux_loss or 0.01,
            z_loss=self.z_loss or 0.001,
            dropout=self.dropout or 0.1,
        )


class MoE(Channel):
    def __init__(self, config: Config, d_model: int, shard: Shard, place: str):
        super().__init__()
        if config.top_k > config.num_experts:
            raise UserError(f"moe: top_k={config.top_k} exceeds num_experts={config.num_experts}")
        if config.routing == "expert_choice" and (config.bias_rate or config.renormalize):
            raise UserError("moe: bias_rate and renormalize are for tokens that choose; leave them out here")
        self.config, self.shard = config, shard
        options = RouterOptions(**{k: getattr(config, k) for k in RouterOptions.__dataclass_fields__})
        self.router = Router(options, d_model, shard, place)
        sizes = ExpertSizes(config.num_experts, config.top_k, d_model, config.d_ff)
        self.experts = Experts(sizes, config.activation, config.dropout, config.init_scale, shard, place)
        shared = config.shared_d_ff
        segments = hidden_segments(config.activation, shared)
        self.shared_in = Column(shard, d_model, segments, enter=False) if shared else None
        self.shared_out = Row(shard, shared, d_model, into="partial") if shared else None

    def forward(self, x_BTD: Tensor, rows: Rows, state: dict[str, Any] | None = None) -> Tensor:
        x_BTD = self.shard.enter(x_BTD)
        dealt = self.shard.exchange.size > 1  # then no rank of the tensor group sends a token that another sends
        mine = (self.shard.rank, self.shard.size) if dealt else (0, 1)
        exact = dealt or x_BTD.device.type == "cpu"  # what is sent is counted anyway; else no GPU is waited for
        slots = dispatch(self.router(x_BTD, rows), self.config.num_experts, *mine, exact)
        experts, where_M = partial(self.experts, rows=rows), slots.names(rows.where_BT)
        y_MD = self.shard.exchange.through(experts, slots.gather(x_BTD), where_M, slots.counts_E)
        y_BTD = slots.scatter(y_MD, x_BTD)
        if self.shared_in is not None and self.shared_out is not None:
            h = self.shared_in.joined(x_BTD)
            y_BTD = y_BTD + self.shared_out(rows.core(activate, self.config.activation, h))
        return self.shard.leave(y_BTD)

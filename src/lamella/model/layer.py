"""A layer: two pre-norm residual branches, a mixer over time and a mixer over channels, either may be absent."""

from torch import Tensor, nn

from lamella.config import ModelConfig
from lamella.mixers.base import State
from lamella.model.stack import LayerPlan
from lamella.nn.norm import stream_norm
from lamella.nn.rows import Rows
from lamella.nn.shard import Shard


class Layer(nn.Module):
    """x += mixer(norm(x)); x += channel(norm(x)), with dropout on each branch's output in training."""

    def __init__(self, config: ModelConfig, plan: LayerPlan, shard: Shard):
        super().__init__()
        self.shard, self.dropout, self.place = shard, config.dropout, f"layer{plan.index}"
        if plan.mixer is not None:
            self.mixer_norm = stream_norm(config.norm, shard, config.d_model, config.norm_eps)
            self.mixer = plan.mixer.build_at(config.d_model, config.norm_eps, shard, plan.depth)
        if plan.channel is not None:
            self.channel_norm = stream_norm(config.norm, shard, config.d_model, config.norm_eps)
            self.channel = plan.channel.build_at(config.d_model, shard, f"{self.place}/channel", plan.depth)
        self.has_mixer, self.has_channel = plan.mixer is not None, plan.channel is not None

    def forward(self, x: Tensor, rows: Rows, state: State | None = None) -> Tensor:
        y = None
        if self.has_mixer:
            y = self._drop(self.mixer(self.mixer_norm(x), rows, state), rows, "mixer")
        if self.has_channel:
            inside, x = (self.channel_norm(x), x) if y is None else self.channel_norm.behind(y, x)
            y = self._drop(self.channel(inside, rows, state), rows, "channel")
        return x if y is None else x + y

    def _drop(self, y: Tensor, rows: Rows, branch: str) -> Tensor:
        if not self.dropout or rows.draw is None:
            return y
        time_T = self.shard.stream(rows.time_T[None])[0]
        keep = rows.draw.uniform(f"{self.place}/{branch}/dropout", time_T, y.shape[-1]) >= self.dropout
        return y * keep / (1 - self.dropout)

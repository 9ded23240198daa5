"""The language model: embedding, layers, final norm, head."""

from torch import Tensor, nn

from lamella.config import ModelConfig
from lamella.mixers.base import State
from lamella.model.layer import Layer
from lamella.model.stack import plan_layers
from lamella.nn.linear import Column, Embedding
from lamella.nn.norm import RMSNorm
from lamella.nn.rows import Rows
from lamella.nn.shard import Shard, Whole


class LanguageModel(nn.Module):
    """tokens [B, T] -> this rank's columns of the logits [B, T, V]. Parameters are empty until `init.initialize`."""

    def __init__(self, config: ModelConfig, shard: Shard | None = None):
        super().__init__()
        self.config = config
        plans = plan_layers(config)
        self.shard = shard or Whole(init_std=config.init_std, num_layers=len(plans))
        self.embedding = Embedding(self.shard, config.vocab_size, config.d_model)
        self.layers = nn.ModuleDict({str(plan.index): Layer(config, plan, self.shard) for plan in plans})
        self.norm = RMSNorm(self.shard, config.d_model, config.norm_eps)
        self.head = Column(self.shard, config.d_model, config.vocab_size)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, tokens_BT: Tensor, rows: Rows, states: dict[str, State] | None = None) -> Tensor:
        """With `states` ({} before the first tokens, updated in place) the rows continue where the last call ended."""
        x = self.embedding(tokens_BT)
        for name, layer in self.layers.items():
            x = layer(x, rows, None if states is None else states.setdefault(name, {}))
        return self.head(self.norm(x))

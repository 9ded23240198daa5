"""The language model: embedding, layers, final norm, head; whole, or some stages of it."""

import dataclasses

from torch import Tensor, nn

from lamella.config import ModelConfig
from lamella.mixers.base import State
from lamella.model.layer import Layer
from lamella.model.stack import plan_layers
from lamella.model.stage import Stage, make_stages
from lamella.nn.initializers import Initializer, orthogonal, uniform
from lamella.nn.linear import Column, Embedding
from lamella.nn.norm import stream_norm
from lamella.nn.rows import Rows
from lamella.nn.shard import Shard, Whole


class LanguageModel(nn.Module):
    """tokens [B, T] -> this rank's columns of the logits [B, T, V]. Parameters are empty until `init.initialize`.

    A process of a pipeline builds the `stages` that it holds. Names of parameters are those of the whole model.
    """

    def __init__(self, config: ModelConfig, shard: Shard | None = None, stages: tuple[Stage, ...] | None = None):
        super().__init__()
        self.config = config
        plans = plan_layers(config)
        self.stages = stages or make_stages((), len(plans))
        self.shard = shard or Whole(init_std=config.init_std, num_layers=len(plans))
        first, last = any(s.first for s in self.stages), any(s.last for s in self.stages)
        if first or (last and config.tie_embeddings):
            sizes = config.d_model, config.norm_eps
            norm = stream_norm(config.norm, self.shard, *sizes) if first and config.embedding_norm else None
            self.embedding = Embedding(self.shard, config.vocab_size, config.d_model, norm, _ends_init(config)[0])
        held = sorted(index for stage in self.stages for index in stage.layers)
        self.layers = nn.ModuleDict({str(i): Layer(config, plans[i], self.shard) for i in held})
        if last:
            self.norm = stream_norm(config.norm, self.shard, config.d_model, config.norm_eps)
            self.head = Column(self.shard, config.d_model, config.vocab_size, init=_ends_init(config)[1])
            if config.tie_embeddings:
                weight = self.head.weight = self.embedding.weight
                if not first:
                    weight.place = dataclasses.replace(weight.place, owner=False, copy=True)

    def forward(
        self,
        tokens_BT: Tensor,
        rows: Rows,
        states: dict[str, State] | None = None,
        targets_BT: Tensor | None = None,
    ) -> Tensor:
        """With `states` ({} before the first tokens, updated in place) the rows continue where the last call ended.

        With `targets_BT` the head makes no logits: it returns each target's -log p, [B, T] in fp32, of those below 0
        a 0.
        """
        return self.run(self.stages[0], tokens_BT, rows, states, targets_BT)

    def run(
        self,
        stage: Stage,
        x: Tensor,
        rows: Rows,
        states: dict[str, State] | None = None,
        targets_BT: Tensor | None = None,
    ) -> Tensor:
        """One stage: tokens or the stream in; the stream, or of the last one logits or -log p out."""
        if stage.first:
            rows.carried.clear()
            x = self.embedding(x)
        for index in stage.layers:
            layer = self.layers[str(index)]
            state = None if states is None else states.setdefault(str(index), {})
            x = rows.again(layer, x, rows) if rows.recompute == "full" else layer(x, rows, state)
        if not stage.last:
            return x
        x = self.norm(x)
        return self.head(x) if targets_BT is None else self.shard.nats(x, self.head.weight, targets_BT)


def _ends_init(config: ModelConfig) -> tuple[Initializer, Initializer] | tuple[None, None]:
    """Of embedding and head; None: the shard's. RWKV's are those of RWKV-LM (BlinkDL), RWKV-v7/train_temp/src/model.py:
    the embedding, which a norm follows, nearly 0, and the head orthogonal, its values of deviation 0.5 / sqrt(D).
    """
    if config.ends_init == "normal":
        return None, None
    return uniform(1e-4), orthogonal(0.5 * max(config.vocab_size / config.d_model, 1) ** 0.5)

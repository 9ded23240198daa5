"""A nano model of every mixer, and plain training of it: AdamW, one process, no engine."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lamella.config import ModelConfig
from lamella.model.init import initialize
from lamella.model.lm import LanguageModel
from lamella.nn.rows import Rows, one_document
from lamella.nn.shard import Whole

# For width 64: four heads of 16 where there are heads, Mamba-2 as many channels a head as its state has numbers.
MIXERS = {
    "attention": {"num_heads": 4, "rope_theta": 10000.0},
    "mamba": {"d_state": 16, "norms": False},  # as its paper has it
    "mamba2": {"d_state": 32, "head_dim": 32},
    "retention": {"num_heads": 4},
    "rwkv6": {"head_size": 16, "mix_rank": 8, "decay_rank": 16},
    "rwkv7": {"head_size": 16, "decay_rank": 16, "rate_rank": 16, "value_rank": 8, "gate_rank": 32},
}

Batch = tuple[Tensor, Tensor, Rows]


def build(
    mixer: str,
    vocab: int,
    *,
    channel: dict | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **options,
) -> LanguageModel:
    """Two layers of the mixer, each with a channel mixer behind it, width 64."""
    parts = {"mixer": {"mixer": mixer, **MIXERS[mixer]}, "channel": channel or {"channel": "mlp", "d_ff": 128}}
    stack = [{"repeat": 2, "layers": ["mixer/channel"]}]
    tree = {"d_model": 64, "vocab_size": vocab, "parts": parts, "stack": stack, **options}
    config = ModelConfig.model_validate(tree, strict=False)
    model = LanguageModel(config, Whole(dtype, config.init_std, num_layers=2))
    initialize(model, seed)
    return model.to(dtype)


def alone(tokens: Tensor, targets: Tensor) -> Batch:
    """Rows of a document each."""
    return tokens, targets, one_document(tokens)


def nats(model: LanguageModel, batch: Batch) -> Tensor:
    """The sum over what is asked: targets of -1 are not."""
    tokens, targets, rows = batch
    return F.cross_entropy(model(tokens, rows).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")


def asked(batch: Batch) -> int:
    return int((batch[1] >= 0).sum())


def train(
    model: LanguageModel, batches: Callable[[int], list[Batch]], steps: int, rate: Callable[[int], float]
) -> list[float]:
    """AdamW (betas 0.9 and 0.98, no decay), gradients clipped to a norm of 1. `batches` gives a step's micro-batches,
    `rate` its learning rate. Returns the steps' losses, mean nats of what is asked.
    """
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.zero_grad()
        parts = batches(step)
        count, total = sum(asked(batch) for batch in parts), 0.0
        for batch in parts:
            loss = nats(model, batch) / count
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(total)
    return losses

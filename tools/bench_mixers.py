"""Whole models on a CPU, one for each mixer, at equal parameters: training tokens a second against attention's.

    python tools/bench_mixers.py [--threads 2] [--rounds 5] [--lengths 256 2048] [--only rwkv7 ...] [--json]

Width 256, 4 layers, vocabulary 4,096, fp32, a step of 2,048 tokens in rows of the length. The feed-forward layers are
as wide as makes every model as large as the attention's (to 0.5%). Forward, backward and AdamW's update; the models
take turns in one process; medians of the rounds with their spread, and the ratio to attention at the same length.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lamella.config import ModelConfig
from lamella.model.count import count
from lamella.model.lm import LanguageModel
from lamella.nn.rows import one_document
from lamella.parallel.allocator import keep_memory

WIDTH, LAYERS, VOCAB, TOKENS, D_FF = 256, 4, 4096, 2048, 704
GATED: dict[str, Any] = {"channel": "mlp"}
RWKV: dict[str, Any] = {"norm": "layer", "embedding_norm": True}
MIXERS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {  # mixer, channel, options of the model
    "attention": ({"mixer": "attention", "num_heads": 8, "rope_theta": 1e4}, GATED, {}),
    "mamba": ({"mixer": "mamba", "norms": False}, GATED, {}),
    "mamba2": ({"mixer": "mamba2", "d_state": 128, "head_dim": 64}, GATED, {}),
    "retention": ({"mixer": "retention", "num_heads": 4, "value_head_dim": 112}, GATED, {}),
    "rwkv6": ({"mixer": "rwkv6"}, {"channel": "rwkv", "version": 6}, RWKV),
    "rwkv7": ({"mixer": "rwkv7"}, {"channel": "rwkv", "version": 7}, RWKV),
}


def config(name: str, d_ff: int) -> ModelConfig:
    mixer, channel, options = MIXERS[name]
    parts = {"mixer": mixer, "channel": channel | {"d_ff": d_ff}}
    stack = [{"layers": ["mixer/channel"], "repeat": LAYERS}]
    return ModelConfig.model_validate(
        {"d_model": WIDTH, "vocab_size": VOCAB, "parts": parts, "stack": stack} | options, strict=False
    )


def size(model: ModelConfig) -> int:
    return count(model, TOKENS).parameters


def as_large(name: str, wanted: int) -> ModelConfig:
    """The model whose feed-forward layers make it `wanted` parameters large, as nearly as can be."""
    small, step = size(config(name, 64)), size(config(name, 65)) - size(config(name, 64))
    return config(name, 64 + round((wanted - small) / step))


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens_BT: torch.Tensor) -> None:
    logits = model(tokens_BT[:, :-1], one_document(tokens_BT[:, :-1]))
    F.cross_entropy(logits.flatten(0, 1), tokens_BT[:, 1:].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--only", nargs="+", choices=sorted(MIXERS), default=list(MIXERS))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_memory()  # as a run does
    torch.manual_seed(0)
    wanted = size(config("attention", D_FF))
    names = list(dict.fromkeys(["attention", *options.only]))
    models = {name: LanguageModel(as_large(name, wanted)) for name in names}
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-5) for name, model in models.items()}
    rates: dict[str, dict[int, list[float]]] = {name: {length: [] for length in options.lengths} for name in names}
    for round_ in range(options.rounds + 1):  # the first warms up
        for length in options.lengths:
            tokens = torch.randint(VOCAB, (TOKENS // length, length + 1))
            for name, model in models.items():
                took = seconds(partial(step, model, optimizers[name], tokens))
                if round_:
                    rates[name][length].append(tokens[:, 1:].numel() / took)
    sizes = {name: size(model.config) for name, model in models.items()}
    if options.json:
        print(json.dumps({"parameters": sizes, "tokens_per_second": rates}))
        return
    print("| model | parameters |" + "".join(f" T={length}, tokens/s | of attention |" for length in options.lengths))
    print("|---" * (2 + 2 * len(options.lengths)) + "|")
    for name, row in rates.items():
        cells = [f"{sizes[name]:,}"]
        for length, found in row.items():
            middle = statistics.median(found)
            cells.append(f"{middle:,.0f} ({min(found):,.0f}-{max(found):,.0f})")
            cells.append(f"{middle / statistics.median(rates['attention'][length]):.2f}")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

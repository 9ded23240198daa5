"""A hybrid on a CPU against transformers: Jamba with the same weights, and a Llama of the same shape.

    python tools/bench_models.py [--threads 2] [--rounds 7] [--json]

Width 256, 8 layers (one attention, seven Mamba; four with 4 experts top-2), ffn 896, vocabulary 8,192, one row of 256
tokens, fp32. Forward and backward, and beside it the whole step with AdamW on both sides. The models take turns in one
process; medians of the rounds, with their spread. The ceiling is torch's own matmul of the same shapes, same run. It
needs the test extra (transformers).
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from peers import copy_weights
from torch import Tensor, nn

from lamella.config import ModelConfig
from lamella.model.count import count
from lamella.model.lm import LanguageModel
from lamella.nn.rows import one_document
from lamella.parallel.allocator import keep_memory

WIDTH, FFN, VOCAB, LENGTH, LAYERS = 256, 896, 8192, 256, 8
OURS: dict[str, Any] = {
    "d_model": WIDTH,
    "vocab_size": VOCAB,
    "parts": {
        "mamba": {"mixer": "mamba"},
        "attention": {"mixer": "attention", "num_heads": 8, "num_kv_heads": 2},
        "mlp": {"channel": "mlp", "d_ff": FFN},
        "moe": {"channel": "moe", "num_experts": 4, "d_ff": FFN},
    },
    "stack": [
        {
            "layers": [
                *("mamba/mlp", "mamba/moe", "mamba/mlp", "mamba/moe"),
                *("attention/mlp", "mamba/moe", "mamba/mlp", "mamba/moe"),
            ]
        }
    ],
}
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
JAMBA: dict[str, Any] = SHAPE | {"num_experts": 4, "attn_layer_offset": 4, "attn_layer_period": 8}


def models() -> dict[str, nn.Module]:
    """Ours and transformers' Jamba with equal weights, and its Llama."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jamba = transformers.JambaForCausalLM(transformers.JambaConfig(**JAMBA)).float()
        llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).float()
    ours = LanguageModel(ModelConfig.model_validate(OURS, strict=False))
    copy_weights(jamba, ours)
    return {"lamella": ours, "transformers Jamba": jamba, "transformers Llama": llama}


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    if isinstance(model, LanguageModel):
        return model(tokens, one_document(tokens))
    return model(tokens, use_cache=False).logits


def backward(model: nn.Module, tokens: Tensor) -> None:
    logits = logits_of(model, tokens[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(rounds: int, tokens: Tensor) -> dict[str, dict[str, list[float]]]:
    """Seconds of forward and backward, and of a step with AdamW, by model, round by round in turn."""
    found: dict[str, dict[str, list[float]]] = {}
    optimizers = {}
    everything = models()
    for round_ in range(rounds + 1):  # the first warms up
        for name, model in everything.items():
            optimizer = optimizers.setdefault(name, torch.optim.AdamW(model.parameters(), lr=1e-5))
            optimizer.zero_grad(set_to_none=True)
            compute = seconds(lambda model=model: backward(model, tokens))
            update = seconds(optimizer.step)
            if round_:
                row = found.setdefault(name, {"compute": [], "step": []})
                row["compute"].append(compute)
                row["step"].append(compute + update)
    return found


def matmul_ceiling(rounds: int) -> float:
    """FLOP/s of the products that dominate: a row of tokens by the feed-forward's weights."""
    x, w = torch.randn(LENGTH, WIDTH), torch.randn(2 * FFN, WIDTH)
    times = [seconds(lambda: [x @ w.t() for _ in range(50)]) for _ in range(rounds + 1)][1:]
    return 50 * 2 * LENGTH * WIDTH * 2 * FFN / statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_memory()  # as a run does; all models gain
    torch.manual_seed(0)
    tokens = torch.randint(VOCAB, (1, LENGTH + 1))
    found = measure(options.rounds, tokens)
    ceiling = matmul_ceiling(options.rounds)
    work = count(ModelConfig.model_validate(OURS, strict=False), LENGTH).training_flops
    rates = {n: {k: [LENGTH / s for s in v] for k, v in row.items()} for n, row in found.items()}
    middle = {n: {k: statistics.median(v) for k, v in row.items()} for n, row in rates.items()}
    if options.json:
        print(json.dumps({"tokens_per_second": rates, "ceiling_flops": ceiling, "flops_a_row": work}))
        return
    print(f"{'':22}{'forward + backward':>32}{'with AdamW':>32}")
    for name, row in rates.items():
        cells = [f"{middle[name][k]:8.1f} tokens/s ({min(v):.0f}-{max(v):.0f})" for k, v in row.items()]
        print(f"{name:22}{cells[0]:>32}{cells[1]:>32}")
    ours = middle["lamella"]["compute"]
    for peer in ("transformers Jamba", "transformers Llama"):
        print(f"ratio to {peer}: {ours / middle[peer]['compute']:.2f}, with AdamW"
              f" {middle['lamella']['step'] / middle[peer]['step']:.2f}")
    print(f"matmul ceiling {ceiling / 1e9:.1f} GFLOP/s; ours {ours * work / LENGTH / 1e9:.1f} GFLOP/s of counted work")


if __name__ == "__main__":
    main()

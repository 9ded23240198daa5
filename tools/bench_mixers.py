"""Whole models on a CPU, one for each mixer: training tokens a second against attention's and against a peer's.

    python tools/bench_mixers.py [--threads 2] [--rounds 5] [--lengths 256 2048] [--only rwkv7 ...]
    python tools/bench_mixers.py --peers [--patience 60] ...

Width 256, vocabulary 4,096, fp32; a step is forward, backward and AdamW's update. The models take turns in one process;
medians of the rounds with their spread. With one thread it is the processor's time, which others on the machine disturb
less; with more the wall's.

The first form: 4 layers, 2,048 tokens a step in rows of the length, feed-forward layers as wide as makes every model as
large as the attention's (to 0.5%); the ratio to attention at the same length.

The second: each mixer beside a plain torch path of a library, on the same weights, 2 layers and one row a step.
transformers' Mamba and Mamba-2, layers without a feed-forward branch, became ours by `lamella convert`; the naive forms
of flash-linear-attention (where it is installed: only its files are read, it needs no triton) take the place of our
kernel, all else is ours on both sides. Before that both sides' logits and gradients are compared. A peer that has taken
`--patience` seconds in all takes part in no further round.
"""

import argparse
import contextlib
import importlib
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamella.config import ModelConfig
from lamella.convert.convert import to_lamella
from lamella.model.count import count
from lamella.model.init import initialize
from lamella.model.lm import LanguageModel
from lamella.nn.rows import one_document
from lamella.parallel.allocator import keep_memory
from lamella.train.restore import load_model

WIDTH, LAYERS, VOCAB, TOKENS, D_FF = 256, 4, 4096, 2048, 704
PEER_LAYERS = 2
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
FLA_RETENTION = ({"mixer": "retention", "num_heads": 4, "head_dim": 64, "variant": "fla"}, GATED, {})
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": PEER_LAYERS,
    "tie_word_embeddings": False,
}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("Mamba", SHAPE | {"state_size": 16}),
    "mamba2": ("Mamba2", SHAPE | {"state_size": 128, "num_heads": 8, "head_dim": 64, "n_groups": 1}),
}


def config(name: str, d_ff: int, layers: int = LAYERS) -> ModelConfig:
    mixer, channel, options = FLA_RETENTION if name == "retention, fla" else MIXERS[name]
    parts = {"mixer": mixer, "channel": channel | {"d_ff": d_ff}}
    stack = [{"layers": ["mixer/channel"], "repeat": layers}]
    return ModelConfig.model_validate(
        {"d_model": WIDTH, "vocab_size": VOCAB, "parts": parts, "stack": stack} | options, strict=False
    )


def size(model: ModelConfig) -> int:
    return count(model, TOKENS).parameters


def as_large(name: str, wanted: int) -> ModelConfig:
    """The model whose feed-forward layers make it `wanted` parameters large, as nearly as can be."""
    small, step = size(config(name, 64)), size(config(name, 65)) - size(config(name, 64))
    return config(name, 64 + round((wanted - small) / step))


def built(config: ModelConfig) -> LanguageModel:
    model = LanguageModel(config)
    initialize(model, seed=0)
    return model


class Peer(NamedTuple):
    """`swap()`: what puts the peer's form in the place of ours, where `theirs` is the same model as `ours`."""

    name: str
    ours: nn.Module
    theirs: nn.Module
    swap: Callable[[], contextlib.AbstractContextManager[Any]]


def transformers_peers(name: str) -> Iterator[Peer]:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        print(f"{name}: no transformers here")
        return
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    family, options = TRANSFORMERS[name]
    theirs = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**options)).float()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(Path(folder, "theirs"))
        converted = to_lamella(Path(folder, "theirs"), Path(folder, "ours"))
        ours = load_model(converted.checkpoint, converted.model, torch.float32).requires_grad_().train()
    yield Peer(f"transformers {transformers.__version__}", ours, theirs.train(), contextlib.nullcontext)


def fla_file(path: str) -> Any:
    """A module of flash-linear-attention by its file, None where there is none: the package itself needs triton."""
    found = importlib.util.find_spec("fla")
    for folder in [] if found is None else found.submodule_search_locations or []:
        if (file := Path(folder, path)).is_file():
            spec = importlib.util.spec_from_file_location(file.stem, file)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    return None


def heads_first(*tensors: Tensor) -> list[Tensor]:
    return [t.transpose(1, 2) for t in tensors]


def fla_peers(name: str) -> Iterator[Peer]:
    """Their forms on rows of one document from no state; what they return as a state nobody reads."""

    def rwkv6(form: Callable[..., Any], r, k, v, log_w, u, **_):
        return form(*heads_first(r, k, v, log_w), u)[0].transpose(1, 2), None

    def rwkv7(form: Callable[..., Any], r, log_w, k, v, a, b, **_):
        r, log_w, k, v, a, b = heads_first(r * r.shape[-1] ** 0.5, log_w, k, v, a, b)
        return form(r, k, v, a, b, log_w)[0].transpose(1, 2), None

    def retention(form: Callable[..., Any], q, k, v, log_H, **_):
        return form(*heads_first(q, k * k.shape[-1] ** 0.5, v)).transpose(1, 2)

    here: dict[str, list[tuple[str, str, str, Callable[..., Any], dict[str, Any]]]] = {
        # rwkv6/chunk_naive.py writes over what its backward needs: no training with that.
        "rwkv6": [("recurrence", "rwkv6/recurrent_naive", "naive_recurrent_rwkv6", rwkv6, {"scale": 1.0})],
        "rwkv7": [
            ("recurrence", "generalized_delta_rule/dplr/naive", "dplr_recurrence", rwkv7, {}),
            ("chunks", "generalized_delta_rule/dplr/naive", "dplr_chunkwise", rwkv7, {}),
        ],
        "retention": [("parallel form", "retention/naive", "naive_retention", retention, {})],
    }
    model = built(config("retention, fla" if name == "retention" else name, D_FF, PEER_LAYERS))
    with torch.no_grad():  # RWKV's last projections start at 0, and no gradient would go farther
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    op = "linear_attention" if name == "retention" else name.replace("rwkv", "wkv")
    mixer = importlib.import_module(f"lamella.mixers.{name}")
    for word, path, function, adapt, options in here[name]:
        module = fla_file(f"ops/{path}.py")
        if module is None:
            print(f"{name}: no flash-linear-attention here, or without {path}.py")
            continue
        form = partial(adapt, partial(getattr(module, function), **options))
        yield Peer(f"flash-linear-attention's {word}", model, model, partial(mock.patch.object, mixer, op, form))


def peers_of(name: str) -> Iterator[Peer]:
    if name != "attention":
        yield from (transformers_peers if name in TRANSFORMERS else fla_peers)(name)


def logits_of(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    if isinstance(model, LanguageModel):
        return model(tokens_BT, one_document(tokens_BT))
    return model(tokens_BT, use_cache=False).logits


def backward(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    logits = logits_of(model, tokens_BT[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), tokens_BT[:, 1:].flatten()).backward()
    return logits.detach()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens_BT: Tensor) -> None:
    backward(model, tokens_BT)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def apart(peer: Peer, tokens_BT: Tensor) -> str:
    """The relative differences of the logits, and of the embedding's gradient, to which all others contribute."""
    found = []
    for model, swap in ((peer.ours, contextlib.nullcontext), (peer.theirs, peer.swap)):
        with swap():
            logits = backward(model, tokens_BT)
        embedding = next(p for p in model.parameters() if p.shape == (VOCAB, WIDTH))
        assert embedding.grad is not None
        found.append((logits, embedding.grad.clone()))
        model.zero_grad(set_to_none=True)
    logits, gradient = (float((a - b).norm() / b.norm()) for a, b in zip(*found, strict=True))
    return f"{logits:.1e}, {gradient:.1e}"


def rate(tokens: Tensor, work: Callable[[], object]) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    work()
    return tokens[:, 1:].numel() / (clock() - start)


def spread(found: list[float]) -> str:
    return f"{statistics.median(found):,.0f} ({min(found):,.0f}-{max(found):,.0f})"


def against_attention(names: list[str], lengths: list[int], rounds: int) -> None:
    wanted = size(config("attention", D_FF))
    names = list(dict.fromkeys(["attention", *names]))
    models = {name: built(as_large(name, wanted)) for name in names}
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-5) for name, model in models.items()}
    rates: dict[str, dict[int, list[float]]] = {name: {length: [] for length in lengths} for name in names}
    for round_ in range(rounds + 1):  # the first warms up
        for length in lengths:
            tokens = torch.randint(VOCAB, (TOKENS // length, length + 1))
            for name, model in models.items():
                found = rate(tokens, partial(step, model, optimizers[name], tokens))
                if round_:
                    rates[name][length].append(found)
    print("| model | parameters |" + "".join(f" T={length}, tokens/s | of attention |" for length in lengths))
    print("|---" * (2 + 2 * len(lengths)) + "|")
    for name, row in rates.items():
        cells = [f"{size(models[name].config):,}"]
        for length, found in row.items():
            cells.append(spread(found))
            cells.append(f"{statistics.median(found) / statistics.median(rates['attention'][length]):.2f}")
        print(f"| {name} | " + " | ".join(cells) + " |")


def against_peers(names: list[str], lengths: list[int], rounds: int, patience: float) -> None:
    print("| mixer | peer | T | ours, tokens/s | peer's | times | logits, gradient apart |")
    print("|---" * 7 + "|")
    for name in names:
        for peer in peers_of(name):
            sides = {"ours": (peer.ours, contextlib.nullcontext), "theirs": (peer.theirs, peer.swap)}
            optimizers = {side: torch.optim.AdamW(model.parameters(), lr=1e-9) for side, (model, _) in sides.items()}
            difference = apart(peer, torch.randint(VOCAB, (1, 97)))
            for length in lengths:
                rates: dict[str, list[float]] = {side: [] for side in sides}
                spent = time.perf_counter()
                for round_ in range(rounds + 1):  # the first warms up, unless it is all there is
                    if round_ and time.perf_counter() - spent > patience:
                        break
                    tokens = torch.randint(VOCAB, (1, length + 1))
                    for side, (model, swap) in sides.items():
                        with swap():
                            found = rate(tokens, partial(step, model, optimizers[side], tokens))
                        if round_ == 1:
                            rates[side].clear()
                        rates[side].append(found)
                ours, theirs = (statistics.median(found) for found in rates.values())
                cells = [name, peer.name, str(length), *(spread(found) for found in rates.values())]
                print("| " + " | ".join([*cells, f"{ours / theirs:.1f}", difference]) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--only", nargs="+", choices=sorted(MIXERS), default=list(MIXERS))
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--patience", type=float, default=60)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_memory()  # as a run does
    torch.manual_seed(0)
    if options.peers:
        against_peers(options.only, options.lengths, options.rounds, options.patience)
    else:
        against_attention(options.only, options.lengths, options.rounds)


if __name__ == "__main__":
    main()

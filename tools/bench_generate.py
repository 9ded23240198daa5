"""Generation on a CPU: milliseconds a token and resident memory after few and many tokens, against transformers' Jamba.

    python tools/bench_generate.py [--lengths 256 4096] [--window 64] [--threads 1]

The quickstart's shape (width 128, 4 layers, vocabulary 4,096, fp32), as Mamba alone and as the hybrid with attention
and experts; one row, greedy. Jamba has the hybrid's weights (without an attention layer its cache raises, so Mamba
alone has no peer). All lengths of both models take turns in one process, token by token, and the figure at a length is
the processor time of the last `window` tokens before it, the median: on a busy machine the clock on the wall measures
the neighbours. Their first ids must be the same. Memory is what each model by itself adds to a fresh process from the
eighth token to that length, as the operating system counts it.
"""

import argparse
import ctypes
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from peers import copy_weights
from torch import nn

from lamella.config import ModelConfig
from lamella.model.generate import GREEDY, Generation
from lamella.model.init import generator, initialize
from lamella.model.lm import LanguageModel

WIDTH, VOCAB, EOD = 128, 4096, 2
PROMPT = [17, 5, 900, 3]
SAME = 128  # tokens that must agree; later a near tie may part them
PARTS = {
    "mamba": {"mixer": "mamba", "d_state": 16},
    "attention": {"mixer": "attention", "num_heads": 4, "num_kv_heads": 2},
    "mlp": {"channel": "mlp", "d_ff": 352},
    "moe": {"channel": "moe", "num_experts": 8, "top_k": 2, "d_ff": 352},  # Jamba's experts are as wide as its mlp
}
STACKS = {
    "Mamba alone": ["mamba/mlp", "mamba/mlp", "mamba/mlp", "mamba/mlp"],
    "hybrid": ["mamba/mlp", "mamba/moe", "attention/mlp", "mamba/moe"],
}


def jamba_config() -> transformers.JambaConfig:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 8,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "mamba_dt_rank": 8,
    }
    return transformers.JambaConfig(**sizes)


def models(name: str) -> list[nn.Module]:
    """Ours, and theirs where there is one, with the same weights."""
    tree = {"d_model": WIDTH, "vocab_size": VOCAB, "parts": PARTS, "stack": [{"layers": STACKS[name]}]}
    ours = LanguageModel(ModelConfig.model_validate(tree, strict=False))
    initialize(ours, seed=0)
    found: list[nn.Module] = [ours.requires_grad_(False)]
    if name == "hybrid":
        transformers.logging.set_verbosity_error()  # it tells of kernels for GPUs
        theirs = transformers.JambaForCausalLM(jamba_config()).float().eval()
        with torch.no_grad():
            for key, parameter in theirs.named_parameters():
                if parameter.dim() > 1 and "A_log" not in key:  # spread, so that greedy text is no single token
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator(key, 0)))
            copy_weights(theirs, ours)
        found.append(theirs)
    return found


def tokens_of(model: nn.Module) -> Iterator[int]:
    return our_tokens(model) if isinstance(model, LanguageModel) else their_tokens(model)


def our_tokens(model: LanguageModel) -> Iterator[int]:
    batch = Generation(model, [PROMPT], EOD, VOCAB, GREEDY)
    while True:
        yield batch.step()[0][1]


def their_tokens(model: nn.Module) -> Iterator[int]:
    """Their forward with their cache, as their `generate` calls it, without its bookkeeping around it."""
    with torch.inference_mode():
        out = model(input_ids=torch.tensor([[EOD, *PROMPT]]), use_cache=True)
        while True:
            token = out.logits[:, -1:].argmax(-1)
            yield int(token)
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)


def times(name: str, lengths: list[int], window: int) -> tuple[list[list[float]], int]:
    """Milliseconds a token by length and model; and how many of the first ids were the same."""
    streams = [[tokens_of(model) for model in models(name)] for _ in lengths]
    said = [[[next(s) for _ in range(n - window)] for s in row] for n, row in zip(lengths, streams, strict=True)]
    spent: list[list[list[float]]] = [[[] for _ in row] for row in streams]
    for _ in range(window):
        for row, clocks, ids in zip(streams, spent, said, strict=True):
            for stream, clock, out in zip(row, clocks, ids, strict=True):
                begin = time.process_time()
                out.append(next(stream))
                clock.append(1e3 * (time.process_time() - begin))
    ids = said[-1]
    same = next((i for i, both in enumerate(zip(*ids, strict=True)) if len(set(both)) > 1), len(ids[0]))
    assert same >= min(SAME, max(lengths)), f"{name}: the two say different things from token {same}"
    return [[statistics.median(clock) for clock in clocks] for clocks in spent], same


def memory(name: str, lengths: list[int], side: int, answer) -> None:
    """In a fresh process: resident MiB at each length beyond those at the eighth token."""
    stream = tokens_of(models(name)[side])
    for _ in range(8):
        next(stream)
    before, found = resident(), list[float]()
    for step in range(8, max(lengths) + 1):
        next(stream)
        if step in lengths:
            found.append(resident() - before)
    answer.send(found)


def resident() -> float:
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back, so that what is left is in use
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def in_a_process(*args) -> list[float]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=memory, args=(*args, theirs))
    process.start()
    found = ours.recv()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 4096])
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    os.environ["OMP_NUM_THREADS"] = str(given.threads)  # of the processes that measure memory
    heads = ("ms a token", 11), ("Jamba, ms", 10), ("ratio", 6), ("MiB", 7), ("Jamba, MiB", 11)
    print(f"{'model':<12} {'tokens':>7} " + " ".join(f"{head:>{width}}" for head, width in heads))
    for name in STACKS:
        found, same = times(name, given.lengths, given.window)
        kept = [in_a_process(name, given.lengths, side) for side in range(len(found[0]))]
        for n, ms, mib in zip(given.lengths, found, zip(*kept, strict=True), strict=True):
            peer = [f"{ms[1]:.2f}", f"{ms[1] / ms[0]:.2f}", f"{mib[1]:.1f}"] if len(ms) > 1 else ["-"] * 3
            print(f"{name:<12} {n:>7,} {ms[0]:>11.2f} {peer[0]:>10} {peer[1]:>6} {mib[0]:>7.1f} {peer[2]:>11}")
        if len(kept) > 1:
            print(f"{'':<12} the first {same:,} ids are the same")


if __name__ == "__main__":
    main()

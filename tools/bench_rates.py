"""What an operation costs by its kind, against a matmul's: the table `RATES` of `lamella/model/cuts.py`.

    OMP_NUM_THREADS=1 python tools/bench_rates.py [--widths 128 256 512 1024] [--tokens 1024] [--rounds 11]

Every part in turn, forward and backward apart, in processor time (on a busy machine the clock on the wall measures the
neighbours), medians of the rounds. A matmul's operation is the dense channel mixer's. What a mixer takes beyond its
matmuls at that rate is laid to its scan or its scores, and what the head takes to the loss. The last line says what a
mixture of experts takes against its matmuls at that rate.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lamella.channels import mlp, moe
from lamella.config import check_options
from lamella.mixers import attention, mamba
from lamella.model.init import initialize
from lamella.nn.flops import Flops
from lamella.nn.linear import Column, Embedding
from lamella.nn.rows import one_document
from lamella.nn.shard import Whole
from lamella.parallel.allocator import keep_memory

VOCAB = 8192


def seconds(forward: Callable[[], Tensor]) -> tuple[float, float]:
    """Processor time of forward, and of backward from a gradient of ones."""
    start = time.process_time()
    y = forward()
    middle = time.process_time()
    gradient = torch.ones_like(y)
    again = time.process_time()
    y.backward(gradient)
    return middle - start, time.process_time() - again


def measure(width: int, length: int, rounds: int) -> dict[str, list[float]]:
    """Forward and backward rates by kind, and a mixture's time over that of its matmuls."""
    shard, tokens = Whole(), torch.randint(VOCAB, (1, length))
    rows = one_document(tokens)
    configs = {
        "mamba": check_options(mamba.Config, {"mixer": "mamba"}, "mamba"),
        "attention": check_options(attention.Config, {"mixer": "attention", "num_heads": width // 64}, "attention"),
    }
    channels = {
        "mlp": check_options(mlp.Config, {"channel": "mlp", "d_ff": 7 * width // 2}, "mlp"),
        "moe": check_options(moe.Config, {"channel": "moe", "num_experts": 8, "d_ff": 7 * width // 2}, "moe"),
    }
    built = {name: c.build(width, 1e-6, shard) for name, c in configs.items()}
    built |= {name: c.build(width, shard, name) for name, c in channels.items()}
    head, embedding = Column(shard, width, VOCAB), Embedding(shard, VOCAB, width)
    work = {name: c.flops(width, length) for name, c in (configs | channels).items()}
    work["head"] = Flops(matmul=2 * length * width * VOCAB)
    modules = [*built.values(), head, embedding]
    for module in modules:
        initialize(module, seed=0)
    stream = torch.randn(1, length, width, requires_grad=True)
    cases: dict[str, Callable[[], Tensor]] = {n: lambda m=m: m(stream, rows) for n, m in built.items()}
    cases["head"] = lambda: shard.cross_entropy(head(stream), tokens)
    cases["embedding"] = lambda: embedding(tokens)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for round_ in range(rounds + 1):  # the first warms up
        for name, case in cases.items():
            for module in modules:
                module.zero_grad(set_to_none=True)
            stream.grad = None
            taken = seconds(case)
            if round_:
                times[name].append(taken)
    taken = {name: [statistics.median(column) for column in zip(*t, strict=True)] for name, t in times.items()}
    matmul = [t / work["mlp"].matmul for t in taken["mlp"]]

    def beyond(name: str, operations: float) -> list[float]:
        rest = [t - work[name].matmul * m for t, m in zip(taken[name], matmul, strict=True)]
        return [t / operations / matmul[0] for t in rest]

    return {
        "matmul": [m / matmul[0] for m in matmul],
        "scores": beyond("attention", work["attention"].scores),
        "scan": beyond("mamba", work["mamba"].scan),
        "loss": beyond("head", length * VOCAB),
        "embedding": [t / (length * width) / matmul[0] for t in taken["embedding"]],
        "mixture": [t / work["moe"].matmul / m for t, m in zip(taken["moe"], matmul, strict=True)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=11)
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    found = [measure(width, given.tokens, given.rounds) for width in given.widths]
    print(f"{'forward, backward':>20}" + "".join(f"{f'width {w}':>18}" for w in given.widths) + f"{'median':>18}")
    for kind in found[0]:
        columns = [f[kind] for f in found]
        columns.append([statistics.median(c) for c in zip(*columns, strict=True)])
        print(f"{kind:>20}" + "".join(f"{f'{a:.2f}, {b:.2f}':>18}" for a, b in columns))


if __name__ == "__main__":
    main()

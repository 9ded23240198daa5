"""Attention's cost over packed documents: time against the sum of squared document lengths, and the largest tensor.

    python tools/bench_attention.py [--length 8192] [--d-model 64] [--heads 4] [--head-dim 64] [--window W]

One row, always of the same length, holds one document, two halves, four quarters and so on, and a mix of lengths. If
every document is attended by itself, time = fixed + slope * sum of squares, where the fixed part is what is linear in
tokens (projections, copies); a mask over the row would cost the same for every packing. With a window the line is over
the pairs inside it. On a busy machine OMP_NUM_THREADS=1 gives steadier figures.
"""

import argparse
import statistics
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lamella.config import check_options
from lamella.mixers.attention import Attention, Config
from lamella.model.init import initialize
from lamella.nn.rows import Rows
from lamella.nn.shard import Whole


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation returned."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [t.numel() * t.element_size() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.bytes = max(self.bytes, *sizes, 0)
        return result


def packings(length: int) -> list[tuple[str, list[int]]]:
    """The row's documents: equal ones, and halves of halves down to 1/16."""
    equal = [(f"{n} x {length // n}", [length // n] * n) for n in (1, 2, 4, 8, 16, 32) if length % n == 0]
    mixed = [length // 2, length // 4, length // 8, length // 16]
    return [*equal, ("halves of halves", [*mixed, length - sum(mixed)])]


def pack(lengths: list[int]) -> Rows:
    document = torch.cat([torch.full((n,), d) for d, n in enumerate(lengths)])
    position = torch.cat([torch.arange(n) for n in lengths])
    return Rows(document.int()[None], position.int()[None])


def seconds(attention: Attention, x: torch.Tensor, rows: Rows) -> float:
    """One forward and backward."""
    begin = time.perf_counter()
    attention(x, rows).sum().backward()
    return time.perf_counter() - begin


def fit(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Least squares: fixed part and slope."""
    slope, fixed = statistics.linear_regression(*zip(*points, strict=True))
    return fixed, slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("length", 8192), ("d-model", 64), ("heads", 4), ("head-dim", 64), ("repeats", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--window", type=int)
    given = parser.parse_args()
    d_model = given.d_model
    options = {"mixer": "attention", "num_heads": given.heads, "head_dim": given.head_dim, "window": given.window}
    config = check_options(Config, options, "attention")
    attention = config.build(d_model, 1e-6, Whole())
    initialize(attention, seed=0)
    x = torch.randn(1, given.length, d_model, requires_grad=True)
    work = [(name, pack(n), sum(config.flops(d_model, k).scores for k in n)) for name, n in packings(given.length)]
    seconds(attention, x, work[1][1])
    # Round by round, so that a slow moment of a busy machine does not fall on one packing alone.
    times = [[seconds(attention, x, rows) for _, rows, _ in work] for _ in range(given.repeats)]
    best = [min(column) for column in zip(*times, strict=True)]
    fixed, slope = fit([(scores, t) for (_, _, scores), t in zip(work, best, strict=True)])
    print(f"{given.length} tokens, {given.heads} heads of {given.head_dim}, {torch.get_num_threads()} threads")
    print(f"{'documents':>18} {'sum of squares':>15} {'of full':>9} {'ms':>9} {'line, ms':>9} {'largest, MiB':>13}")
    for (name, rows, scores), t in zip(work, best, strict=True):
        with Largest() as largest:
            seconds(attention, x, rows)
        squares, line = sum(n * n for n in rows.lengths), fixed + slope * scores
        mebibytes = largest.bytes / 2**20
        row = f"{name:>18} {squares:>15,} {scores / work[0][2]:>9.3f}"
        print(f"{row} {1e3 * t:>9.1f} {1e3 * line:>9.1f} {mebibytes:>13.2f}")
    print(f"fixed part {1e3 * fixed:.1f} ms, {100 * fixed / best[0]:.1f}% of one document's time")
    print(f"a matrix of all scores of one head would be {4 * given.length**2 / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()

"""Whether the pipeline's cuts balance: what the table of rates predicts of each stage, and what the stages take.

    OMP_NUM_THREADS=1 python tools/bench_cuts.py [--stages 2 4] [--length 512] [--rounds 9] [--recompute none]

A stack of unequal layers (attention, Mamba, dense and mixtures of experts) with a large vocabulary is cut by cost and
in equal numbers of layers. In one process each stage is a model of its own, as a pipeline's rank would hold it, and in
turn runs forward and backward of a row on a stream of the right shape; the last with the loss. Processor time, medians
of the rounds. Imbalance is the largest stage over the mean: a pipeline waits for the largest. In brackets the range of
the rounds' own imbalances. The last column is the largest stage's time over that of the cut by cost.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from lamella.config import ModelConfig
from lamella.model.cuts import cut, imbalance, layer_costs, stage_costs
from lamella.model.init import initialize
from lamella.model.lm import LanguageModel
from lamella.model.stack import plan_layers
from lamella.model.stage import make_stages
from lamella.nn.rows import Rows, one_document
from lamella.parallel.allocator import keep_memory

MODEL: dict[str, Any] = {
    "d_model": 256,
    "vocab_size": 16384,
    "parts": {
        "mamba": {"mixer": "mamba"},
        "attention": {"mixer": "attention", "num_heads": 4},
        "mlp": {"channel": "mlp", "d_ff": 896},
        "moe": {"channel": "moe", "num_experts": 8, "d_ff": 448},
    },
    "stack": [
        {"layers": ["attention/-", "attention/mlp"]},
        {"layers": ["mamba/moe", "mamba/-", "mamba/mlp", "attention/moe"], "repeat": 2},
        {"layers": ["mamba/mlp", "-/mlp"]},
    ],
}


class Part:
    """One stage, as one rank holds it."""

    def __init__(self, config: ModelConfig, starts: Sequence[int], number: int, length: int, recompute: Any):
        stages = make_stages(tuple(starts), len(plan_layers(config)))
        self.stage = stages[number]
        self.model = LanguageModel(config, stages=(self.stage,))
        initialize(self.model, seed=0)
        self.tokens = torch.randint(config.vocab_size, (1, length))
        self.stream = torch.randn(1, length, config.d_model)
        self.recompute = recompute
        self.times: list[float] = []

    def run(self) -> None:
        self.model.zero_grad(set_to_none=True)
        x = self.tokens if self.stage.first else self.stream.clone().requires_grad_()
        known = one_document(self.tokens)
        rows = Rows(known.document_BT, known.position_BT, recompute=self.recompute)
        start = time.process_time()
        y = self.model.run(self.stage, x, rows, targets_BT=self.tokens)
        y.backward(torch.ones_like(y))
        self.times.append(time.process_time() - start)


def over_mean(times: Sequence[float]) -> float:
    return max(times) * len(times) / sum(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--recompute", choices=["none", "selective", "full"], default="none")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_memory()
    config = ModelConfig.model_validate(MODEL, strict=False)
    layers, costs = len(plan_layers(config)), layer_costs(config, given.length, given.recompute)
    cuts = {
        (stages, name): starts
        for stages in given.stages
        for name, starts in (
            ("by cost", cut(costs, stages)),
            ("equal numbers", tuple(i * layers // stages for i in range(1, stages))),
        )
    }
    parts = {
        key: [Part(config, starts, i, given.length, given.recompute) for i in range(key[0])]
        for key, starts in cuts.items()
    }
    for _ in range(given.rounds + 1):  # the first warms up
        for held in parts.values():
            for part in held:
                part.run()
    columns = "stages | cut | starts | ms by stage | predicted shares | measured | imbalance predicted | measured"
    print(f"| {columns} | largest |")
    print("|" + 9 * "---|")
    for (stages, name), held in parts.items():
        times = [statistics.median(part.times[1:]) for part in held]
        rounds = [over_mean(now) for now in zip(*(part.times[1:] for part in held), strict=True)]
        base = max(statistics.median(part.times[1:]) for part in parts[stages, "by cost"])
        predicted = stage_costs(costs, cuts[stages, name])
        cells = [
            f"{stages} | {name}",
            " ".join(map(str, cuts[stages, name])),
            " ".join(f"{1e3 * t:.0f}" for t in times),
            " ".join(f"{c / sum(predicted):.2f}" for c in predicted),
            " ".join(f"{t / sum(times):.2f}" for t in times),
            f"{imbalance(costs, cuts[stages, name]):.2f}",
            f"{over_mean(times):.2f} ({min(rounds):.2f}-{max(rounds):.2f})",
            f"{max(times) / base:.2f}",
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

"""Switch's claim in small (Fedus et al. 2021, arXiv 2101.03961, section 2.3): with as much work a token, a model that
sends each token to one of several experts reaches the dense model's loss in fewer steps.

    python tools/bench_switch.py configs/run/quickstart.yaml [--steps 400] [--seeds 3] [--runs runs/switch]
        [--figure docs/images/switch-claim.png]

The data must be prepared. A Transformer of four layers, width 128; Switch has eight experts in every other layer, each
as wide as the dense layer that it stands for, with the paper's loss of 0.01. The capacity is 2.0 and not 1.25: it is
of one row of 128 tokens, and 1.25 dropped 15 to 30% of them. The initial weights are as large as the dense model's: the
paper's scale of 0.1 is against 1 / fan-in, here a deviation of 0.028, and the dense layers have 0.02. One process a
run, the same rows, a constant learning rate, so that each step's loss is one that the model would end with. Runs that
are in the folder are not run again. Prints a table; exits 1 where a seed's Switch needs as many steps.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from lamella.config import load_run
from lamella.model.count import count

EVERY = 20
PARTS = {
    "attention": "{mixer: attention, num_heads: 4, num_kv_heads: 4, rope_theta: 10000.0}",
    "dense": "{channel: mlp, d_ff: 256, activation: relu}",
    "switch": "{channel: moe, num_experts: 8, top_k: 1, d_ff: 256, activation: relu, capacity_factor: 2.0,"
    " aux_loss: 0.01}",
}
STACKS = {
    "dense": "[{repeat: 2, layers: [attention/dense, attention/dense]}]",
    "Switch": "[{repeat: 2, layers: [attention/dense, attention/switch]}]",
}


def words_of(kind: str, steps: int, seed: int, runs: Path) -> list[str]:
    model = [f"model.parts.{name}={options}" for name, options in PARTS.items()] + [f"model.stack={STACKS[kind]}"]
    train = {
        "steps": steps + 1,  # the last evaluation takes other rows, so it is one more
        "seed": seed,
        "sequence_length": 128,
        "global_batch_size": 16,
        "optimizer.lr": 3e-3,
        "schedule.kind": "constant",
        "schedule.warmup_steps": 40,
        "evaluate.every": EVERY,
        "evaluate.rows": 64,
        "checkpoint.every": steps + 1,
    }
    words = [f"train.{key}={value}" for key, value in train.items()]
    return [f"name={kind}-{seed}", f"runs={runs}", "layout.micro_batch=16", "tracking.enabled=false", *model, *words]


def held_out(run: Path, words: list[str]) -> tuple[list[int], list[float]]:
    """The steps done at each evaluation, and the held-out losses there, the last one's rows apart."""
    config = load_run(run, words)
    metrics = config.folder / "metrics.jsonl"
    if not metrics.exists() or len(metrics.read_text().splitlines()) < config.train.steps:
        subprocess.run([sys.executable, "-m", "lamella", "train", str(run), *words], check=True)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    found = [(line["step"] + 1, line["heldout_loss"]) for line in lines if "heldout_loss" in line][:-1]
    return [step for step, _ in found], [loss for _, loss in found]


def reached(steps: np.ndarray, loss: np.ndarray, wanted: float) -> float:
    """The step at which the least loss so far falls to `wanted`, between evaluations on a line; nan where never."""
    least = np.minimum.accumulate(loss)
    if least[-1] > wanted:
        return float("nan")
    at = int(np.argmax(least <= wanted))
    if at == 0:
        return float(steps[0])
    share = (least[at - 1] - wanted) / (least[at - 1] - least[at])
    return float(steps[at - 1] + share * (steps[at] - steps[at - 1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/switch"))
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    found: dict[str, np.ndarray] = {}
    steps = np.zeros(0)
    for kind in STACKS:
        curves = []
        for seed in range(args.seeds):
            at, loss = held_out(args.run, words_of(kind, args.steps, seed, args.runs))
            steps = np.array(at)
            curves.append(loss)
        found[kind] = np.array(curves)
        sizes = count(load_run(args.run, words_of(kind, args.steps, 0, args.runs)).model, 128)
        print(f"{kind:<7} {sizes.parameters:,} parameters, {sizes.training_flops / 128e6:.3f} MFLOP a token")
    saved = []
    for seed, (dense, switch) in enumerate(zip(found["dense"], found["Switch"], strict=True)):
        need = reached(steps, switch, dense.min())
        own = reached(steps, dense, dense.min())
        saved.append(need < own)
        print(
            f"seed {seed}: held-out loss dense {dense.min():.4f} at step {own:.0f}, Switch {switch.min():.4f};"
            f" Switch reaches the dense one's at step {need:.0f}, {own / need:.2f} times as fast;"
            f" it is ahead at {(switch < dense).sum()} of {len(steps)} evaluations"
        )
    dense, switch = (found[kind].mean(0) for kind in ("dense", "Switch"))
    own, need = (reached(steps, loss, dense.min()) for loss in (dense, switch))
    print(f"mean of the seeds: Switch reaches the dense one's {dense.min():.4f} {own / need:.2f} times as fast")
    if args.figure:
        draw(args.figure, steps, found)
    sys.exit(not all(saved))


def draw(file: Path, steps: np.ndarray, found: dict[str, np.ndarray]) -> None:
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=(3, 2))
    for (kind, curves), style in zip(found.items(), ("--", "-"), strict=True):
        for loss in curves:
            above.plot(steps, loss, style, color="0.6", linewidth=0.6)
        above.plot(steps, curves.mean(0), style, color="black", label=kind)
    above.set_ylabel("held-out loss, nats a token")
    above.set_title(f"As much work a token; thick: the mean of {len(found['dense'])} seeds", fontsize=10)
    above.legend(fontsize=8)
    for dense, switch in zip(found["dense"], found["Switch"], strict=True):
        least = np.minimum.accumulate(dense)
        ratio = [step / reached(steps, switch, loss) for step, loss in zip(steps, least, strict=True)]
        below.plot(steps, ratio, color="0.5", linewidth=0.8)
    below.axhline(1, color="black", linewidth=0.6)
    below.set_ylabel("dense steps a Switch step\nto the same loss")
    below.set_xlabel("step")
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main()

"""Trains one run under several layouts and shows how far their losses stay from one process's, step by step, against
how far one process stays from itself with other micro-batches.

    python tools/layout_distance.py configs/run/quickstart.yaml [--steps 100] [--figure docs/images/layout-distance.png]

The data must be prepared. Prints a table; exits 1 where a layout's largest distance is more than twice one process's.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

BASE = ("one process, 1 micro-batch", 1, ["layout.micro_batch=8"])
NOISE = ("one process, 4 micro-batches", 1, ["layout.micro_batch=2"])
LAYOUTS = [
    ("tensor 2 x pipeline 2, 1F1B", 4, ["layout.tensor=2", "layout.pipeline=2", "layout.micro_batch=2"]),
    ("expert 2 x data 2, ZeRO 1", 2, ["layout.expert=2", "layout.micro_batch=4"]),
    ("pipeline 2, zero-bubble", 2, ["layout.pipeline=2", "layout.schedule=zbv", "layout.micro_batch=2"]),
    ("data 2, ZeRO 3", 2, ["layout.zero=3", "layout.micro_batch=4"]),
]


def losses(run: Path, folder: Path, number: int, nproc: int, words: list[str], steps: int) -> np.ndarray:
    name = f"layout-{number}"
    command = [sys.executable, "-m", "lamella", "train", str(run), f"name={name}", f"runs={folder}"]
    command += [f"train.steps={steps}", f"train.evaluate.every={steps}", f"train.checkpoint.every={steps}"]
    command += ["train.evaluate.rows=8", "tracking.enabled=false", *words, "--nproc", str(nproc)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return np.array([json.loads(line)["loss"] for line in lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    cases = [BASE, NOISE, *LAYOUTS]
    with tempfile.TemporaryDirectory() as folder:
        found = [losses(args.run, Path(folder), i, n, words, args.steps) for i, (_, n, words) in enumerate(cases)]
    apart = [np.abs(one - found[0]) for one in found[1:]]
    limit = 2 * apart[0].max()
    for (name, _, _), far in zip(cases[1:], apart, strict=True):
        print(f"{name:<32} largest distance {far.max():.2e} nats, mean {far.mean():.2e}, last {far[-1]:.2e}")
    print(f"twice the largest of one process with 4 micro-batches: {limit:.2e}")
    if args.figure:
        draw(args.figure, [name for name, _, _ in cases[1:]], apart, found[0], limit)
    sys.exit(any(far.max() > limit for far in apart[1:]))


def draw(file: Path, names: list[str], apart: list[np.ndarray], loss: np.ndarray, limit: float) -> None:
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=(1, 2))
    above.plot(loss, color="black")
    above.set_ylabel("loss, nats a token")
    above.set_title("One process, 1 micro-batch; below, the others' distance from it", fontsize=10)
    for number, (name, far) in enumerate(zip(names, apart, strict=True)):
        style = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))[number]
        below.semilogy(np.maximum(far, 1e-9), linestyle=style, color=str(0.15 * number), label=name)
    below.axhline(limit, color="black", linewidth=0.6)
    below.text(0, limit * 1.15, "twice the largest of one process with 4 micro-batches", fontsize=8)
    below.set_ylabel("distance in loss, nats a token")
    below.set_xlabel("step")
    below.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main()

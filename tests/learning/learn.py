"""What a nano model of each mixer learns of the two tasks.

    python -m tests.learning.learn TASK MIXER [SEED]

Both are learned from small to large, so that a mixer first meets the rule and then the distance: induction's length
doubles over the first three fifths of the steps; copying begins with one symbol beside as much noise, goes on to 16 one
by one, and only then doubles the length. A step has about as many tokens at every length.
"""

import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Generator, Tensor

from lamella.model.lm import LanguageModel
from lamella.nn.rows import one_document
from tests.learning import nano, tasks

COPIES, COPY_LENGTH = 16, 256
INDUCTION_LENGTH, INDUCTION_LENGTHS = 64, (64, 128, 256, 512, 1024)
DOUBLINGS, GROWN = 3, 0.35  # doublings of the length; the share of the steps after which copying has all its symbols
RATE, ATTENTION_RATE = 5e-3, 3e-3
STEPS, TOKENS = {"copying": 2000, "induction": 350}, {"copying": 1088, "induction": 1024}

Maker = Callable[[int, Generator], tuple[Tensor, Tensor]]


def ramp(task: str, share: float) -> tuple[int, Maker]:
    """At `share` of the training: the tokens of a row, and rows of them."""
    if task == "induction":
        length = INDUCTION_LENGTH >> max(0, DOUBLINGS - int(DOUBLINGS * share / 0.6))
        return length, partial(_induction, length=length)
    copies = min(COPIES, 1 + int((COPIES - 1) * share / GROWN))
    later = int(4 * (share - GROWN) / GROWN)  # a quarter of the time that the symbols took
    length = 2 * copies if copies < COPIES else COPY_LENGTH >> max(0, DOUBLINGS - later)
    return length + copies, partial(_copying, length=length, copies=copies)


def _copying(rows: int, random: Generator, length: int, copies: int) -> tuple[Tensor, Tensor]:
    return tasks.selective_copying(rows, length, copies, random)


def _induction(rows: int, random: Generator, length: int) -> tuple[Tensor, Tensor]:
    return tasks.induction_heads(rows, length, random)


def learned(task: str, mixer: str, seed: int = 0) -> LanguageModel:
    steps = STEPS[task]

    def batches(step: int) -> list[nano.Batch]:
        length, make = ramp(task, step / steps)
        random = Generator().manual_seed(seed * 10**6 + step)
        return [nano.alone(*make(TOKENS[task] // length, random))]

    top = ATTENTION_RATE if mixer == "attention" else RATE

    def rate(step: int) -> float:
        return top * min((step + 1) / 30, 1, 5 * (steps - step) / steps)

    model = nano.build(mixer, tasks.VOCAB, seed=seed)
    nano.train(model, batches, steps, rate)
    return model


@torch.no_grad()
def share_right(model: LanguageModel, make: Maker, rows: int) -> float:
    """On rows that no training saw."""
    tokens, targets = make(rows, Generator().manual_seed(10**9))
    logits = torch.cat([model(part, one_document(part)) for part in tokens.split(16)])
    return tasks.accuracy(logits, targets)


def copying(mixer: str, seed: int = 0) -> float:
    """The share of the 16 symbols told rightly behind 256 tokens."""
    return share_right(learned("copying", mixer, seed), ramp("copying", 1.0)[1], 64)


def induction(mixer: str, seed: int = 0) -> dict[int, float]:
    """By length, trained at up to 64."""
    model = learned("induction", mixer, seed)
    return {n: share_right(model, partial(_induction, length=n), 128) for n in INDUCTION_LENGTHS}


if __name__ == "__main__":
    torch.set_num_threads(1)
    start = time.process_time()
    found = {"copying": copying, "induction": induction}[sys.argv[1]](sys.argv[2], *map(int, sys.argv[3:]))
    print(*sys.argv[1:], found, f"{time.process_time() - start:.0f} s of processor time")

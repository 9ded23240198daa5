"""What a nano model of each mixer learns of the two tasks.

    python -m tests.learning.learn TASK MIXER

Both are learned from small to large: the length doubles a few times over the first three fifths of the steps, so that a
mixer first meets the rule and then the distance. A step has about as many tokens at every length.
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
DOUBLINGS = {"copying": 4, "induction": 3}
RATE, ATTENTION_RATE = 5e-3, 3e-3
STEPS, TOKENS = {"copying": 600, "induction": 350}, {"copying": 2176, "induction": 1024}

Maker = Callable[[int, Generator], tuple[Tensor, Tensor]]


def ramp(task: str, share: float) -> tuple[int, Maker]:
    """At `share` of the training: the tokens of a row, and rows of them."""
    most = DOUBLINGS[task]
    less = max(0, most - int(most * share / 0.6))
    if task == "induction":
        length = INDUCTION_LENGTH >> less
        return length, partial(_induction, length=length)
    length, copies = COPY_LENGTH >> less, max(2, COPIES >> less)
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


def copying(mixer: str) -> float:
    """The share of the 16 symbols told rightly behind 256 tokens."""
    return share_right(learned("copying", mixer), ramp("copying", 1.0)[1], 64)


def induction(mixer: str) -> dict[int, float]:
    """By length, trained at up to 64."""
    model = learned("induction", mixer)
    return {n: share_right(model, partial(_induction, length=n), 128) for n in INDUCTION_LENGTHS}


if __name__ == "__main__":
    torch.set_num_threads(1)
    start = time.process_time()
    found = {"copying": copying, "induction": induction}[sys.argv[1]](sys.argv[2])
    print(*sys.argv[1:], found, f"{time.process_time() - start:.0f} s of processor time")

"""The recorded loss curves: how they are made, and the command that records them anew.

    python -m tests.learning.golden

The text is the project's own LICENSE, byte by byte, so that it is the same everywhere; a paragraph is a document. The
curves are of fp64: the norm of a head that nearly cancels blows its rounding up, and RetNet and RWKV-6 turn fp32's 1e-7
into a few 1e-2 within the steps.
"""

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch

from lamella.model.lm import LanguageModel
from lamella.nn.rows import Rows
from tests.learning import nano

FILE = Path(__file__).with_name("golden.json")
TEXT = Path(__file__).parent.parent.parent / "LICENSE"
DIGEST = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
STEPS, ROWS, LENGTH = 80, 8, 64
AT = (0, 1, 2, 3, 5, 7, 9, 14, 19, 29, 39, 49, 59, 69, 79)  # the steps that are recorded
SHORT = {"retention": 40, "rwkv6": 40}  # beyond, even fp64's rounding grows: what is compared of these
RWKV = {"norm": "layer", "norm_eps": 1e-5, "embedding_norm": True}
MOE = {"channel": "moe", "num_experts": 4, "top_k": 2, "d_ff": 64, "aux_loss": 0.01, "z_loss": 0.001}
CASES = {
    "attention": {"mixer": "attention"},
    "attention-moe": {"mixer": "attention", "channel": MOE},
    "mamba": {"mixer": "mamba"},
    "mamba2": {"mixer": "mamba2"},
    "retention": {"mixer": "retention"},
    "rwkv6": {"mixer": "rwkv6", "channel": {"channel": "rwkv", "version": 6, "d_ff": 224}, **RWKV},
    "rwkv7": {"mixer": "rwkv7", "channel": {"channel": "rwkv", "version": 7, "d_ff": 256}, **RWKV},
}

Change = Callable[[LanguageModel], None]


def text() -> bytes:
    found = TEXT.read_bytes()
    assert hashlib.sha256(found).hexdigest() == DIGEST, f"{TEXT.name} has changed: record the curves anew"
    return found


@functools.cache
def documents() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of every byte: itself, the number of its paragraph, its place in it."""
    tokens, document, position = list(text()), [], []
    for i, byte in enumerate(tokens):
        starts = i == 0 or (tokens[i - 2 : i] == [10, 10] and byte != 10)
        document.append(0 if i == 0 else document[-1] + starts)
        position.append(0 if starts else position[-1] + 1)
    return torch.tensor(tokens), torch.tensor(document, dtype=torch.int32), torch.tensor(position, dtype=torch.int32)


def batches(step: int, parts: int) -> list[nano.Batch]:
    """The next `ROWS` rows of the text, from its start again at its end; a row starts its first document anew."""
    tokens, document, position = documents()
    start = step * ROWS * LENGTH % (len(tokens) - ROWS * LENGTH - 1)
    here = slice(start, start + ROWS * LENGTH)
    now, then = tokens[here].view(ROWS, LENGTH), tokens[start + 1 : here.stop + 1].view(ROWS, LENGTH)
    number, place = document[here].view(ROWS, LENGTH), position[here].view(ROWS, LENGTH)
    ends = document[start + 1 : here.stop + 1].view(ROWS, LENGTH) != number
    first = number == number[:, :1]
    place = torch.where(first, place - place[:, :1], place)
    number = number - number[:, :1]
    pieces = (t.chunk(parts) for t in (now, then.masked_fill(ends, -1), number, place))
    return [(x, y, Rows(d, p, loss_scale=1 / ROWS)) for x, y, d, p in zip(*pieces, strict=True)]


def curve(
    case: str, steps: int = STEPS, *, dtype: torch.dtype = torch.float64, parts: int = 1, change: Change | None = None
) -> list[float]:
    """The losses of the first steps; `parts`: micro-batches a step; `change` does something to the model first."""
    model = nano.build(vocab=256, dtype=dtype, **CASES[case])
    if change is not None:
        change(model)
    return nano.train(model, lambda step: batches(step, parts), steps, lambda step: 3e-3 * min(1, (step + 1) / 10))


def record() -> None:
    torch.set_num_threads(1)
    curves = {case: [round(loss, 10) for step, loss in enumerate(curve(case)) if step in AT] for case in CASES}
    FILE.write_text(json.dumps({"steps": AT, "curves": curves}, indent=1) + "\n")


if __name__ == "__main__":
    record()

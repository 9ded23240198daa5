"""Two tasks of the Mamba paper (Gu & Dao 2023, arXiv 2312.00752, section 4.1), made from a seed alone.

Both give (tokens, targets), int64 [B, T]; a target is -1 where nothing is asked.
"""

import torch
from torch import Generator, Tensor

SYMBOLS = 16  # that carry something, 0 ... 15; noise and the mark come behind them
NOISE, MARK = SYMBOLS, SYMBOLS + 1
VOCAB = SYMBOLS + 2


def selective_copying(rows: int, length: int, copies: int, random: Generator) -> tuple[Tensor, Tensor]:
    """`copies` symbols scattered over `length` tokens of noise, then as many marks, each to be answered by the next
    symbol: T = length + copies. Where the symbols lie differs by row, so what is to be kept depends on the input.
    """
    place = torch.rand(rows, length, generator=random).argsort(1)[:, :copies].sort(1).values
    symbols = torch.randint(SYMBOLS, (rows, copies), generator=random)
    tokens = torch.full((rows, length + copies), NOISE)
    tokens.scatter_(1, place, symbols)
    tokens[:, length:] = MARK
    targets = torch.full_like(tokens, -1)
    targets[:, length:] = symbols
    return tokens, targets


def induction_heads(rows: int, length: int, random: Generator) -> tuple[Tensor, Tensor]:
    """Symbols with one mark among them; the last token is the mark again, and what followed it the first time is to be
    said. T = length.
    """
    tokens = torch.randint(SYMBOLS, (rows, length), generator=random)
    place = torch.randint(length - 2, (rows, 1), generator=random)
    tokens.scatter_(1, place, MARK)
    tokens[:, -1] = MARK
    targets = torch.full_like(tokens, -1)
    targets[:, -1:] = tokens.gather(1, place + 1)
    return tokens, targets


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """The share of what is asked that the likeliest token answers."""
    asked = targets >= 0
    return float((logits.argmax(-1)[asked] == targets[asked]).double().mean())

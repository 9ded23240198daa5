"""Rows of packed documents as tensors.

A piece of a document has inputs [eod] + ids and targets ids + [eod]; a later piece of a long document begins with the
token before it instead of eod. So each stored token is a target where its piece is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

NO_TARGET = -100  # cross_entropy's ignore_index
PADDING = -1

Piece = tuple[int, int, np.ndarray]  # source; the token before it, or -1; its tokens


@dataclass(frozen=True)
class Batch:
    """Five int32 tensors [B, T].

    tokens: ids; eod on padding. targets: the id to predict, -100 on padding. document: 0, 1, ... inside the row, -1 on
    padding. position: 0, 1, ... inside the document; padding counts from 0 too, as if it were one more document.
    source: the document's; -1 on padding.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    document: torch.Tensor
    position: torch.Tensor
    source: torch.Tensor

    def pin(self) -> "Batch":
        """In memory that a GPU reads while the CPU goes on."""
        return Batch(*(tensor.pin_memory() for tensor in vars(self).values()))

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in vars(self).values()))


def assemble(rows: Sequence[Sequence[Piece]], length: int, eod: int, size: int) -> Batch:
    """A Batch [size, length] of rows made of pieces; rows beyond them are all padding."""
    tokens = np.full((size, length), eod, np.int32)
    targets = np.full((size, length), NO_TARGET, np.int32)
    document = np.full((size, length), PADDING, np.int32)
    source = np.full((size, length), PADDING, np.int32)
    position = np.empty((size, length), np.int32)
    count = np.arange(length, dtype=np.int32)
    for b in range(size):
        begin = 0
        for number, (origin, before, ids) in enumerate(rows[b] if b < len(rows) else ()):
            end = begin + len(ids)
            targets[b, begin:end] = ids
            tokens[b, begin + 1 : end] = ids[:-1]
            if before >= 0:
                tokens[b, begin] = before
            document[b, begin:end] = number
            source[b, begin:end] = origin
            position[b, begin:end] = count[: end - begin]
            begin = end
        position[b, begin:] = count[: length - begin]
    return Batch(*map(torch.from_numpy, (tokens, targets, document, position, source)))

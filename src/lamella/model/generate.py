"""Text goes on token by token: a batch of documents, each at its own position, with the mixers' states in between.

A prompt is the beginning of a document, so its ids come behind an eod, as in training rows. Prompts of different
lengths are aligned at their ends: what is before them in a row is one more document, of padding, and the mixers keep
documents apart anyway. From then on each call computes one token a row, at a cost that depends on what the mixers keep:
none on the length for a recurrence, linear for attention, up to its window.

A row's choices are a pure function of (seed, the row's number, the token's position): not of the batch it is in.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lamella.errors import UserError
from lamella.mixers.base import State
from lamella.model.lm import LanguageModel
from lamella.nn.draw import Draw
from lamella.nn.rows import Rows
from lamella.nn.shard import wide

CHUNK = 256  # tokens a row that a prompt is read in: bounds the memory


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: from softmax(logits / temperature), cut to the `top_k` likeliest ids and then to the
    fewest whose chances add up to `top_p` (Holtzman et al. 2020, arXiv 1904.09751). Temperature 0 takes the likeliest.
    """

    temperature: float = 0.8
    top_p: float = 1.0  # in (0, 1]; 1: no cut
    top_k: int = 0  # 0: no cut
    seed: int = 0

    def __post_init__(self) -> None:
        assert self.temperature >= 0 and 0 < self.top_p <= 1 and self.top_k >= 0, self


GREEDY = Sampling(temperature=0)


class Generation:
    """Documents being continued together.

    `rows` are the numbers of those still in the batch: their places in `prompts`, counted from `first`. `step` gives
    each its next id; `leave` takes rows out. Ids from `vocab_size` on, which no text has, are never chosen.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        eod: int,
        vocab_size: int,
        sampling: Sampling,
        first: int = 0,
    ):
        self.model, self.vocab_size, self.sampling = model, vocab_size, sampling
        self.rows = list(range(first, first + len(prompts)))
        self.device = model.norm.weight.device
        self._states: dict[str, State] = {}
        self._position_B = torch.tensor([len(ids) + 1 for ids in prompts], device=self.device)  # of the next token
        self._token_B: Tensor | None = None  # chosen, not yet read
        self._logits_BV = self._read(prompts, eod)

    @torch.inference_mode()
    def step(self) -> list[tuple[int, int]]:
        """The next id of every row that has not left, as (row, id).

        Raises UserError where the logits are not finite.
        """
        if self._token_B is not None:
            position_B1 = (self._position_B - 1).int()[:, None]
            self._logits_BV = self._forward(self._token_B[:, None], Rows(torch.zeros_like(position_B1), position_B1))
        logits_BV = wide(self._logits_BV[:, : self.vocab_size])
        if not logits_BV.amax(-1).isfinite().all():
            raise UserError("the model's outputs are not finite: its training diverged; take an earlier checkpoint")
        self._token_B = choose(logits_BV, self.sampling, torch.tensor(self.rows, device=self.device), self._position_B)
        self._position_B = self._position_B + 1
        return list(zip(self.rows, self._token_B.tolist(), strict=True))

    @torch.inference_mode()
    def leave(self, rows: Iterable[int]) -> None:
        """Takes rows out of the batch, and what is kept of them."""
        gone = set(rows)
        if not gone:
            return
        kept = torch.tensor([i for i, row in enumerate(self.rows) if row not in gone], device=self.device).long()
        self.rows = [row for row in self.rows if row not in gone]
        self._position_B, self._logits_BV = self._position_B[kept], self._logits_BV[kept]
        if self._token_B is not None:
            self._token_B = self._token_B[kept]
        for state in self._states.values():
            for name, value_BX in state.items():
                state[name] = value_BX[kept]

    @torch.inference_mode()
    def _read(self, prompts: Sequence[Sequence[int]], eod: int) -> Tensor:
        """The logits [B, V] behind the prompts, aligned at their ends."""
        length = 1 + max(len(ids) for ids in prompts)
        token_BT = torch.full((len(prompts), length), eod, dtype=torch.int32)
        document_BT = torch.full_like(token_BT, -1)
        position_BT = torch.arange(length, dtype=torch.int32).repeat(len(prompts), 1)
        for b, ids in enumerate(prompts):
            begin = length - 1 - len(ids)
            token_BT[b, begin + 1 :] = torch.tensor(ids, dtype=torch.int32)
            document_BT[b, begin:] = 0
            position_BT[b, begin:] -= begin
        pieces = (t.to(self.device).split(CHUNK, dim=1) for t in (token_BT, document_BT, position_BT))
        for token, document, position in zip(*pieces, strict=True):
            logits_BV = self._forward(token, Rows(document, position))
        return logits_BV

    def _forward(self, token_BT: Tensor, rows: Rows) -> Tensor:
        """The logits [B, V] of the last tokens; `LanguageModel.forward` makes those of all, [B, T, V]."""
        x_BTD = self.model.embedding(token_BT)
        for name, layer in self.model.layers.items():
            x_BTD = layer(x_BTD, rows, self._states.setdefault(name, {}))
        return self.model.head(self.model.norm(x_BTD[:, -1]))


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    eod: int,
    vocab_size: int,
    max_tokens: int,
    sampling: Sampling,
) -> list[list[int]]:
    """What each prompt goes on with, up to its eod (left out) or `max_tokens` ids."""
    out: list[list[int]] = [[] for _ in prompts]
    batch = Generation(model, prompts, eod, vocab_size, sampling)
    while batch.rows and max_tokens:
        step = dict(batch.step())
        for row, token in step.items():
            if token != eod:
                out[row].append(token)
        batch.leave(row for row, token in step.items() if token == eod or len(out[row]) == max_tokens)
    return out


def choose(logits_BV: Tensor, sampling: Sampling, row_B: Tensor, position_B: Tensor) -> Tensor:
    """One id a row, [B], by the row's number and the position of the token that is chosen."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV.double()
    # From the largest, 0, down: whatever the temperature, no infinity meets another.
    scores_BV = _cut((logits_BV - logits_BV.amax(-1, keepdim=True)) / sampling.temperature, sampling)
    below_BV = scores_BV.softmax(-1).cumsum(-1)
    # In the order of the ids, so that two ids of nearly the same chance never trade places.
    point_B1 = _uniform(sampling.seed, row_B, position_B)[:, None] * below_BV[:, -1:]
    return torch.searchsorted(below_BV, point_B1, right=True).squeeze(1)


def _cut(scores_BV: Tensor, sampling: Sampling) -> Tensor:
    """Minus infinity for the ids that are not to be drawn; the likeliest one always stays."""
    if 0 < sampling.top_k < scores_BV.shape[1]:
        least_B1 = scores_BV.topk(sampling.top_k).values[:, -1:]
        scores_BV = scores_BV.masked_fill(scores_BV < least_B1, -torch.inf)
    if sampling.top_p < 1:
        falling_BV, order_BV = scores_BV.sort(descending=True, stable=True)
        chance_BV = falling_BV.softmax(-1)
        above_BV = chance_BV.cumsum(-1) - chance_BV  # the chance of all that are likelier
        gone_BV = (above_BV >= sampling.top_p).scatter(1, order_BV, above_BV >= sampling.top_p)
        scores_BV = scores_BV.masked_fill(gone_BV, -torch.inf)
    return scores_BV


def _uniform(seed: int, row_B: Tensor, position_B: Tensor) -> Tensor:
    """[B] in [0, 1), fp64 with 48 random bits."""
    both_BB2 = Draw(seed, 0, row_B).uniform("sampling", position_B, 2)
    both_B2 = both_BB2.diagonal().T.double()  # of every row at every row's position, its own
    return both_B2[:, 0] + both_B2[:, 1] * 2**-24

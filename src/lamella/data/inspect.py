"""What prepared data is in numbers, and what its first steps are: packing, mixture and balance, all from the plans; and
one row as text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lamella.data.deal import deal
from lamella.data.plan import Plan
from lamella.data.steps import Steps
from lamella.data.store.manifest import Prepared

SHARES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)


@dataclass(frozen=True)
class Source:
    """Of the training split, but `duplicates` and `skipped`, which are of all that was read.

    `planned` and `drawn` are shares of the tokens, `drawn` over the steps looked at, `epochs` how often those steps
    go through the source.
    """

    name: str
    documents: int
    tokens: int
    text_bytes: int | None
    duplicates: int
    skipped: dict[str, int]
    planned: float
    drawn: float
    epochs: float


@dataclass(frozen=True)
class Lengths:
    """Tokens a document, its eod included. `counts` documents and `tokens` tokens lie at edges[i] <= n < edges[i + 1];
    `quantiles` by share of the documents.
    """

    mean: float
    longest: int
    quantiles: dict[float, int]
    edges: np.ndarray
    counts: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True)
class Packing:
    """Of a plan's rows. `padding` and `cut` are shares, of the slots and of the documents; `avoidable` counts documents
    that are cut though they fit a row, `discarded` tokens that are in no row.
    """

    rows: int
    documents: int
    padding: float
    cut: float
    avoidable: int
    discarded: int


@dataclass(frozen=True)
class Balance:
    """The dearest rank's cost over the mean, by step: dealt by cost, and in order."""

    ranks: int
    dealt: np.ndarray
    in_order: np.ndarray


@dataclass(frozen=True)
class Look:
    """`padding` by step, a share of the slots; `drawn` tokens by step and source, int64 [steps, sources]."""

    sequence_length: int
    rows_per_step: int
    sources: list[Source]
    lengths: Lengths
    packing: Packing
    rows_per_epoch: int
    padding: np.ndarray
    drawn: np.ndarray
    balance: Balance


def look(prepared: Prepared, steps: Steps, sequence_length: int, count: int, ranks: int) -> Look:
    """Looks at the first `count` steps; `ranks` divides their rows."""
    entries, files = prepared.manifest.sources, [splits["train"] for splits in prepared.sources.values()]
    drawn = np.array([steps.source_counts(step) for step in range(count)], np.int64)
    per_step = len(steps.step_rows(0))
    slots = per_step * sequence_length
    plan = steps.plans.plan(0)
    stored = [file.lengths for file in files]
    tokens = sum(int(some.sum(dtype=np.int64)) for some in stored)
    sources = []
    for number, (name, entry) in enumerate(entries.items()):
        train, mine = entry.splits["train"], int(drawn[:, number].sum())
        sources.append(
            Source(
                name,
                train.documents,
                train.tokens,
                train.text_bytes,
                entry.duplicates,
                entry.skipped,
                planned=steps.shares[number],
                drawn=mine / int(drawn.sum()),
                epochs=mine / train.tokens if train.tokens else 0.0,
            )
        )
    return Look(
        sequence_length,
        per_step,
        sources,
        lengths_of(np.concatenate(stored)),
        packing_of(plan, stored),
        rows_per_epoch=-(-tokens * plan.num_rows // int(plan.targets[-1])),
        padding=1 - drawn.sum(axis=1) / slots,
        drawn=drawn,
        balance=balance_of([steps.costs(step) for step in range(count)], ranks),
    )


def lengths_of(lengths: np.ndarray) -> Lengths:
    """`lengths`: int [documents], at least one. The edges are powers of two."""
    longest = int(lengths.max())
    edges = 2 ** np.arange(int(lengths.min()).bit_length() - 1, longest.bit_length() + 1)
    ordered = np.sort(lengths)
    quantiles = {share: int(ordered[min(len(ordered) - 1, int(share * len(ordered)))]) for share in SHARES}
    counts, tokens = (np.histogram(lengths, edges, weights=weights)[0] for weights in (None, lengths.astype(np.int64)))
    return Lengths(float(lengths.mean()), longest, quantiles, edges, counts, tokens)


def packing_of(plan: Plan, lengths: Sequence[np.ndarray]) -> Packing:
    """`lengths` of the stored documents by source."""
    first = plan.offset == 0
    stored = np.empty(int(first.sum()), np.int64)
    for number, some in enumerate(lengths):
        here = plan.source[first] == number
        stored[here] = some[plan.document[first][here]]
    cut = plan.length[first] < stored
    filled = int(plan.targets[-1])
    return Packing(
        rows=plan.num_rows,
        documents=len(stored),
        padding=1 - filled / (plan.num_rows * plan.sequence_length),
        cut=float(cut.mean()),
        avoidable=int((cut & (stored <= plan.sequence_length)).sum()),
        discarded=int(stored.sum()) - filled,
    )


def balance_of(costs: Sequence[np.ndarray], ranks: int) -> Balance:
    """`costs` by step, int64 [rows]; `ranks` divides the rows."""
    dealt = [over_mean(some[deal(some, ranks)]) for some in costs]
    return Balance(ranks, np.array(dealt), np.array([over_mean(some.reshape(ranks, -1)) for some in costs]))


def squared(lengths: np.ndarray) -> np.ndarray:
    """What attention over whole documents costs: a RowCost."""
    return lengths.astype(np.int64) ** 2


def over_mean(costs: np.ndarray) -> float:
    """The largest rank's over the mean, of costs [ranks, rows]."""
    loads = costs.sum(axis=1)
    return float(loads.max() / loads.mean())


@dataclass(frozen=True)
class PieceText:
    """Slots begin to begin + length of a row: tokens offset to offset + length of a stored document of `stored`."""

    source: str
    document: int
    offset: int
    length: int
    stored: int
    begin: int
    text: str


def find_step(steps: Steps, row: int, rows_per_step: int, window: int) -> tuple[int, int]:
    """The step that trains a row of the run, and the row's place in it."""
    block = row // (rows_per_step * window)
    for step in range(block * window, (block + 1) * window):
        here = np.flatnonzero(steps.step_rows(step) == row)
        if len(here):
            return step, int(here[0])
    raise AssertionError(f"row {row} is in no step")


def row_text(prepared: Prepared, steps: Steps, row: int) -> Iterator[PieceText]:
    """What a row of the run holds, document by document. Raises Damaged."""
    plan, place = steps.plans.find(row)
    files, begin = [splits["train"] for splits in prepared.sources.values()], 0
    for source, document, offset, length in plan.pieces(place):
        ids = files[source].read(document, offset, length).tolist()
        stored = int(files[source].lengths[document])
        text = prepared.tokenizer.decode(ids)
        yield PieceText(steps.names[source], document, offset, length, stored, begin, text)
        begin += length

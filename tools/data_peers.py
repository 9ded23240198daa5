"""What others do with documents and rows, for tools/bench_data.py: three ways to pack, small and plain, a search for
the best deal, and megatron-core's own GPTDataset.
"""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

Step = np.ndarray  # costs of a step's rows, int64


class Packed(NamedTuple):
    """`rows` made; documents that are cut though they fit a row; tokens that are in no row."""

    rows: int
    avoidable: int
    discarded: int


def concat_and_chunk(lengths: np.ndarray, row: int) -> Packed:
    """All documents one behind the other, cut every `row` tokens (Megatron's GPTDataset, nanotron)."""
    ends = np.cumsum(lengths, dtype=np.int64)
    begins = ends - lengths
    cut = (begins // row != (ends - 1) // row) & (lengths <= row)
    return Packed(int(ends[-1]) // row, int(cut.sum()), int(ends[-1]) % row)


def next_fit(lengths: np.ndarray, row: int) -> Packed:
    """A document that does not fit the open row closes it. Longer ones are cut into whole rows first, as by ours."""
    full, rest = np.divmod(lengths, row)
    rows, left = int(full.sum()), 0
    for length in rest[rest > 0].tolist():
        if length > left:
            rows, left = rows + 1, row
        left -= length
    return Packed(rows, 0, 0)


def first_fit(lengths: np.ndarray, row: int, bins: int = 8) -> Packed:
    """Into the first of the open rows that holds it; where none does, the oldest is closed (Grain, torchtitan)."""
    full, rest = np.divmod(lengths, row)
    rows, open_rows = int(full.sum()), []
    for length in rest[rest > 0].tolist():
        for number, left in enumerate(open_rows):
            if length <= left:
                open_rows[number] -= length
                break
        else:
            rows += 1
            if len(open_rows) == bins:
                del open_rows[0]
            open_rows.append(row - length)
    return Packed(rows, 0, 0)


def lower_bound(costs: Step, ranks: int) -> int:
    """No deal of as many rows to each rank costs its dearest rank less.

    The mean; and of the ranks * j + 1 dearest rows some rank has j + 1, whose others cost at least the cheapest.
    """
    each, up = len(costs) // ranks, np.sort(costs)
    found = -(-int(costs.sum()) // ranks)
    for j in range(each):
        cheapest = int(up[: each - j - 1].sum())
        found = max(found, (j + 1) * int(up[-(ranks * j + 1)]) + cheapest)
    return found


def search(costs: Step, ranks: int, seconds: float, start: np.ndarray, seed: int = 0) -> tuple[int, bool]:
    """The cheapest dearest rank that is found in `seconds` of processor time, and whether none is cheaper.

    Local search with restarts. A descent exchanges that row of the dearest rank with that of any other which lowers
    the larger of the two loads most, until none does. It starts from `start` (our own deal, so the search is never
    worse), then nine times of ten from the best so far with a few random exchanges, else from a random deal.
    """
    rng, end = np.random.default_rng(seed), time.process_time() + seconds
    bound = lower_bound(costs, ranks)
    dealt = start.copy()
    least, best = _descend(dealt, costs), dealt
    while least > bound and time.process_time() < end:
        if rng.random() < 0.1:
            dealt = rng.permutation(len(costs)).reshape(ranks, -1)
        else:
            dealt = best.copy()
            for a, b in rng.integers(len(costs), size=(int(rng.integers(1, 6)), 2)):
                flat = dealt.reshape(-1)
                flat[a], flat[b] = flat[b], flat[a]
        found = _descend(dealt, costs)
        if found <= least:
            least, best = found, dealt
    return least, least <= bound


def _descend(dealt: np.ndarray, costs: Step) -> int:
    """Changes `dealt` until no exchange helps; returns the dearest rank's cost."""
    ranks, each = dealt.shape
    held = costs[dealt]
    loads = held.sum(axis=1)
    while True:
        full = int(loads.argmax())
        less = held[full][:, None] - held.reshape(1, -1)
        after = np.maximum(loads[full] - less, np.repeat(loads, each) + less)
        after[:, full * each : (full + 1) * each] = loads[full]
        mine, theirs = divmod(int(after.argmin()), ranks * each)
        if after[mine, theirs] >= loads[full]:
            return int(loads[full])
        other, place = divmod(theirs, each)
        for table in (dealt, held):
            table[full, mine], table[other, place] = table[other, place], table[full, mine]
        loads[full] -= less[mine, theirs]
        loads[other] += less[mine, theirs]


def gpt_dataset(prefix: Path, row: int, vocab_size: int, eod: int, reset: bool, cache: Path) -> Any:
    """megatron-core's GPTDataset over PREFIX.bin and .idx, one epoch; dataset[i] is a row.

    With `reset`, positions and the dense attention mask start anew at each document; without, it makes no mask, which
    is its fastest way.
    """
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    tokenizer: Any = SimpleNamespace(vocab_size=vocab_size, eod=eod, pad=-1, unique_identifiers={"tokenizer": "ours"})
    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=row,
        blend=([str(prefix)], None),
        split="1,0,0",
        path_to_cache=str(cache),
        tokenizer=tokenizer,
        reset_position_ids=reset,
        reset_attention_mask=reset,
        eod_mask_loss=False,
        create_attention_mask=reset,
    )
    stored = GPTDataset.build_low_level_dataset(str(prefix), config)
    documents = np.arange(GPTDataset.numel_low_level_dataset(stored), dtype=np.int32)
    return GPTDataset(stored, str(prefix), documents, None, Split.train, config)

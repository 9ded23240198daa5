"""The plan covers each stored token once, cuts nothing that fits, pads little, and depends on its arguments alone."""

import hashlib

import numpy as np
import pytest

from lamella.data.plan import Plans, plan_once
from lamella.data.shuffle import permutation


def realistic(documents: int, median: float, spread: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.maximum(2, np.exp(rng.normal(np.log(median), spread, documents))).astype(np.int32)


def plan(lengths, sequence_length, seed=0, epoch=0):
    return Plans([lengths], None, sequence_length, seed).plan(epoch)


def all_pieces(plan):
    return [(row, *piece) for row in range(plan.num_rows) for _, *piece in plan.pieces(row)]


@pytest.mark.parametrize("sequence_length", [1, 2, 7, 64, 1000, 10**6])
def test_every_token_once_and_nothing_that_fits_is_cut(sequence_length):
    lengths = realistic(700, 60, 1.5)
    for found in (plan(lengths, sequence_length, seed=3, epoch=1), plan_once([lengths], sequence_length)):
        seen = [np.zeros(n, int) for n in lengths]
        filled = np.zeros(found.num_rows, int)
        for row, document, offset, length in all_pieces(found):
            seen[document][offset : offset + length] += 1
            filled[row] += length
            if lengths[document] <= sequence_length:
                assert length == lengths[document]
            assert offset % sequence_length == 0
        assert all((s == 1).all() for s in seen)
        assert filled.min() > 0 and filled.max() <= sequence_length
        assert (np.diff(found.targets) == filled).all()


@pytest.mark.parametrize(
    ("documents", "median", "spread", "lengths"),
    [(20_000, 2142, 1.4, (256, 2048, 8192)), (60_000, 600, 1.2, (256, 2048, 8192))],
)
def test_little_padding(documents, median, spread, lengths):
    stored = realistic(documents, median, spread)
    for sequence_length in lengths:
        found = plan(stored, sequence_length)
        assert 1 - stored.sum() / (found.num_rows * sequence_length) < 0.001


def test_the_plan_is_a_function_of_seed_and_epoch():
    lengths = realistic(500, 60, 1.0)
    plans = {key: plan(lengths, 256, *key) for key in [(0, 0), (0, 1), (1, 0)]}
    again = plan(lengths.astype(np.int64), 256, 0, 0)
    assert all_pieces(again) == all_pieces(plans[0, 0])
    assert all_pieces(plans[0, 1]) != all_pieces(plans[0, 0]) != all_pieces(plans[1, 0])


def test_the_plan_never_changes():
    """A run resumed under a later version must find its rows: a change here breaks the resumption of every run."""
    assert permutation(8, 5, 2).tolist() == PERMUTATION
    pieces = all_pieces(plan(np.arange(2, 302), 128, seed=5, epoch=2))
    assert hashlib.sha256(str(pieces).encode()).hexdigest()[:16] == PLAN
    mixed = Plans([np.arange(2, 302), np.arange(1, 90)], [1, 2.5], 128, 5).plan(3)
    pieces = [list(mixed.pieces(row)) for row in range(mixed.num_rows)]
    assert hashlib.sha256(str(pieces).encode()).hexdigest()[:16] == MIXED


def test_the_order_is_even():
    """Each document is as likely early as late."""
    places = np.mean([np.argsort(permutation(50, 0, epoch)) for epoch in range(400)], axis=0)
    assert abs(places - 24.5).max() < 4 * 14.4 / 20  # 4 standard errors of a uniform place's mean


def test_long_documents_do_not_stand_in_consecutive_rows():
    lengths = np.array([50_000] + [100] * 500)
    rows = [row for row, document, *_ in all_pieces(plan(lengths, 100)) if document == 0]
    assert np.diff(sorted(rows)).max() > 3


PERMUTATION = [1, 6, 3, 0, 7, 5, 2, 4]
PLAN = "674196f449f89851"
MIXED = "66f8afff61acd711"

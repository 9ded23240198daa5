"""The plan covers each stored token once, cuts nothing that fits, pads little, and depends on its arguments alone."""

import hashlib

import numpy as np
import pytest

from lamella.data.pack import permutation, plan_epoch


def realistic(documents: int, median: float, spread: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.maximum(2, np.exp(rng.normal(np.log(median), spread, documents))).astype(np.int32)


def all_pieces(plan):
    return [(row, *piece) for row in range(plan.num_rows) for piece in plan.pieces(row)]


@pytest.mark.parametrize("sequence_length", [1, 2, 7, 64, 1000, 10**6])
def test_every_token_once_and_nothing_that_fits_is_cut(sequence_length):
    lengths = realistic(700, 60, 1.5)
    plan = plan_epoch(lengths, sequence_length, seed=3, epoch=1)
    seen = [np.zeros(n, int) for n in lengths]
    filled = np.zeros(plan.num_rows, int)
    for row, document, offset, length in all_pieces(plan):
        seen[document][offset : offset + length] += 1
        filled[row] += length
        assert length == lengths[document] if lengths[document] <= sequence_length else offset % sequence_length == 0
    assert all((s == 1).all() for s in seen)
    assert filled.min() > 0 and filled.max() <= sequence_length
    assert (np.diff(plan.targets) == filled).all()
    assert plan.target_count(0, plan.num_rows) == lengths.sum()


@pytest.mark.parametrize("sequence_length", [256, 2048, 8192])
@pytest.mark.parametrize(("documents", "median", "spread"), [(20_000, 2142, 1.4), (30_000, 600, 1.0)])
def test_little_padding(sequence_length, documents, median, spread):
    lengths = realistic(documents, median, spread)
    plan = plan_epoch(lengths, sequence_length, seed=0, epoch=0)
    assert 1 - lengths.sum() / (plan.num_rows * sequence_length) < 0.005


def test_the_plan_is_a_function_of_seed_and_epoch():
    lengths = realistic(500, 60, 1.0)
    plans = {key: plan_epoch(lengths, 256, *key) for key in [(0, 0), (0, 1), (1, 0)]}
    again = plan_epoch(lengths.astype(np.int64), 256, 0, 0)
    assert all_pieces(again) == all_pieces(plans[0, 0])
    assert all_pieces(plans[0, 1]) != all_pieces(plans[0, 0]) != all_pieces(plans[1, 0])


def test_the_plan_never_changes():
    """A run resumed under a later version must find its rows: a change here breaks the resumption of every run."""
    plan = plan_epoch(np.arange(2, 302), 128, seed=5, epoch=2)
    assert permutation(8, 5, 2).tolist() == PERMUTATION
    assert hashlib.sha256(str(all_pieces(plan)).encode()).hexdigest()[:16] == PLAN


def test_the_order_is_even():
    """Each document is as likely early as late."""
    places = np.mean([np.argsort(permutation(50, 0, epoch)) for epoch in range(400)], axis=0)
    assert abs(places - 24.5).max() < 4 * 14.4 / 20  # 4 standard errors of a uniform place's mean


def test_long_documents_do_not_stand_in_consecutive_rows():
    lengths = np.array([50_000] + [100] * 500)
    plan = plan_epoch(lengths, 100, seed=0, epoch=0)
    rows = [row for row, document, *_ in all_pieces(plan) if document == 0]
    assert np.diff(sorted(rows)).max() > 3


PERMUTATION = [1, 6, 3, 0, 7, 5, 2, 4]
PLAN = "0072ee3e91166f09"

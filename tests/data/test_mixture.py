"""Sources come in their shares of the tokens, whole epochs of each, in parts that do not hang on one another."""

import numpy as np
import pytest

from lamella.data import mixture
from lamella.data.mixture import Mixture, Stream
from lamella.data.plan import Plans

RNG = np.random.default_rng(0)
LENGTHS = [np.maximum(1, RNG.lognormal(4, 1.5, n)).astype(np.int32) for n in (3000, 500, 40)]


def tokens(source: np.ndarray, document: np.ndarray) -> np.ndarray:
    sizes = [LENGTHS[s][d] for s, d in zip(source, document, strict=True)]
    return np.bincount(source, weights=sizes, minlength=3)


def test_without_weights_a_segment_is_an_epoch():
    for number in (0, 1, 7):
        source, document = Mixture(LENGTHS, None, 3).segment(number)
        for s, lengths in enumerate(LENGTHS):
            assert sorted(document[source == s].tolist()) == list(range(len(lengths)))
    orders = [Mixture(LENGTHS, None, 3).segment(n)[1].tolist() for n in (0, 1)]
    assert orders[0] != orders[1]


@pytest.mark.parametrize("weights", [[1, 1, 1], [5, 0.3, 2], [1e-3, 1, 1]])
def test_shares_are_of_tokens_in_every_segment(weights):
    mix = Mixture(LENGTHS, weights, 0)
    total = sum(int(n.sum()) for n in LENGTHS)
    for number in range(6):
        found = tokens(*mix.segment(number))
        for have, share, lengths in zip(found, mix.shares, LENGTHS, strict=True):
            assert abs(have - share * total) <= 2 * lengths.max()  # a document hangs over each end at most


def test_within_a_segment_too():
    source, document = Mixture(LENGTHS, [2, 1, 1], 0).segment(2)
    half = len(source) // 2
    first, second = tokens(source[:half], document[:half]), tokens(source[half:], document[half:])
    assert np.abs(first / first.sum() - second / second.sum()).max() < 0.1


def test_every_document_comes_as_often_as_any_other_of_its_source():
    mix = Mixture(LENGTHS, [1, 1, 1], 1)
    counts = [np.zeros(len(n), int) for n in LENGTHS]
    for number in range(5):
        source, document = mix.segment(number)
        for s, seen in enumerate(counts):
            np.add.at(seen, document[source == s], 1)
    for seen in counts:
        assert seen.max() - seen.min() <= 1


def test_many_documents_are_planned_in_parts(monkeypatch):
    whole = Mixture(LENGTHS, None, 3).segment(1)
    monkeypatch.setattr(mixture, "MOST", 1000)
    monkeypatch.setattr(mixture, "BLOCK", 700)
    parts = [Mixture(LENGTHS, None, 3).segment(n) for n in range(4, 8)]
    assert all(len(document) < 1200 for _, document in parts)
    for s in range(3):
        joined = np.concatenate([document[source == s] for source, document in parts])
        assert joined.tolist() == whole[1][whole[0] == s].tolist()


def test_any_stretch_of_a_stream():
    stream = Stream(LENGTHS[1], 9, 1)
    documents, at = stream.between(0, 3 * stream.tokens)
    for begin, end in ((0, 1), (17, 5000), (stream.tokens - 9, stream.tokens + 9), (stream.tokens, 2 * stream.tokens)):
        found, places = stream.between(begin, end)
        here = (at >= begin) & (at < end)
        assert found.tolist() == documents[here].tolist() and places.tolist() == at[here].tolist()


def test_a_source_without_documents_changes_nothing():
    with_none = Mixture([LENGTHS[0], np.empty(0, np.int32)], None, 3).segment(0)
    assert with_none[1].tolist() == Mixture(LENGTHS[:1], None, 3).segment(0)[1].tolist()


def test_rows_of_a_mixture_are_full():
    for sequence_length in (128, 2048):  # all sources together are 274 rows of 2,048
        plan = Plans(LENGTHS, [1, 1, 1], sequence_length, 0).plan(0)
        assert plan.targets[-1] / (plan.num_rows * sequence_length) > 0.999 and plan.num_rows > 4000
    assert len({source for row in range(40) for source, *_ in plan.pieces(row)}) == 3

"""Batches hold what the plan says, however the rows are dealt, and held-out text never trains."""

from itertools import islice

import numpy as np
import pytest
import torch

from lamella.config import SourceConfig, change
from lamella.data.batch import NO_TARGET
from lamella.data.prepare.prepare import prepare
from lamella.data.store.manifest import open_prepared
from lamella.data.stream import TrainRows, heldout_rows

T, G = 96, 4
FIELDS = ("tokens", "targets", "document", "position", "source")


@pytest.fixture(scope="module")
def rows(config):
    return TrainRows(config, T, G, seed=7)


def same(a, b) -> bool:
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in FIELDS)


def pieces(batch):
    """Yields the tokens and targets of every piece of a document in a batch."""
    for b in range(len(batch.tokens)):
        for number in range(int(batch.document[b].max()) + 1):
            here = batch.document[b] == number
            yield batch.tokens[b, here].tolist(), batch.targets[b, here].tolist()


def test_types_and_positions(rows):
    for step in range(rows.plans.begin(1) // G + 3):
        batch = rows.batch(step, range(G))
        for field in FIELDS:
            tensor = getattr(batch, field)
            assert tensor.shape == (G, T) and tensor.dtype == torch.int32
        padding = batch.document == -1
        assert torch.equal(padding, batch.targets == NO_TARGET)
        assert (batch.tokens[padding] == rows.tokenizer.eod).all()
        starts = torch.ones_like(padding)
        starts[:, 1:] = batch.document[:, 1:] != batch.document[:, :-1]
        assert torch.equal(batch.position == 0, starts)
        assert (batch.position[:, 1:] == batch.position[:, :-1] + 1)[~starts[:, 1:]].all()
        grown = batch.document[:, 1:] - batch.document[:, :-1]
        assert ((grown == 0) | (grown == 1) | padding[:, 1:]).all() and (batch.document[:, 0] == 0).all()
        assert rows.target_count(step) == (batch.targets != NO_TARGET).sum()


def test_inputs_are_the_targets_shifted(config):
    """A document begins with eod, a later piece of a long one with the stored token before it."""
    prepared = open_prepared(config)
    eod = prepared.tokenizer.eod
    (stored,) = (splits["train"] for splits in prepared.sources.values())
    documents = [[eod, *stored.read(d).tolist()] for d in range(len(stored))]
    rows = TrainRows(config, T, G, seed=0)
    kinds = {True: 0, False: 0}
    for step in range(5):
        for tokens, targets in pieces(rows.batch(step, range(G))):
            assert tokens[1:] == targets[:-1]
            assert eod not in targets[:-1]
            span = [tokens[0], *targets]
            begins = range(1) if tokens[0] == eod else range(T, max(map(len, documents)), T)
            assert any(d[i : i + len(span)] == span for i in begins for d in documents)
            kinds[tokens[0] == eod] += 1
    assert min(kinds.values()) > 5


def test_every_stored_token_is_a_target_once_an_epoch(config):
    prepared = open_prepared(config)
    (stored,) = (splits["train"] for splits in prepared.sources.values())
    rows = TrainRows(config, T, 1, seed=2)
    expected = np.bincount(np.concatenate([stored.read(d) for d in range(len(stored))]), minlength=rows.vocab_size)
    for epoch in range(2):
        steps = range(rows.plans.begin(epoch), rows.plans.begin(epoch + 1))
        targets = [rows.batch(step, range(1)).targets for step in steps]
        seen = torch.cat(targets)
        assert (np.bincount(seen[seen >= 0].numpy(), minlength=rows.vocab_size) == expected).all()


def test_the_same_however_dealt(rows):
    for step in (0, 3, 40):
        whole = rows.batch(step, range(G))
        singles, strided = [range(r, r + 1) for r in range(G)], [range(0, G, 2), range(1, G, 2)]
        for dealt in ([range(0, 1), range(1, G)], singles, strided):
            for some in dealt:
                part = rows.batch(step, some)
                for field in FIELDS:
                    assert torch.equal(getattr(part, field), getattr(whole, field)[list(some)])
    assert rows.batch(0, range(0)).tokens.shape == (0, T)


def test_any_step_at_any_time(config, rows):
    """Far steps first, in another object, with other neighbours: the rows do not change."""
    late = TrainRows(config, T, G, seed=7)
    for step in (60, 0, 31, 5):
        assert same(late.batch(step, range(G)), rows.batch(step, range(G)))
        assert late.target_count(step) == rows.target_count(step)
    assert not same(late.batch(0, range(G)), TrainRows(config, T, G, seed=8).batch(0, range(G)))


def test_steps_of_another_size_train_the_same_rows(config, rows):
    wide = TrainRows(config, T, 2 * G, seed=7)
    both = [rows.batch(step, range(G)).tokens for step in (4, 5)]
    assert torch.equal(wide.batch(2, range(2 * G)).tokens, torch.cat(both))


def test_held_out_text_never_trains(config):
    prepared = open_prepared(config)
    (stored,) = prepared.sources.values()
    documents = {
        split: {prepared.tokenizer.decode(s.read(d)[:-1].tolist()) for d in range(len(s))}
        for split, s in stored.items()
    }
    assert documents["heldout"] and not documents["heldout"] & documents["train"]
    assert prepared.manifest.total("heldout").documents > len(documents["heldout"])  # a text and its copy, together
    heldout = {tuple(stored["heldout"].read(d).tolist()) for d in range(len(stored["heldout"]))}
    rows = TrainRows(config, 4096, 1, seed=0)
    batches = (rows.batch(step, range(1)) for step in range(10))
    for _, targets in islice((p for b in batches for p in pieces(b)), 500):
        assert tuple(targets) not in heldout


def test_held_out_rows(config):
    rows = heldout_rows(config, T)
    batch = rows.batch(range(rows.num_rows))
    (stored,) = (splits["heldout"] for splits in open_prepared(config).sources.values())
    assert rows.target_count(range(rows.num_rows)) == (batch.targets >= 0).sum() == stored.lengths.sum()
    assert rows.target_count(range(1, 3)) == (batch.targets[1:3] >= 0).sum()
    assert same(heldout_rows(config, T).batch(range(2, 4)), rows.batch(range(2, 4)))
    raw = sum(len(rows.tokenizer.decode(stored.read(d)[:-1].tolist()).encode()) for d in range(len(stored)))
    assert rows.bytes_per_token == pytest.approx(raw / stored.lengths.sum())
    with pytest.raises(AssertionError):
        rows.batch(range(rows.num_rows, rows.num_rows + 1))


@pytest.mark.parametrize("length", [1, 2, 100_000])
def test_rows_of_any_length(config, length):
    rows = TrainRows(config, length, 2, seed=0)
    batch = rows.batch(1, range(2))
    assert batch.tokens.shape == (2, length)
    assert rows.target_count(1) == (batch.targets >= 0).sum() > 0


def squared(lengths: np.ndarray) -> np.ndarray:
    return lengths.astype(np.int64) ** 2


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_step_is_dealt_whole(config, ranks):
    rows = TrainRows(config, T, G, seed=7, cost=squared)
    for step in range(6):
        dealt = rows.deal(step, ranks)
        assert sorted(row for mine in dealt for row in mine) == list(range(G))
        assert {len(mine) for mine in dealt} == {G // ranks}
        assert same(rows.batch(step, range(G)), TrainRows(config, T, G, seed=7).batch(step, range(G)))
    in_turn = TrainRows(config, T, G, seed=7, cost=squared, balanced=False).deal(0, 2)
    assert in_turn == [[0, 1], [2, 3]]


def test_a_window_exchanges_rows_between_its_steps_alone(config):
    plain, wide = (TrainRows(config, T, G, seed=7, window=w, cost=squared) for w in (1, 4))
    spread = {}
    for name, rows in (("plain", plain), ("wide", wide)):
        steps = [rows.batch(step, range(G)) for step in range(8)]
        spread[name] = np.mean([_costs(batch).std() / _costs(batch).mean() for batch in steps])
        for block in (steps[:4], steps[4:]):
            spread[name, len(spread)] = sorted(map(tuple, torch.cat([b.tokens for b in block]).tolist()))
    assert [v for k, v in spread.items() if k[0] == "plain"] == [v for k, v in spread.items() if k[0] == "wide"]
    assert spread["wide"] < 0.6 * spread["plain"]
    late = TrainRows(config, T, G, seed=7, window=4, cost=squared)
    assert same(late.batch(6, range(G)), wide.batch(6, range(G)))


def _costs(batch) -> np.ndarray:
    rows = zip(batch.document.numpy(), batch.source.numpy(), strict=True)
    return np.array([sum(np.bincount(d[s >= 0]) ** 2) for d, s in rows])


def test_sources_are_counted(corpus, make, tmp_path):
    texts = SourceConfig(format="text", path=str(corpus / "*.py"), name="programs", weight=1.0)
    long = SourceConfig(format="text", path=str(corpus / "long.txt"), name="long", weight=2.0)
    config = make(corpus, tmp_path / "two", sources=(texts, long), heldout=0.05)
    prepare(config)
    rows = TrainRows(config, T, G, seed=0)
    assert rows.names == ["programs", "long"] and rows.shares == pytest.approx([1 / 3, 2 / 3])
    counts = np.zeros(2, int)
    for step in range(60):
        batch = rows.batch(step, range(G))
        found = rows.source_counts(step)
        assert found == [int((batch.source == n).sum()) for n in range(2)]
        assert sum(found) == rows.target_count(step)
        counts += found
    assert counts[1] / counts.sum() == pytest.approx(2 / 3, abs=0.03)
    other = TrainRows(change(config, sources=[s | {"weight": 1.0} for s in config.model_dump()["sources"]]), T, G, 0)
    assert other.fingerprint != rows.fingerprint

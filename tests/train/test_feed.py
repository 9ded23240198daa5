"""What is read ahead is what would be read when asked for, for every rank, and errors come where it is asked for."""

from types import SimpleNamespace

import pytest
import torch

from lamella.train.feed import Feed
from lamella.train.probe import ROWS, ProbeRows


def mesh(ranks=2, rank=0, micro_batch=2):
    layout = SimpleNamespace(
        data=ranks,
        micro_batch_count=ROWS // ranks // micro_batch,
        micro_batches=lambda rows: [rows[r : r + micro_batch] for r in range(0, len(rows), micro_batch)],
    )
    return SimpleNamespace(layout=layout, data_rank=rank, device=torch.device("cpu"))


DATA = ProbeRows(vocab_size=50, length=24, seed=3)


def tokens(feed, step):
    return [(numbers, batch.tokens.tolist()) for numbers, batch in feed.step(step)]


@pytest.mark.parametrize("ahead", [1, 3, 50])
def test_the_same_ahead(ahead):
    feed, direct = Feed(DATA, mesh(), ahead), Feed(DATA, mesh())
    for step in (0, 1, 2, 7, 8, 3, 4, 4):  # in turn, a jump ahead, back, the same again
        assert tokens(feed, step) == tokens(direct, step)
    half = feed.step(5)
    next(half)
    assert tokens(feed, 6) == tokens(direct, 6)  # a step that was left in the middle
    feed.close()
    feed.close()


def test_the_ranks_have_every_row_once():
    for step in range(3):
        rows = [r for rank in range(4) for numbers, _ in Feed(DATA, mesh(4, rank), 2).step(step) for r in numbers]
        assert sorted(rows) == list(range(ROWS)) and rows != list(range(ROWS))


def test_an_error_comes_with_its_micro_batch():
    class Broken(ProbeRows):
        def batch(self, step, rows):
            if step == 1:
                raise OSError("gone")
            return super().batch(step, rows)

    feed = Feed(Broken(50, 24, 3), mesh(), 3)
    assert len(tokens(feed, 0)) == 4
    with pytest.raises(OSError, match="gone"):
        tokens(feed, 1)
    feed.close()

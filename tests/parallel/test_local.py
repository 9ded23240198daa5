"""Starting processes together: their seats, their values, and how each kind of end comes back."""

import os
import time
from multiprocessing.connection import wait

import pytest
import torch

from lamella.errors import UserError
from lamella.parallel import local
from tests.parallel import workers


def test_seats_and_values():
    outcomes = local.run_local(3, workers.seat_and_word, "word", timeout=60)
    assert [o.code for o in outcomes] == [0, 0, 0]
    seats = [o.value[0] for o in outcomes]
    assert [(s.rank, s.world, s.local_rank, s.local_world) for s in seats] == [(r, 3, r, 3) for r in range(3)]
    assert {o.value[1] for o in outcomes} == {"word"}


def test_a_mistake_is_raised_here():
    with pytest.raises(UserError, match="this is how to mend it"):
        local.run_local(2, workers.one_makes_a_mistake, timeout=60)


@pytest.mark.parametrize(("code", "whole"), [(0, 0), (75, 75), (1, 1), (3, 1)])
def test_exit_codes(code, whole):
    assert local.exit_code(local.run_local(2, workers.one_exits, code, timeout=60)) == whole


def test_a_dead_rank_ends_the_others(monkeypatch):
    monkeypatch.setattr(local, "GRACE", 0.5)
    started = time.monotonic()
    outcomes = local.run_local(2, workers.one_dies_the_other_waits, timeout=60)
    assert [o.code for o in outcomes] == [-9, -9]
    assert local.exit_code(outcomes) == 1
    assert time.monotonic() - started < 30


class EndsOnceSeen:
    """A process that ends right after it was first seen alive."""

    exitcode = 0

    def __init__(self):
        self.sentinel, self._life = os.pipe()
        self._alive = True

    def is_alive(self):
        alive, self._alive = self._alive, False
        if alive:
            os.close(self._life)
        return alive

    def join(self):
        os.close(self.sentinel)


def test_an_end_between_looks_is_noticed(monkeypatch):
    def wait_for_some(objects, timeout):
        assert objects, "nothing can end this wait"
        return wait(objects, timeout)

    monkeypatch.setattr(local, "wait", wait_for_some)
    assert local._collect([], [EndsOnceSeen()], timeout=None) == []


def test_sums_reach_views():
    (grad, total), other = (o.value for o in local.run_local(2, workers.gradients_of_views, timeout=60))
    assert torch.equal(grad, 3 * torch.arange(6.0).view(2, 3).t())
    assert torch.equal(total, 2 * torch.arange(6.0).view(2, 3)[:, ::2])
    assert torch.equal(other[0], grad)
    assert torch.equal(other[1], total)

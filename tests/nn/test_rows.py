"""What rows say about their documents, and what backward computes anew of them."""

import pytest
import torch

from lamella.nn.record import Record
from lamella.nn.rows import Rows, one_document
from tests.nn.building import noise, packed


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Counts what is kept for backward."""

    tensors = 0

    def __init__(self):
        def keep(tensor):
            self.tensors += 1
            return tensor

        super().__init__(keep, lambda tensor: tensor)


def test_lengths_follow_the_documents_through_the_rows():
    assert packed([[3, 1, 2], [6], [1, 4]], padding=[0, 0, 1]).lengths == [3, 1, 2, 6, 1, 4, 1]


def test_a_row_that_continues_a_document_still_starts_a_length():
    """Two rows never share a document, even where the second one's first position is above 0."""
    position = torch.tensor([[0, 1, 2], [5, 6, 0]])
    rows = Rows(torch.zeros_like(position), position)
    assert rows.lengths == [3, 2, 1]
    assert rows.reset_BT.tolist() == [[True, False, False], [False, False, True]]


def test_padding_is_a_document_of_its_own_that_is_not_real():
    rows = packed([[2], [3]], padding=[2, 1])
    assert rows.reset_BT.tolist() == [[True, False, True, False], [True, False, False, True]]
    assert rows.real_BT.tolist() == [[True, True, False, False], [True, True, True, False]]
    assert rows.time_T.tolist() == [0, 1, 2, 3]


def test_one_document_counts_from_its_start():
    tokens = torch.zeros(2, 3)
    assert one_document(tokens).lengths == [3, 3]
    later = one_document(tokens, start=4)
    assert later.position_BT.tolist() == [[4, 5, 6]] * 2
    assert later.real_BT.all() and not later.reset_BT.any()


def record_and_double(x, rows):
    """A part that leaves a sum behind and needs more than its input for backward."""
    rows.record.add("sum", x.sum())
    return torch.sin(torch.exp(x)) * 2


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_recomputation_changes_no_gradient_and_records_once(recompute):
    x, weight = noise(2, 3).requires_grad_(), noise(2, 3, seed=1)
    rows = packed([[3], [3]], record=Record(), recompute=recompute)
    run = rows.again if recompute == "full" else rows.core
    wanted = torch.autograd.grad((torch.sin(torch.exp(x)) * 2 * weight).sum(), x)[0]
    with (saved := Saved()):
        y = run(record_and_double, x, rows)
    assert saved.tensors == (2 if recompute == "none" else 1)
    (y * weight).sum().backward()
    assert torch.equal(x.grad, wanted)
    assert torch.equal(rows.record.values["sum"], x.detach().sum())
    run(record_and_double, x, rows)
    assert torch.equal(rows.record.values["sum"], 2 * x.detach().sum())  # it takes what comes after


def test_nothing_is_kept_for_backward_where_there_is_none():
    rows = packed([[3], [3]], record=Record(), recompute="selective")
    with torch.no_grad():
        assert not rows.core(record_and_double, noise(2, 3), rows).requires_grad
    assert packed([[3]], recompute="full").again(torch.neg, torch.ones(3).requires_grad_()).requires_grad  # no record


class Broken(Exception):
    pass


@pytest.mark.parametrize("breaks_at", [1, 2], ids=["forward", "backward"])
def test_a_record_is_not_left_paused_by_an_exception(breaks_at):
    calls = []

    def breaks(x):
        calls.append(x)
        if len(calls) == breaks_at:
            raise Broken
        return torch.exp(x)

    rows = packed([[3]], record=Record(), recompute="selective")
    with pytest.raises(Broken):
        rows.core(breaks, torch.ones(3, requires_grad=True)).sum().backward()
    assert len(calls) == breaks_at
    rows.record.add("after", torch.ones(()))
    assert rows.record.values["after"] == 1


def test_a_pause_inside_a_pause():
    record = Record()
    with record.pause():
        with record.pause():
            record.add("x", torch.ones(()))
        record.add("x", torch.ones(()))
    assert record.values == {}

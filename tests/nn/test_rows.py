"""What rows say about their documents."""

import torch

from lamella.nn.rows import Rows, one_document
from tests.nn.building import packed


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

import itertools
import math

import pytest
import torch

from lamella.checkpoint.boxes import flat_boxes, pieces
from lamella.nn.initializers import zeros
from tests.checkpoint.workers import Part

SHAPES = [(), (7,), (1,), (3, 5), (1, 5), (5, 1), (2, 3, 4), (3, 1, 4), (5, 1, 1), (2, 2, 3, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flat_boxes_are_the_range_in_order(shape: tuple[int, ...]):
    n = math.prod(shape)
    numbered = torch.arange(n).view(shape)
    for start, stop in itertools.combinations_with_replacement(range(n + 1), 2):
        boxes = flat_boxes(shape, start, stop)
        found = [x for offset, size in boxes for x in numbered[slices(offset, size)].flatten().tolist()]
        assert found == list(range(start, stop))
        assert len(boxes) <= max(1, 2 * len(shape) - 1)


@pytest.mark.parametrize("limit", [2**20, 40, 8, 1])
@pytest.mark.parametrize(
    ("shape", "split", "segments"),
    [
        ((8, 3), 0, (4, 2, 2)),
        ((3, 8), 1, (4, 2, 2)),
        ((2, 4, 3), 1, (2, 2)),
        ((4, 6), 1, None),
        ((3, 4), None, None),
        ((), None, None),
    ],
    ids=str,
)
def test_pieces_lie_where_they_belong(shape, split, segments, limit):
    numbered = torch.arange(math.prod(shape)).view(shape)
    for rank in range(2):
        parameter = Part(rank, 2).parameter(shape, zeros, split=split, segments=segments)
        boxes = parameter.place.boxes
        local = torch.empty(parameter.shape, dtype=torch.long)
        for box in boxes:
            local[box.local_slices] = numbered[box.whole_slices]
        n = local.numel()
        for start, stop in itertools.combinations_with_replacement(range(n + 1), 2):
            fragment = local.flatten()[start:stop]
            found = pieces(fragment, local.shape, start, boxes, limit)
            for offset, view in found:
                assert torch.equal(view, numbered[slices(offset, view.shape)])
                assert view.nbytes <= max(limit, 8)
                assert view.untyped_storage().data_ptr() == fragment.untyped_storage().data_ptr()  # live
            values = sorted(x for _, view in found for x in view.flatten().tolist())
            assert values == sorted(fragment.tolist())
            if limit == 2**20:
                assert len(found) <= len(boxes) * max(1, 2 * len(shape) - 1)


def test_the_size_cut_is_near_the_limit():
    x = torch.empty(1, 10, 100)
    boxes = Part(0, 1).parameter(x.shape, zeros).place.boxes
    assert [v.shape for _, v in pieces(x.flatten(), x.shape, 0, boxes, 1200)] == [(1, 3, 100)] * 3 + [(1, 1, 100)]
    assert [v.shape for _, v in pieces(x.flatten(), x.shape, 0, boxes, 399)] == [(1, 1, 99), (1, 1, 1)] * 10
    assert len(pieces(x.flatten(), x.shape, 0, boxes)) == 1


def slices(offset, size):
    return tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))

"""Rows out and back in Triton against one slot at a time: dropped choices, rows of no token, values and gradients."""

import pytest
import torch

from lamella_kernels.moe_permute import moe_permute, moe_unpermute, reference
from tests.kernels.building import mapping
from tests.kernels.gpu.building import (
    LIMITS,
    assert_compiles,
    assert_exact,
    assert_operator,
    between_fences,
    numbers,
)


def make(tokens, choices, channels, dtype=torch.float32, dropped=0.3, unused=3, index=torch.int64):
    slot_M, place_NS = mapping(tokens, choices, dropped, unused)
    return {
        "x": numbers(dtype)(tokens, channels),
        "y": numbers(dtype, 1)(len(slot_M), channels),
        "weight": numbers(torch.float32, 2)(tokens, choices),
        "slot": between_fences(slot_M.to(index)),
        "place": between_fences(place_NS.to(index)),
    }


def both(form):
    """What is sent out, and what comes back of other rows."""

    def run(inputs):
        x, y, weight, slot, place = (inputs[name] for name in ("x", "y", "weight", "slot", "place"))
        return form.moe_permute(x, slot, place), form.moe_unpermute(y, weight, slot, place)

    return run


class Ours:
    moe_permute, moe_unpermute = staticmethod(moe_permute), staticmethod(moe_unpermute)


ours, theirs = both(Ours), both(reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_reference(dtype, fenced):
    inputs = make(20, 3, 37, dtype)
    found = assert_exact(ours, theirs, inputs, LIMITS[dtype])
    unused, dropped = inputs["slot"] < 0, inputs["place"] < 0
    assert unused.any() and dropped.any()
    assert not found["out0"][unused].any() and not found["y"][unused].any() and not found["weight"][dropped].any()


@pytest.mark.full
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("dropped", "unused"), [(0.0, 0), (0.5, 4)])
@pytest.mark.parametrize(
    ("tokens", "choices", "channels"), [(1, 8, 40), (63, 2, 48), (100, 3, 33), (257, 1, 70), (4, 2, 1030)]
)
def test_sizes_and_types(tokens, choices, channels, dropped, unused, dtype, fenced):
    inputs = make(tokens, choices, channels, dtype, dropped, unused, torch.int32)
    assert_exact(ours, theirs, inputs, LIMITS[dtype])


def test_every_choice_dropped(fenced):
    found = assert_exact(ours, theirs, make(4, 2, 16, dropped=1.0), LIMITS[torch.float32])
    assert not any(value.any() for value in found.values())


@pytest.mark.full
def test_many_choices(fenced):
    """As of experts that choose: a slot for each expert, most of them empty."""
    assert_exact(ours, theirs, make(25, 40, 16, dropped=0.9, unused=100), LIMITS[torch.float32])


def test_rows_that_are_apart():
    inputs = make(9, 2, 48)

    def run(form):
        def both(given):
            parts = {name: given[name][:, 16:] for name in ("x", "y")}
            return [y.sum(-1, keepdim=True).expand(-1, 4) for y in form({**given, **parts})]

        return both

    assert_exact(run(ours), run(theirs), inputs, LIMITS[torch.float32])


def test_frozen_arguments():
    inputs = make(7, 2, 16)
    for name in ("y", "weight"):
        given = {k: v.detach().requires_grad_(k == name) for k, v in inputs.items()}
        assert_exact(lambda i: ours(i)[1], lambda i: theirs(i)[1], given, LIMITS[torch.float32])


def test_no_tokens():
    x, index = torch.empty(0, 8), torch.empty(0, dtype=torch.int64)
    assert moe_permute(x, index, index.view(0, 2)).shape == (0, 8)
    assert moe_unpermute(x, torch.empty(0, 2), index, index.view(0, 2)).shape == (0, 8)


def test_operators():
    names = ["moe_permute", "moe_unpermute"]
    assert_operator(ours, make(5, 2, 16), [*names, *(f"{name}_backward" for name in names)])


def test_torch_compile():
    assert_compiles(ours, make(5, 2, 16, torch.bfloat16))

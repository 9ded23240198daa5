"""The gate of a gated linear unit in plain torch against the equation."""

import pytest
import torch

from lamella_kernels.swiglu import reference, swiglu
from tests.kernels.building import assert_exact, assert_gradients, source


def make(*shape, dtype=torch.float64):
    normal = source(0)
    return {name: normal(*shape).to(dtype).requires_grad_() for name in ("gate", "up")}


def run(inputs):
    return swiglu(**inputs), None


def run_reference(inputs):
    return reference.swiglu(**inputs), None


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_equals_reference(dtype, limit):
    found = assert_exact(run, run_reference, make(2, 33, 40, dtype=dtype), limit=limit)
    assert {value.dtype for value in found.values()} == {dtype}


def test_gradcheck():
    assert_gradients(run, make(3, 5))


def test_one_piece():
    gate, up = make(3, 5).values()
    assert torch.equal(swiglu(torch.cat([gate, up], -1)), swiglu(gate, up))


@pytest.mark.parametrize(
    ("gate", "up", "message"),
    [
        (torch.ones(3), torch.ones(4), "up must be like gate"),
        (torch.ones(3), torch.ones(3).bfloat16(), "up must be like gate"),
        (torch.ones(3), torch.ones(3, device="meta"), "up must be like gate"),
        (torch.ones(3).int(), torch.ones(3).int(), "gate must be floating point"),
        (torch.ones(()), torch.ones(()), "at least one dim"),
        (torch.ones(2, 3), None, "of an even width"),
    ],
)
def test_wrong_inputs_are_named(gate, up, message):
    with pytest.raises(ValueError, match=f"swiglu: .*{message}"):
        swiglu(gate, up)

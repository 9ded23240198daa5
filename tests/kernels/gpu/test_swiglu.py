"""The Triton gate against the equation."""

import pytest
import torch

from lamella_kernels.swiglu import reference, swiglu
from tests.kernels.gpu.building import LIMITS, assert_compiles, assert_exact, assert_operator, between_fences, numbers


def ours(inputs):
    return swiglu(*inputs["both"].chunk(2, -1))


def whole(inputs):
    return swiglu(inputs["both"])


def theirs(inputs):
    return reference.swiglu(*inputs["both"].chunk(2, -1))


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 63, 34), (1, 3, 2500)])
def test_equals_reference(shape, dtype, fenced):
    for run in (ours, whole):
        found = assert_exact(run, theirs, {"both": numbers(dtype)(*shape)}, LIMITS[dtype])
        assert {value.dtype for value in found.values()} == {dtype}


def test_extremes():
    """silu far out is 0 or its argument, with slopes 0 and 1; nothing overflows on the way."""
    gate = between_fences(torch.tensor([-1e30, -200.0, -90.0, 0.0, 90.0, 200.0, 1e30])).requires_grad_()
    y = swiglu(gate, torch.ones_like(gate))
    (slope,) = torch.autograd.grad(y.sum(), gate)
    torch.testing.assert_close(y, gate.clamp(min=0))
    torch.testing.assert_close(slope, torch.tensor([0, 0, 0, 0.5, 1, 1, 1], device=gate.device))


def test_no_rows():
    assert swiglu(torch.empty(0, 8), torch.empty(0, 8)).shape == (0, 8)


def test_operator():
    for run in (ours, whole):
        assert_operator(run, {"both": numbers(torch.float32)(2, 5, 16)}, ["swiglu", "swiglu_backward"])


def test_torch_compile():
    assert_compiles(whole, {"both": numbers(torch.float32)(2, 5, 16)})

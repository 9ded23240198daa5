"""The rotation in plain torch against the equation."""

import pytest
import torch

from lamella_kernels.rotary import reference, rotary
from tests.kernels.building import assert_exact, assert_gradients, source

POSITION = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [9, 10, 0, 0, 1, 10**6, 10**6 + 1]])


def make(*shape, dtype=torch.float64):
    return {"x": source(0)(*shape).to(dtype).requires_grad_()}


def run(inputs, theta, width):
    return rotary(inputs["x"], POSITION, theta=theta, width=width), None


def run_reference(inputs, theta, width):
    return reference.rotary(inputs["x"], POSITION, theta, width or inputs["x"].shape[-1]), None


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize(("theta", "width"), [(1e4, None), (5e5, 6), (0.5, 2)])
def test_equals_reference(theta, width, dtype, limit):
    found = assert_exact(run, run_reference, make(2, 7, 3, 8, dtype=dtype), theta, width, limit=limit)
    assert {value.dtype for value in found.values()} == {dtype}


def test_gradcheck():
    assert_gradients(run, make(2, 7, 1, 6), 1e4, 4)


def test_products_depend_on_distance_alone():
    """q at m, k at n: their product is that of positions m + 1000 and n + 1000."""
    q, k = (source(seed)(1, 1, 1, 64) for seed in (1, 2))

    def product(m, n):
        return (rotary(q, torch.tensor([[m]]), theta=1e4) * rotary(k, torch.tensor([[n]]), theta=1e4)).sum()

    torch.testing.assert_close(product(17, 5), product(1017, 1005))
    assert abs(product(17, 5) - product(17, 6)) > 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_BTHK": torch.ones(2, 7, 3)}, "x_BTHK needs 4 dims"),
        ({"x_BTHK": torch.ones(2, 7, 3, 4).int()}, "x_BTHK must be floating point"),
        ({"position_BT": torch.zeros(2, 6).int()}, "position_BT has shape"),
        ({"position_BT": torch.zeros(2, 7)}, "position_BT must be int32 or int64"),
        ({"width": 3}, "width must be even"),
        ({"width": 6}, "at most the 4 channels"),
        ({"theta": 0.0}, "theta must be above 0"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    with pytest.raises(ValueError, match=f"rotary: .*{message}"):
        rotary(**{"x_BTHK": torch.ones(2, 7, 3, 4), "position_BT": POSITION, "theta": 1e4} | change)

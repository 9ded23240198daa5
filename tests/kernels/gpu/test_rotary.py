"""The Triton rotation against the equation."""

import pytest
import torch

from lamella_kernels.rotary import reference, rotary
from tests.kernels.gpu.building import (
    DEVICE,
    LIMITS,
    assert_compiles,
    assert_exact,
    assert_operator,
    between_fences,
    numbers,
)


def forms(position, theta=1e4, width=None):
    def ours(inputs):
        return rotary(inputs["x"], position.to(DEVICE), theta=theta, width=width)

    def theirs(inputs):
        return reference.rotary(inputs["x"], position.to(DEVICE), theta, width or inputs["x"].shape[-1])

    return ours, theirs


def positions(time, dtype=torch.int32):
    """Documents of 41 tokens, and one that starts far out."""
    packed = torch.arange(time) % 41
    return between_fences(torch.stack([packed, 10**6 + torch.arange(time)]).to(dtype))


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("heads", "channels", "width"), [(3, 16, None), (1, 22, 6), (18, 8, 8)])
def test_equals_reference(heads, channels, width, dtype, fenced):
    x = numbers(dtype)(2, 63, heads, channels)
    found = assert_exact(*forms(positions(63), width=width), {"x": x}, LIMITS[dtype])
    assert {value.dtype for value in found.values()} == {dtype}


@pytest.mark.full
@pytest.mark.parametrize("theta", [1e-3, 500.0, 1e6])
@pytest.mark.parametrize("time", [1, 100, 257])
@pytest.mark.parametrize(("channels", "width"), [(2, 2), (64, 64), (130, 80), (256, 256)])
def test_lengths_widths_and_bases(channels, width, time, theta, fenced):
    x = numbers(torch.float32)(2, time, 5, channels)
    assert_exact(*forms(positions(time, torch.int64), theta, width), {"x": x}, LIMITS[torch.float32])


def test_far_out():
    """Angles keep their digits at any position: 2e-7 of the length is the rounding of fp32."""
    position = torch.tensor([[0, 1, 2**20 + 1, 2**24 + 3, 2**31 - 1]])
    x = numbers(torch.float32)(1, 5, 2, 32)
    assert_exact(*forms(position), {"x": x}, 2e-7)


def test_slices_are_read_in_place():
    whole = {"x": numbers(torch.float32)(2, 21, 3, 40)}
    pair = forms(positions(21))
    run, judge = (lambda inputs, form=form: form({"x": inputs["x"][..., 5:21]}) for form in pair)
    assert_exact(run, judge, whole, LIMITS[torch.float32])


def test_operator():
    assert_operator(forms(positions(5))[0], {"x": numbers(torch.float32)(2, 5, 3, 8)}, ["rotary", "rotary_backward"])


def test_torch_compile():
    assert_compiles(forms(positions(5))[0], {"x": numbers(torch.float32)(2, 5, 3, 8)})

"""The Triton convolution against the equation: packed rows, states in and out."""

import pytest
import torch

from lamella_kernels.causal_conv1d import causal_conv1d, reference
from tests.kernels.gpu.building import (
    DEVICE,
    LIMITS,
    assert_compiles,
    assert_exact,
    assert_operator,
    between_fences,
    numbers,
)


def make(time, channels=6, width=4, dtype=torch.float32, bias=True, initial=True):
    normal = numbers(dtype)
    shapes = {"x": (2, time, channels), "weight": (channels, width)}
    if bias:
        shapes["bias"] = (channels,)
    if initial:
        shapes["initial"] = (2, width - 1, channels)
    return {name: normal(*shape) for name, shape in shapes.items()}


def positions(time, dtype=torch.int32):
    """Documents of one to nine tokens; row 0 goes on with the state's document at index 2."""
    lengths = torch.randint(1, 10, (time,), generator=torch.Generator().manual_seed(3))
    packed = torch.cat([torch.arange(n) for n in lengths])
    return between_fences(torch.stack([torch.cat([torch.arange(2, 6), packed])[:time], packed[:time]]).to(dtype))


def forms(position=None, activation="silu"):
    def both(inputs):
        return inputs["x"], inputs["weight"], inputs.get("bias")

    def ours(inputs):
        named = {"position_BT": position, "initial_state_BKI": inputs.get("initial")}
        return causal_conv1d(*both(inputs), activation=activation, **named, return_state=True)

    def theirs(inputs):
        return reference.causal_conv1d(*both(inputs), activation, position, inputs.get("initial"))

    return ours, theirs


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("time", [1, 2, 63])
def test_equals_reference(time, packed, fenced):
    position = positions(time) if packed else None
    assert_exact(*forms(position), make(time), LIMITS[torch.float32])


@pytest.mark.full
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize(("time", "channels"), [(3, 1), (70, 33)])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_lengths_widths_and_types(time, channels, width, dtype, activation, fenced):
    for initial in (False, True):
        inputs = make(time, channels, width, dtype, bias=initial, initial=initial)
        given = {name: value for name, value in inputs.items() if value.numel()}
        assert_exact(*forms(positions(time, torch.int64), activation), given, LIMITS[dtype])


@pytest.mark.full
@pytest.mark.parametrize(("time", "channels"), [(100, 130), (257, 5)])
def test_long(time, channels, fenced):
    assert_exact(*forms(positions(time)), make(time, channels), LIMITS[torch.float32])


def test_bfloat16(fenced):
    found = assert_exact(*forms(positions(30)), make(30, dtype=torch.bfloat16), LIMITS[torch.bfloat16])
    assert {value.dtype for value in found.values()} == {torch.bfloat16}


def test_slices_are_read_in_place():
    inputs = make(20, channels=12)
    inputs["weight"], inputs["bias"] = (numbers(torch.float32, 5)(*shape) for shape in ((4, 4), (4,)))
    inputs["initial"] = numbers(torch.float32, 6)(2, 3, 4)
    pair = forms(positions(20))
    run, judge = (lambda given, form=form: form({**given, "x": given["x"][..., 3:7]}) for form in pair)
    assert_exact(run, judge, inputs, LIMITS[torch.float32])


@pytest.mark.parametrize("index", [0, 1])
def test_one_of_two_outputs(index):
    """The outputs or the state alone take part in the loss."""
    inputs = make(7 if index == 0 else 2)
    if index == 1:
        for name in ("weight", "bias"):
            inputs[name].requires_grad_(False)
    run, judge = (
        lambda given, form=form: form(given)[index] for form in forms(positions(7)[:, : inputs["x"].shape[1]])
    )
    assert_exact(run, judge, inputs, LIMITS[torch.float32])


def test_other_documents_have_no_influence_at_all():
    starts, time = [0, 62, 64, 65], 68  # a program of backward has 64 tokens
    position = torch.cat([torch.arange(end - start) for start, end in zip(starts, [*starts[1:], time], strict=True)])
    run = forms(position[None].to(DEVICE))[0]
    inputs, others = make(time, initial=False), numbers(torch.float32, 9)(1, time, 6)

    def by_token(x):
        y = run({**inputs, "x": x})[0]
        return y.detach(), torch.autograd.grad(y, x, (3 * x.detach()).cos())[0]

    first = inputs["x"].detach()[:1]
    before = by_token(first.clone().requires_grad_())
    for start, end in zip(starts, [*starts[1:], time], strict=True):
        x = first.clone()
        x[:, start:end] = others.detach()[:, start:end]
        elsewhere = torch.ones(time, dtype=torch.bool)
        elsewhere[start:end] = False
        for old, new in zip(before, by_token(x.requires_grad_()), strict=True):
            assert torch.equal(old[:, elsewhere], new[:, elsewhere])
            assert not torch.equal(old[:, start:end], new[:, start:end])


def test_operator():
    for packed in (False, True):
        run = forms(positions(5) if packed else None)[0]
        inputs = make(5, bias=packed, initial=packed)
        assert_operator(run, inputs, ["causal_conv1d", "causal_conv1d_backward"])


def test_torch_compile():
    assert_compiles(forms(positions(9))[0], make(9))

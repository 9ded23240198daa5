"""The causal depthwise convolution against the equation: values, every gradient, packed documents, states handed over.

B batch, T time, I channel, K width of the kernel.
"""

import numpy as np
import pytest
import torch

from lamella_kernels.causal_conv1d import causal_conv1d, reference
from tests.kernels.building import (
    assert_agree,
    assert_exact,
    assert_finite,
    assert_gradients,
    source,
    values_and_gradients,
)

pytestmark = pytest.mark.usefixtures("form")


def make(time, batch=2, channels=6, width=4, dtype=torch.float64, seed=0, initial=True):
    normal = source(seed)
    shapes = {"x": (batch, time, channels), "weight": (channels, width), "bias": (channels,)}
    if initial:
        shapes["initial"] = (batch, width - 1, channels)
    return {name: normal(*shape).to(dtype).requires_grad_() for name, shape in shapes.items()}


def positions(time, batch=2, seed=1, dtype=torch.int32):
    """Documents of random lengths, many of one to four tokens; row 0 goes on with the state's document at index 2."""
    random = torch.Generator().manual_seed(seed)
    start = torch.rand(batch, time, generator=random) < 0.3
    position = torch.zeros(batch, time, dtype=dtype)
    for b in range(batch):
        index = 2 if b == 0 else 0
        for t in range(time):
            index = 0 if start[b, t] and t else index
            position[b, t] = index
            index += 1
    return position


def run(inputs, position=None, activation: str | None = "silu"):
    named = {"activation": activation, "position_BT": position, "initial_state_BKI": inputs.get("initial")}
    return causal_conv1d(inputs["x"], inputs["weight"], inputs.get("bias"), **named, return_state=True)


def run_reference(inputs, position=None, activation="silu"):
    return reference.causal_conv1d(
        inputs["x"], inputs["weight"], inputs.get("bias"), activation, position, inputs.get("initial")
    )


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("time", [1, 2, 63, 100])
def test_fp64_equals_reference(time, packed, activation):
    inputs, position = make(time), positions(time) if packed else None
    assert_agree(run, run_reference, inputs, position, activation, limit=1e-13)


@pytest.mark.parametrize("width", [1, 2, 3, 7])
@pytest.mark.parametrize("time", [1, 4, 30])
def test_any_width(time, width):
    inputs = make(time, width=width, initial=width > 1)
    for position in (None, positions(time, dtype=torch.int64)):
        assert_agree(run, run_reference, inputs, position, limit=1e-13)


def test_without_bias_and_state():
    inputs = {name: value for name, value in make(30, initial=False).items() if name != "bias"}
    assert_agree(run, run_reference, inputs, limit=1e-13)


def test_fp32_equals_fp64():
    assert_exact(run, run_reference, make(257, dtype=torch.float32), positions(257), limit=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_only_inputs_and_outputs(dtype):
    limit = torch.finfo(dtype).eps
    ours = assert_exact(run, run_reference, make(100, dtype=dtype), positions(100), limit=limit)
    assert {value.dtype for value in ours.values()} == {dtype}


def test_is_torch_conv1d_where_nothing_is_packed():
    inputs = make(50, initial=False)
    expected = torch.nn.functional.conv1d(
        inputs["x"].transpose(1, 2), inputs["weight"][:, None], inputs["bias"], padding=3, groups=6
    )
    torch.testing.assert_close(run(inputs, None, None)[0], expected[..., :50].transpose(1, 2))


def test_formula_by_hand():
    """y_t = silu(bias + sum over j <= position_t of w_{3-j} x_{t-j}), written anew in numpy."""
    inputs, position = make(40, initial=False), positions(40)
    position[0] = (torch.arange(40) % 5).int()
    x, w, bias = (v.detach().numpy() for v in inputs.values())
    expected = np.zeros_like(x)
    for b, t in np.ndindex(2, 40):
        taps = range(min(4, int(position[b, t]) + 1))
        s = bias + sum(w[:, 3 - j] * x[b, t - j] for j in taps)
        expected[b, t] = s / (1 + np.exp(-s))
    np.testing.assert_allclose(run(inputs, position)[0].detach().numpy(), expected, rtol=1e-12, atol=1e-14)


def test_gradcheck():
    assert_gradients(run, make(5, channels=2, width=3), positions(5))


@pytest.mark.parametrize("pieces", [(10, 2, 1, 17), (1,) * 12])
@pytest.mark.parametrize("packed", [False, True])
def test_pieces_with_the_state_handed_over(pieces, packed):
    inputs, position = make(sum(pieces)), positions(sum(pieces)) if packed else None

    def in_pieces(inputs, position):
        ys, state, start = [], inputs["initial"], 0
        for length in pieces:
            part = slice(start, start + length)
            of_part = {**inputs, "x": inputs["x"][:, part], "initial": state}
            y, state = run(of_part, None if position is None else position[:, part])
            ys.append(y)
            start += length
        return torch.cat(ys, 1), state

    assert_agree(in_pieces, run, inputs, position, limit=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_documents_have_no_influence_at_all(dtype):
    starts, time = (0, 7, 8, 10, 13, 17, 40), 64
    ends = (*starts[1:], time)
    position = torch.cat([torch.arange(end - start) for start, end in zip(starts, ends, strict=True)]).expand(2, time)
    inputs, other = make(time, dtype=dtype, initial=False), make(time, dtype=dtype, seed=9)["x"].detach()

    def outputs_by_token(inputs):
        y = run(inputs, position)[0]
        weight = (3 * inputs["x"].detach()).cos()
        return y.detach(), torch.autograd.grad(y, inputs["x"], weight)[0]

    before = outputs_by_token(inputs)
    for start, end in zip(starts, ends, strict=True):
        x = inputs["x"].detach().clone()
        x[:, start:end] = 5 * other[:, start:end]
        after = outputs_by_token({**inputs, "x": x.requires_grad_()})
        elsewhere = torch.ones(time, dtype=torch.bool)
        elsewhere[start:end] = False
        for old, new in zip(before, after, strict=True):
            assert torch.equal(old[:, elsewhere], new[:, elsewhere])
            assert not torch.equal(old[:, start:end], new[:, start:end])


def test_backward_saves_inputs_alone():
    saved = []
    inputs, position = make(30), positions(30)
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v.data_ptr()) or v, lambda v: v):
        run(inputs, position)
    assert set(saved) == {v.data_ptr() for v in (*inputs.values(), position)}


@pytest.mark.parametrize("time", [1, 2, 63])
def test_everything_is_written(poisoned, time):
    for position in (None, positions(time)):
        assert_finite(values_and_gradients(run, make(time), position))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5)}, "x_BTI needs 3 dims"),
        ({"weight": torch.zeros(4, 4)}, "weight_IK has shape .* but I is 3 in x_BTI"),
        ({"bias": torch.zeros(4)}, "bias_I has shape"),
        ({"initial": torch.zeros(2, 4, 3)}, "initial_state_BKI must hold the last K-1 inputs"),
        ({"initial": torch.zeros(2, 3, 3, device="meta")}, "initial_state_BKI is on meta"),
        ({"position": torch.zeros(2, 4, dtype=torch.int64)}, "position_BT has shape"),
        ({"position": torch.zeros(2, 5)}, "position_BT must be int32 or int64"),
        ({"x": torch.zeros(2, 5, 3, dtype=torch.int64)}, "x_BTI must be floating point"),
        ({"x": torch.zeros(2, 0, 3)}, "needs at least one token"),
        ({"activation": "gelu"}, "activation must be None or 'silu'"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    inputs = {"x": torch.ones(2, 5, 3), "weight": torch.ones(3, 4), "position": None, "activation": None} | change
    with pytest.raises(ValueError, match=f"causal_conv1d: {message}"):
        run(inputs, inputs["position"], inputs["activation"])

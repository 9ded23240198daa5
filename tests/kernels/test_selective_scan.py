"""The selective scan: the equation of the paper, chunks, steps at their ends, cost.

B batch, T time, I channel, N state.
"""

import math

import numpy as np
import pytest
import torch

from lamella_kernels.selective_scan import eager, reference, selective_scan
from tests.kernels.building import FIVE, assert_agree, assert_exact, assert_gradients, cost, resets, source

TOKENS = ("x", "dt", "B", "C")
pytestmark = pytest.mark.usefixtures("form")


def make(time, batch=2, channels=6, states=5, dtype=torch.float64, seed=0, initial=True):
    """Inputs by name; dt, A, D stay fp32 where x is half precision."""
    normal, wide = source(seed), torch.promote_types(dtype, torch.float32)
    inputs = {
        "x": normal(batch, time, channels).to(dtype),
        "dt": torch.nn.functional.softplus(normal(batch, time, channels) - 1).to(wide),
        "A": -normal(channels, states).exp().to(wide),
        "B": normal(batch, time, states).to(dtype),
        "C": normal(batch, time, states).to(dtype),
        "D": normal(channels).to(wide),
    }
    if initial:
        inputs["initial"] = normal(batch, channels, states).to(wide)
    return {name: value.requires_grad_() for name, value in inputs.items()}


def run(inputs, reset=None):
    a = inputs
    named = {"reset_BT": reset, "initial_state_BIN": a.get("initial"), "return_state": True}
    return selective_scan(a["x"], a["dt"], a["A"], a["B"], a["C"], a["D"], **named)


def run_reference(inputs, reset=None):
    a = inputs
    return reference.selective_scan(a["x"], a["dt"], a["A"], a["B"], a["C"], a["D"], reset, a.get("initial"))


@pytest.mark.parametrize(
    "sizes", [(1, 63, 63), (1, 63, 10), (4, 16, 16), (4, 16, 5), (7, 9, 1), (63, 1, 1), (32, 2, 2)]
)
def test_every_chunking_equals_reference(monkeypatch, sizes):
    """Also with documents that start and end exactly at the borders of chunks and blocks."""
    monkeypatch.setattr(eager, "chunk_sizes", lambda time, batch, state: sizes)
    inputs = make(63)
    for reset in (None, resets(63), (torch.arange(63) % sizes[1] == 0).expand(2, 63)):
        assert_agree(run, run_reference, inputs, reset, limit=1e-13)


def test_recurrence_of_the_paper():
    """h_t = Abar h_{t-1} + Bbar x_t with Abar = exp(dt A) and Bbar = dt B, written anew in numpy."""
    inputs, reset = make(40, initial=False), resets(40)
    x, dt, A, B, C, D = (v.detach().numpy() for v in inputs.values())
    expected = np.zeros_like(x)
    for b in range(x.shape[0]):
        for i in range(x.shape[2]):
            h = np.zeros(A.shape[1])
            for t in range(x.shape[1]):
                h = (0.0 if reset[b, t] else h) * np.exp(dt[b, t, i] * A[i]) + dt[b, t, i] * B[b, t] * x[b, t, i]
                expected[b, t, i] = C[b, t] @ h + D[i] * x[b, t, i]
    np.testing.assert_allclose(run(inputs, reset)[0].detach().numpy(), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("sizes", [(1, 5, 3), (3, 2, 1)])
def test_gradcheck(monkeypatch, sizes):
    monkeypatch.setattr(eager, "chunk_sizes", lambda time, batch, state: sizes)
    inputs = make(5, channels=2, states=2)
    assert_gradients(run, inputs, FIVE)


def test_without_skip_and_state():
    inputs = make(30, initial=False)
    zero = torch.zeros_like(inputs.pop("D"))
    assert_agree(
        lambda a: (selective_scan(a["x"], a["dt"], a["A"], a["B"], a["C"]), None),
        lambda a: (run_reference({**a, "D": zero})[0], None),
        inputs,
        limit=1e-13,
    )


def test_extreme_steps_stay_finite():
    """Decays from 1 down to far below the smallest number, beside resets: no inf * 0 anywhere."""
    inputs = make(64, dtype=torch.float32)
    with torch.no_grad():
        inputs["dt"].mul_(torch.logspace(-6, 4, 64).view(1, 64, 1))
    assert_exact(run, run_reference, inputs, resets(64), limit=2e-5)


def cost_of(time):
    return cost(run, make(time, batch=1, channels=32, states=16, dtype=torch.float32, initial=False))


def test_calls_grow_with_the_root_of_time():
    for short, long in zip(cost_of(256), cost_of(4096), strict=True):
        assert long.count <= 5 * short.count


def test_memory_grows_slower_than_time():
    """No tensor holds a quarter of all states at T = 4096, or an eighth at 16384."""
    for time, share in ((4096, 4), (16384, 8)):
        for calls in cost_of(time):
            assert calls.elements < time * 32 * 16 / share


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4)}, "x_BTI needs 3 dims"),
        ({"dt": torch.ones(2, 5, 3)}, "dt_BTI has shape .* but T is 4 in x_BTI"),
        ({"A": torch.ones(2, 4)}, "A_IN has shape .* but I is 3"),
        ({"B": torch.ones(2, 4, 7)}, "B_BTN has shape .* but N is 4 in A_IN"),
        ({"D": torch.ones(4)}, "D_I has shape"),
        ({"initial": torch.ones(2, 4, 3)}, "initial_state_BIN has shape"),
        ({"x": torch.zeros(2, 4, 3, dtype=torch.int64)}, "x_BTI must be floating point"),
        ({"dt": torch.ones(2, 4, 3, dtype=torch.bfloat16)}, "dt_BTI must be float32 or float64"),
        ({"reset": torch.zeros(2, 4)}, "reset_BT must be bool"),
        ({"A": torch.ones(3, 4, device="meta")}, "A_IN is on meta"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    inputs = {"x": torch.ones(2, 4, 3), "dt": torch.ones(2, 4, 3), "A": -torch.ones(3, 4), "D": torch.ones(3)}
    inputs |= {"B": torch.ones(2, 4, 4), "C": torch.ones(2, 4, 4), "reset": None} | change
    with pytest.raises(ValueError, match=f"selective_scan: {message}"):
        run(inputs, inputs["reset"])


def test_chunk_sizes_cover_time():
    for time in (*range(1, 3000, 7), 4096, 100_000):
        for state in (16, 8192, 10**7):
            chunks, length, block = eager.chunk_sizes(time, 4, state)
            assert chunks * length >= time and 1 <= block <= length
            assert chunks * length - time < chunks
            assert length <= max(256, 8 * math.sqrt(time) + 1)

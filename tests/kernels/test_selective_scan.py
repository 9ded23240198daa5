"""The selective scan against the equation: values, every gradient, packed documents, states handed over, cost.

B batch, T time, I channel, N state.
"""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lamella_kernels.selective_scan import eager, reference, selective_scan

NAMES = ("x", "dt", "A", "B", "C", "D", "initial")
LENGTHS = (1, 2, 63, 100, 257)


def make(time, batch=2, channels=6, states=5, dtype=torch.float64, seed=0, initial=True):
    """Inputs by name; dt, A, D stay fp32 where x is half precision."""
    random = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

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


def resets(time, batch=2, seed=1):
    """Documents of random lengths, some of one token, other ones in each row; row 0 continues the initial state."""
    random = torch.Generator().manual_seed(seed)
    reset = torch.rand(batch, time, generator=random) < 0.08
    reset[:, 1:] |= reset[:, :-1] & (torch.rand(batch, time - 1, generator=random) < 0.3)
    reset[0, 0], reset[-1, 0] = False, True
    return reset


def run(inputs, reset=None, scan=selective_scan):
    a = inputs
    named = {"reset_BT": reset, "initial_state_BIN": a.get("initial")}
    return scan(a["x"], a["dt"], a["A"], a["B"], a["C"], a["D"], **named, return_state=True)


def run_reference(inputs, reset=None):
    a = inputs
    return reference.selective_scan(a["x"], a["dt"], a["A"], a["B"], a["C"], a["D"], reset, a.get("initial"))


def values_and_gradients(function, inputs, reset):
    y, state = function(inputs, reset)
    random = torch.Generator().manual_seed(2)
    weights = [torch.randn(v.shape, generator=random, dtype=torch.float64).to(v.dtype) for v in (y, state)]
    gradients = torch.autograd.grad((y, state), list(inputs.values()), weights)
    return {"y": y, "state": state, **dict(zip(inputs, gradients, strict=True))}


def distances(ours, theirs):
    ours, theirs = ({name: v.detach().double() for name, v in side.items()} for side in (ours, theirs))
    return {name: float((ours[name] - theirs[name]).norm() / (theirs[name].norm() + 1e-300)) for name in theirs}


def assert_close(ours, theirs, limit):
    far = {name: distance for name, distance in distances(ours, theirs).items() if not distance <= limit}
    assert not far


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("time", LENGTHS)
def test_fp64_equals_reference(time, packed):
    inputs, reset = make(time), resets(time) if packed else None
    assert_close(values_and_gradients(run, inputs, reset), values_and_gradients(run_reference, inputs, reset), 1e-13)


@pytest.mark.parametrize(
    "sizes", [(1, 63, 63), (1, 63, 10), (4, 16, 16), (4, 16, 5), (7, 9, 1), (63, 1, 1), (32, 2, 2)]
)
def test_every_chunking_equals_reference(monkeypatch, sizes):
    """Also with documents that start and end exactly at the borders of chunks and blocks."""
    monkeypatch.setattr(eager, "chunk_sizes", lambda time, batch, state: sizes)
    inputs = make(63)
    for reset in (None, resets(63), (torch.arange(63) % sizes[1] == 0).expand(2, 63)):
        assert_close(
            values_and_gradients(run, inputs, reset), values_and_gradients(run_reference, inputs, reset), 1e-13
        )


@pytest.mark.parametrize("time", LENGTHS)
def test_fp32_equals_fp64(time):
    inputs, reset = make(time, dtype=torch.float32), resets(time)
    exact = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    ours = values_and_gradients(run, inputs, reset)
    assert {v.dtype for v in ours.values()} == {torch.float32}
    assert_close(ours, values_and_gradients(run_reference, exact, reset), 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_only_inputs_and_outputs(dtype):
    inputs, reset = make(100, dtype=dtype), resets(100)
    ours = values_and_gradients(run, inputs, reset)
    assert all(ours[name].dtype == dtype for name in ("y", "x", "B", "C"))
    assert all(ours[name].dtype == torch.float32 for name in ("state", "dt", "A", "D", "initial"))
    assert_close(ours, values_and_gradients(run_reference, inputs, reset), torch.finfo(dtype).eps / 8)


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
    reset = torch.tensor([[False, False, True, False, False], [True, False, False, True, True]])
    assert torch.autograd.gradcheck(
        lambda *v: run(dict(zip(inputs, v, strict=True)), reset), tuple(inputs.values()), fast_mode=False
    )


def test_without_skip_and_state():
    inputs = make(30, initial=False)
    a, zero = inputs, torch.zeros_like(inputs["D"])
    y = selective_scan(a["x"], a["dt"], a["A"], a["B"], a["C"])
    expected = reference.selective_scan(a["x"], a["dt"], a["A"], a["B"], a["C"], zero, None, None)[0]
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), a["dt"]), torch.autograd.grad(expected.sum(), a["dt"]))


@pytest.mark.parametrize("pieces", [(100, 1, 156), (1,) * 20])
def test_pieces_with_the_state_handed_over(pieces):
    inputs, reset = make(sum(pieces)), resets(sum(pieces))

    def in_pieces(inputs, reset):
        ys, state, start = [], inputs["initial"], 0
        for length in pieces:
            part = {n: v[:, start : start + length] if n in ("x", "dt", "B", "C") else v for n, v in inputs.items()}
            y, state = run({**part, "initial": state}, reset[:, start : start + length])
            ys.append(y)
            start += length
        return torch.cat(ys, 1), state

    assert_close(values_and_gradients(in_pieces, inputs, reset), values_and_gradients(run, inputs, reset), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("starts", [(0, 37, 38, 150, 299), (0, 150), (0, 149, 151, 298)])
def test_other_documents_have_no_influence_at_all(starts, dtype):
    """300 tokens are two chunks of 150: borders before, at and after the chunk's."""
    time = 300
    ends = (*starts[1:], time)
    reset = torch.zeros(2, time, dtype=torch.bool)
    reset[:, list(starts)] = True
    inputs, others = (make(time, dtype=dtype, seed=seed, initial=False) for seed in (0, 9))

    def outputs_by_token(inputs):
        y = run(inputs, reset)[0]
        tokens = {name: inputs[name] for name in ("x", "dt", "B", "C")}
        weight = (3 * inputs["x"].detach()).cos()
        return {"y": y, **dict(zip(tokens, torch.autograd.grad(y, list(tokens.values()), weight), strict=True))}

    before = outputs_by_token(inputs)
    for start, end in zip(starts, ends, strict=True):
        changed = {name: value.detach().clone() for name, value in inputs.items()}
        for name in ("x", "dt", "B", "C"):
            changed[name][:, start:end] = 5 * others[name].detach()[:, start:end]
        after = outputs_by_token({name: value.requires_grad_() for name, value in changed.items()})
        for name, value in before.items():
            elsewhere = torch.ones(time, dtype=torch.bool)
            elsewhere[start:end] = False
            assert torch.equal(value[:, elsewhere], after[name][:, elsewhere]), (name, start)
            assert not torch.equal(value[:, start:end], after[name][:, start:end])


def test_reset_at_the_first_token_drops_the_initial_state():
    inputs = make(20)
    reset = torch.zeros(2, 20, dtype=torch.bool)
    reset[:, 0] = True
    y, _ = run(inputs, reset)
    without, _ = run({name: value for name, value in inputs.items() if name != "initial"}, reset)
    assert torch.equal(y, without)
    assert not torch.autograd.grad(y.sum(), inputs["initial"])[0].any()


def test_extreme_steps_stay_finite():
    """Decays from 1 down to far below the smallest number, beside resets: no inf * 0 anywhere."""
    inputs = make(64, dtype=torch.float32)
    with torch.no_grad():
        inputs["dt"].mul_(torch.logspace(-6, 4, 64).view(1, 64, 1))
    ours = values_and_gradients(run, inputs, resets(64))
    assert all(value.isfinite().all() for value in ours.values())
    assert_close(ours, values_and_gradients(run_reference, inputs, resets(64)), 2e-5)


class Calls(TorchDispatchMode):
    """Counts torch calls and the numbers in the largest tensor that one returns."""

    def __init__(self):
        super().__init__()
        self.count = 0
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += 1
        self.largest = max([self.largest, *(v.numel() for v in tree_leaves(out) if isinstance(v, torch.Tensor))])
        return out


def cost(time):
    inputs = make(time, batch=1, channels=32, states=16, dtype=torch.float32, initial=False)
    with Calls() as forward:
        y = run(inputs, resets(time, batch=1))[0]
    with Calls() as backward:
        torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y))
    return forward, backward


def test_calls_grow_with_the_root_of_time():
    for short, long in zip(cost(256), cost(4096), strict=True):
        assert long.count <= 5 * short.count


def test_memory_grows_slower_than_time():
    """No tensor holds a quarter of all states at T = 4096, or an eighth at 16384."""
    for time, share in ((4096, 4), (16384, 8)):
        for calls in cost(time):
            assert calls.largest < time * 32 * 16 / share


@pytest.fixture
def poisoned():
    """torch.empty returns NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("time", [1, 63, 300])
def test_everything_is_written(poisoned, time):
    assert torch.empty(3).isnan().all()
    for reset in (None, resets(time)):
        assert all(value.isfinite().all() for value in values_and_gradients(run, make(time), reset).values())


def test_autocast_changes_nothing():
    inputs, reset = make(64, dtype=torch.float32), resets(64)
    expected = run(inputs, reset)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(inputs, reset)[0], expected)


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


def test_no_tokens():
    inputs = {
        name: value.detach()[:, :0] if name in ("x", "dt", "B", "C") else value for name, value in make(3).items()
    }
    with pytest.raises(ValueError, match="at least one token"):
        run(inputs)


def test_chunk_sizes_cover_time():
    for time in (*range(1, 3000, 7), 4096, 100_000):
        for state in (16, 8192, 10**7):
            chunks, length, block = eager.chunk_sizes(time, 4, state)
            assert chunks * length >= time and 1 <= block <= length
            assert chunks * length - time < chunks
            assert length <= max(256, 8 * math.sqrt(time) + 1)


def test_package_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; from lamella_kernels import causal_conv1d, selective_scan"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

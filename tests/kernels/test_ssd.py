"""SSD against the equation: values, every gradient, packed documents, states handed over, extremes, cost.

B batch, T time, H head, P head size, G group, N state.
"""

import numpy as np
import pytest
import torch

from lamella_kernels.ssd import eager, reference, ssd
from tests.nn.building import Largest

NAMES = ("x", "dt", "A", "B", "C", "D", "initial")
LENGTHS = (1, 2, 31, 100, 257)


@pytest.fixture(autouse=True)
def form():
    """There is one form; the folder's fixture would run everything twice."""


def make(time, batch=2, heads=4, size=3, groups=2, states=5, dtype=torch.float64, seed=0, initial=True):
    """Inputs by name; dt, A, D stay fp32 where x is half precision."""
    random = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    inputs = {
        "x": normal(batch, time, heads, size).to(dtype),
        "dt": torch.nn.functional.softplus(normal(batch, time, heads) - 1).to(wide),
        "A": -normal(heads).exp().to(wide),
        "B": normal(batch, time, groups, states).to(dtype),
        "C": normal(batch, time, groups, states).to(dtype),
        "D": normal(heads).to(wide),
    }
    if initial:
        inputs["initial"] = normal(batch, heads, size, states).to(wide)
    return {name: value.requires_grad_() for name, value in inputs.items()}


def resets(time, batch=2, seed=1):
    """Documents of random lengths, some of one token, other ones in each row; row 0 continues the initial state."""
    random = torch.Generator().manual_seed(seed)
    reset = torch.rand(batch, time, generator=random) < 0.08
    reset[:, 1:] |= reset[:, :-1] & (torch.rand(batch, time - 1, generator=random) < 0.3)
    reset[0, 0], reset[-1, 0] = False, True
    return reset


def run(inputs, reset=None):
    a = inputs
    named = {"reset_BT": reset, "initial_state_BHPN": a.get("initial")}
    return ssd(a["x"], a["dt"], a["A"], a["B"], a["C"], a["D"], **named, return_state=True)


def run_reference(inputs, reset=None):
    a = inputs
    return reference.ssd(a["x"], a["dt"], a["A"], a["B"], a["C"], a["D"], reset, a.get("initial"))


def values_and_gradients(function, inputs, reset):
    y, state = function(inputs, reset)
    random = torch.Generator().manual_seed(2)
    weights = [torch.randn(v.shape, generator=random, dtype=torch.float64).to(v.dtype) for v in (y, state)]
    gradients = torch.autograd.grad((y, state), list(inputs.values()), weights)
    return {"y": y, "state": state, **dict(zip(inputs, gradients, strict=True))}


def assert_close(ours, theirs, limit):
    ours, theirs = ({name: v.detach().double() for name, v in side.items()} for side in (ours, theirs))
    distances = {name: float((ours[name] - theirs[name]).norm() / (theirs[name].norm() + 1e-300)) for name in theirs}
    assert not {name: distance for name, distance in distances.items() if not distance <= limit}


def chunks_of(tokens, block):
    """As `chunk_sizes`, with chunks of at most `tokens`, so many in a block."""

    def sizes(time, *rest):
        chunks = -(-time // tokens)
        return chunks, -(-time // chunks), block

    return sizes


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("time", LENGTHS)
def test_fp64_equals_reference(time, packed):
    inputs, reset = make(time), resets(time) if packed else None
    assert_close(values_and_gradients(run, inputs, reset), values_and_gradients(run_reference, inputs, reset), 1e-13)


@pytest.mark.parametrize("heads, groups", [(1, 1), (3, 1), (3, 3), (6, 2)])
@pytest.mark.parametrize("size, states", [(1, 1), (4, 1), (1, 6)])
def test_every_grouping_equals_reference(heads, groups, size, states):
    inputs, reset = make(40, heads=heads, groups=groups, size=size, states=states), resets(40)
    assert_close(values_and_gradients(run, inputs, reset), values_and_gradients(run_reference, inputs, reset), 1e-13)


@pytest.mark.parametrize("tokens, block", [(63, 1), (32, 1), (16, 4), (16, 3), (9, 2), (7, 100), (2, 5), (1, 1)])
def test_every_chunking_equals_reference(monkeypatch, tokens, block):
    """Also with documents that start and end exactly at the borders of chunks."""
    monkeypatch.setattr(eager, "chunk_sizes", chunks_of(tokens, block))
    inputs = make(63)
    for reset in (None, resets(63), (torch.arange(63) % tokens == 0).expand(2, 63)):
        assert_close(
            values_and_gradients(run, inputs, reset), values_and_gradients(run_reference, inputs, reset), 1e-13
        )


@pytest.mark.parametrize("time", LENGTHS)
def test_fp32_equals_fp64(time):
    inputs, reset = make(time, dtype=torch.float32), resets(time)
    exact = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    ours = values_and_gradients(run, inputs, reset)
    assert {v.dtype for v in ours.values()} == {torch.float32}
    assert_close(ours, values_and_gradients(run_reference, exact, reset), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_only_inputs_and_outputs(dtype):
    inputs, reset = make(100, dtype=dtype), resets(100)
    ours = values_and_gradients(run, inputs, reset)
    assert all(ours[name].dtype == dtype for name in ("y", "x", "B", "C"))
    assert all(ours[name].dtype == torch.float32 for name in ("state", "dt", "A", "D", "initial"))
    assert_close(ours, values_and_gradients(run_reference, inputs, reset), torch.finfo(dtype).eps / 8)


@pytest.mark.parametrize("time", [1, 40, 300])
def test_recurrence_of_the_paper(time):
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T and y_t = h_t C_t + D x_t, written anew in numpy."""
    inputs, reset = make(time, initial=False), resets(time)
    x, dt, A, B, C, D = (v.detach().numpy() for v in inputs.values())
    expected = np.zeros_like(x)
    for b in range(x.shape[0]):
        for head in range(x.shape[2]):
            group, h = head // (x.shape[2] // B.shape[2]), np.zeros((x.shape[3], B.shape[3]))
            for t in range(time):
                h = np.zeros_like(h) if reset[b, t] else h
                h = np.exp(dt[b, t, head] * A[head]) * h + dt[b, t, head] * np.outer(x[b, t, head], B[b, t, group])
                expected[b, t, head] = h @ C[b, t, group] + D[head] * x[b, t, head]
    np.testing.assert_allclose(run(inputs, reset)[0].detach().numpy(), expected, rtol=1e-11, atol=1e-12)


def test_dual_form_of_the_paper():
    """y = (L o C B^T) X with L_ij the product of the decays after j up to i (equation 16), of one document."""
    inputs = make(33, batch=1, heads=2, groups=1, initial=False)
    x, dt, A, B, C, D = (v.detach().numpy()[0] if v.dim() > 1 else v.detach().numpy() for v in inputs.values())
    expected = np.zeros_like(x)
    for head in range(2):
        a = np.exp(dt[:, head] * A[head])
        L = np.array([[np.prod(a[j + 1 : i + 1]) if j <= i else 0.0 for j in range(33)] for i in range(33)])
        expected[:, head] = (L * (C[:, 0] @ B[:, 0].T)) @ (dt[:, head, None] * x[:, head]) + D[head] * x[:, head]
    np.testing.assert_allclose(run(inputs)[0].detach().numpy()[0], expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("tokens", [5, 3, 2])
def test_gradcheck(monkeypatch, tokens):
    monkeypatch.setattr(eager, "chunk_sizes", chunks_of(tokens, 2))
    inputs = make(5, heads=2, size=2, states=2)
    reset = torch.tensor([[False, False, True, False, False], [True, False, False, True, True]])
    assert torch.autograd.gradcheck(
        lambda *v: run(dict(zip(inputs, v, strict=True)), reset), tuple(inputs.values()), fast_mode=False
    )


def test_without_skip_and_state():
    inputs = make(30, initial=False)
    a, zero = inputs, torch.zeros_like(inputs["D"])
    y = ssd(a["x"], a["dt"], a["A"], a["B"], a["C"])
    expected = reference.ssd(a["x"], a["dt"], a["A"], a["B"], a["C"], zero, None, None)[0]
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), a["dt"]), torch.autograd.grad(expected.sum(), a["dt"]))


@pytest.mark.parametrize("pieces", [(100, 1, 56), (1,) * 20, (31, 32, 33)])
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
@pytest.mark.parametrize("starts", [(0, 20, 21, 32, 90), (0, 32), (0, 31, 33, 95)])
def test_other_documents_have_no_influence_at_all(monkeypatch, starts, dtype):
    """100 tokens are four chunks of 25, two to a block, then one of them: borders before, at and after the chunks'."""
    time = 100
    ends = (*starts[1:], time)
    reset = torch.zeros(2, time, dtype=torch.bool)
    reset[:, list(starts)] = True
    for tokens, block in ((32, 2), (100, 1)):
        monkeypatch.setattr(eager, "chunk_sizes", chunks_of(tokens, block))
        inputs, others = (make(time, dtype=dtype, seed=seed, initial=False) for seed in (0, 9))
        before = by_token(inputs, reset)
        for start, end in zip(starts, ends, strict=True):
            changed = {name: value.detach().clone() for name, value in inputs.items()}
            for name in ("x", "dt", "B", "C"):
                changed[name][:, start:end] = 5 * others[name].detach()[:, start:end]
            after = by_token({name: value.requires_grad_() for name, value in changed.items()}, reset)
            for name, value in before.items():
                elsewhere = torch.ones(time, dtype=torch.bool)
                elsewhere[start:end] = False
                assert torch.equal(value[:, elsewhere], after[name][:, elsewhere]), (name, start)
                assert not torch.equal(value[:, start:end], after[name][:, start:end])


def by_token(inputs, reset):
    y = run(inputs, reset)[0]
    tokens = {name: inputs[name] for name in ("x", "dt", "B", "C")}
    weight = (3 * inputs["x"].detach()).cos()
    return {"y": y, **dict(zip(tokens, torch.autograd.grad(y, list(tokens.values()), weight), strict=True))}


def test_the_same_call_gives_the_same_bits():
    inputs, reset = make(257, dtype=torch.float32), resets(257)
    one, two = (values_and_gradients(run, inputs, reset) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_reset_at_the_first_token_drops_the_initial_state():
    inputs = make(20)
    reset = torch.zeros(2, 20, dtype=torch.bool)
    reset[:, 0] = True
    y, _ = run(inputs, reset)
    without, _ = run({name: value for name, value in inputs.items() if name != "initial"}, reset)
    assert torch.equal(y, without)
    assert not torch.autograd.grad(y.sum(), inputs["initial"])[0].any()


@pytest.mark.parametrize("time, judge", [(1, run_reference), (64, run_reference), (300, run_reference), (4096, run)])
def test_extreme_steps_stay_finite_and_exact(time, judge):
    """Decays from exactly 1 down to 0 beside each other in a chunk and beside resets: no inf * 0, no lost digits.

    The longest row is judged by the op itself in fp64.
    """
    inputs = make(time, heads=2, groups=1, dtype=torch.float32)
    with torch.no_grad():
        inputs["dt"].mul_(torch.logspace(-6, 4, 64).repeat(-(-time // 64))[:time].view(1, time, 1))
        inputs["dt"][:, ::7] = 0
    ours = values_and_gradients(run, inputs, resets(time))
    assert all(value.isfinite().all() for value in ours.values())
    exact = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    assert_close(ours, values_and_gradients(judge, exact, resets(time)), 1e-5)


def test_steep_decays_keep_the_digits_of_gentle_ones():
    """Exponents add up to thousands in a chunk, while those of neighbours differ by little."""
    inputs = make(128, dtype=torch.float32)
    with torch.no_grad():
        inputs["dt"][:, :64], inputs["dt"][:, 64:], inputs["A"][:] = 40.0, 0.01, -1.0
        inputs["dt"].mul_(1 + 0.1 * torch.rand(inputs["dt"].shape, generator=torch.Generator().manual_seed(5)))
    exact = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    assert_close(values_and_gradients(run, inputs, None), values_and_gradients(run_reference, exact, None), 1e-6)


@pytest.mark.parametrize("scale", [1e-18, 1e12])
def test_tiny_and_huge_inputs(scale):
    inputs = make(100, dtype=torch.float32, initial=False)
    with torch.no_grad():
        for name in ("x", "B"):
            inputs[name].mul_(scale)
    ours = values_and_gradients(run, inputs, resets(100))
    assert all(value.isfinite().all() for value in ours.values())
    exact = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    assert_close(ours, values_and_gradients(run_reference, exact, resets(100)), 2e-6)


def largest(time):
    inputs = make(time, batch=1, heads=8, size=16, groups=1, states=16, dtype=torch.float32, initial=False)
    with Largest() as seen:
        y = run(inputs, resets(time, batch=1))[0]
        torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y))
    return seen.elements


@pytest.mark.parametrize("time", [4096, 16384])
def test_no_tensor_is_larger_than_x(time):
    """Not the states of all tokens, which are 16 times as many numbers, nor a [T, T] matrix a head."""
    assert largest(time) <= time * 8 * 16


def test_only_chunk_states_are_kept():
    inputs = make(256, heads=8, size=16, groups=1, states=16, dtype=torch.float32, initial=False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        run(inputs)
    chunks = eager.chunk_sizes(256, 2, 8, 16, 16)[0]
    assert sum(kept) == sum(v.numel() for v in inputs.values()) + chunks * 2 * 8 * 16 * 16


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
    expected = values_and_gradients(run, inputs, reset)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = values_and_gradients(run, inputs, reset)
    assert all(torch.equal(got[name], expected[name]) for name in got)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4, 3)}, "x_BTHP needs 4 dims"),
        ({"dt": torch.ones(2, 5, 4)}, "dt_BTH has shape .* but T is 3 in x_BTHP"),
        ({"A": torch.ones(2)}, "A_H has shape .* but H is 4"),
        ({"B": torch.ones(2, 3, 2, 7)}, "C_BTGN has shape .* but N is 7 in B_BTGN"),
        ({"D": torch.ones(3)}, "D_H has shape"),
        ({"initial": torch.ones(2, 4, 5, 4)}, "initial_state_BHPN has shape"),
        ({"B": torch.ones(2, 3, 3, 5), "C": torch.ones(2, 3, 3, 5)}, "4 heads cannot share 3 groups"),
        ({"x": torch.zeros(2, 3, 4, 5, dtype=torch.int64)}, "x_BTHP must be floating point"),
        ({"dt": torch.ones(2, 3, 4, dtype=torch.bfloat16)}, "dt_BTH must be float32 or float64"),
        ({"reset": torch.zeros(2, 3)}, "reset_BT must be bool"),
        ({"A": torch.ones(4, device="meta")}, "A_H is on meta"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    inputs = {"x": torch.ones(2, 3, 4, 5), "dt": torch.ones(2, 3, 4), "A": -torch.ones(4), "D": torch.ones(4)}
    inputs |= {"B": torch.ones(2, 3, 2, 5), "C": torch.ones(2, 3, 2, 5), "reset": None} | change
    with pytest.raises(ValueError, match=f"ssd: {message}"):
        run(inputs, inputs["reset"])


def test_no_tokens():
    inputs = {
        name: value.detach()[:, :0] if name in ("x", "dt", "B", "C") else value for name, value in make(3).items()
    }
    with pytest.raises(ValueError, match="at least one token"):
        run(inputs)


def test_chunk_sizes_cover_time():
    for time in (*range(1, 3000, 7), 4096, 100_000):
        for heads, size, state in ((1, 1, 1), (80, 64, 128), (128, 256, 256)):
            chunks, length, block = eager.chunk_sizes(time, 4, heads, size, state)
            assert chunks * length >= time and 1 <= block <= chunks
            assert chunks * length - time < chunks
            assert length <= 256

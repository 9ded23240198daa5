"""SSD: the equation and the dual form of the paper, groups, chunks, extremes, cost.

B batch, T time, H head, P head size, G group, N state.
"""

import numpy as np
import pytest
import torch

from lamella_kernels.ssd import eager, reference, ssd
from tests.kernels.building import (
    FIVE,
    assert_agree,
    assert_apart,
    assert_exact,
    assert_gradients,
    cost,
    resets,
    source,
)

TOKENS = ("x", "dt", "B", "C")


def make(time, batch=2, heads=4, size=3, groups=2, states=5, dtype=torch.float64, seed=0, initial=True):
    """Inputs by name; dt, A, D stay fp32 where x is half precision."""
    normal, wide = source(seed), torch.promote_types(dtype, torch.float32)
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


def run(inputs, reset=None):
    a = inputs
    named = {"reset_BT": reset, "initial_state_BHPN": a.get("initial")}
    return ssd(a["x"], a["dt"], a["A"], a["B"], a["C"], a["D"], **named, return_state=True)


def run_reference(inputs, reset=None):
    a = inputs
    return reference.ssd(a["x"], a["dt"], a["A"], a["B"], a["C"], a["D"], reset, a.get("initial"))


def chunks_of(tokens, block):
    """As `chunk_sizes`, with chunks of at most `tokens`, so many in a block."""

    def sizes(time, *rest):
        chunks = -(-time // tokens)
        return chunks, -(-time // chunks), block

    return sizes


@pytest.mark.parametrize("heads, groups", [(1, 1), (3, 1), (3, 3), (6, 2)])
@pytest.mark.parametrize("size, states", [(1, 1), (4, 1), (1, 6)])
def test_every_grouping_equals_reference(heads, groups, size, states):
    inputs, reset = make(40, heads=heads, groups=groups, size=size, states=states), resets(40)
    assert_agree(run, run_reference, inputs, reset, limit=1e-13)


@pytest.mark.parametrize("tokens, block", [(63, 1), (32, 1), (16, 4), (16, 3), (9, 2), (7, 100), (2, 5), (1, 1)])
def test_every_chunking_equals_reference(monkeypatch, tokens, block):
    """Also with documents that start and end exactly at the borders of chunks."""
    monkeypatch.setattr(eager, "chunk_sizes", chunks_of(tokens, block))
    inputs = make(63)
    for reset in (None, resets(63), (torch.arange(63) % tokens == 0).expand(2, 63)):
        assert_agree(run, run_reference, inputs, reset, limit=1e-13)


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
    assert_gradients(run, inputs, FIVE)


def test_without_skip_and_state():
    inputs = make(30, initial=False)
    zero = torch.zeros_like(inputs.pop("D"))
    assert_agree(
        lambda a: (ssd(a["x"], a["dt"], a["A"], a["B"], a["C"]), None),
        lambda a: (run_reference({**a, "D": zero})[0], None),
        inputs,
        limit=1e-13,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("starts", [(0, 20, 21, 32, 90), (0, 32), (0, 31, 33, 95)])
def test_other_documents_have_no_influence_at_all(monkeypatch, starts, dtype):
    """100 tokens are four chunks of 25, two to a block, then one of them: borders before, at and after the chunks'."""
    for tokens, block in ((32, 2), (100, 1)):
        monkeypatch.setattr(eager, "chunk_sizes", chunks_of(tokens, block))
        assert_apart(run, make, TOKENS, starts, 100, dtype)


@pytest.mark.parametrize("time, judge", [(1, run_reference), (64, run_reference), (300, run_reference), (4096, run)])
def test_extreme_steps_stay_finite_and_exact(time, judge):
    """Decays from exactly 1 down to 0 beside each other in a chunk and beside resets: no inf * 0, no lost digits.

    The longest row is judged by the op itself in fp64.
    """
    inputs = make(time, heads=2, groups=1, dtype=torch.float32)
    with torch.no_grad():
        inputs["dt"].mul_(torch.logspace(-6, 4, 64).repeat(-(-time // 64))[:time].view(1, time, 1))
        inputs["dt"][:, ::7] = 0
    assert_exact(run, judge, inputs, resets(time), limit=1e-5)


def test_steep_decays_keep_the_digits_of_gentle_ones():
    """Exponents add up to thousands in a chunk, while those of neighbours differ by little."""
    inputs = make(128, dtype=torch.float32)
    with torch.no_grad():
        inputs["dt"][:, :64], inputs["dt"][:, 64:], inputs["A"][:] = 40.0, 0.01, -1.0
        inputs["dt"].mul_(1 + 0.1 * torch.rand(inputs["dt"].shape, generator=torch.Generator().manual_seed(5)))
    assert_exact(run, run_reference, inputs, None, limit=1e-6)


@pytest.mark.parametrize("scale", [1e-18, 1e12])
def test_tiny_and_huge_inputs(scale):
    inputs = make(100, dtype=torch.float32, initial=False)
    with torch.no_grad():
        for name in ("x", "B"):
            inputs[name].mul_(scale)
    assert_exact(run, run_reference, inputs, resets(100), limit=2e-6)


@pytest.mark.parametrize("time", [4096, 16384])
def test_no_tensor_is_larger_than_x(time):
    """Not the states of all tokens, which are 16 times as many numbers, nor a [T, T] matrix a head."""
    inputs = make(time, batch=1, heads=8, size=16, groups=1, states=16, dtype=torch.float32, initial=False)
    assert all(calls.elements <= time * 8 * 16 for calls in cost(run, inputs))


def test_only_chunk_states_are_kept():
    inputs = make(256, heads=8, size=16, groups=1, states=16, dtype=torch.float32, initial=False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        run(inputs)
    chunks = eager.chunk_sizes(256, 2, 8, 16, 16)[0]
    assert sum(kept) == sum(v.numel() for v in inputs.values()) + chunks * 2 * 8 * 16 * 16


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


def test_chunk_sizes_cover_time():
    for time in (*range(1, 3000, 7), 4096, 100_000):
        for heads, size, state in ((1, 1, 1), (80, 64, 128), (128, 256, 256)):
            chunks, length, block = eager.chunk_sizes(time, 4, heads, size, state)
            assert chunks * length >= time and 1 <= block <= chunks
            assert chunks * length - time < chunks
            assert length <= 256

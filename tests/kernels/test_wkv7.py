"""RWKV-7's recurrence: the equation of the paper, the peer, a value replaced, mistakes.

B batch, T time, H head, K key channel, V value channel.
"""

import numpy as np
import pytest
import torch

from lamella_kernels.wkv7 import reference, wkv7
from tests.kernels.building import assert_agree, fla_file, log_decays, resets, source

TOKENS = ("r", "log_w", "k", "v", "a", "b")


def make(time, batch=2, heads=3, keys=6, values=5, dtype=torch.float64, seed=0, initial=True):
    """Inputs by name, a and b as RWKV-7 has them; log_w and the state stay fp32 where the others are half precision."""
    normal, wide = source(seed), torch.promote_types(dtype, torch.float32)
    shape = batch, time, heads, keys
    kk = torch.nn.functional.normalize(normal(*shape), dim=-1)
    inputs = {
        "r": normal(*shape).to(dtype),
        "log_w": log_decays(*shape, seed=90 + 2 * seed).to(wide),
        "k": normal(*shape).to(dtype),
        "v": normal(batch, time, heads, values).to(dtype),
        "a": -kk.to(dtype),
        "b": (kk * torch.sigmoid(normal(*shape))).to(dtype),
    }
    if initial:
        inputs["initial"] = normal(batch, heads, values, keys).to(wide)
    return {name: value.requires_grad_() for name, value in inputs.items()}


def run(inputs, reset=None):
    named = {"reset_BT": reset, "initial_state_BHVK": inputs.get("initial"), "return_state": True}
    return wkv7(*(inputs[name] for name in TOKENS), **named)


def run_reference(inputs, reset=None):
    a = inputs
    return reference.wkv7(a["r"], a["log_w"], a["k"], a["v"], a["a"], a["b"], reset, a.get("initial"))


def test_recurrence_of_the_paper():
    """S_t = S_{t-1} (diag(w_t) + a_t b_t^T) + v_t k_t^T and y_t = S_t r_t of arXiv 2503.14456, anew in numpy."""
    inputs, reset = make(40), resets(40)
    r, log_w, k, v, a, b, state = (x.detach().numpy() for x in inputs.values())
    expected = np.zeros_like(v)
    for row, h in np.ndindex(2, 3):
        S = state[row, h]
        for t in range(40):
            at = row, t, h
            S = np.zeros_like(S) if reset[row, t] else S
            S = S @ (np.diag(np.exp(log_w[at])) + np.outer(a[at], b[at])) + np.outer(v[at], k[at])
            expected[at] = S @ r[at]
    np.testing.assert_allclose(run(inputs, reset)[0].detach().numpy(), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.peer
@pytest.mark.parametrize("time", [5, 96])
def test_equals_flash_linear_attention(time):
    """Its naive recurrence of a diagonal plus low-rank transition, in fp32: values, and gradients by autograd."""
    theirs = fla_file("ops/generalized_delta_rule/dplr/naive.py").dplr_recurrence
    inputs = make(time, dtype=torch.float32)

    def run_theirs(x):
        r, w, k, v, a, b = (x[name].transpose(1, 2) for name in TOKENS)
        r = r * r.shape[-1] ** 0.5  # it divides by that
        y, state = theirs(r, k, v, a, b, w, initial_state=x["initial"].mT)
        return y.transpose(1, 2), state.mT

    assert_agree(run, run_theirs, inputs, limit=2e-6)


def test_a_replaced_value_is_gone():
    """Learning rate 1, no decay, the same unit key twice: the second value takes the first one's place."""
    normal = source(3)
    key = torch.nn.functional.normalize(normal(1, 1, 1, 6), dim=-1).expand(1, 70, 1, 6)
    values = normal(1, 70, 1, 5)
    y = wkv7(key, torch.zeros_like(key), key, values, -key, key)
    torch.testing.assert_close(y, values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": torch.zeros(2, 4, 3)}, "r_BTHK needs 4 dims"),
        ({"k": torch.zeros(2, 5, 1, 3)}, "k_BTHK has shape .* but T is 4 in r_BTHK"),
        ({"initial": torch.zeros(2, 1, 3, 2)}, "initial_state_BHVK has shape"),
        ({"a": torch.zeros(2, 4, 1, 3, dtype=torch.int64)}, "a_BTHK must be floating point"),
        ({"log_w": torch.zeros(2, 4, 1, 3, dtype=torch.bfloat16)}, "log_w_BTHK must be float32 or float64"),
        ({"reset": torch.zeros(2, 4)}, "reset_BT must be bool"),
        ({"b": torch.zeros(2, 4, 1, 3, device="meta")}, "b_BTHK is on meta"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    inputs = {name: torch.zeros(2, 4, 1, 2 if name == "v" else 3) for name in TOKENS} | {"reset": None} | change
    with pytest.raises(ValueError, match=f"wkv7: {message}"):
        run(inputs, inputs["reset"])

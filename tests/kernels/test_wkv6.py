"""RWKV-6's recurrence: the equation of the paper, the peer, mistakes.

B batch, T time, H head, K key channel, V value channel.
"""

import numpy as np
import pytest
import torch

from lamella_kernels.wkv6 import reference, wkv6
from tests.kernels.building import assert_agree, fla_file, log_decays, resets, source

TOKENS = ("r", "k", "v", "log_w")


def make(time, batch=2, heads=3, keys=6, values=5, dtype=torch.float64, seed=0, initial=True):
    """Inputs by name; log_w, u and the state stay fp32 where the others are half precision."""
    normal, wide = source(seed), torch.promote_types(dtype, torch.float32)
    inputs = {
        "r": normal(batch, time, heads, keys).to(dtype),
        "k": normal(batch, time, heads, keys).to(dtype),
        "v": normal(batch, time, heads, values).to(dtype),
        "log_w": log_decays(batch, time, heads, keys, seed=90 + 2 * seed).to(wide),
        "u": normal(heads, keys).to(wide),
    }
    if initial:
        inputs["initial"] = normal(batch, heads, keys, values).to(wide)
    return {name: value.requires_grad_() for name, value in inputs.items()}


def run(inputs, reset=None):
    a = inputs
    named = {"reset_BT": reset, "initial_state_BHKV": a.get("initial"), "return_state": True}
    return wkv6(a["r"], a["k"], a["v"], a["log_w"], a["u"], **named)


def run_reference(inputs, reset=None):
    a = inputs
    return reference.wkv6(a["r"], a["k"], a["v"], a["log_w"], a["u"], reset, a.get("initial"))


def test_recurrence_of_the_paper():
    """Equations 19 and 20 of arXiv 2404.05892 written anew in numpy."""
    inputs, reset = make(40), resets(40)
    r, k, v, log_w, u, state = (x.detach().numpy() for x in inputs.values())
    expected = np.zeros_like(v)
    for b, h in np.ndindex(2, 3):
        S = state[b, h]
        for t in range(40):
            S = np.zeros_like(S) if reset[b, t] else S
            kv = np.outer(k[b, t, h], v[b, t, h])
            expected[b, t, h] = r[b, t, h] @ (S + np.diag(u[h]) @ kv)
            S = np.diag(np.exp(log_w[b, t, h])) @ S + kv
    np.testing.assert_allclose(run(inputs, reset)[0].detach().numpy(), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.peer
@pytest.mark.parametrize("time", [5, 96])
def test_equals_flash_linear_attention(time):
    """Its naive recurrence, in fp32: values, and gradients by autograd."""
    theirs = fla_file("ops/rwkv6/recurrent_naive.py").naive_recurrent_rwkv6
    inputs = make(time, dtype=torch.float32)

    def run_theirs(a):
        r, k, v, w = (a[name].transpose(1, 2) for name in TOKENS)
        y, state = theirs(r, k, v, w, a["u"], scale=1.0, initial_state=a["initial"], output_final_state=True)
        return y.transpose(1, 2), state

    assert_agree(run, run_theirs, inputs, limit=2e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": torch.zeros(2, 4, 3)}, "r_BTHK needs 4 dims"),
        ({"k": torch.zeros(2, 5, 1, 3)}, "k_BTHK has shape .* but T is 4 in r_BTHK"),
        ({"u": torch.zeros(2, 3)}, "u_HK has shape"),
        ({"initial": torch.zeros(2, 1, 2, 3)}, "initial_state_BHKV has shape"),
        ({"v": torch.zeros(2, 4, 1, 2, dtype=torch.int64)}, "v_BTHV must be floating point"),
        ({"log_w": torch.zeros(2, 4, 1, 3, dtype=torch.bfloat16)}, "log_w_BTHK must be float32 or float64"),
        ({"reset": torch.zeros(2, 4)}, "reset_BT must be bool"),
        ({"u": torch.zeros(1, 3, device="meta")}, "u_HK is on meta"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    inputs = {name: torch.zeros(2, 4, 1, 3) for name in ("r", "k", "log_w")} | {"v": torch.zeros(2, 4, 1, 2)}
    inputs |= {"u": torch.zeros(1, 3), "reset": None} | change
    with pytest.raises(ValueError, match=f"wkv6: {message}"):
        run(inputs, inputs["reset"])

"""RWKV-6's time mix against the paper's equations, written out token by token in numpy and fp64."""

import math

import numpy as np
import pytest
import torch

from lamella.config import check_options
from lamella.errors import UserError
from lamella.mixers.rwkv6 import Config
from lamella.model.init import initialize
from lamella.nn.depth import Depth
from lamella.nn.shard import Whole
from tests.nn.building import double, filled, noise, packed, relative

D_MODEL = 12
ROWS = packed([[7, 1, 2, 5], [12]], padding=[0, 3])

VARIANTS = {
    "two heads": {"head_size": 6, "mix_rank": 3, "decay_rank": 2},
    "many heads": {"head_size": 3, "mix_rank": 1, "decay_rank": 4},
    "one head": {"head_size": 12, "mix_rank": 2, "decay_rank": 5, "group_eps": 0.2},
}


def config_of(**options):
    return check_options(Config, {"mixer": "rwkv6", **options}, "rwkv6")


def rwkv6(config, w, x, position):
    """One row, equations 15 to 24 of arXiv 2404.05892."""
    K, heads, R = config.head_size, D_MODEL // config.head_size, config.mix_rank
    states, out = [np.zeros((K, K)) for _ in range(heads)], []
    for t in range(len(x)):
        d = (x[t - 1] if position[t] else 0) - x[t]
        low = np.tanh(w["mix_down"] @ (x[t] + w["mix.x"] * d))
        mixed = {
            name: x[t] + (w[f"mix.{name}"] + w["mix_up"][i] @ low[i * R : (i + 1) * R]) * d
            for i, name in enumerate("wkvrg")
        }
        r, k, v, g = (
            w[f"{name}.weight"] @ mixed[letter]
            for name, letter in (("receptance", "r"), ("key", "k"), ("value", "v"), ("gate", "g"))
        )
        decay = np.exp(-np.exp(w["decay.bias"] + w["decay.up"] @ np.tanh(w["decay.down"] @ mixed["w"])))
        y = []
        for h in range(heads):
            at = slice(h * K, (h + 1) * K)
            S = np.zeros((K, K)) if position[t] == 0 else states[h]
            kv = np.outer(k[at], v[at])
            o = r[at] @ (S + w["bonus"][h][:, None] * kv)
            states[h] = decay[at][:, None] * S + kv
            y.append((o - o.mean()) / np.sqrt(o.var() + config.group_eps))
        y = np.concatenate(y) * w["group_norm.weight"] + w["group_norm.bias"]
        out.append(w["out.weight"] @ (y * g / (1 + np.exp(-g))))
    return np.stack(out)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_equals_the_equations(options):
    config = config_of(**options)
    mixer = filled(config.build(D_MODEL, 1e-5, double())).double()
    weights = {name: p.detach().numpy() for name, p in mixer.named_parameters()}
    x = noise(*ROWS.position_BT.shape, D_MODEL)
    wanted = [rwkv6(config, weights, *row) for row in zip(x.numpy(), ROWS.position_BT.numpy(), strict=True)]
    assert relative(mixer(x, ROWS), np.stack(wanted)) < 1e-12


@pytest.mark.parametrize("index", [0, 1, 5])
def test_starts_as_published(index):
    """BlinkDL/RWKV-LM, RWKV-v5/src/model.py: the time mix x060 and the weights made from nothing."""
    D, L = 128, 6
    mixer = config_of(head_size=32).build_at(D, 1e-5, Whole(num_layers=L), Depth(index, L))
    initialize(mixer, seed=3)
    w = {name: p.detach().double().numpy() for name, p in mixer.named_parameters()}
    up, down, n = index / (L - 1), 1 - index / L, np.arange(D)
    for name, power, lift in (("x", 1, 0), ("w", 1, 0), ("k", 1, 0), ("v", 1, 0.3 * up), ("r", 0.5, 0), ("g", 0.5, 0)):
        np.testing.assert_allclose(w[f"mix.{name}"], 1 - (n / D) ** (power * down) - lift, atol=1e-6)
    np.testing.assert_allclose(w["decay.bias"], -6 + 5 * (n / (D - 1)) ** (0.7 + 1.3 * up), atol=1e-6)
    zigzag = np.array([0.0, 0.1, -0.1])[n % 3]
    np.testing.assert_allclose(w["bonus"].ravel(), up * (1 - n / (D - 1)) + zigzag, atol=1e-6)
    assert w["bonus"].shape == (4, 32)
    np.testing.assert_allclose(w["group_norm.weight"], ((index + 1) / L) ** 0.7, rtol=1e-6)
    assert not w["mix_down"].any() and not w["decay.down"].any() and not w["out.weight"].any()
    for name in ("mix_up", "decay.up"):
        assert 0.0099 < np.abs(w[name]).max() <= 0.01
        assert abs(w[name].std() / (0.01 / math.sqrt(3)) - 1) < 0.03
    for name, gain in (("receptance", 1), ("key", 0.1), ("value", 1), ("gate", 0.1)):
        matrix = w[f"{name}.weight"]
        np.testing.assert_allclose(matrix @ matrix.T, gain**2 * np.eye(D), atol=1e-5 * gain)


def test_decays_start_between_those_of_the_first_and_the_last_channel():
    """w0 runs from -6 to -1: decays from 0.9975 down to 0.692."""
    mixer = config_of(head_size=32).build(128, 1e-5, Whole())
    initialize(mixer, seed=0)
    decay = torch.exp(-torch.exp(mixer.decay(noise(1, 3, 128, dtype=torch.float32))))[0, 0].detach()
    assert abs(float(decay[0]) - math.exp(-math.exp(-6))) < 1e-6
    assert abs(float(decay[-1]) - math.exp(-math.exp(-1))) < 1e-6
    assert (decay.diff() < 0).all()


@pytest.mark.parametrize("size", [1e-20, 1e4], ids=str)
def test_extreme_inputs_stay_finite(size):
    """Decays down to exactly 0 and up to 1: no inf * 0 anywhere."""
    mixer = filled(config_of(head_size=4, mix_rank=2, decay_rank=2).build(D_MODEL, 1e-5, Whole()))
    x = (size * noise(1, 150, D_MODEL, dtype=torch.float32)).requires_grad_()
    y = mixer(x, packed([[1, 149]]))
    gradients = torch.autograd.grad(y.sum(), [x, *mixer.parameters()])
    assert y.isfinite().all() and all(g.isfinite().all() for g in gradients)


def test_weight_decay_is_for_the_projections_alone():
    """As published: no low rank, mix, decay or norm decays."""
    mixer = config_of().build(128, 1e-5, Whole())
    decayed = {name for name, p in mixer.named_parameters() if p.place.decay}
    assert decayed == {f"{name}.weight" for name in ("receptance", "key", "value", "gate", "out")}


def test_what_a_state_holds():
    """A matrix a head in fp32, and one token of the stream."""
    mixer, state = filled(config_of(head_size=4).build(D_MODEL, 1e-5, Whole(torch.bfloat16))), {}
    mixer(noise(2, 9, D_MODEL, dtype=torch.bfloat16), packed([[9], [4, 5]]), state)
    held = {name: (tuple(v.shape), v.dtype) for name, v in state.items()}
    assert held == {"wkv": ((2, 3, 4, 4), torch.float32), "shift": ((2, D_MODEL), torch.bfloat16)}


def test_sizes_that_do_not_fit():
    with pytest.raises(UserError, match="d_model=12 does not divide by head_size=64"):
        config_of().build(D_MODEL, 1e-5, Whole())

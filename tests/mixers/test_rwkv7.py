"""RWKV-7's time mix against the paper's equations, written out token by token in numpy and fp64."""

import math

import numpy as np
import pytest
import torch

from lamella.config import ModelConfig, check_options
from lamella.mixers.rwkv7 import FIRST_VALUES, Config
from lamella.model.init import initialize
from lamella.model.lm import LanguageModel
from lamella.model.stack import plan_layers
from lamella.nn.depth import Depth
from lamella.nn.shard import Whole
from tests.nn.building import double, filled, noise, packed, relative

D_MODEL = 12
LENGTHS, PADDING = [[7, 1, 2, 5], [12]], [0, 3]
LATER = Depth(1, 2, frozenset({FIRST_VALUES}))

VARIANTS = {
    "two heads": {"head_size": 6, "decay_rank": 2, "rate_rank": 3, "value_rank": 1, "gate_rank": 4},
    "many heads": {"head_size": 3, "decay_rank": 4, "rate_rank": 1, "value_rank": 3, "gate_rank": 2},
    "one head": {"head_size": 12, "decay_rank": 3, "rate_rank": 2, "value_rank": 2, "gate_rank": 5, "group_eps": 0.2},
}


def config_of(**options):
    return check_options(Config, {"mixer": "rwkv7", **options}, "rwkv7")


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rwkv7(config, w, x, position, v_first=None):
    """One row, the time mixing of arXiv 2503.14456 (section 4); also the values."""
    K, heads = config.head_size, D_MODEL // config.head_size
    states, out, values = [np.zeros((K, K)) for _ in range(heads)], [], []

    def low(name, x, f=lambda h: h):
        return w[f"{name}.up"] @ f(w[f"{name}.down"] @ x)

    for t in range(len(x)):
        before = x[t - 1] if position[t] else 0
        mixed = {name: x[t] + (before - x[t]) * w[f"mix.{name}"] for name in "rwkvag"}
        r, k, v = (
            w[f"{name}.weight"] @ mixed[letter] for name, letter in (("receptance", "r"), ("key", "k"), ("value", "v"))
        )
        if v_first is not None:
            v = v + (v_first[t] - v) * sigmoid(w["value_residual.bias"] + low("value_residual", mixed["v"]))
        values.append(v)
        speed = w["decay.bias"] + low("decay", mixed["w"], np.tanh)
        clamped = -0.5 - np.log1p(np.exp(-speed))  # soft, below -0.5
        decay = np.exp(-np.exp(clamped))
        a = sigmoid(w["rate.bias"] + low("rate", mixed["a"]))
        g = low("gate", mixed["g"], sigmoid)
        kk, k = k * w["k_k"], k * (1 + (a - 1) * w["k_a"])
        y = []
        for h in range(heads):
            at = slice(h * K, (h + 1) * K)
            unit = kk[at] / np.linalg.norm(kk[at])
            S = np.zeros((K, K)) if position[t] == 0 else states[h]
            S = S @ (np.diag(decay[at]) - np.outer(unit, unit * a[at])) + np.outer(v[at], k[at])
            states[h], o = S, S @ r[at]
            o = (o - o.mean()) / np.sqrt(o.var() + config.group_eps)
            o = o * w["group_norm.weight"][at] + w["group_norm.bias"][at]
            y.append(o + (r[at] * k[at] * w["r_k"][h]).sum() * v[at])
        out.append(w["out.weight"] @ (np.concatenate(y) * g))
    return np.stack(out), np.stack(values)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_equals_the_equations(options):
    """A first layer and one behind it, that takes its values' residual from the first."""
    config, rows = config_of(**options), packed(LENGTHS, padding=PADDING)
    first = filled(config.build(D_MODEL, 1e-5, double())).double()
    later = filled(config.build_at(D_MODEL, 1e-5, double(), LATER), seed=1).double()
    weights = [{name: p.detach().numpy() for name, p in mixer.named_parameters()} for mixer in (first, later)]
    xs = [noise(*rows.position_BT.shape, D_MODEL, seed=seed) for seed in (0, 1)]
    got = [mixer(x, rows) for mixer, x in zip((first, later), xs, strict=True)]
    for b, position in enumerate(rows.position_BT.numpy()):
        wanted, values = rwkv7(config, weights[0], xs[0][b].numpy(), position)
        assert relative(got[0][b], wanted) < 1e-12
        assert relative(got[1][b], rwkv7(config, weights[1], xs[1][b].numpy(), position, values)[0]) < 1e-12


def test_gradients_of_a_later_layer_reach_the_first_s_values():
    config, rows = config_of(**VARIANTS["two heads"]), packed([[3, 2]])
    mixer = filled(config.build_at(D_MODEL, 1e-5, double(), LATER)).double()
    x, v = (noise(1, 5, D_MODEL, seed=seed).requires_grad_() for seed in (0, 1))

    def function(x, v, *parameters):
        rows.carried[FIRST_VALUES] = v
        named = dict(zip(dict(mixer.named_parameters()), parameters, strict=True))
        return torch.func.functional_call(mixer, named, (x, rows))

    inputs = (x, v, *(p.detach().requires_grad_() for p in mixer.parameters()))
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-7, rtol=1e-5, fast_mode=True)
    assert all(g.norm() > 0 for g in torch.autograd.grad(function(*inputs).square().sum(), inputs))


def test_the_first_of_its_kind_alone_has_no_residual():
    """Wherever in the stack it is; the layers behind it have one, at the cost of its products."""
    ranks = VARIANTS["two heads"]
    config = ModelConfig.model_validate(
        {
            "d_model": D_MODEL,
            "vocab_size": 8,
            "parts": {
                "time": {"mixer": "rwkv7", **ranks},
                "attention": {"mixer": "attention", "num_heads": 2},
                "mlp": {"channel": "mlp", "d_ff": 4},
            },
            "stack": [{"layers": ["attention/mlp", "time/mlp", "attention/-", "time/-", "time/mlp"]}],
        },
        strict=False,
    )
    with torch.device("meta"):
        layers = LanguageModel(config).layers
    assert [layers[i].mixer.value_residual is None for i in "134"] == [True, False, False]
    plans = plan_layers(config)
    first, later = (plans[i].mixer.flops_at(D_MODEL, 9, plans[i].depth).matmul for i in (1, 3))
    assert later - first == 2 * 9 * 2 * D_MODEL * ranks["value_rank"]


@pytest.mark.parametrize("index", [0, 1, 5])
def test_starts_as_published(index):
    """BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/model.py: the time mix x070 and the weights made from nothing."""
    D, L, N = 128, 6, 32
    ranks = {"decay_rank": 16, "rate_rank": 16, "value_rank": 8, "gate_rank": 24}
    carried = frozenset({FIRST_VALUES} if index else ())
    mixer = config_of(head_size=N, **ranks).build_at(D, 1e-5, Whole(num_layers=L), Depth(index, L, carried))
    initialize(mixer, seed=3)
    w = {name: p.detach().double().numpy() for name, p in mixer.named_parameters()}
    up, down, n = index / (L - 1), 1 - index / L, np.arange(D)
    for name, power in {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}.items():
        np.testing.assert_allclose(w[f"mix.{name}"], 1 - (n / D) ** (power * down), atol=1e-6)
    linear, z = n / (D - 1) - 0.5, (n % N - (N - 1) / 2) / ((N - 1) / 2)
    zigzag = z * np.abs(z)
    np.testing.assert_allclose(
        w["decay.bias"], -6 + 6 * (n / (D - 1)) ** (1 + up**0.3) + 0.5 + 2.5 * zigzag, atol=1e-5
    )
    np.testing.assert_allclose(w["rate.bias"], -0.19 + 0.3 * zigzag + 0.4 * linear, atol=1e-6)
    np.testing.assert_allclose(w["k_k"], 0.71 - 0.1 * linear, atol=1e-6)
    assert np.allclose(w["k_a"], 1.02) and np.allclose(w["r_k"], -0.04) and w["r_k"].shape == (4, N)
    np.testing.assert_allclose(w["group_norm.weight"], ((index + 1) / L) ** 0.7, rtol=1e-6)
    low_ranks = {"decay": 16, "rate": 16, "gate": 24} | ({"value_residual": 8} if index else {})
    for name, rank in low_ranks.items():
        assert not w[f"{name}.down"].any()
        np.testing.assert_allclose(w[f"{name}.up"].T @ w[f"{name}.up"], 0.01 * np.eye(rank), atol=1e-6)
    if index:
        np.testing.assert_allclose(w["value_residual.bias"], 0.73 - 0.4 * linear, atol=1e-6)
    assert not w["out.weight"].any() and "gate.bias" not in w
    for name, gain in (("receptance", 1), ("key", 0.1), ("value", 1)):
        matrix = w[f"{name}.weight"]
        np.testing.assert_allclose(matrix @ matrix.T, gain**2 * np.eye(D), atol=1e-5 * gain)


def test_no_decay_is_below_the_clamp():
    mixer = filled(config_of(**VARIANTS["two heads"]).build(D_MODEL, 1e-5, Whole()))
    speeds = mixer.decay(1e4 * noise(1, 50, D_MODEL, dtype=torch.float32))
    log_w = -math.exp(-0.5) * torch.sigmoid(speeds)
    assert log_w.exp().min() >= 0.545 and log_w.max() <= 0


def test_ranks_by_width():
    """Of the published models 0.1B, 1.5B and 2.9B: decay, a, value residual, gate."""
    ranks = {768: (64, 64, 32, 128), 2048: (96, 96, 64, 256), 2560: (96, 96, 64, 320), 128: (32, 32, 32, 32)}
    assert {width: config_of().ranks(width) for width in ranks} == ranks
    assert config_of(gate_rank=128).ranks(1024) == (64, 64, 32, 128)  # 0.4B


@pytest.mark.parametrize("size", [1e-20, 1e4], ids=str)
def test_extreme_inputs_stay_finite(size):
    """Keys too small to be normalised, and every sigmoid at its end."""
    mixer = filled(config_of(**VARIANTS["two heads"]).build(D_MODEL, 1e-5, Whole()))
    x = (size * noise(1, 150, D_MODEL, dtype=torch.float32)).requires_grad_()
    y = mixer(x, packed([[1, 149]]))
    gradients = torch.autograd.grad(y.sum(), [x, *mixer.parameters()])
    assert y.isfinite().all() and all(g.isfinite().all() for g in gradients)


def test_weight_decay_is_for_the_projections_alone():
    """As published: no low rank, mix, decay or norm decays."""
    mixer = config_of().build_at(128, 1e-5, Whole(), LATER)
    decayed = {name for name, p in mixer.named_parameters() if p.place.decay}
    assert decayed == {f"{name}.weight" for name in ("receptance", "key", "value", "out")}


def test_what_a_state_holds():
    """A matrix a head in fp32, and one token of the stream."""
    options = VARIANTS["two heads"]
    mixer, state = filled(config_of(**options).build(D_MODEL, 1e-5, Whole(torch.bfloat16))), {}
    mixer(noise(2, 9, D_MODEL, dtype=torch.bfloat16), packed([[9], [4, 5]]), state)
    held = {name: (tuple(v.shape), v.dtype) for name, v in state.items()}
    assert held == {"wkv": ((2, 2, 6, 6), torch.float32), "shift": ((2, D_MODEL), torch.bfloat16)}

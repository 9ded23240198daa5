"""Attention against its equation, written out token by token in numpy and fp64."""

import numpy as np
import pytest
import torch

from lamella.config import check_options
from lamella.errors import UserError
from lamella.mixers.attention import Config
from lamella.nn.shard import Whole
from lamella_kernels.rotary import rotary
from tests.nn.building import Largest, OneOf, double, filled, noise, packed, relative

D_MODEL, EPS = 12, 1e-3
ROWS = packed([[9, 1, 5], [3, 8]], padding=[0, 4])

VARIANTS = {
    "plain": {"num_heads": 3},
    "grouped": {"num_heads": 6, "num_kv_heads": 2, "head_dim": 4},
    "multi-query": {"num_heads": 3, "num_kv_heads": 1},
    "rope": {"num_heads": 2, "rope_theta": 50.0},
    "window": {"num_heads": 2, "window": 4},
    "window of a document": {"num_heads": 2, "window": 9},
    "qk-norm": {"num_heads": 3, "qk_norm": True},
    "bias": {"num_heads": 3, "qkv_bias": True},
    "all": {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 6,
        "rope_theta": 100.0,
        "window": 3,
        "qk_norm": True,
        "qkv_bias": True,
    },
}


def make(options):
    config = check_options(Config, {"mixer": "attention", **options}, "attention")
    return config, filled(config.build(D_MODEL, EPS, double())).double()


def turn(vector, position, theta):
    """RoFormer's equation 34 with the pairs (i, i + K/2): each pair as a complex number times e^(i angle)."""
    half = len(vector) // 2
    pairs = vector[:half] + 1j * vector[half:]
    pairs = pairs * np.exp(1j * position * theta ** (-2 * np.arange(half) / len(vector)))
    return np.concatenate([pairs.real, pairs.imag])


def normed(vector, weight):
    return vector / np.sqrt(np.mean(vector**2) + EPS) * weight


def attention(config, weights, x, document, position):
    """One row: for every token and head a softmax over the keys that it may see."""
    heads, groups, size = config.sizes(D_MODEL)
    wq, wk, wv = np.split(weights["qkv.weight"], [heads * size, (heads + groups) * size])
    bias = weights.get("qkv.bias", np.zeros((heads + 2 * groups) * size))
    bq, bk, bv = np.split(bias, [heads * size, (heads + groups) * size])
    q = (x @ wq.T + bq).reshape(-1, heads, size)
    k = (x @ wk.T + bk).reshape(-1, groups, size)
    v = (x @ wv.T + bv).reshape(-1, groups, size)
    y = np.zeros_like(q)
    for t in range(len(x)):
        for h in range(heads):
            group = h // (heads // groups)
            seen = [s for s in range(t + 1) if document[s] == document[t] and t - s < (config.window or 10**9)]
            query, keys = q[t, h], [k[s, group] for s in seen]
            if config.qk_norm:
                query = normed(query, weights["q_norm.weight"])
                keys = [normed(key, weights["k_norm.weight"]) for key in keys]
            if config.rope_theta:
                query = turn(query, position[t], config.rope_theta)
                keys = [turn(key, position[s], config.rope_theta) for key, s in zip(keys, seen, strict=True)]
            score = np.exp([query @ key / np.sqrt(size) for key in keys])
            y[t, h] = sum(p * v[s, group] for p, s in zip(score / score.sum(), seen, strict=True))
    return y.reshape(len(x), -1) @ weights["out.weight"].T


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_equals_the_equation(options):
    config, mixer = make(options)
    weights = {name: p.detach().numpy() for name, p in mixer.named_parameters()}
    x = noise(*ROWS.position_BT.shape, D_MODEL)
    wanted = [
        attention(config, weights, *row)
        for row in zip(x.numpy(), ROWS.document_BT.numpy(), ROWS.position_BT.numpy(), strict=True)
    ]
    assert relative(mixer(x, ROWS), np.stack(wanted)) < 1e-13


def test_a_window_keeps_no_scores():
    """Of all heads together: the largest tensor is the mask, T x 2 windows, that the heads share."""
    config = check_options(Config, {"mixer": "attention", "num_heads": 6, "window": 50}, "attention")
    mixer, x = filled(config.build(D_MODEL, EPS, Whole())), noise(1, 500, D_MODEL, dtype=torch.float32)
    with Largest() as largest:
        mixer(x.requires_grad_(), packed([[500]])).sum().backward()
    assert largest.elements <= 500 * 2 * 50


def test_rotary_scores_depend_on_the_distance_alone():
    q, k = noise(1, 1, 2, 8, seed=1).expand(1, 3, 2, 8), noise(1, 1, 2, 8, seed=2).expand(1, 3, 2, 8)

    def scores(first):
        at, ahead = torch.tensor([[first, first + 90, first + 4000]]), torch.tensor([[3, 93, 4003]]) + first
        q_turned, k_turned = rotary(q, ahead, theta=1e4), rotary(k, at, theta=1e4)
        return (q_turned * k_turned).sum(-1)

    assert relative(scores(0), scores(0)[:, :1].expand(1, 3, 2)) < 1e-12
    assert relative(scores(12345), scores(0)) < 1e-12


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_heads": 4, "num_kv_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3"),
        ({"num_heads": 5}, "d_model=12 does not divide by num_heads=5"),
        ({"num_heads": 4, "rope_theta": 1e4, "head_dim": 3}, "even head_dim, got 3"),
    ],
)
def test_sizes_that_do_not_fit(options, message):
    with pytest.raises(UserError, match=message):
        make(options)


def test_heads_that_do_not_divide_name_their_option():
    config, _ = make(VARIANTS["grouped"])
    with pytest.raises(UserError, match="num_kv_heads=2 cannot be split over tensor=3"):
        config.build(D_MODEL, EPS, OneOf(0, 3))


@pytest.mark.parametrize("window", [None, 1, 4, 30])
def test_score_flops_count_the_pairs(window):
    config = check_options(Config, {"mixer": "attention", "num_heads": 3, "window": window}, "attention")
    pairs = sum(s <= t and t - s < (window or 99) for t in range(17) for s in range(17))
    assert config.flops(D_MODEL, 17).scores == 2 * 2 * pairs * D_MODEL

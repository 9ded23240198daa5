"""Mamba-1 against its equations, written out token by token in numpy and fp64."""

import numpy as np
import pytest

from lamella.config import check_options
from lamella.mixers.mamba import Config
from lamella.model.init import initialize
from lamella.nn.shard import Whole
from tests.nn.building import double, filled, noise, packed, relative

D_MODEL, EPS = 6, 1e-3
ROWS = packed([[7, 1, 2, 5], [12]], padding=[0, 3])

VARIANTS = {
    "Jamba": {"d_state": 4, "dt_rank": 3},
    "Mamba": {"d_state": 3, "dt_rank": 2, "norms": False},
    "short kernel, no expansion": {"d_state": 5, "d_conv": 2, "expand": 1},
    "long kernel": {"d_state": 2, "d_conv": 6, "expand": 3, "norms": False},
}


def silu(x):
    return x / (1 + np.exp(-x))


def normed(x, weight):
    return x / np.sqrt(np.mean(x**2) + EPS) * weight


def mamba(config, w, x, position):
    """One row, algorithm 2 of arXiv 2312.00752 with its simplified B (dt B), and Jamba's norms before dt_proj."""
    inner, rank, n = config.expand * D_MODEL, config.rank(D_MODEL), config.d_state
    projected = x @ w["in_proj.weight"].T
    u, z = projected[:, :inner], projected[:, inner:]
    A, h, y = -np.exp(w["A_log"]), np.zeros((inner, n)), []
    for t in range(len(x)):
        taps = range(min(config.d_conv - 1, position[t]) + 1)
        c = silu(w["conv.bias"] + sum(w["conv.weight"][:, config.d_conv - 1 - j] * u[t - j] for j in taps))
        dt, B, C = np.split(w["x_proj.weight"] @ c, [rank, rank + n])
        if config.norms:
            dt, B, C = (normed(v, w[f"{k}_norm.weight"]) for k, v in (("dt", dt), ("B", B), ("C", C)))
        dt = np.log1p(np.exp(w["dt_proj.weight"] @ dt + w["dt_proj.bias"]))
        h = np.zeros_like(h) if position[t] == 0 else h
        h = np.exp(dt[:, None] * A) * h + dt[:, None] * B * c[:, None]
        y.append(w["out_proj.weight"] @ ((h @ C + w["D"] * c) * silu(z[t])))
    return np.stack(y)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_equals_the_equations(options):
    config = check_options(Config, {"mixer": "mamba", **options}, "mamba")
    mixer = filled(config.build(D_MODEL, EPS, double())).double()
    weights = {name: p.detach().numpy() for name, p in mixer.named_parameters()}
    x = noise(*ROWS.position_BT.shape, D_MODEL)
    wanted = [mamba(config, weights, *row) for row in zip(x.numpy(), ROWS.position_BT.numpy(), strict=True)]
    assert relative(mixer(x, ROWS), np.stack(wanted)) < 1e-12


def test_starts_as_the_paper_says():
    """A = -1..-N (S4D-real), D = 1, dt = softplus(bias) in [1e-3, 0.1], spread evenly over its logarithm."""
    mixer = check_options(Config, {"mixer": "mamba", "d_state": 5}, "mamba").build(512, EPS, Whole())
    initialize(mixer, seed=3)
    assert relative(mixer.A_log.exp(), np.tile(np.arange(1.0, 6.0), (1024, 1))) < 1e-6
    assert (mixer.D == 1).all()
    dt = np.log1p(np.exp(mixer.dt_proj.bias.detach().double().numpy()))
    assert dt.min() > 0.999e-3 and dt.max() < 0.1001
    quarters = np.quantile(np.log10(dt), [0.25, 0.5, 0.75])
    assert np.abs(quarters - [-2.5, -2.0, -1.5]).max() < 0.08
    assert mixer.dt_proj.weight.abs().max() < 32**-0.5 < 1.01 * mixer.dt_proj.weight.abs().max()


def test_rank_of_dt_is_a_sixteenth_of_the_width_rounded_up():
    config = check_options(Config, {"mixer": "mamba"}, "mamba")
    assert [config.rank(d) for d in (16, 17, 4096)] == [1, 2, 256]


def test_weight_decay_spares_what_is_no_matrix():
    mixer = check_options(Config, {"mixer": "mamba"}, "mamba").build(32, EPS, Whole())
    kept = {name for name, p in mixer.named_parameters() if not p.place.decay}
    norms = {"dt_norm.weight", "B_norm.weight", "C_norm.weight"}
    assert kept == {"A_log", "D", "conv.bias", "dt_proj.bias"} | norms

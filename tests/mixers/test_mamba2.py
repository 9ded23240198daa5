"""Mamba-2 against its equations, written out token by token in numpy and fp64, and against transformers."""

import numpy as np
import pytest
import torch

from lamella.config import check_options
from lamella.errors import UserError
from lamella.mixers.mamba2 import Config
from lamella.model.init import initialize
from lamella.nn.shard import Whole
from tests.nn.building import OneOf, double, filled, noise, packed, relative, some

D_MODEL, EPS = 6, 1e-3
ROWS = packed([[7, 1, 2, 5], [12]], padding=[0, 3])

VARIANTS = {
    "Mamba-2": {"d_state": 4, "head_dim": 3},
    "groups": {"d_state": 3, "head_dim": 2, "num_groups": 3},
    "short kernel, no expansion": {"d_state": 5, "d_conv": 2, "expand": 1, "head_dim": 6},
    "long kernel, more heads": {"d_state": 2, "d_conv": 6, "head_dim": 4, "num_heads": 4, "num_groups": 2},
    "every head its group": {"d_state": 2, "head_dim": 4, "num_groups": 3},
    "heads of one channel": {"d_state": 3, "head_dim": 1, "num_groups": 2},
}


def make(options, d_model=D_MODEL, shard=None, eps=EPS):
    config = check_options(Config, {"mixer": "mamba2", **options}, "mamba2")
    return config, config.build(d_model, eps, shard or double())


def silu(x):
    return x / (1 + np.exp(-x))


def mamba2(config, w, x, position):
    """One row, section 7 of arXiv 2405.21060: parallel projections, a convolution, SSD, the gate, then the norm."""
    size, n, groups = config.head_dim, config.d_state, config.num_groups
    heads = config.num_heads or config.expand * D_MODEL // size
    inner = heads * size
    z, mixed, dt = np.split(x @ w["in_proj.weight"].T, [inner, 2 * (inner + groups * n)], axis=1)
    h, y = np.zeros((heads, size, n)), []
    for t in range(len(x)):
        taps = range(min(config.d_conv - 1, position[t]) + 1)
        c = silu(w["conv.bias"] + sum(w["conv.weight"][:, config.d_conv - 1 - j] * mixed[t - j] for j in taps))
        u, B, C = np.split(c, [inner, inner + groups * n])
        u, B, C = u.reshape(heads, size), B.reshape(groups, n), C.reshape(groups, n)
        h = np.zeros_like(h) if position[t] == 0 else h
        out = np.zeros((heads, size))
        for i in range(heads):
            group, step = i * groups // heads, np.log1p(np.exp(dt[t, i] + w["dt_bias"][i]))
            h[i] = np.exp(-step * np.exp(w["A_log"][i])) * h[i] + step * np.outer(u[i], B[group])
            out[i] = h[i] @ C[group] + w["D"][i] * u[i]
        gated = (out.reshape(-1) * silu(z[t])).reshape(groups, -1)
        normed = gated / np.sqrt((gated**2).mean(1, keepdims=True) + EPS)
        y.append(w["out_proj.weight"] @ (normed.reshape(-1) * w["norm.weight"]))
    return np.stack(y)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_equals_the_equations(options):
    config, mixer = make(options)
    filled(mixer).double()
    weights = {name: p.detach().numpy() for name, p in mixer.named_parameters()}
    x = noise(*ROWS.position_BT.shape, D_MODEL)
    wanted = [mamba2(config, weights, *row) for row in zip(x.numpy(), ROWS.position_BT.numpy(), strict=True)]
    assert relative(mixer(x, ROWS), np.stack(wanted)) < 1e-12


THEIRS = {"conv1d.weight": "conv.weight", "conv1d.bias": "conv.bias"}


def transformers_pair(d_model, heads, size, groups, states, chunk):
    """transformers' mixer and ours with the same weights."""
    module = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    config = module.Mamba2Config(
        hidden_size=d_model,
        num_heads=heads,
        head_dim=size,
        n_groups=groups,
        state_size=states,
        expand=heads * size // d_model,
        chunk_size=chunk,
        num_hidden_layers=1,
        layer_norm_epsilon=EPS,
    )
    theirs = module.Mamba2Mixer(config, layer_idx=0)
    options = {"d_state": states, "head_dim": size, "num_heads": heads, "num_groups": groups}
    ours = filled(make(options, d_model, Whole())[1])
    given = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(given.pop(THEIRS.get(name, name)).view_as(parameter))
    assert not given
    return ours, theirs


@pytest.mark.peer
@pytest.mark.parametrize(
    "sizes, time",
    [
        ((32, 4, 16, 1, 8, 16), 50),
        ((32, 8, 8, 2, 16, 256), 64),
        ((16, 4, 8, 4, 4, 8), 33),
        ((64, 2, 64, 1, 32, 64), 300),
    ],
)
def test_transformers_values_and_gradients(sizes, time):
    """Its torch path, one document a row; the order (z, x, B, C, dt) and the names but the convolution's are shared."""
    ours, theirs = transformers_pair(*sizes)
    x, weight = (noise(2, time, sizes[0], seed=seed, dtype=torch.float32) for seed in (0, 1))
    found = []
    for mixer, call in ((ours, lambda x: ours(x, packed([[time]] * 2))), (theirs, theirs)):
        given = x.clone().requires_grad_()
        y = call(given)
        (y * weight).sum().backward()
        parameters = {THEIRS.get(n, n): p.grad.flatten() for n, p in mixer.named_parameters()}
        found.append({"y": y.flatten(), "x": given.grad.flatten(), **parameters})
    far = {name: relative(found[0][name], found[1][name]) for name in found[1]}
    assert len(far) == 10 and far.pop("y") < 2e-6
    assert not {name: distance for name, distance in far.items() if not distance < 3e-5}


@pytest.mark.peer
def test_transformers_steps():
    """Generation's steps against its whole."""
    ours, theirs = transformers_pair(32, 4, 16, 2, 8, 16)
    x, rows, state = noise(2, 20, 32, dtype=torch.float32), packed([[20]] * 2), {}
    with torch.no_grad():
        steps = [ours(x[:, t : t + 1], some(rows, time=slice(t, t + 1)), state) for t in range(20)]
        assert relative(torch.cat(steps, 1), theirs(x)) < 1e-5


def test_starts_as_the_public_code_does():
    """A uniform in [-16, -1], D = 1, dt = softplus(bias) in [1e-3, 0.1], spread evenly over its logarithm."""
    _, mixer = make({"head_dim": 1, "d_state": 2}, 2048, Whole())
    initialize(mixer, seed=3)
    A = mixer.A_log.detach().double().exp().numpy()
    assert A.min() > 1 - 1e-5 and A.max() < 16 + 1e-5
    assert np.abs(np.quantile(A, [0.25, 0.5, 0.75]) - [4.75, 8.5, 12.25]).max() < 0.4
    assert (mixer.D == 1).all() and (mixer.norm.weight == 1).all()
    dt = np.log1p(np.exp(mixer.dt_bias.detach().double().numpy()))
    assert dt.min() > 0.999e-3 and dt.max() < 0.1001
    assert np.abs(np.quantile(np.log10(dt), [0.25, 0.5, 0.75]) - [-2.5, -2.0, -1.5]).max() < 0.05
    assert abs(np.corrcoef(A, dt)[0, 1]) < 0.05


def test_weight_decay_spares_what_is_no_matrix():
    _, mixer = make({"d_state": 4, "head_dim": 8}, 32, Whole())
    kept = {name for name, p in mixer.named_parameters() if not p.place.decay}
    assert kept == {"A_log", "D", "dt_bias", "conv.bias", "norm.weight"}


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_count(groups):
    """From the paper's shapes: H = 2 D / P, in_proj 2 I + 2 G N + H, convolution over I + 2 G N channels."""
    d_model, size, n = 64, 16, 12
    heads, inner = 2 * d_model // size, 2 * d_model
    _, mixer = make({"d_state": n, "head_dim": size, "num_groups": groups}, d_model)
    mixed = inner + 2 * groups * n
    wanted = d_model * (inner + mixed + heads) + mixed * 4 + mixed + 3 * heads + inner + inner * d_model
    assert sum(p.numel() for p in mixer.parameters()) == wanted


@pytest.mark.parametrize("lengths", [[1], [4096], [2000, 1, 2095]], ids=str)
@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e3])
def test_extremes_stay_finite(lengths, scale):
    """Lengths, inputs, and decays that are exactly 1 (dt = 0) in one head, exactly 0 in the next.

    The norm squares a product of five activations: fp32 ends where they are 1e4.
    """
    _, mixer = make({"d_state": 4, "head_dim": 4, "num_heads": 3}, 8, Whole())
    filled(mixer)
    with torch.no_grad():
        mixer.dt_bias.copy_(torch.tensor([-200.0, 200.0, 0.0]))
        mixer.A_log.copy_(torch.tensor([0.0, 8.0, 0.0]))
    x = (noise(1, sum(lengths), 8, dtype=torch.float32) * scale).requires_grad_()
    y = mixer(x, packed([lengths]))
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize("time", [33, 300])
def test_long_rows_in_pieces(time):
    """Pieces and single tokens over several chunks of the scan equal the whole."""
    _, mixer = make({"d_state": 3, "head_dim": 2, "num_groups": 2})
    filled(mixer).double()
    rows, x, state, start, pieces = packed([[time - 10, 10], [time]]), noise(2, time, D_MODEL), {}, 0, []
    for length in (1, 1, time - 13, 1, 10):
        now = slice(start, start := start + length)
        pieces.append(mixer(x[:, now], some(rows, time=now), state))
    assert set(state) == {"conv", "h"} and all(len(value) == 2 for value in state.values())
    assert relative(torch.cat(pieces, 1), mixer(x, rows)) < 1e-13


def test_ranks_hold_the_same_share_of_every_segment():
    """A rank that held the first rows of the fused weight would multiply gates with heads."""
    _, mixer = make({"d_state": 4, "head_dim": 4, "num_groups": 1}, 8, OneOf(1, 2))
    assert [box.whole[0] for box in mixer.in_proj.weight.place.boxes] == [8, 24, 34, 38, 42]
    assert [box.whole[0] for box in mixer.conv.weight.place.boxes] == [8, 18, 22]
    assert [box.whole[0] for box in mixer.norm.weight.place.boxes] == [8]


class Told(OneOf):
    """A rank that is told what the others add to each sum, and notes what it adds itself."""

    def __init__(self, rank, size, others):
        super().__init__(rank, size)
        self.others, self.own = others, []

    def sum(self, x):
        self.own.append(x.detach())
        return x + (self.others.pop(0) if self.others else 0)


@pytest.mark.parametrize("ranks, groups", [(2, 1), (4, 1), (4, 2), (4, 4), (2, 4)])
def test_ranks_together_are_the_whole(ranks, groups):
    """More ranks than groups, as many, fewer: what the ranks leave the branch with adds up to the whole's output."""
    options = {"d_state": 4, "head_dim": 2, "num_heads": 8, "num_groups": groups}
    whole = filled(make(options, 8, Whole())[1])
    rows, x, added = packed([[5, 4]]), noise(1, 9, 8, dtype=torch.float32), [[] for _ in range(ranks)]
    parts = [filled_share(whole, make(options, 8, OneOf(rank, ranks))[1]) for rank in range(ranks)]
    for _ in range(3):  # first nobody is told anything, then the first sum is right, then the second, too
        outputs, before, added = [], added, []
        for rank, mixer in enumerate(parts):
            others = zip(*(before[r] for r in range(ranks) if r != rank), strict=True)
            shard = mixer.shard = mixer.norm.shard = Told(rank, ranks, [sum(values) for values in others])
            outputs.append(mixer(x, rows))
            added.append(shard.own)
    assert len(added[0]) == (2 if ranks > groups else 0)
    assert relative(sum(outputs), whole(x, rows)) < 1e-6


@torch.no_grad()
def filled_share(whole, part):
    """The part of the whole's weights that the part's places name."""
    values = dict(whole.named_parameters())
    for name, parameter in part.named_parameters():
        for box in parameter.place.boxes:
            parameter[box.local_slices] = values[name][box.whole_slices]
    return part


@pytest.mark.parametrize(
    "options, size, message",
    [
        ({"head_dim": 5}, 1, "12 inner channels do not divide by head_dim=5"),
        ({"head_dim": 3, "num_groups": 3}, 1, "num_heads=4 is not a multiple of num_groups=3"),
        ({"head_dim": 4, "d_state": 2}, 2, "num_heads=3 cannot be split over tensor=2"),
        ({"head_dim": 2, "num_groups": 3, "d_state": 2}, 2, "num_groups=3 cannot be split over tensor=2"),
    ],
)
def test_sizes_that_do_not_fit(options, size, message):
    with pytest.raises(UserError, match=message):
        make(options, shard=OneOf(0, size))

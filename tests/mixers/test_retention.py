"""Multi-scale retention against its equations: step by step in numpy and fp64, and the parallel form of torchscale."""

import math

import numpy as np
import pytest
import torch
from torch.func import functional_call

from lamella.config import check_options
from lamella.errors import UserError
from lamella.mixers.retention import Config, log_decays
from lamella.model.init import cut, initialize
from lamella.nn.shard import Whole
from lamella_kernels.linear_attention import eager
from tests.nn.building import OneOf, double, filled, noise, packed, relative, some

D_MODEL, EPS = 12, 1e-3
ROWS = packed([[7, 1, 2, 5], [12]], padding=[0, 3])

VARIANTS = {
    "defaults": {"num_heads": 2},
    "sizes of their own": {"num_heads": 3, "head_dim": 6, "value_head_dim": 5},
    "keys of two": {"num_heads": 6, "value_head_dim": 3},
    "fla": {"num_heads": 2, "variant": "fla"},
    "fla, sizes of their own": {"num_heads": 3, "head_dim": 6, "value_head_dim": 5, "variant": "fla"},
    "fla without a gate": {"num_heads": 2, "variant": "fla", "gate": False},
    "no weight in the norm": {"num_heads": 2, "variant": "fla", "norm_weight": False},
    "a weight in the norm": {"num_heads": 2, "norm_weight": True, "gate": False},
}


def make(**options):
    config = check_options(Config, {"mixer": "retention", **options}, "retention")
    return config, filled(config.build(D_MODEL, EPS, double())).double()


def projections(config, weights, x):
    """q, k, v and, where there is one, g by head."""
    heads, keys, values = config.sizes(D_MODEL)
    cuts = np.cumsum([heads * keys, heads * keys, *([heads * values] if config.gate else [])])
    parts = np.split(weights["qkvg.weight" if config.gate else "qkv.weight"], cuts)
    return [(x @ w.T).reshape(len(x), heads, -1) for w in parts]


def turned(vector, position, variant):
    """The pairs that a variant rotates, each as a complex number times e^(i angle)."""
    half = len(vector) // 2
    if variant == "fla":
        pairs, angle = vector[:half] + 1j * vector[half:], 1e4 ** (-np.arange(half) / half)
    else:
        pairs, angle = vector[::2] + 1j * vector[1::2], 1e4 ** -np.linspace(0, 1, half)
    return pairs * np.exp(1j * position * angle)


def retention(config, weights, x, position):
    """One row: the recurrence of arXiv 2307.08621, equation 6, with the sums that its normalisations need."""
    heads, keys, values = config.sizes(D_MODEL)
    q, k, v, *g = projections(config, weights, x)
    out = np.zeros((len(x), heads, values))
    for h in range(heads):
        gamma = 1 - 2.0 ** (-5 - h)
        for t in range(len(x)):
            if position[t] == 0:
                S, z, w = np.zeros((keys // 2, values), complex), np.zeros(keys // 2, complex), 0.0
            query, key = (turned(y[t, h], position[t], config.variant) for y in (q, k))
            key = key / np.sqrt(keys)
            S, z, w = gamma * S + np.outer(key, v[t, h]), gamma * z + key, gamma * w + 1
            o = (np.conj(query) @ S).real
            if config.variant == "retnet":
                scale = np.sqrt(w)  # the paper's D over the root of its row sum, then scores over max(1, |row sum|)
                o = o / scale / max(1, abs((np.conj(query) @ z).real / scale))
            o = o / np.sqrt(np.mean(o**2) + EPS)
            gate = g[0][t, h] / (1 + np.exp(-g[0][t, h])) if g else 1.0
            out[t, h] = o * weights.get("norm.weight", 1.0) * gate
    return out.reshape(len(x), -1) @ weights["out.weight"].T


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_equals_the_equations(options):
    config, mixer = make(**options)
    weights = {name: p.detach().numpy() for name, p in mixer.named_parameters()}
    x = noise(*ROWS.position_BT.shape, D_MODEL)
    wanted = [retention(config, weights, *row) for row in zip(x.numpy(), ROWS.position_BT.numpy(), strict=True)]
    assert relative(mixer(x, ROWS), np.stack(wanted)) < 1e-12


def torchscale(config, weights, x, detached=True):
    """torchscale's parallel form (September 2023) as its equations, a row one document: [B, T, D].

    Sines and cosines of an index times the angles, each angle twice; x cos + (the pairs turned by 90 degrees) sin; a
    decay matrix over the root of its row sums; scores over the detached max(1, |row sum|); RMS norm; swish gate.
    """
    heads, keys, values = config.sizes(D_MODEL)
    batch, time, _ = x.shape
    wq, wk, wv, wg = weights["qkvg.weight"].split([heads * keys, heads * keys, heads * values, heads * values])
    angle = (1.0 / 10000 ** torch.linspace(0, 1, keys // 2, dtype=x.dtype)).repeat_interleave(2)
    index = torch.arange(time, dtype=x.dtype)
    sin, cos = (index[:, None] * angle).sin(), (index[:, None] * angle).cos()
    decay = torch.log(1 - 2 ** (-5 - torch.arange(heads, dtype=x.dtype)))
    back = index[:, None] - index
    mask = torch.where(back >= 0, torch.exp(back * decay[:, None, None]), 0.0)
    mask = mask / mask.sum(-1, keepdim=True).sqrt()

    def split(w, scale=1.0):
        return (x @ w.T * scale).view(batch, time, heads, -1).transpose(1, 2)

    def shifted(y):
        return y * cos + torch.stack((-y[..., 1::2], y[..., ::2]), -1).flatten(-2) * sin

    q, k, v = shifted(split(wq)), shifted(split(wk, keys**-0.5)), split(wv)
    scores = q @ k.mT * mask
    sums = scores.detach() if detached else scores
    scores = scores / sums.sum(-1, keepdim=True).abs().clamp(min=1)
    out = scores @ v
    out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + EPS)
    gate = torch.nn.functional.silu(x @ wg.T)
    return (gate * out.transpose(1, 2).flatten(2)) @ weights["out.weight"].T


def gradients(function, weights, x):
    """The output, and the gradients of x and of every weight."""
    inputs = {"x": x, **weights}
    inputs = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    y = function({n: t for n, t in inputs.items() if n != "x"}, inputs["x"])
    weight = noise(*y.shape, seed=1, dtype=y.dtype)
    return {"y": y, **dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), weight), strict=True))}


@pytest.mark.parametrize("size", [1, 8, 9, 13, 40])
@pytest.mark.parametrize("options", [{"num_heads": 2}, {"num_heads": 3, "head_dim": 6, "value_head_dim": 5}], ids=str)
def test_values_and_gradients_are_torchscale_s(monkeypatch, options, size):
    """In every chunking, also where chunks do not divide the length; the divisor is constant for the gradient."""
    monkeypatch.setattr(eager, "chunk_size", lambda time, keys, values: size)
    config, mixer = make(**options)
    x, rows = 3 * noise(2, 40, D_MODEL), packed([[40], [40]])
    weights = dict(mixer.named_parameters())
    ours = gradients(lambda w, x: functional_call(mixer, w, (x, rows)), weights, x)
    theirs = gradients(lambda w, x: torchscale(config, w, x), weights, x)
    assert {name: relative(ours[name], theirs[name]) < 1e-12 for name in theirs} == dict.fromkeys(theirs, True)
    through = gradients(lambda w, x: torchscale(config, w, x, detached=False), weights, x)
    assert max(relative(ours[name], through[name]) for name in theirs) > 1e-6


def test_the_recurrent_form_is_the_parallel_one():
    """One token at a time with the state, 40 of them, and pieces whose lengths differ."""
    config, mixer = make(num_heads=2)
    weights = dict(mixer.named_parameters())
    x, rows = 3 * noise(2, 40, D_MODEL), packed([[40], [40]])
    wanted = torchscale(config, weights, x)
    for cuts in ([1] * 40, [17, 1, 22]):
        state, out, start = {}, [], 0
        for length in cuts:
            time = slice(start, start := start + length)
            out.append(mixer(x[:, time], some(rows, time=time), state))
        assert relative(torch.cat(out, 1), wanted) < 1e-12


@pytest.mark.parametrize("variant", ["retnet", "fla"])
def test_the_state_does_not_grow(variant):
    _, mixer = make(num_heads=2, variant=variant)
    state, rows = {}, packed([[50], [50]])
    shapes = {"kv": (2, 2, 6, 12)} | ({"keys": (2, 2, 6), "weight": (2, 2)} if variant == "retnet" else {})
    for start, stop in ((0, 1), (1, 2), (2, 40), (40, 41)):
        time = slice(start, stop)
        mixer(noise(2, stop - start, D_MODEL), some(rows, time=time), state)
        assert {name: tuple(t.shape) for name, t in state.items()} == shapes


def test_the_divisor_is_seen_by_the_norm_s_epsilon_alone():
    """An output times any number is the same after its norm, but for epsilon; q / 100 changes the divisor, too."""
    config, _ = make(num_heads=2)
    x, rows, found = noise(2, 30, D_MODEL), packed([[30], [30]]), []
    for eps in (1e-2, 1e-14):
        mixer = filled(config.build(D_MODEL, eps, double())).double()
        weight = mixer.qkvg.weight
        scaled = {**dict(mixer.named_parameters()), "qkvg.weight": torch.cat([weight[:12] / 100, weight[12:]])}
        found.append(relative(functional_call(mixer, scaled, (x, rows)), mixer(x, rows)))
    assert found[0] > 1e-2 and found[1] < 1e-7


def test_decays_come_from_global_heads():
    """A rank's heads decay as they do in the whole: gamma = 1 - 2^(-5-h)."""
    whole = log_decays(0, 8, torch.device("cpu"))
    assert relative(whole.exp(), 1 - 2.0 ** (-5 - np.arange(8))) < 1e-15
    assert torch.equal(torch.cat([log_decays(rank, 2, torch.device("cpu")) for rank in range(4)]), whole)
    assert (log_decays(0, 60, torch.device("cpu")) < 0).all()


def test_a_rank_s_heads_are_the_whole_s():
    """Two ranks by themselves, before the sum between them: their partial outputs add up to the whole's."""
    options = {"num_heads": 4, "head_dim": 4, "value_head_dim": 3}
    config, mixer = make(**options)
    weights = dict(mixer.named_parameters())
    x, total = noise(*ROWS.position_BT.shape, D_MODEL), 0.0
    for rank in range(2):
        part = config.build(D_MODEL, EPS, OneOf(rank, 2))
        parts = {name: cut(weights[name].detach(), p.place) for name, p in part.named_parameters()}
        total = total + functional_call(part, parts, (x, ROWS))
    assert relative(total, mixer(x, ROWS)) < 1e-13


def test_starts_as_torchscale_does():
    """Glorot's uniform bound of each matrix by itself, gain 2^-2.5, of the output 2^-1."""
    config = check_options(Config, {"mixer": "retention", "num_heads": 4}, "retention")
    mixer = config.build(256, EPS, Whole())
    initialize(mixer, seed=3)
    q, k, v, g = mixer.qkvg.weight.detach().split([256, 256, 512, 512])
    for weight, gain in ((q, 2**-2.5), (k, 2**-2.5), (v, 2**-2.5), (g, 2**-2.5), (mixer.out.weight.detach(), 0.5)):
        bound = gain * math.sqrt(6 / sum(weight.shape))
        assert 0.999 * bound < weight.abs().max() <= bound
        assert abs(weight.std() / (bound / math.sqrt(3)) - 1) < 0.01
        assert abs(weight.mean()) < 0.01 * bound


def test_first_outputs_have_unit_scale_under_the_gate():
    """Every head leaves its norm at root mean square 1; q, k, v and g start with a std of 2^-2.5 or nearly."""
    config = check_options(Config, {"mixer": "retention", "num_heads": 4}, "retention")
    mixer = config.build(64, 1e-14, double()).double()
    initialize(mixer, seed=1)
    seen = []
    mixer.out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = noise(1, 64, 64)
    mixer(x, packed([[64]]))
    q, k, v, g = mixer.qkvg(x)
    heads = (seen[0] / torch.nn.functional.silu(g)).unflatten(-1, (4, 32))
    assert (heads.square().mean(-1).sqrt() - 1).abs().max() < 1e-6
    for part, fans in ((q, 2), (k, 2), (v, 3), (g, 3)):
        assert abs(part.std() / (2**-2.5 * math.sqrt(2 / fans)) - 1) < 0.1


@pytest.mark.parametrize("variant", ["retnet", "fla"])
@pytest.mark.parametrize("scale", [1e-20, 1e-4, 1e4])
@pytest.mark.parametrize("time", [1, 4096])
def test_extremes_stay_finite(variant, scale, time):
    """32 heads: decays from 0.97 to within 1e-11 of 1."""
    config = check_options(Config, {"mixer": "retention", "num_heads": 32, "variant": variant}, "retention")
    mixer = config.build(64, 1e-6, Whole())
    initialize(mixer, seed=1)
    x = (scale * noise(1, time, 64, dtype=torch.float32)).requires_grad_()
    y = mixer(x, packed([[time]]))
    grads = torch.autograd.grad(y.sum(), [x, *mixer.parameters()])
    assert y.isfinite().all() and all(g.isfinite().all() for g in grads)


def test_bf16_stays_near():
    """A model's width: outputs and gradients within what rounding the projections costs."""
    config = check_options(Config, {"mixer": "retention", "num_heads": 4}, "retention")
    rows, found = packed([[40, 24]]), {}
    for dtype in (torch.float64, torch.bfloat16):
        mixer = config.build(64, 1e-6, Whole(dtype))
        initialize(mixer, seed=1)
        mixer = mixer.double() if dtype == torch.float64 else mixer
        x = noise(1, 64, 64, dtype=torch.bfloat16).to(dtype).requires_grad_()
        y = mixer(x, rows)
        found[dtype] = y, torch.autograd.grad(y, x, noise(*y.shape, seed=1, dtype=dtype))[0]
    for ours, exact, limit in zip(found[torch.bfloat16], found[torch.float64], (0.02, 0.1), strict=True):
        assert relative(ours, exact) < limit


def test_weight_decay_spares_what_is_no_matrix():
    for variant, spared in (("retnet", set()), ("fla", {"norm.weight"})):
        _, mixer = make(num_heads=2, variant=variant)
        assert {name for name, p in mixer.named_parameters() if not p.place.decay} == spared


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_heads": 5}, "d_model=12 does not divide by num_heads=5"),
        ({"num_heads": 4}, "even head_dim, got 3"),
    ],
)
def test_sizes_that_do_not_fit(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)

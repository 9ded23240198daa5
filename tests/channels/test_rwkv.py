"""RWKV's channel mixes against their equations in numpy; the token before; states; their count."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lamella.channels.rwkv import Config
from lamella.config import check_options
from lamella.model.init import initialize
from lamella.nn.depth import Depth
from lamella.nn.shard import Whole
from tests.nn.building import OneOf, double, filled, noise, packed, relative, some

D_MODEL, D_FF = 8, 12
ROWS = packed([[4, 1, 8], [13], [6, 5]], padding=[0, 0, 2])
TIME = ROWS.position_BT.shape[1]


@pytest.fixture(params=[6, 7])
def config(request):
    return check_options(Config, {"channel": "rwkv", "version": request.param, "d_ff": D_FF}, "rwkv")


def build(config, shard=None):
    shard = shard or double()
    channel = filled(config.build(D_MODEL, shard, "here"))
    return channel.double() if shard.dtype == torch.float64 else channel


def test_equals_the_equation(config):
    channel, x = build(config), noise(3, TIME, D_MODEL)
    w = {name: p.detach().numpy() for name, p in channel.named_parameters()}
    wanted = np.zeros((3, TIME, D_MODEL))
    for b, t in np.ndindex(3, TIME):
        now = x[b, t].numpy()
        before = x[b, t - 1].numpy() if ROWS.position_BT[b, t] else 0 * now
        k = np.maximum(w["key.weight"] @ (now + w["mix_k"] * (before - now)), 0) ** 2
        y = w["value.weight"] @ k
        if config.version == 6:
            y = y / (1 + np.exp(-w["receptance.weight"] @ (now + w["mix_r"] * (before - now))))
        wanted[b, t] = y
    assert relative(channel(x, ROWS), wanted) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_documents_are_isolated(config, dtype):
    """Bit-identical, outputs and input gradients, whatever another document holds."""
    channel, x = build(config, Whole(dtype)), noise(3, TIME, D_MODEL, dtype=dtype)

    def output_and_gradient(x):
        x = x.clone().requires_grad_()
        y = channel(x, ROWS)
        return y.detach(), torch.autograd.grad(y, x, noise(*y.shape, seed=1, dtype=dtype))[0]

    y, dx = output_and_gradient(x)
    for b, d in ((0, 0), (0, 1), (0, 2), (2, 0), (2, 1)):
        here = torch.zeros(x.shape[:2], dtype=torch.bool)
        here[b] = ROWS.document_BT[b] == d
        z, dz = output_and_gradient(torch.where(here[..., None], x, 3 * noise(3, TIME, D_MODEL, seed=5, dtype=dtype)))
        assert torch.equal(z[here], y[here]) and torch.equal(dz[here], dx[here])


@pytest.mark.parametrize("chunks", [[1] * 13, [5, 8], [2, 2, 4, 1, 3, 1], [13]], ids=str)
def test_chunks_with_the_state_handed_over_equal_the_whole(config, chunks):
    channel, x, state, pieces, start = build(config), noise(3, TIME, D_MODEL), {"wkv": torch.zeros(3)}, [], 0
    for length in chunks:
        time = slice(start, start := start + length)
        pieces.append(channel(x[:, time], some(ROWS, time=time), state))
    assert relative(torch.cat(pieces, 1), channel(x, ROWS)) < 1e-14
    assert set(state) == {"wkv", "channel_shift"}  # the mixer's is left alone
    assert torch.equal(state["channel_shift"], x[:, -1])


def test_gradients_are_right(config):
    channel, rows = build(config), packed([[3, 2], [5]])
    parameters = {name: p.detach().clone().requires_grad_() for name, p in channel.named_parameters()}

    def function(x, *values):
        return torch.func.functional_call(channel, dict(zip(parameters, values, strict=True)), (x, rows))

    inputs = (noise(2, 5, D_MODEL).requires_grad_(), *parameters.values())
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-7, rtol=1e-5, fast_mode=True)
    assert all(g.norm() > 0 for g in torch.autograd.grad(function(*inputs).square().sum(), inputs))


def test_bf16_is_near_fp64(config):
    x = noise(3, TIME, D_MODEL, dtype=torch.bfloat16)
    y = build(config, Whole(torch.bfloat16))(x, ROWS)
    assert y.dtype == torch.bfloat16
    assert relative(y, build(config)(x.double(), ROWS)) < 0.02


def test_matmul_flops_are_those_that_torch_counts(config):
    channel = build(config, Whole())
    with FlopCounterMode(display=False) as counter:
        channel(noise(1, 5, D_MODEL, dtype=torch.float32), packed([[5]]))
    assert counter.get_total_flops() == config.flops(D_MODEL, 5).matmul


@pytest.mark.parametrize("index", [0, 2, 5])
def test_starts_as_published(config, index):
    """BlinkDL/RWKV-LM: RWKV-v5/src/model.py (x060), RWKV-v7/train_temp/src/model.py (x070)."""
    D, L = 32, 6
    channel = config.build_at(D, Whole(num_layers=L), "here", Depth(index, L))
    initialize(channel, seed=1)
    w = {name: p.detach().double().numpy() for name, p in channel.named_parameters()}
    down = 1 - index / L
    mix = 1 - (np.arange(D) / D) ** (down if config.version == 6 else down**4)
    np.testing.assert_allclose(w["mix_k"], mix, atol=1e-6)
    np.testing.assert_allclose(w["key.weight"] @ w["key.weight"].T, np.eye(D_FF), atol=1e-5)
    assert not w["value.weight"].any()
    if config.version == 6:
        np.testing.assert_allclose(w["mix_r"], mix, atol=1e-6)
        assert not w["receptance.weight"].any()
    decayed = {name for name, p in channel.named_parameters() if p.place.decay}
    assert decayed == {name for name in w if name.endswith(".weight")}


def test_ranks_hold_the_channels_that_their_products_need(config):
    """A rank's rows of the key are its columns of the value; its columns of the receptance are the inputs it takes."""
    for rank in range(2):
        channel = config.build(D_MODEL, OneOf(rank, 2), "here")
        assert [box.whole for box in channel.key.weight.place.boxes] == [(rank * D_FF // 2, 0)]
        assert [box.whole for box in channel.value.weight.place.boxes] == [(0, rank * D_FF // 2)]
        if channel.receptance is not None:
            assert [box.whole for box in channel.receptance.weight.place.boxes] == [(0, rank * D_MODEL // 2)]

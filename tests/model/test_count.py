"""What the configuration says a model has and does, against the built model and torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lamella.config import load_run
from lamella.model.count import count
from lamella.model.init import initialize
from lamella.model.lm import LanguageModel
from tests.nn.building import packed

RUN, TIME, D_MODEL, VOCAB = "configs/run/quickstart.yaml", 19, 128, 4096

MOE = "model.parts.moe="
VARIANTS = {
    "jamba-nano": [],
    "tied": ["model.tie_embeddings=true"],
    "shared experts": ["model.parts.moe.shared_d_ff=96"],
    # Room for every token: what overflows is not computed, so the count is an upper bound where room is short.
    "Switch": [MOE + "{channel: moe, num_experts: 8, top_k: 1, capacity_factor: 8.0, d_ff: 64, activation: relu}"],
    "no norms, bias, QK-norm": [
        "model.parts.mamba.norms=false",
        "model.parts.attention.qkv_bias=true",
        "model.parts.attention.qk_norm=true",
    ],
    "mixers alone": ["model.stack=[{layers: [mamba/-, attention/-, -/moe], repeat: 2}]"],
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def config(request):
    return load_run(RUN, request.param).model


def test_parameters_are_the_built_model_s(config):
    model = LanguageModel(config)
    assert count(config, TIME).parameters == sum(p.numel() for p in model.parameters())


def test_active_parameters_leave_out_the_experts_that_a_token_does_not_choose(config):
    idle = 0
    for layer in LanguageModel(config).layers.values():
        if layer.has_channel and hasattr(layer.channel, "experts"):
            moe = layer.channel
            one = sum(p[0].numel() for p in moe.experts.parameters())
            idle += (moe.config.num_experts - moe.config.top_k) * one
    counted = count(config, TIME)
    assert idle > 0 and counted.active == counted.parameters - idle


def test_jamba_nano_by_hand():
    """From the paper's shapes, nothing of the code: D 128, inner 256, state 16, rank 8, ffn 352, 8 experts of 176."""
    inner, rank, n = 2 * D_MODEL, D_MODEL // 16, 16
    mamba = D_MODEL * 2 * inner + inner * 4 + inner + inner * (rank + 2 * n) + rank + 2 * n
    mamba += inner * rank + inner + inner * n + inner + inner * D_MODEL
    attention = D_MODEL * (4 + 2 + 2) * 32 + 4 * 32 * D_MODEL
    mlp = 3 * D_MODEL * 352
    router, expert = 8 * D_MODEL, 3 * D_MODEL * 176
    outside = 2 * VOCAB * D_MODEL + (2 * 4 + 1) * D_MODEL  # embedding, head, norms
    got = count(load_run(RUN).model, TIME)
    assert got.parameters == outside + 3 * mamba + attention + 2 * mlp + 2 * (router + 8 * expert)
    assert got.active == outside + 3 * mamba + attention + 2 * mlp + 2 * (router + 2 * expert)


def test_matmul_flops_are_those_that_torch_counts(config):
    """The projections are mm and addmm; a bmm is inside the scan or softmax attention and counted by its formula."""
    model = LanguageModel(config)
    initialize(model, seed=0)
    rows = packed([[TIME]])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(TIME)[None], rows)
    counts = counter.get_flop_counts()["Global"]
    counted = sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm"))
    assert counted == count(config, TIME).forward.matmul


def test_backward_s_products_are_twice_the_forward_s():
    """`training_flops` says so; of the first layer's input no gradient is needed, but the embedding's is."""
    config = load_run(RUN).model
    model = LanguageModel(config)
    initialize(model, seed=0)
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(TIME)[None], packed([[TIME]])).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    counted = sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm"))
    assert counted == 3 * count(config, TIME).forward.matmul
    total = count(config, TIME).forward
    assert count(config, TIME).training_flops == 3 * (total.matmul + total.scores + total.scan)


def test_work_outside_attention_is_linear_in_time():
    one, two = (count(load_run(RUN).model, length).forward for length in (100, 200))
    assert two.matmul == 2 * one.matmul and two.scan == 2 * one.scan > 0
    assert two.scores / one.scores == pytest.approx(200 * 201 / (100 * 101))


def test_nothing_is_allocated():
    """A model of half a trillion parameters is counted on any machine."""
    big = ["model.d_model=12288", "model.parts.mlp.d_ff=98304", "model.parts.moe.d_ff=98304"]
    stack = "model.stack=[{layers: [mamba/mlp, mamba/moe, attention/mlp, mamba/moe], repeat: 8}]"
    assert count(load_run(RUN, [*big, stack]).model, 4096).parameters > 4e11

"""The words of a model file: what they mean, and one clear line where they mean nothing."""

import pytest

from lamella.config import load_run
from lamella.errors import UserError
from lamella.model.lm import LanguageModel
from lamella.model.stack import plan_layers
from tests.nn.building import OneOf

RUN = "configs/run/quickstart.yaml"


def plan(*overrides):
    return plan_layers(load_run(RUN, overrides).model)


def test_blocks_repeat_in_order():
    layers = plan("model.stack=[{layers: [mamba/mlp, attention/-], repeat: 2}, {layers: [-/moe]}]")
    assert [p.name for p in layers] == ["mamba/mlp", "attention/-", "mamba/mlp", "attention/-", "-/moe"]
    assert [p.index for p in layers] == [0, 1, 2, 3, 4]
    assert [p.mixer and p.mixer.mixer for p in layers] == ["mamba", "attention", "mamba", "attention", None]
    assert [p.channel and p.channel.channel for p in layers] == ["mlp", None, "mlp", None, "moe"]


def test_two_parts_of_one_kind_keep_their_options():
    layers = plan(
        "model.parts.local={mixer: attention, num_heads: 2, window: 8}",
        "model.stack=[{layers: [local/mlp, attention/mlp]}]",
    )
    assert [p.mixer.window for p in layers] == [8, None]


def test_an_absent_branch_has_no_parameters():
    config = load_run(RUN, ["model.stack=[{layers: [mamba/-, -/mlp]}]"]).model
    names = {name.split(".")[2] for name, _ in LanguageModel(config).named_parameters() if name.startswith("layers.0")}
    assert names == {"mixer", "mixer_norm"}


@pytest.mark.parametrize(
    "override, words",
    [
        ("model.stack=[{layers: [mambo/mlp]}]", ["mambo is no mixer", "mamba, attention"]),
        ("model.stack=[{layers: [mamba/moo]}]", ["moo is no channel", "mlp, moe"]),
        ("model.stack=[{layers: [mlp/mamba]}]", ["mlp is no mixer", "mamba, attention"]),
        ("model.stack=[{layers: [mamba]}]", ["'mamba' must read MIXER/CHANNEL"]),
        ("model.stack=[{layers: [mamba/mlp/moe]}]", ["'mamba/mlp/moe' must read MIXER/CHANNEL"]),
        ("model.stack=[{layers: ['-/-']}]", ["'-/-' must read MIXER/CHANNEL", "one of the two"]),
        ("model.parts.mamba.mixer=mambo", ["model.parts.mamba.mixer", "no mixer 'mambo'", "there is mamba"]),
        ("model.parts.mamba.mixer=xyzzy", ["no mixer 'xyzzy'", "attention, mamba"]),
        ("model.parts.mamba.mixer=base", ["no mixer 'base'"]),
        ("model.parts.mlp.channel=mpl", ["model.parts.mlp.channel", "no channel 'mpl'", "there is mlp"]),
        ("model.parts.mamba.d_stat=8", ["model.parts.mamba", "d_stat: unknown key", "did you mean d_state?"]),
        ("model.parts.moe.topk=1", ["model.parts.moe", "topk: unknown key", "did you mean top_k?"]),
        ("model.parts.moe.zzzz=1", ["zzzz: unknown key", "known here", "num_experts"]),
        ("model.parts.moe.channel=mlp", ["model.parts.moe", "unknown key"]),
        ("model.parts.mamba.channel=mlp", ["model.parts.mamba", "either a mixer or a channel"]),
        ("model.parts.empty={d_ff: 3}", ["model.parts.empty", "either a mixer or a channel"]),
        ("model.parts.mamba.d_state=0", ["model.parts.mamba", "d_state", "greater than 0", "got 0"]),
        ("model.parts.mamba.d_state=many", ["model.parts.mamba", "d_state", "integer", '"many"']),
        ("model.parts.new={channel: moe, d_ff: 3}", ["model.parts.new", "num_experts: missing"]),
        ("model.parts.moe.jitter=1.0", ["model.parts.moe", "jitter", "less than 1"]),
        ("model.parts.mlp.activation=silu", ["model.parts.mlp", "activation", "swiglu"]),
    ],
)
def test_mistakes_are_one_clear_line(override, words):
    with pytest.raises(UserError) as caught:
        plan(override)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["model.parts.attention.num_heads=5", "model.parts.attention.num_kv_heads=5"], ["d_model=128", "num_heads=5"]),
        (["model.parts.moe.top_k=9"], ["top_k=9 exceeds num_experts=8"]),
    ],
)
def test_sizes_that_do_not_fit_are_one_clear_line(overrides, words):
    with pytest.raises(UserError) as caught:
        LanguageModel(load_run(RUN, overrides).model)
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_layout_that_does_not_fit_is_one_clear_line():
    with pytest.raises(UserError, match="cannot be split over tensor=5"):
        LanguageModel(load_run(RUN).model, OneOf(0, 5))

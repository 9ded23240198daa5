"""fla's RetNet, RWKV-6 and RWKV-7 to ours and back: the same tensors bit for bit, the same configuration, and the
logits of the papers' equations.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lamella.config import ModelConfig
from lamella.convert.check import skipped
from lamella.convert.convert import to_hf, to_lamella
from lamella.convert.family import Misfit, family, family_for
from lamella.errors import UserError
from lamella.nn.rows import one_document
from lamella.train.restore import load_model
from tests.commands import call
from tests.convert import forms
from tests.convert.fla_models import CASES, IDS, saved, shapes
from tests.convert.models import assert_same_tensors, config_of, write_config


def tokens_of(vocab):
    return torch.randint(vocab, (2, 24), generator=torch.Generator().manual_seed(0))


def worst(checkpoint, model: ModelConfig, wanted) -> float:
    """The largest difference of our fp32 logits to those wanted, which are none too small."""
    tokens = tokens_of(model.vocab_size)
    with torch.no_grad():
        logits = load_model(checkpoint, model, torch.float32).cpu()(tokens, one_document(tokens))
        exact = wanted(tokens)
    assert exact.dtype == torch.float64 and exact.abs().max() > 0.5
    return float((logits - exact).abs().max())


@pytest.mark.parametrize(("name", "number"), IDS)
def test_there_and_back(name, number, tmp_path):
    theirs = saved(name, number, tmp_path)
    ours = to_lamella(theirs, tmp_path / "ours")
    back = to_hf(tmp_path / "ours", tmp_path / "back")
    assert (ours.family.name, back.family.name) == (name, name)
    assert_same_tensors(back.theirs, theirs)
    assert config_of(back.theirs) == config_of(theirs)
    weights, config = load_file(theirs / "model.safetensors"), config_of(theirs)
    difference = worst(ours.checkpoint, ours.model, lambda tokens: forms.fla(config, weights, tokens))
    print(f"{name} {number}: {difference:.1e}")
    assert difference < 1e-5


@pytest.mark.parametrize(("name", "number"), IDS)
def test_a_configuration_that_is_made_means_the_same(name, number, tmp_path):
    """As of a model that was trained here: it is read as itself, and its tensors are those that the case has."""
    theirs = saved(name, number, tmp_path)
    model = to_lamella(theirs, tmp_path / "ours").model
    kind = family(name)
    made = kind.write(model, 2048) | {"model_type": name, "vocab_size": model.vocab_size, "hidden_size": model.d_model}
    made |= {"tie_word_embeddings": model.tie_embeddings, "initializer_range": model.init_std}
    assert kind.read(made, "made") == model
    made["fuse_norm"] = config_of(theirs).get("fuse_norm", True)
    assert shapes(made | {k: None for k in ("hidden_ratio",)}) == shapes(config_of(theirs))
    assert family_for(model, 64, None).name == name


def test_bf16_goes_both_ways(tmp_path):
    theirs = saved("rwkv6", 0, tmp_path, torch.bfloat16)
    assert to_lamella(theirs, tmp_path / "ours").dtype == torch.bfloat16
    back = to_hf(tmp_path / "ours", tmp_path / "back", shard_bytes=5000)
    assert len(list(back.theirs.glob("*.safetensors"))) > 3
    assert_same_tensors(back.theirs, theirs)


KEYS = {
    "retnet": {
        "feature_map": "relu",
        "hidden_act": "powlu",
        "num_kv_heads": 1,
        "attnres_block_size": 2,
        "expand_k": 0.3,
        "attn": {"layers": [1], "num_heads": 2, "qk_norm": True},
    },
    "rwkv6": {
        "expand_k": 0.5,
        "expand_v": 2.0,
        "norm_bias": False,
        "hidden_act": "relu",
        "num_heads": 5,
        "attn": {"layers": [7], "num_heads": 2},
    },
    "rwkv7": {
        "value_dim": 64,
        "norm_bias": False,
        "hidden_act": "relu",
        "attn": {"layers": [0], "num_heads": 2},
    },
}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in KEYS.items() for key in keys])
def test_what_is_not_computed_here_is_refused_by_its_key(name, key, tmp_path):
    theirs = saved(name, 0, tmp_path)
    write_config(theirs, config_of(theirs) | {key: KEYS[name][key]})
    with pytest.raises(UserError, match=key) as refused:
        to_lamella(theirs, tmp_path / "ours")
    assert "\n" not in str(refused.value) and not (tmp_path / "ours").exists()


def test_a_default_that_is_left_out_is_fla_s(tmp_path):
    """RWKV-6's keys are half as wide as the model unless it says otherwise."""
    theirs = saved("rwkv6", 0, tmp_path)
    write_config(theirs, {key: value for key, value in config_of(theirs).items() if key != "expand_k"})
    with pytest.raises(UserError, match=r"expand_k=0\.5"):
        to_lamella(theirs, tmp_path / "ours")


def model_of(mixer, channel, **more):
    parts = {"m": mixer, "c": channel, "a": {"mixer": "attention", "num_heads": 4}}
    tree = {"d_model": 32, "vocab_size": 50, "parts": parts, "stack": [{"layers": ["m/c", "m/c"]}]} | more
    return ModelConfig.model_validate(tree, strict=False)


RETENTION, MLP = {"mixer": "retention", "num_heads": 2, "variant": "fla"}, {"channel": "mlp", "d_ff": 24}
SIX, SEVEN = {"mixer": "rwkv6", "head_size": 8}, {"mixer": "rwkv7", "head_size": 8}
MIX6, MIX7 = {"channel": "rwkv", "version": 6, "d_ff": 24}, {"channel": "rwkv", "version": 7, "d_ff": 24}
LAYERED = {"norm": "layer", "norm_eps": 1e-5}
ATTENTION_FIRST = LAYERED | {"stack": [{"layers": ["a/c", "m/c"]}]}
MISFITS = [
    ("retnet", RETENTION | {"variant": "retnet"}, MLP, {}, "layer 0 (m/c): variant=retnet"),
    ("retnet", RETENTION | {"group_eps": 0.1}, MLP, {}, "group_eps=0.1, and retnet has one norm_eps=1e-06"),
    ("retnet", RETENTION, MLP | {"activation": "gelu"}, {}, "activation=gelu"),
    ("retnet", RETENTION, MLP, {"norm": "layer"}, "model.norm=layer: retnet has norm=rms alone"),
    ("retnet", RETENTION, MLP, {"stack": [{"layers": ["m/c", "a/c"]}]}, "layer 1 (a/c): "),
    ("rwkv6", SIX, MIX6, LAYERED, "layer 0 (m/c): group_eps=0.00064, and rwkv6 has one norm_eps=1e-05"),
    ("rwkv6", SIX | {"group_eps": 1e-5}, MIX7, LAYERED, "version=7"),
    ("rwkv6", SEVEN, MIX6, LAYERED, "layer 0 (m/c): rwkv6 has rwkv6 or attention there, not rwkv7"),
    ("rwkv7", SEVEN | {"head_size": 16}, MIX7, LAYERED, "group_eps=0.00064, and rwkv7's is head_size x norm_eps"),
    ("rwkv7", SEVEN | {"group_eps": 8e-5}, MIX7, ATTENTION_FIRST, "layer 0 (a/c): "),
    ("rwkv7", SEVEN, MLP, LAYERED, "layer 0 (m/c): rwkv7 has rwkv there, not mlp"),
]


@pytest.mark.parametrize(("name", "mixer", "channel", "more", "text"), MISFITS)
def test_the_first_layer_that_does_not_fit_is_named(name, mixer, channel, more, text):
    with pytest.raises(Misfit) as refused:
        family(name).write(model_of(mixer, channel, **more), 64)
    assert text in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", CASES)
def test_a_tensor_missing_and_one_left_over_are_named(name, tmp_path, capfd):
    """A part of a tensor cannot be missing: five of ours lie in `x_bias`."""
    theirs = saved(name, 0, tmp_path)
    weights = load_file(theirs / "model.safetensors")
    missing = {"retnet": "g_proj.weight", "rwkv6": "x_bias", "rwkv7": "x_a"}[name]
    gone = f"model.layers.1.attn.{missing}"
    for change, text in [
        ({name: tensor for name, tensor in weights.items() if name != gone}, f"lacks {gone}"),
        (weights | {"model.layers.0.attn.more": torch.ones(1)}, "model.layers.0.attn.more has no place"),
        (weights | {gone: torch.ones(2, 2)}, f"{missing} is [2, 2], by config.json it must"),
    ]:
        save_file({k: t.contiguous() for k, t in change.items()}, theirs / "model.safetensors", {"format": "pt"})
        assert call("convert", theirs, tmp_path / "ours", "--to", "lamella") == 2
        said = capfd.readouterr().err.splitlines()
        assert len(said) == 1 and text in said[0] and not (tmp_path / "ours").exists(), said


def test_the_command_says_that_nothing_was_compared(tmp_path, capfd, monkeypatch):
    theirs = saved("rwkv7", 0, tmp_path)
    reason = skipped(to_lamella(theirs, tmp_path / "other").model, family("rwkv7"))
    assert reason and ("fla" in reason or "transformers" in reason)
    assert call("convert", theirs, tmp_path / "ours", "--to", "lamella") == 0
    assert f"logits not compared: {reason}" in capfd.readouterr().out
    assert call("convert", theirs, tmp_path / "more", "--to", "lamella", "--check") == 2
    assert reason in capfd.readouterr().err

"""The published models' files: each goes out as its family and is read as itself; config.json of some as they are."""

import math
from pathlib import Path

import pytest

from lamella.config import ModelConfig, load_run
from lamella.convert.family import Misfit, family, family_for, family_of
from lamella.convert.map import links, places
from lamella.model.stack import plan_layers

ROOT = Path(__file__).parents[2]
FAMILIES = {
    "jamba-v0.1": "jamba",
    "jamba-1.5-mini": "jamba",
    "jamba-1.5-large": "jamba",
    "llama-2-7b": "llama",
    "tinyllama-1.1b": "llama",
    "transformer-nano": "llama",
    "mixtral-8x7b": "mixtral",
    "mamba-130m": "mamba",
    "mamba-2.8b": "mamba",
    "mamba2-130m": "mamba2",
    "mamba2-2.7b": "mamba2",
    "mamba2-nano": "mamba2",
    "nemotron-h-8b": "nemotron_h",
    "rwkv7-2.9b": "rwkv7",
}
REFUSED = {
    "jamba-nano": "d_ff=352 of mlp and 176 of moe; jamba has one for both",
    "rwkv7-nano": "layer 0 (time/channel): group_eps=0.00064, and rwkv7's is head_size x norm_eps",
    "rwkv6-1.6b": "layer 0 (time/channel): group_eps=0.00064, and rwkv6 has one norm_eps=1e-05 for all norms",
    "retnet-nano": "layer 0 (retention/mlp)",
    "switch-nano": "layer 0 (attention/mlp)",
}
PATTERN = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
PUBLISHED = {
    "mamba-130m": {
        "d_model": 768,
        "n_layer": 24,
        "vocab_size": 50277,
        "ssm_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
    },
    "mamba2-130m": {
        "d_model": 768,
        "d_intermediate": 0,
        "n_layer": 24,
        "vocab_size": 50277,
        "ssm_cfg": {"layer": "Mamba2"},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": True,
    },
    "nemotron-h-8b": {
        "model_type": "nemotron_h",
        "hybrid_override_pattern": PATTERN,
        "hidden_size": 4096,
        "vocab_size": 131072,
        "intermediate_size": 21504,
        "attention_head_dim": 128,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "n_groups": 8,
        "ssm_state_size": 128,
        "layer_norm_epsilon": 1e-5,
        "time_step_limit": [0.0, float("inf")],
        "mlp_hidden_act": "relu2",
    },
}


def model(name) -> ModelConfig:
    return load_run(ROOT / "configs/run/quickstart.yaml", [f"model={name}"]).model


def computed(config: ModelConfig):
    """What a stack computes, however its file says it."""
    shapes = {name: place.shape for name, place in places(config).items()}
    kinds = [(type(plan.mixer), type(plan.channel)) for plan in plan_layers(config)]
    return shapes, kinds, config.norm_eps, config.tie_embeddings


@pytest.mark.parametrize("name", FAMILIES)
def test_each_goes_out_and_is_read_as_itself(name):
    config = model(name)
    kind = family_for(config, 2048, None)
    assert kind.name == FAMILIES[name]
    tree = kind.write(config, 2048) | {"vocab_size": config.vocab_size, "hidden_size": config.d_model}
    again = kind.read(tree | {"tie_word_embeddings": config.tie_embeddings, "model_type": kind.name}, name)
    assert computed(again) == computed(config)
    found = places(config)
    linked = links(found, kind.table, kind.layers(config), kind.name)
    elements = {name: 0 for name in found}
    for link in linked:
        elements[link.ours] += math.prod(link.their_shape)
    assert elements == {name: math.prod(place.shape) for name, place in found.items()}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_family_has(name):
    with pytest.raises(Misfit) as refusal:
        family_for(model(name), 2048, None)
    assert REFUSED[name] in str(refusal.value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_config_json_as_published(name):
    kind = family_of(PUBLISHED[name], name)
    assert computed(kind.read(PUBLISHED[name], name)) == computed(model(name))


def test_the_blocks_of_nemotron_h():
    kind, config = family("nemotron_h"), model("nemotron-h-8b")
    letters = {"linear_attention": "M", "full_attention": "*", "mlp": "-"}
    assert "".join(letters[word] for word in kind.write(config, 64)["layers_block_type"]) == PATTERN
    numbers = kind.layers(config)
    assert numbers[0] == {"mixer": 0, "channel": 1} and numbers[4] == {"mixer": 7, "channel": 8}

"""Mamba (Gu & Dao 2023, arXiv 2312.00752): `MambaForCausalLM` of transformers."""

from lamella.convert.family import NOTHING, Family, Keys, Stack, Tree, stack_of
from lamella.convert.map import kernel
from lamella.mixers import mamba

TABLE = {
    "embedding.weight": "backbone.embeddings.weight",
    "norm.weight": "backbone.norm_f.weight",
    "head.weight": "lm_head.weight",
    "layers.{layer}.mixer_norm.weight": "backbone.layers.{layer}.norm.weight",
    "layers.{layer}.mixer.conv.weight": kernel("backbone.layers.{layer}.mixer.conv1d.weight"),
    "layers.{layer}.mixer.conv.bias": "backbone.layers.{layer}.mixer.conv1d.bias",
    "layers.{layer}.mixer.{rest}": "backbone.layers.{layer}.mixer.{rest}",
}


def read(keys: Keys, **options: object) -> Tree:
    """What Falcon Mamba has too."""
    keys.only("hidden_act", "silu", "swish")
    keys.only("use_bias", False)
    keys.only("use_conv_bias", True)
    d_model = keys.int("hidden_size")
    rank = -(-d_model // 16) if keys.tree.get("time_step_rank") == "auto" else keys.int("time_step_rank")
    part = {
        "mixer": "mamba",
        "d_state": keys.int("state_size", 16),
        "d_conv": keys.int("conv_kernel", 4),
        "expand": keys.int("expand", 2),
        "dt_rank": rank,
    }
    return {
        "d_model": d_model,
        "vocab_size": keys.int("vocab_size"),
        "norm_eps": keys.float("layer_norm_epsilon", 1e-5),
        "tie_embeddings": keys.flag("tie_word_embeddings", True),
        "parts": {"mamba": part | options},
        "stack": stack_of(["mamba/-"] * keys.int("num_hidden_layers")),
    }


def write(stack: Stack, part: mamba.Config) -> Tree:
    d_model = stack.model.d_model
    return {
        "hidden_act": "silu",
        "use_bias": False,
        "use_conv_bias": True,
        "num_hidden_layers": len(stack.plans),
        "layer_norm_epsilon": stack.model.norm_eps,
        "state_size": part.d_state,
        "conv_kernel": part.d_conv,
        "expand": part.expand,
        "intermediate_size": part.expand * d_model,
        "time_step_rank": part.rank(d_model),
    }


def to_ours(keys: Keys) -> Tree:
    return read(keys, norms=False)


def to_theirs(stack: Stack) -> Tree:
    return write(stack, stack.parts({mamba.Config: {"norms": False}}, {NOTHING: {}})[mamba.Config])


FAMILY = Family("mamba", "MambaForCausalLM", TABLE, to_ours, to_theirs)

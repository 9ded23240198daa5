"""Mamba-2 (Dao & Gu 2024, arXiv 2405.21060): `Mamba2ForCausalLM` of transformers."""

from lamella.convert.families import mamba
from lamella.convert.family import NOTHING, Family, Keys, Stack, Tree, refuse_clamp, stack_of
from lamella.mixers import mamba2


def to_ours(keys: Keys) -> Tree:
    keys.only("hidden_act", "silu", "swish")
    keys.only("use_bias", False)
    keys.only("use_conv_bias", True)
    refuse_clamp(keys)
    part = {
        "mixer": "mamba2",
        "d_state": keys.int("state_size", 128),
        "d_conv": keys.int("conv_kernel", 4),
        "expand": keys.int("expand", 2),
        "head_dim": keys.int("head_dim", 64),
        "num_heads": keys.int("num_heads", 128),
        "num_groups": keys.int("n_groups", 8),
    }
    return {
        "d_model": keys.int("hidden_size"),
        "vocab_size": keys.int("vocab_size"),
        "norm_eps": keys.float("layer_norm_epsilon", 1e-5),
        "tie_embeddings": keys.flag("tie_word_embeddings", False),
        "parts": {"mamba2": part},
        "stack": stack_of(["mamba2/-"] * keys.int("num_hidden_layers")),
    }


def to_theirs(stack: Stack) -> Tree:
    part = stack.parts({mamba2.Config: {}}, {NOTHING: {}})[mamba2.Config]
    heads, inner = part.sizes(stack.model.d_model)
    if inner % stack.model.d_model:
        raise stack.misfit(stack.plans[0], f"{inner} inner channels, and mamba2's are a multiple of d_model")
    return {
        "hidden_act": "silu",
        "use_bias": False,
        "use_conv_bias": True,
        "num_hidden_layers": len(stack.plans),
        "layer_norm_epsilon": stack.model.norm_eps,
        "state_size": part.d_state,
        "conv_kernel": part.d_conv,
        "expand": inner // stack.model.d_model,
        "head_dim": part.head_dim,
        "num_heads": heads,
        "n_groups": part.num_groups,
    }


FAMILY = Family("mamba2", "Mamba2ForCausalLM", mamba.TABLE, to_ours, to_theirs)

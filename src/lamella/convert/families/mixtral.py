"""Mixtral (Jiang et al. 2024, arXiv 2401.04088): `MixtralForCausalLM`. The weights of the chosen experts sum to 1."""

from lamella.channels import moe
from lamella.convert.families import llama
from lamella.convert.family import (
    ATTENTION,
    MOE,
    Family,
    Keys,
    Stack,
    Tree,
    read_heads,
    read_rope,
    stack_of,
    write_heads,
    write_rope,
)
from lamella.mixers import attention

TABLE = {
    **{key: row for key, row in llama.TABLE.items() if ".channel." not in key},
    "layers.{layer}.channel.router.weight": "model.layers.{layer}.block_sparse_moe.gate.weight",
    "layers.{layer}.channel.experts.w_in": (
        "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
        "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
    ),
    "layers.{layer}.channel.experts.w_out": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
}


def to_ours(keys: Keys) -> Tree:
    keys.only("hidden_act", "silu", "swish")
    heads = read_heads(keys) | {"rope_theta": read_rope(keys, 1e6)[0]}
    if keys.tree.get("sliding_window") is not None:
        heads["window"] = keys.int("sliding_window")
    experts = {
        "num_experts": keys.int("num_local_experts", 8),
        "top_k": keys.int("num_experts_per_tok", 2),
        "d_ff": keys.int("intermediate_size"),
        "renormalize": True,
        "aux_loss": keys.float("router_aux_loss_coef", 0.001),
        "jitter": keys.float("router_jitter_noise", 0.0),
    }
    return {
        "d_model": keys.int("hidden_size"),
        "vocab_size": keys.int("vocab_size"),
        "norm_eps": keys.float("rms_norm_eps", 1e-5),
        "tie_embeddings": keys.flag("tie_word_embeddings", False),
        "init_std": keys.float("initializer_range", 0.02),
        "parts": {"attention": {"mixer": "attention"} | heads, "moe": {"channel": "moe"} | experts},
        "stack": stack_of(["attention/moe"] * keys.int("num_hidden_layers")),
    }


def to_theirs(stack: Stack) -> Tree:
    plain = ATTENTION | {"qkv_bias": False, "out_bias": False}
    parts = stack.parts({attention.Config: plain}, {moe.Config: MOE | {"renormalize": True}})
    heads, experts = parts[attention.Config], parts[moe.Config]
    if heads.rope_theta is None:
        raise stack.misfit(stack.plans[0], "attention without rope_theta; mixtral's has rotary positions")
    return {
        "hidden_act": "silu",
        "intermediate_size": experts.d_ff,
        "num_hidden_layers": len(stack.plans),
        "num_local_experts": experts.num_experts,
        "num_experts_per_tok": experts.top_k,
        "router_aux_loss_coef": experts.aux_loss,
        "router_jitter_noise": experts.jitter,
        "rms_norm_eps": stack.model.norm_eps,
        "max_position_embeddings": stack.length,
        "sliding_window": heads.window,
        **write_heads(stack, heads, sized=True),
        **write_rope(heads.rope_theta),
    }


FAMILY = Family("mixtral", "MixtralForCausalLM", TABLE, to_ours, to_theirs, extra=llama.FAMILY.extra)

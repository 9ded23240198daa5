"""Llama (Touvron et al. 2023, arXiv 2302.13971): `LlamaForCausalLM`."""

from lamella.channels import mlp
from lamella.convert.family import (
    ATTENTION,
    MLP,
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
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "layers.{layer}.mixer_norm.weight": "model.layers.{layer}.input_layernorm.weight",
    "layers.{layer}.channel_norm.weight": "model.layers.{layer}.post_attention_layernorm.weight",
    "layers.{layer}.mixer.qkv.{rest}": (
        "model.layers.{layer}.self_attn.q_proj.{rest}",
        "model.layers.{layer}.self_attn.k_proj.{rest}",
        "model.layers.{layer}.self_attn.v_proj.{rest}",
    ),
    "layers.{layer}.mixer.out.{rest}": "model.layers.{layer}.self_attn.o_proj.{rest}",
    "layers.{layer}.channel.w_in.{rest}": (
        "model.layers.{layer}.mlp.gate_proj.{rest}",
        "model.layers.{layer}.mlp.up_proj.{rest}",
    ),
    "layers.{layer}.channel.w_out.{rest}": "model.layers.{layer}.mlp.down_proj.{rest}",
}


def to_ours(keys: Keys) -> Tree:
    keys.only("hidden_act", "silu", "swish")
    bias, (theta, _) = keys.flag("attention_bias", False), read_rope(keys, 10000.0)
    heads = read_heads(keys) | {"rope_theta": theta, "qkv_bias": bias, "out_bias": bias}
    gated = {"d_ff": keys.int("intermediate_size"), "bias": keys.flag("mlp_bias", False)}
    return {
        "d_model": keys.int("hidden_size"),
        "vocab_size": keys.int("vocab_size"),
        "norm_eps": keys.float("rms_norm_eps", 1e-6),
        "tie_embeddings": keys.flag("tie_word_embeddings", False),
        "init_std": keys.float("initializer_range", 0.02),
        "parts": {"attention": {"mixer": "attention"} | heads, "mlp": {"channel": "mlp"} | gated},
        "stack": stack_of(["attention/mlp"] * keys.int("num_hidden_layers")),
    }


def to_theirs(stack: Stack) -> Tree:
    parts = stack.parts({attention.Config: ATTENTION | {"window": None}}, {mlp.Config: MLP})
    heads, gated = parts[attention.Config], parts[mlp.Config]
    first = stack.plans[0]
    if heads.qkv_bias != heads.out_bias:
        raise stack.misfit(first, "qkv_bias and out_bias differ; llama has one attention_bias")
    if heads.rope_theta is None:
        raise stack.misfit(first, "attention without rope_theta; llama's has rotary positions")
    return {
        "hidden_act": "silu",
        "intermediate_size": gated.d_ff,
        "num_hidden_layers": len(stack.plans),
        "rms_norm_eps": stack.model.norm_eps,
        "max_position_embeddings": stack.length,
        "attention_bias": heads.qkv_bias,
        "mlp_bias": gated.bias,
        **write_heads(stack, heads, sized=True),
        **write_rope(heads.rope_theta),
    }


FAMILY = Family("llama", "LlamaForCausalLM", TABLE, to_ours, to_theirs, extra=r".*\.rotary_emb\.inv_freq")

"""Bamba (IBM, Princeton, CMU and UIUC 2024; arXiv 2403.19887's layout with Mamba-2): `BambaForCausalLM`.

Attention in some layers, its positions turning half of each head; a gated MLP in all.
"""

from lamella.channels import mlp
from lamella.convert.families import jamba
from lamella.convert.family import (
    ATTENTION,
    MLP,
    Family,
    Keys,
    Stack,
    Tree,
    read_heads,
    read_rope,
    refuse_clamp,
    stack_of,
    write_heads,
    write_rope,
)
from lamella.mixers import attention, mamba2

TURNED = 0.5  # of a head's channels; transformers has no other


def to_ours(keys: Keys) -> Tree:
    keys.only("hidden_act", "silu", "swish")
    keys.only("mamba_conv_bias", True)
    keys.only("mamba_proj_bias", False)
    refuse_clamp(keys)
    d_model, count, bias = keys.int("hidden_size"), keys.int("mamba_n_heads", 128), keys.flag("attention_bias", False)
    theta, rope = read_rope(keys, 10000.0)
    size = d_model // keys.int("num_attention_heads")
    if rope.get("partial_rotary_factor", TURNED) != TURNED:
        raise keys.refuse(f"partial_rotary_factor={rope['partial_rotary_factor']}: bamba's is {TURNED} alone")
    inner = keys.int("mamba_expand", 2) * d_model
    parts = {
        "mamba2": {
            "mixer": "mamba2",
            "d_state": keys.int("mamba_d_state", 256),
            "d_conv": keys.int("mamba_d_conv", 4),
            "expand": keys.int("mamba_expand", 2),
            "head_dim": inner // count if keys.tree.get("mamba_d_head") == "auto" else keys.int("mamba_d_head"),
            "num_heads": count,
            "num_groups": keys.int("mamba_n_groups", 1),
        },
        "attention": {"mixer": "attention", "rope_theta": theta, "rope_dim": int(size * TURNED)}
        | read_heads(keys)
        | {"qkv_bias": bias, "out_bias": bias},
        "mlp": {"channel": "mlp", "d_ff": keys.int("intermediate_size"), "bias": keys.flag("mlp_bias", False)},
    }
    attends = keys.list("attn_layer_indices", [])
    words = [f"{'attention' if i in attends else 'mamba2'}/mlp" for i in range(keys.int("num_hidden_layers"))]
    return {
        "d_model": d_model,
        "vocab_size": keys.int("vocab_size"),
        "norm_eps": keys.float("rms_norm_eps", 1e-5),
        "tie_embeddings": keys.flag("tie_word_embeddings", False),
        "init_std": keys.float("initializer_range", 0.02),
        "parts": {name: part for name, part in parts.items() if any(name in word.split("/") for word in words)},
        "stack": stack_of(words),
    }


def to_theirs(stack: Stack) -> Tree:
    half = {key: value for key, value in ATTENTION.items() if key != "rope_dim"} | {"window": None}
    parts = stack.parts({mamba2.Config: {}, attention.Config: half}, {mlp.Config: MLP})
    scan, heads, gated = parts.get(mamba2.Config), parts.get(attention.Config), parts[mlp.Config]
    d_model = stack.model.d_model
    tree = {
        "hidden_act": "silu",
        "intermediate_size": gated.d_ff,
        "num_hidden_layers": len(stack.plans),
        "rms_norm_eps": stack.model.norm_eps,
        "max_position_embeddings": stack.length,
        "mlp_bias": gated.bias,
        "attn_layer_indices": [i for i, has in enumerate(stack.where(attention.Config)) if has],
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        **write_heads(stack, heads, sized=False),
    }
    if heads is not None:
        plan, size = stack.first(attention.Config), heads.sizes(d_model)[2]
        if heads.qkv_bias != heads.out_bias:
            raise stack.misfit(plan, "qkv_bias and out_bias differ; bamba has one attention_bias")
        if heads.rope_theta is None or heads.rope_dim != int(size * TURNED):
            raise stack.misfit(plan, f"bamba's attention has rotary positions with rope_dim={int(size * TURNED)}")
        tree |= {"attention_bias": heads.qkv_bias} | write_rope(heads.rope_theta, partial_rotary_factor=TURNED)
    if scan is None:
        return tree | {"mamba_n_heads": 1, "mamba_expand": 1, "mamba_d_head": d_model}
    count, inner = scan.sizes(d_model)
    if inner % d_model:
        raise stack.misfit(stack.first(mamba2.Config), f"{inner} inner channels; bamba's are a multiple of d_model")
    return tree | {
        "mamba_d_state": scan.d_state,
        "mamba_d_conv": scan.d_conv,
        "mamba_expand": inner // d_model,
        "mamba_n_heads": count,
        "mamba_d_head": scan.head_dim,
        "mamba_n_groups": scan.num_groups,
    }


FAMILY = Family("bamba", "BambaForCausalLM", jamba.TABLE, to_ours, to_theirs)

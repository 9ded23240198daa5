"""Jamba (Lieber et al. 2024, arXiv 2403.19887): `JambaForCausalLM`, attention and experts in every so many layers."""

from lamella.channels import mlp, moe
from lamella.convert.family import (
    MLP,
    MOE,
    PLAIN_ATTENTION,
    Family,
    Keys,
    Stack,
    Tree,
    period_of,
    read_heads,
    stack_of,
    write_heads,
)
from lamella.convert.map import kernel
from lamella.mixers import attention, mamba

HERE = "model.layers.{layer}"
TABLE = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.final_layernorm.weight",
    "head.weight": "lm_head.weight",
    "layers.{layer}.mixer_norm.weight": f"{HERE}.input_layernorm.weight",
    "layers.{layer}.channel_norm.weight": f"{HERE}.pre_ff_layernorm.weight",
    "layers.{layer}.mixer.qkv.{rest}": tuple(f"{HERE}.self_attn.{part}_proj.{{rest}}" for part in "qkv"),
    "layers.{layer}.mixer.out.{rest}": f"{HERE}.self_attn.o_proj.{{rest}}",
    "layers.{layer}.mixer.conv.weight": kernel(f"{HERE}.mamba.conv1d.weight"),
    "layers.{layer}.mixer.conv.bias": f"{HERE}.mamba.conv1d.bias",
    "layers.{layer}.mixer.dt_norm.weight": f"{HERE}.mamba.dt_layernorm.weight",
    "layers.{layer}.mixer.B_norm.weight": f"{HERE}.mamba.b_layernorm.weight",
    "layers.{layer}.mixer.C_norm.weight": f"{HERE}.mamba.c_layernorm.weight",
    "layers.{layer}.mixer.{rest}": f"{HERE}.mamba.{{rest}}",
    "layers.{layer}.channel.w_in.{rest}": (
        f"{HERE}.feed_forward.gate_proj.{{rest}}",
        f"{HERE}.feed_forward.up_proj.{{rest}}",
    ),
    "layers.{layer}.channel.w_out.{rest}": f"{HERE}.feed_forward.down_proj.{{rest}}",
    "layers.{layer}.channel.router.weight": f"{HERE}.feed_forward.router.weight",
    "layers.{layer}.channel.experts.w_in": (
        f"{HERE}.feed_forward.experts.{{expert}}.gate_proj.weight",
        f"{HERE}.feed_forward.experts.{{expert}}.up_proj.weight",
    ),
    "layers.{layer}.channel.experts.w_out": f"{HERE}.feed_forward.experts.{{expert}}.down_proj.weight",
}


def to_ours(keys: Keys) -> Tree:
    keys.only("hidden_act", "silu", "swish")
    keys.only("mamba_conv_bias", True)
    keys.only("mamba_proj_bias", False)
    d_model, d_ff, experts = keys.int("hidden_size"), keys.int("intermediate_size"), keys.int("num_experts", 16)
    rank = keys.tree.get("mamba_dt_rank", "auto")
    parts = {
        "mamba": {
            "mixer": "mamba",
            "d_state": keys.int("mamba_d_state", 16),
            "d_conv": keys.int("mamba_d_conv", 4),
            "expand": keys.int("mamba_expand", 2),
            "dt_rank": -(-d_model // 16) if rank == "auto" else keys.int("mamba_dt_rank"),
        },
        "attention": {"mixer": "attention"} | read_heads(keys),
        "mlp": {"channel": "mlp", "d_ff": d_ff},
        "moe": {
            "channel": "moe",
            "num_experts": experts,
            "top_k": keys.int("num_experts_per_tok", 2),
            "d_ff": d_ff,
            "aux_loss": keys.float("router_aux_loss_coef", 0.001),
        },
    }

    def every(kind: str, period: int, offset: int) -> list[bool]:
        period, offset = keys.int(f"{kind}_layer_period", period), keys.int(f"{kind}_layer_offset", offset)
        if not 0 <= offset < period:
            raise keys.refuse(f"{kind}_layer_offset={offset} must lie below {kind}_layer_period={period}")
        return [i % period == offset for i in range(keys.int("num_hidden_layers"))]

    attends, routes = every("attn", 8, 4), every("expert", 2, 1)
    words = [
        f"{'attention' if a else 'mamba'}/{'moe' if r and experts > 1 else 'mlp'}"
        for a, r in zip(attends, routes, strict=True)
    ]
    used = {name for word in words for name in word.split("/")}
    return {
        "d_model": d_model,
        "vocab_size": keys.int("vocab_size"),
        "norm_eps": keys.float("rms_norm_eps", 1e-6),
        "tie_embeddings": keys.flag("tie_word_embeddings", False),
        "init_std": keys.float("initializer_range", 0.02),
        "parts": {name: part for name, part in parts.items() if name in used},
        "stack": stack_of(words),
    }


def to_theirs(stack: Stack) -> Tree:
    norms = {"norms": True, "norm_weights": True, "norms_eps": None}
    unturned = PLAIN_ATTENTION | {"rope_theta": None}
    experts_like = MOE | {"renormalize": False}
    parts = stack.parts(
        {mamba.Config: norms, attention.Config: unturned},
        {mlp.Config: MLP | {"bias": False}, moe.Config: experts_like},
    )
    scan, dense, experts = parts.get(mamba.Config), parts.get(mlp.Config), parts.get(moe.Config)
    if dense is not None and experts is not None and dense.d_ff != experts.d_ff:
        later = max(stack.first(mlp.Config), stack.first(moe.Config), key=lambda plan: plan.index)
        raise stack.misfit(later, f"d_ff={dense.d_ff} of mlp and {experts.d_ff} of moe; jamba has one for both")
    if experts is not None and experts.num_experts == 1:
        raise stack.misfit(stack.first(moe.Config), "num_experts=1, which jamba takes for an mlp")
    attention_every = period_of(stack, attention.Config, "attention")
    experts_every = period_of(stack, moe.Config, "experts")
    tree = {
        "hidden_act": "silu",
        "intermediate_size": next(part.d_ff for part in (dense, experts) if part is not None),
        "num_hidden_layers": len(stack.plans),
        "rms_norm_eps": stack.model.norm_eps,
        "max_position_embeddings": stack.length,
        "attn_layer_period": attention_every[0],
        "attn_layer_offset": attention_every[1],
        "expert_layer_period": experts_every[0],
        "expert_layer_offset": experts_every[1],
        "num_experts": 1 if experts is None else experts.num_experts,
        "num_experts_per_tok": 1 if experts is None else experts.top_k,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        **write_heads(stack, parts.get(attention.Config), sized=False),
    }
    if experts is not None:
        tree["router_aux_loss_coef"] = experts.aux_loss
    if scan is not None:
        rank = scan.rank(stack.model.d_model)
        tree |= {"mamba_d_state": scan.d_state, "mamba_d_conv": scan.d_conv, "mamba_expand": scan.expand}
        tree |= {"mamba_dt_rank": rank}
    return tree


FAMILY = Family("jamba", "JambaForCausalLM", TABLE, to_ours, to_theirs)

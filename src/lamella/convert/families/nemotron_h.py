"""Nemotron-H (NVIDIA 2025, arXiv 2504.03624): `NemotronHForCausalLM`.

Its blocks are one branch each, in any order: Mamba-2, attention without positions, or a plain MLP. A block over time
and the MLP behind it are one layer of ours. Its experts (sigmoid scores, groups of experts) have no part here.

transformers takes `time_step_min`, the least dt at the start of training, for a bound: it clamps dt there, except when
it generates. The models were trained without, and neither vLLM nor llama.cpp clamps; ours does not. It also ignores
`tie_word_embeddings`, so a head is always there.
"""

from lamella.channels import mlp
from lamella.config import ModelConfig
from lamella.convert.family import (
    NOTHING,
    PLAIN_ATTENTION,
    Family,
    Keys,
    Misfit,
    Stack,
    Tree,
    refuse_clamp,
    stack_of,
    write_heads,
)
from lamella.convert.map import kernel
from lamella.mixers import attention, mamba2
from lamella.model.stack import LayerPlan, plan_layers

TABLE = {
    "embedding.weight": "backbone.embeddings.weight",
    "norm.weight": "backbone.norm_f.weight",
    "head.weight": "lm_head.weight",
    "layers.{layer}.mixer_norm.weight": "backbone.layers.{mixer}.norm.weight",
    "layers.{layer}.channel_norm.weight": "backbone.layers.{channel}.norm.weight",
    "layers.{layer}.mixer.qkv.weight": tuple(f"backbone.layers.{{mixer}}.mixer.{part}_proj.weight" for part in "qkv"),
    "layers.{layer}.mixer.out.weight": "backbone.layers.{mixer}.mixer.o_proj.weight",
    "layers.{layer}.mixer.conv.weight": kernel("backbone.layers.{mixer}.mixer.conv1d.weight"),
    "layers.{layer}.mixer.conv.bias": "backbone.layers.{mixer}.mixer.conv1d.bias",
    "layers.{layer}.mixer.{rest}": "backbone.layers.{mixer}.mixer.{rest}",
    "layers.{layer}.channel.w_in.{rest}": "backbone.layers.{channel}.mixer.up_proj.{rest}",
    "layers.{layer}.channel.w_out.{rest}": "backbone.layers.{channel}.mixer.down_proj.{rest}",
}
LETTERS = {"M": "mamba2", "*": "attention", "-": "mlp", "E": "moe"}
TYPES = {"linear_attention": "mamba2", "mamba": "mamba2", "full_attention": "attention", "attention": "attention"}
WRITTEN = {mamba2.Config: "linear_attention", attention.Config: "full_attention", mlp.Config: "mlp"}
UNCLAMPED = {"time_step_min": 1e-9}
ACTIVATIONS = ("relu2", "relu", "gelu")


def to_ours(keys: Keys) -> Tree:
    for name in ("use_bias", "mamba_proj_bias", "attention_bias"):
        keys.only(name, False)
    keys.only("use_conv_bias", True)
    keys.only("mamba_hidden_act", "silu", "swish")
    keys.only("mlp_hidden_act", *ACTIVATIONS)
    keys.only("num_nextn_predict_layers", 0)
    keys.only("sliding_window", None)
    refuse_clamp(keys)
    refuse_clamp(keys, "mamba_dt_limit")
    size = keys.int("head_dim", keys.int("attention_head_dim", 128))
    parts = {
        "mamba2": {
            "mixer": "mamba2",
            "d_state": keys.int("ssm_state_size", 128),
            "d_conv": keys.int("conv_kernel", 4),
            "head_dim": keys.int("mamba_head_dim", 64),
            "num_heads": keys.int("mamba_num_heads", 128),
            "num_groups": keys.int("n_groups", 8),
        },
        "attention": {
            "mixer": "attention",
            "num_heads": keys.int("num_attention_heads", 32),
            "num_kv_heads": keys.int("num_key_value_heads", 8),
            "head_dim": size,
        },
        "mlp": {
            "channel": "mlp",
            "d_ff": keys.int("intermediate_size", 21504),
            "activation": keys.tree.get("mlp_hidden_act", "relu2"),
            "bias": keys.flag("mlp_bias", False),
        },
    }
    words = _pairs(_blocks(keys))
    return {
        "d_model": keys.int("hidden_size"),
        "vocab_size": keys.int("vocab_size"),
        "norm_eps": keys.float("layer_norm_epsilon", 1e-5),
        "tie_embeddings": False,
        "init_std": keys.float("initializer_range", 0.02),
        "parts": {name: part for name, part in parts.items() if any(name in word.split("/") for word in words)},
        "stack": stack_of(words),
    }


def to_theirs(stack: Stack) -> Tree:
    plain = PLAIN_ATTENTION | {"rope_theta": None}
    parts = stack.parts({mamba2.Config: {}, attention.Config: plain, NOTHING: {}}, {mlp.Config: {}, NOTHING: {}})
    scan, dense = parts.get(mamba2.Config), parts.get(mlp.Config)
    if stack.model.tie_embeddings:
        raise Misfit(-1, "model.tie_embeddings=True: nemotron_h has tie_embeddings=False alone")
    tree = {
        "layers_block_type": [WRITTEN[type(part)] for plan in stack.plans for part in _branches(plan)],
        "layer_norm_epsilon": stack.model.norm_eps,
        "max_position_embeddings": stack.length,
        "use_bias": False,
        "mamba_proj_bias": False,
        "attention_bias": False,
        "use_conv_bias": True,
        "mamba_hidden_act": "silu",
        **UNCLAMPED,
        **write_heads(stack, parts.get(attention.Config), sized=True),
    }
    if dense is not None:
        if dense.activation not in ACTIVATIONS:
            reason = f"activation={dense.activation}, and nemotron_h's mlp has {' or '.join(ACTIVATIONS)}"
            raise stack.misfit(stack.first(mlp.Config), reason)
        tree |= {"intermediate_size": dense.d_ff, "mlp_hidden_act": dense.activation, "mlp_bias": dense.bias}
    if scan is not None:
        heads, _ = scan.sizes(stack.model.d_model)
        tree |= {"ssm_state_size": scan.d_state, "conv_kernel": scan.d_conv, "n_groups": scan.num_groups}
        tree |= {"mamba_num_heads": heads, "mamba_head_dim": scan.head_dim, "expand": scan.expand}
    return tree


def numbers(model: ModelConfig) -> list[dict[str, int]]:
    """The blocks that a layer's branches are."""
    found, block = [], 0
    for plan in plan_layers(model):
        here = {"mixer": block, "channel": block + (plan.mixer is not None)}
        found.append(here)
        block += len(_branches(plan))
    return found


def _branches(plan: LayerPlan) -> list:
    return [part for part in (plan.mixer, plan.channel) if part is not None]


def _blocks(keys: Keys) -> list[str]:
    if keys.tree.get("layers_block_type") is None and "hybrid_override_pattern" in keys.tree:
        blocks = [LETTERS.get(letter, letter) for letter in str(keys.tree["hybrid_override_pattern"])]
    else:
        blocks = [TYPES.get(str(word), str(word)) for word in keys.list("layers_block_type")]
    if strange := next((word for word in blocks if word not in ("mamba2", "attention", "mlp")), None):
        raise keys.refuse(f"block {blocks.index(strange)} is {strange}: no part here computes it")
    return blocks


def _pairs(blocks: list[str]) -> list[str]:
    """mixer, mlp -> mixer/mlp; a block without its other half stands alone."""
    words: list[str] = []
    for block in blocks:
        if block != "mlp":
            words.append(f"{block}/-")
        elif words and words[-1].endswith("/-"):
            words[-1] = words[-1][:-1] + "mlp"
        else:
            words.append("-/mlp")
    return words


FAMILY = Family("nemotron_h", "NemotronHForCausalLM", TABLE, to_ours, to_theirs, numbers, unlike=UNCLAMPED)

"""RetNet of flash-linear-attention (Sun et al. 2023, arXiv 2307.08621): `RetNetForCausalLM`.

Its retention is our `variant: fla`. With the gate's product left out of the norm (`fuse_norm` off), and without a gate,
the norm of heads has another name. `use_short_conv` and `conv_size` are keys that its layers never see.
"""

import math

from lamella.channels import mlp
from lamella.convert import fla
from lamella.convert.family import MLP, Family, Keys, Stack, Tree, stack_of
from lamella.convert.map import Table
from lamella.mixers import attention, retention

TABLE = {
    "layers.{layer}.mixer.qkvg.weight": tuple(f"{fla.HERE}.attn.{part}_proj.weight" for part in "qkvg"),
    "layers.{layer}.mixer.norm.weight": f"{fla.HERE}.attn.g_norm_swish_gate.weight",
    "layers.{layer}.channel_norm.weight": f"{fla.HERE}.mlp_norm.weight",
    "layers.{layer}.channel.w_in.weight": (f"{fla.HERE}.mlp.gate_proj.weight", f"{fla.HERE}.mlp.up_proj.weight"),
    "layers.{layer}.channel.w_out.weight": f"{fla.HERE}.mlp.down_proj.weight",
    **fla.OUTSIDE,
}


def variant(tree: Tree) -> Table:
    fused = tree.get("fuse_norm", True) and tree.get("use_output_gate", True)
    return {} if fused else {"layers.{layer}.mixer.norm.weight": f"{fla.HERE}.attn.g_norm.weight"}


def to_ours(keys: Keys) -> Tree:
    keys.only("feature_map", None)
    keys.only("hidden_act", "swish")
    keys.only("attnres_block_size", None)
    heads, d_model = keys.int("num_heads", 8), keys.int("hidden_size", 2048)
    keys.only("num_kv_heads", None, heads)
    sizes = {}
    for key, default in (("expand_k", 1.0), ("expand_v", 2.0)):
        width = int(d_model * keys.float(key, default))
        if width % heads:
            said = keys.tree.get(key, default)
            raise keys.refuse(f"{key}={said}: num_heads={heads} must divide the {width} channels")
        sizes[key] = width // heads
    part = {
        "mixer": "retention",
        "num_heads": heads,
        "head_dim": sizes["expand_k"],
        "value_head_dim": sizes["expand_v"],
        "variant": "fla",
        "norm_weight": keys.flag("elementwise_affine", True),
        "gate": keys.flag("use_output_gate", True),
    }
    heads_too, attends = fla.read_attention(keys)
    words = fla.words_of(keys, "retention", "mlp", attends)
    channel = {"channel": "mlp", "d_ff": fla.read_width(keys, 2, 4, 2 / 3, 256)}
    parts = ({"retention": part} if len(attends) < len(words) else {}) | heads_too | {"mlp": channel}
    return fla.read_model(keys, parts, stack_of(words)) | {"norm_eps": keys.float("norm_eps", 1e-6)}


def to_theirs(stack: Stack) -> Tree:
    parts = stack.parts(
        {retention.Config: {"variant": "fla"}, attention.Config: fla.HEADS}, {mlp.Config: MLP | {"bias": False}}
    )
    tree = fla.write_model(stack) | fla.write_attention(stack, parts.get(attention.Config))
    tree |= {"hidden_act": "swish", "intermediate_size": parts[mlp.Config].d_ff, "feature_map": None}
    part = parts.get(retention.Config)
    if part is None:
        return tree
    heads, keys, values = part.sizes(stack.model.d_model)
    if (part.group_eps or stack.model.norm_eps) != stack.model.norm_eps:
        reason = f"group_eps={part.group_eps}, and retnet has one norm_eps={stack.model.norm_eps} for all norms"
        raise stack.misfit(stack.first(retention.Config), reason)
    return tree | {
        "num_heads": heads,
        "expand_k": _ratio(heads * keys, stack.model.d_model),
        "expand_v": _ratio(heads * values, stack.model.d_model),
        "elementwise_affine": part.norm_weight is not False,
        "use_output_gate": part.gate,
    }


def _ratio(width: int, d_model: int) -> float:
    """What times d_model, rounded down, is the width."""
    ratio = width / d_model
    return ratio if int(d_model * ratio) == width else math.nextafter(ratio, math.inf)


FAMILY = Family("retnet", "RetNetForCausalLM", TABLE, to_ours, to_theirs, runs_in="fla", variant=variant)

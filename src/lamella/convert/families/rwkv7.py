"""RWKV-7 of flash-linear-attention (Peng et al. 2025, arXiv 2503.14456): `RWKV7ForCausalLM`.

`norm_first` is our `embedding_norm`. The epsilon of the group norm is the stream's, times the channels of a head. The
first layer has no low rank of the value residual.
"""

import math

from lamella.channels import rwkv
from lamella.convert import fla
from lamella.convert.family import Family, Keys, Stack, Tree, stack_of
from lamella.convert.map import lone
from lamella.mixers import attention, rwkv7

ATTN, FFN = f"{fla.HERE}.attn", f"{fla.HERE}.ffn"
LOW = {"decay": "w", "rate": "a", "value_residual": "v", "gate": "g"}
ENDS = {"down": "0.weight", "up": "2.weight", "bias": "2.bias"}
RANKS = {"decay_rank": "decay", "rate_rank": "a", "value_rank": "v", "gate_rank": "gate"}  # _low_rank_dim
DEFAULT = {"decay": 64, "a": 64, "v": 16, "gate": 128}
TABLE = {
    **{f"layers.{{layer}}.mixer.mix.{m}": lone(f"{ATTN}.x_{m}") for m in rwkv7.MIXES},
    **{
        f"layers.{{layer}}.mixer.{ours}.{end}": f"{ATTN}.{theirs}_lora.lora.{tail}"
        for ours, theirs in LOW.items()
        for end, tail in ENDS.items()
    },
    "layers.{layer}.mixer.receptance.weight": f"{ATTN}.r_proj.weight",
    "layers.{layer}.mixer.key.weight": f"{ATTN}.k_proj.weight",
    "layers.{layer}.mixer.value.weight": f"{ATTN}.v_proj.weight",
    "layers.{layer}.mixer.k_k": f"{ATTN}.k_k",
    "layers.{layer}.mixer.k_a": f"{ATTN}.k_a",
    "layers.{layer}.mixer.r_k": f"{ATTN}.r_k",
    "layers.{layer}.mixer.group_norm.{rest}": f"{ATTN}.g_norm.{{rest}}",
    "layers.{layer}.channel_norm.{rest}": f"{fla.HERE}.ffn_norm.{{rest}}",
    "layers.{layer}.channel.mix_k": f"{FFN}.x_k",
    "layers.{layer}.channel.{rest}": f"{FFN}.{{rest}}",
    **fla.OUTSIDE,
}


def to_ours(keys: Keys) -> Tree:
    keys.only("hidden_act", "sqrelu")
    keys.only("norm_bias", True)
    d_model, eps = keys.int("hidden_size", 2048), keys.float("norm_eps", 1e-5)
    widths = keys.tree.get("value_dim")
    if strange := {*(widths if isinstance(widths, list) else [widths])} - {None, d_model}:
        raise keys.refuse(f"value_dim={next(iter(strange))}: values here are as wide as the model, {d_model}")
    size = _head_size(keys, d_model)
    part = {"mixer": "rwkv7", "head_size": size, "group_eps": size * eps}
    part |= {ours: _rank(keys, theirs, d_model, size) for ours, theirs in RANKS.items()}
    heads_too, attends = fla.read_attention(keys)
    if 0 in attends:
        raise keys.refuse("attn: layers holds 0, the layer whose values all later ones take")
    words = fla.words_of(keys, "rwkv7", "rwkv", attends)
    channel = {"channel": "rwkv", "version": 7, "d_ff": fla.read_width(keys, 4, 4, 1, 32)}
    return fla.read_model(keys, {"rwkv7": part} | heads_too | {"rwkv": channel}, stack_of(words)) | {
        "norm": "layer",
        "norm_eps": eps,
        "embedding_norm": keys.flag("norm_first", True),
    }


def to_theirs(stack: Stack) -> Tree:
    parts = stack.parts({rwkv7.Config: {}, attention.Config: fla.HEADS}, {rwkv.Config: {"version": 7}})
    first = stack.plans[0]
    if not isinstance(first.mixer, rwkv7.Config):
        raise stack.misfit(first, "rwkv7 has rwkv7 in its first layer, whose values all later ones take")
    part, d_model, eps = parts[rwkv7.Config], stack.model.d_model, stack.model.norm_eps
    if not math.isclose(part.group_eps, part.head_size * eps):
        raise stack.misfit(first, f"group_eps={part.group_eps}, and rwkv7's is head_size x norm_eps")
    ranks = dict(zip(RANKS.values(), part.ranks(d_model), strict=True))
    return {
        **fla.write_model(stack),
        **fla.write_attention(stack, parts.get(attention.Config)),
        "hidden_act": "sqrelu",
        "intermediate_size": parts[rwkv.Config].d_ff,
        "norm_bias": True,
        "norm_first": stack.model.embedding_norm,
        "head_dim": part.head_size,
        "num_heads": d_model // part.head_size,
        "value_dim": [d_model] * len(stack.plans),
        **{f"{theirs}_low_rank_dim": ranks[theirs] for theirs in RANKS.values()},
    }


def _head_size(keys: Keys, d_model: int) -> int:
    """`head_dim` counts, `num_heads` only where that is null."""
    if "head_dim" in keys.tree and keys.tree["head_dim"] is None:
        return d_model // keys.int("num_heads")
    return keys.int("head_dim", 64)


def _rank(keys: Keys, name: str, d_model: int, size: int) -> int:
    """As it stands; null is a rule of fla's, by the width and the size of a head (versions of 2025 had others, whose
    tensors then have another shape).
    """
    key = f"{name}_low_rank_dim"
    if key not in keys.tree or keys.tree[key] is not None:
        return keys.int(key, DEFAULT[name])
    factor = {"decay": 2.5, "a": 2.5, "v": 1.7}.get(name, 5 * 64 / size) * size / 64
    return max(32, round(factor * d_model**0.5 / 32) * 32)


FAMILY = Family(
    "rwkv7",
    "RWKV7ForCausalLM",
    TABLE,
    to_ours,
    to_theirs,
    norm="layer",
    embedding_norms=(True, False),
    runs_in="fla",
)

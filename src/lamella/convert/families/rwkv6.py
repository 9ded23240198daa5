"""RWKV-6 of flash-linear-attention (Peng et al. 2024, arXiv 2404.05892): `RWKV6ForCausalLM`.

Five mixes lie together in their tensors, in the order r, w, k, v, g; ours is w, k, v, r, g. Its group norm has the
stream's epsilon, where RWKV's own has 64 times that. `norm_first` is our `embedding_norm`.
"""

from lamella.channels import rwkv
from lamella.convert import fla
from lamella.convert.family import Family, Keys, Stack, Tree, stack_of
from lamella.convert.map import share
from lamella.mixers import attention, rwkv6

THEIRS = "rwkvg"  # the order of their mixes
ATTN, FFN = f"{fla.HERE}.attn", f"{fla.HERE}.ffn"
TABLE = {
    **{f"layers.{{layer}}.mixer.mix.{m}": share(f"{ATTN}.x_bias", THEIRS.index(m), 5, form="row") for m in THEIRS},
    "layers.{layer}.mixer.mix.x": f"{ATTN}.x_proj.0.mu",
    "layers.{layer}.mixer.mix_down": tuple(
        share(f"{ATTN}.x_proj.0.linear.weight", THEIRS.index(m), 5) for m in rwkv6.MIXES
    ),
    "layers.{layer}.mixer.mix_up": tuple(
        share(f"{ATTN}.x_proj.2.weight", THEIRS.index(m), 5, dim=1, form="item") for m in rwkv6.MIXES
    ),
    "layers.{layer}.mixer.decay.down": f"{ATTN}.w_proj.linear.lora.0.weight",
    "layers.{layer}.mixer.decay.up": f"{ATTN}.w_proj.linear.lora.2.weight",
    "layers.{layer}.mixer.decay.bias": f"{ATTN}.w_proj.linear.lora.2.bias",
    "layers.{layer}.mixer.bonus": f"{ATTN}.bonus",
    "layers.{layer}.mixer.receptance.weight": f"{ATTN}.r_proj.linear.weight",
    "layers.{layer}.mixer.key.weight": f"{ATTN}.k_proj.linear.weight",
    "layers.{layer}.mixer.value.weight": f"{ATTN}.v_proj.linear.weight",
    "layers.{layer}.mixer.gate.weight": f"{ATTN}.g_proj.linear.weight",
    "layers.{layer}.mixer.group_norm.{rest}": f"{ATTN}.g_norm.{{rest}}",
    "layers.{layer}.channel_norm.{rest}": f"{fla.HERE}.ffn_norm.{{rest}}",
    "layers.{layer}.channel.mix_k": f"{FFN}.key.mu",
    "layers.{layer}.channel.mix_r": f"{FFN}.receptance.mu",
    "layers.{layer}.channel.key.weight": f"{FFN}.key.linear.weight",
    "layers.{layer}.channel.receptance.weight": f"{FFN}.receptance.linear.weight",
    "layers.{layer}.channel.value.weight": f"{FFN}.value.weight",
    **fla.OUTSIDE,
}


def to_ours(keys: Keys) -> Tree:
    keys.only("hidden_act", "sqrelu")
    keys.only("norm_bias", True)
    heads, d_model = keys.int("num_heads", 4), keys.int("hidden_size", 2048)
    for key, default in (("expand_k", 0.5), ("expand_v", 1.0)):
        said = keys.float(key, default)
        if int(d_model * said) != d_model:
            raise keys.refuse(f"{key}={said}: keys and values here are as wide as the model, {key}=1.0")
    if d_model % heads:
        raise keys.refuse(f"num_heads={heads} must divide hidden_size={d_model}")
    eps = keys.float("norm_eps", 1e-5)
    part = {
        "mixer": "rwkv6",
        "head_size": d_model // heads,
        "mix_rank": keys.int("proj_low_rank_dim", 32),
        "decay_rank": keys.int("gate_low_rank_dim", 64),
        "group_eps": eps,
    }
    heads_too, attends = fla.read_attention(keys)
    words = fla.words_of(keys, "rwkv6", "rwkv", attends)
    channel = {"channel": "rwkv", "version": 6, "d_ff": fla.read_width(keys, 3.5, 3.5, 1, 32)}
    parts = ({"rwkv6": part} if len(attends) < len(words) else {}) | heads_too | {"rwkv": channel}
    return fla.read_model(keys, parts, stack_of(words)) | {
        "norm": "layer",
        "norm_eps": eps,
        "embedding_norm": keys.flag("norm_first", True),
    }


def to_theirs(stack: Stack) -> Tree:
    parts = stack.parts({rwkv6.Config: {}, attention.Config: fla.HEADS}, {rwkv.Config: {"version": 6}})
    tree = fla.write_model(stack) | fla.write_attention(stack, parts.get(attention.Config))
    tree |= {"hidden_act": "sqrelu", "intermediate_size": parts[rwkv.Config].d_ff, "expand_k": 1.0, "expand_v": 1.0}
    tree |= {"norm_bias": True, "norm_first": stack.model.embedding_norm}
    part = parts.get(rwkv6.Config)
    if part is None:
        return tree | {"num_heads": 1}
    if part.group_eps != stack.model.norm_eps:
        reason = f"group_eps={part.group_eps}, and rwkv6 has one norm_eps={stack.model.norm_eps} for all norms"
        raise stack.misfit(stack.first(rwkv6.Config), reason)
    return tree | {
        "num_heads": stack.model.d_model // part.head_size,
        "proj_low_rank_dim": part.mix_rank,
        "gate_low_rank_dim": part.decay_rank,
    }


FAMILY = Family(
    "rwkv6",
    "RWKV6ForCausalLM",
    TABLE,
    to_ours,
    to_theirs,
    norm="layer",
    embedding_norms=(True, False),
    runs_in="fla",
)

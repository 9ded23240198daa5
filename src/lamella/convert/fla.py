"""What the models of flash-linear-attention share (github.com/fla-org/flash-linear-attention): names outside the
layers, sizes that a ratio gives, softmax attention in some of the layers.

A key that config.json leaves out has fla's default. How its kernels compute (`attn_mode`, `fuse_*`) is read past.
"""

from lamella.convert.family import ATTENTION, Keys, Stack, Tree
from lamella.mixers import attention

HERE = "model.layers.{layer}"
OUTSIDE = {
    "embedding.weight": "model.embeddings.weight",
    "embedding.norm.{rest}": "model.layers.0.pre_norm.{rest}",
    "norm.{rest}": "model.norm.{rest}",
    "head.weight": "lm_head.weight",
    "layers.{layer}.mixer_norm.{rest}": f"{HERE}.attn_norm.{{rest}}",
    "layers.{layer}.mixer.qkv.{rest}": tuple(f"{HERE}.attn.{part}_proj.{{rest}}" for part in "qkv"),
    "layers.{layer}.mixer.out.weight": f"{HERE}.attn.o_proj.weight",
}
HEADS = ATTENTION | {"out_bias": False}
SPEC = {"layers", "num_heads", "num_kv_heads", "qkv_bias", "window_size", "rope_theta"}


def read_model(keys: Keys, parts: Tree, stack: list[Tree]) -> Tree:
    """What every family's configuration says."""
    return {
        "d_model": keys.int("hidden_size", 2048),
        "vocab_size": keys.int("vocab_size", 32000),
        "tie_embeddings": keys.flag("tie_word_embeddings", False),
        "init_std": keys.float("initializer_range", 0.02),
        "parts": parts,
        "stack": stack,
    }


def read_width(keys: Keys, ratio: float, silent: float, share: float, multiple: int) -> int:
    """The inner width of the channel mixer: as it stands, else `share` of a ratio of the model's width, rounded up.

    `ratio` where the key is left out, `silent` where it is null.
    """
    if keys.tree.get("intermediate_size") is not None:
        return keys.int("intermediate_size")
    said = keys.float("hidden_ratio", silent if "hidden_ratio" in keys.tree else ratio)
    return -(-int(keys.int("hidden_size", 2048) * said * share) // multiple) * multiple


def read_attention(keys: Keys) -> tuple[Tree, list[int]]:
    """The softmax attention, and the layers that have it instead of the family's own mixer."""
    spec = keys.tree.get("attn") or []
    specs = spec if isinstance(spec, list) else [spec]
    if not specs:
        return {}, []
    if len(specs) > 1 or not isinstance(specs[0], dict):
        raise keys.refuse("attn: one mapping of options alone, the same for all layers of attention")
    inside = Keys(specs[0], f"{keys.where}: attn", keys.family)
    if strange := sorted(specs[0].keys() - SPEC):
        raise inside.refuse(f"{strange[0]}={specs[0][strange[0]]}: no such option here")
    heads, layers = inside.int("num_heads"), inside.list("layers")
    count, d_model = keys.int("num_hidden_layers", 24), keys.int("hidden_size", 2048)
    if wrong := [layer for layer in layers if layer not in range(count)]:
        raise inside.refuse(f"layers holds {wrong[0]}, and there are {count} layers")
    if d_model % heads:
        raise inside.refuse(f"num_heads={heads} must divide hidden_size={d_model}")
    part = {
        "mixer": "attention",
        "num_heads": heads,
        "num_kv_heads": inside.int("num_kv_heads", heads),
        "qkv_bias": inside.flag("qkv_bias", False),
        "rope_theta": inside.float("rope_theta", 1e4),
    }
    if specs[0].get("window_size") is not None:
        part["window"] = inside.int("window_size")
    return {"attention": part} if layers else {}, layers


def words_of(keys: Keys, mixer: str, channel: str, attends: list[int]) -> list[str]:
    """The layers, as a stack names them."""
    count = keys.int("num_hidden_layers", 24)
    return [f"{'attention' if layer in attends else mixer}/{channel}" for layer in range(count)]


def write_model(stack: Stack) -> Tree:
    return {
        "num_hidden_layers": len(stack.plans),
        "norm_eps": stack.model.norm_eps,
        "max_position_embeddings": stack.length,
    }


def write_attention(stack: Stack, part: attention.Config | None) -> Tree:
    if part is None:
        return {"attn": None}
    first, (heads, groups, size) = stack.first(attention.Config), part.sizes(stack.model.d_model)
    if heads * size != stack.model.d_model:
        raise stack.misfit(first, f"head_dim={size}, and {stack.family}'s is d_model / num_heads")
    if part.rope_theta is None:
        raise stack.misfit(first, f"attention without rope_theta; {stack.family}'s has rotary positions")
    layers = [layer for layer, has in enumerate(stack.where(attention.Config)) if has]
    spec = {"layers": layers, "num_heads": heads, "num_kv_heads": groups, "qkv_bias": part.qkv_bias}
    return {"attn": spec | {"window_size": part.window, "rope_theta": part.rope_theta}}

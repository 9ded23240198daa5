"""RWKV-6 as its author publishes it (BlinkDL/RWKV-LM, RWKV-v5: x060): a .pth, read and never written.

The mixes' low ranks lie in our order, w, k, v, r, g, and transposed. Variants of its author's (x060b and later) have
other tensors and are refused by the first of them.
"""

from lamella.convert.families.rwkv7_pth import HERE, OUTSIDE, read, write
from lamella.convert.family import Family, Keys, Stack, Tree
from lamella.convert.map import lone, turned
from lamella.mixers import rwkv6

OPTIONS = ("head_size", "mix_rank", "decay_rank")
TABLE = {
    **{f"layers.{{layer}}.mixer.mix.{m}": lone(f"{HERE}.att.time_maa_{m}") for m in ("x", *rwkv6.MIXES)},
    "layers.{layer}.mixer.mix_down": turned(f"{HERE}.att.time_maa_w1"),
    "layers.{layer}.mixer.mix_up": turned(f"{HERE}.att.time_maa_w2"),
    "layers.{layer}.mixer.decay.bias": lone(f"{HERE}.att.time_decay"),
    "layers.{layer}.mixer.decay.down": turned(f"{HERE}.att.time_decay_w1"),
    "layers.{layer}.mixer.decay.up": turned(f"{HERE}.att.time_decay_w2"),
    "layers.{layer}.mixer.bonus": f"{HERE}.att.time_faaaa",
    "layers.{layer}.channel.mix_k": lone(f"{HERE}.ffn.time_maa_k"),
    "layers.{layer}.channel.mix_r": lone(f"{HERE}.ffn.time_maa_r"),
    **OUTSIDE,
    "layers.{layer}.mixer.{rest}": f"{HERE}.att.{{rest}}",
    "layers.{layer}.channel.{rest}": f"{HERE}.ffn.{{rest}}",
}


def to_ours(keys: Keys) -> Tree:
    return read(keys, "rwkv6", {"version": 6}, OPTIONS)


def to_theirs(stack: Stack) -> Tree:
    tree = write(stack, rwkv6.Config, 6)
    return tree | {key: getattr(stack.plans[0].mixer, key) for key in OPTIONS}


FAMILY = Family(
    "rwkv6_pth",
    "RWKV",
    TABLE,
    to_ours,
    to_theirs,
    claims=lambda tree: tree.get("pth") == "rwkv6_pth",
    norm="layer",
    embedding_norms=(True,),
    one_way=True,
)

"""RWKV-7 as its author publishes it (BlinkDL/RWKV-LM, RWKV-v7: x070): a .pth, read and never written.

`blocks.0.ln0` is the norm behind the embedding; epsilons are 1e-5 and, of ln_x, 64e-5. `att.v0`, `v1` and `v2` of the
first layer are in some files and are read by nothing. What programs do to run it in fp16 (dividing by 2 every so many
layers) is in no file.
"""

from lamella.channels import rwkv
from lamella.convert.family import Family, Keys, Misfit, Stack, Tree, stack_of
from lamella.convert.map import lone, turned
from lamella.mixers import rwkv7

EPS, GROUP_EPS = 1e-5, 64e-5
HERE = "blocks.{layer}"
OUTSIDE = {
    "embedding.weight": "emb.weight",
    "embedding.norm.{rest}": "blocks.0.ln0.{rest}",
    "norm.{rest}": "ln_out.{rest}",
    "head.weight": "head.weight",
    "layers.{layer}.mixer_norm.{rest}": f"{HERE}.ln1.{{rest}}",
    "layers.{layer}.channel_norm.{rest}": f"{HERE}.ln2.{{rest}}",
    "layers.{layer}.mixer.group_norm.{rest}": f"{HERE}.att.ln_x.{{rest}}",
    "layers.{layer}.mixer.out.weight": f"{HERE}.att.output.weight",
}
LOW = {"decay": "w", "rate": "a", "value_residual": "v", "gate": "g"}
RANKS = ("decay_rank", "rate_rank", "value_rank", "gate_rank")
TABLE = {
    **{f"layers.{{layer}}.mixer.mix.{m}": lone(f"{HERE}.att.x_{m}") for m in rwkv7.MIXES},
    **{f"layers.{{layer}}.mixer.{ours}.bias": lone(f"{HERE}.att.{theirs}0") for ours, theirs in LOW.items()},
    **{f"layers.{{layer}}.mixer.{ours}.down": turned(f"{HERE}.att.{theirs}1") for ours, theirs in LOW.items()},
    **{f"layers.{{layer}}.mixer.{ours}.up": turned(f"{HERE}.att.{theirs}2") for ours, theirs in LOW.items()},
    "layers.{layer}.mixer.k_k": lone(f"{HERE}.att.k_k"),
    "layers.{layer}.mixer.k_a": lone(f"{HERE}.att.k_a"),
    "layers.{layer}.channel.mix_k": lone(f"{HERE}.ffn.x_k"),
    **OUTSIDE,
    "layers.{layer}.mixer.{rest}": f"{HERE}.att.{{rest}}",
    "layers.{layer}.channel.{rest}": f"{HERE}.ffn.{{rest}}",
}


def read(keys: Keys, mixer: str, channel: Tree, options: tuple[str, ...]) -> Tree:
    """The model that a derived configuration is, its mixer with these options."""
    part = {"mixer": mixer, "group_eps": GROUP_EPS} | {key: keys.int(key) for key in options}
    return {
        "d_model": keys.int("d_model"),
        "vocab_size": keys.int("vocab_size"),
        "norm": "layer",
        "norm_eps": EPS,
        "embedding_norm": True,
        "parts": {mixer: part, "rwkv": {"channel": "rwkv", "d_ff": keys.int("d_ff")} | channel},
        "stack": stack_of([f"{mixer}/rwkv"] * keys.int("num_layers")),
    }


def write(stack: Stack, mixer: type, version: int) -> Tree:
    """The configuration that a file of this stack has."""
    if stack.model.norm_eps != EPS or stack.model.tie_embeddings:
        raise Misfit(-1, f"{stack.family} has model.norm_eps={EPS} and model.tie_embeddings=False alone")
    parts = stack.parts({mixer: {"group_eps": GROUP_EPS}}, {rwkv.Config: {"version": version}})
    return {
        "pth": stack.family,
        "vocab_size": stack.model.vocab_size,
        "d_model": stack.model.d_model,
        "num_layers": len(stack.plans),
        "d_ff": parts[rwkv.Config].d_ff,
        "head_size": parts[mixer].head_size,
    }


def to_ours(keys: Keys) -> Tree:
    return read(keys, "rwkv7", {"version": 7}, ("head_size", *RANKS))


def to_theirs(stack: Stack) -> Tree:
    tree = write(stack, rwkv7.Config, 7)
    part = stack.plans[0].mixer
    assert isinstance(part, rwkv7.Config)
    return tree | dict(zip(RANKS, part.ranks(stack.model.d_model), strict=True))


FAMILY = Family(
    "rwkv7_pth",
    "RWKV",
    TABLE,
    to_ours,
    to_theirs,
    claims=lambda tree: tree.get("pth") == "rwkv7_pth",
    extra=r"blocks\.0\.att\.v[012]",
    norm="layer",
    embedding_norms=(True,),
    one_way=True,
)

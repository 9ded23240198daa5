"""RWKV's own files (github.com/BlinkDL/RWKV-LM): one .pth of tensors and nothing else; names and shapes say it all."""

from lamella.convert.family import Tree
from lamella.convert.read import Weights
from lamella.errors import UserError

# What each version has and no other: RWKV-4 and 5 have att.time_mix_k, the later ones neither.
TOLD_BY = {"rwkv6_pth": "blocks.0.att.time_maa_w1", "rwkv7_pth": "blocks.0.att.r_k"}
SIZES = {
    "rwkv6_pth": {
        "head_size": ("blocks.0.att.time_faaaa", -1),
        "mix_rank": ("blocks.0.att.time_maa_w2", -2),
        "decay_rank": ("blocks.0.att.time_decay_w1", -1),
    },
    "rwkv7_pth": {
        "head_size": ("blocks.0.att.r_k", -1),
        "decay_rank": ("blocks.0.att.w1", -1),
        "rate_rank": ("blocks.0.att.a1", -1),
        "gate_rank": ("blocks.0.att.g1", -1),
    },
}


def derive_config(weights: Weights) -> Tree:
    """What a config.json would say. Raises UserError: another version, or another model; it names what is missing."""
    version = next((name for name, told in TOLD_BY.items() if told in weights.tensors), None)
    if version is None:
        lacks = " nor ".join(TOLD_BY.values())
        what = "so it is no RWKV-6 and no RWKV-7; no other is read"
        raise UserError(f"{weights.folder}: has neither {lacks}, {what}")

    def size(name: str, dim: int) -> int:
        entry = weights.tensors.get(name)
        if entry is None:
            raise UserError(f"{weights.folder}: lacks {name}, which an {version[:5].upper()} has")
        if len(entry.shape) < -dim or not all(entry.shape):
            raise UserError(f"{weights.folder}: {name} is {list(entry.shape)}, which is no {version[:5].upper()}'s")
        return entry.shape[dim]

    layers = {words[1] for name in weights.tensors if (words := name.split("."))[0] == "blocks" and len(words) > 2}
    tree = {
        "pth": version,
        "vocab_size": size("emb.weight", -2),
        "d_model": size("emb.weight", -1),
        "num_layers": len(layers),
        "d_ff": size("blocks.0.ffn.key.weight", -2),
        **{key: size(*where) for key, where in SIZES[version].items()},
    }
    if version == "rwkv7_pth":  # the first layer may have one that nothing reads
        tree["value_rank"] = size("blocks.1.att.v1", -1) if len(layers) > 1 else 1
    return tree

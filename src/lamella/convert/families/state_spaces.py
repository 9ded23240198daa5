"""The original `state-spaces/mamba*` (github.com/state-spaces/mamba): config.json and `pytorch_model.bin` of mamba_ssm.

Both Mamba and Mamba-2, told by `ssm_cfg.layer`. A tied head is written twice, as its strict loading wants it.
"""

from lamella.convert.families import mamba as plain
from lamella.convert.family import NOTHING, Family, Keys, Misfit, Stack, Tree, stack_of
from lamella.mixers import mamba, mamba2

EPS = 1e-5  # no key says it
TABLE = plain.TABLE | {"embedding.weight": "backbone.embedding.weight"}
# How a layer begins, how it is computed, or another word for a default.
SILENT = {"dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "A_init_range", "chunk_size", "use_fast_path"}
SILENT |= {"use_mem_eff_path", "layer"}
SIZES = {
    "Mamba1": {"d_state": ("d_state", 16), "d_conv": ("d_conv", 4), "expand": ("expand", 2)},
    "Mamba2": {
        "d_state": ("d_state", 128),
        "d_conv": ("d_conv", 4),
        "expand": ("expand", 2),
        "headdim": ("head_dim", 64),
        "ngroups": ("num_groups", 1),
    },
}


def to_ours(keys: Keys) -> Tree:
    keys.only("rms_norm", True)
    keys.only("attn_layer_idx", [])
    keys.only("d_intermediate", 0)
    options = keys.tree.get("ssm_cfg") or {}
    layer = options.get("layer", "Mamba1")
    if layer not in SIZES:
        raise keys.refuse(f"ssm_cfg.layer={layer}: no mixer here computes it")
    inside = Keys(options, f"{keys.where}: ssm_cfg", keys.family)
    part: Tree = {ours: inside.int(theirs, default) for theirs, (ours, default) in SIZES[layer].items()}
    known = SILENT | SIZES[layer].keys()
    if layer == "Mamba1":
        part |= {"mixer": "mamba", "norms": False}
        known |= {"dt_rank"}
        if options.get("dt_rank", "auto") != "auto":
            part["dt_rank"] = inside.int("dt_rank")
    else:
        part["mixer"] = "mamba2"
    if strange := sorted(options.keys() - known):
        raise keys.refuse(f"ssm_cfg.{strange[0]}={options[strange[0]]}: no such option here")
    vocab, multiple = keys.int("vocab_size"), keys.int("pad_vocab_size_multiple", 8)
    return {
        "d_model": keys.int("d_model"),
        "vocab_size": -(-vocab // multiple) * multiple,
        "norm_eps": EPS,
        "tie_embeddings": keys.flag("tie_embeddings", True),
        "parts": {part["mixer"]: part},
        "stack": stack_of([f"{part['mixer']}/-"] * keys.int("n_layer")),
    }


def to_theirs(stack: Stack) -> Tree:
    if stack.model.norm_eps != EPS:
        raise Misfit(-1, f"model.norm_eps={stack.model.norm_eps}: state_spaces has {EPS} alone")
    parts = stack.parts({mamba.Config: {"norms": False}, mamba2.Config: {}}, {NOTHING: {}})
    if len(parts) > 1:
        later = max(stack.first(mamba.Config), stack.first(mamba2.Config), key=lambda plan: plan.index)
        raise stack.misfit(later, "state_spaces has mamba in all layers, or mamba2 in all")
    part = next(iter(parts.values()))
    layer = "Mamba1" if isinstance(part, mamba.Config) else "Mamba2"
    options: Tree = {"layer": layer} | {k: getattr(part, ours) for k, (ours, _) in SIZES[layer].items()}
    if isinstance(part, mamba.Config):
        options["dt_rank"] = part.rank(stack.model.d_model)
    elif part.sizes(stack.model.d_model)[1] != part.expand * stack.model.d_model:
        raise stack.misfit(stack.plans[0], "num_heads x head_dim differs from expand x d_model; state_spaces has one")
    return {
        "d_model": stack.model.d_model,
        "n_layer": len(stack.plans),
        "vocab_size": stack.model.vocab_size,
        "pad_vocab_size_multiple": 1,
        "ssm_cfg": options,
        "attn_layer_idx": [],
        "attn_cfg": {},
        "d_intermediate": 0,
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "tie_embeddings": stack.model.tie_embeddings,
    }


FAMILY = Family(
    "state_spaces", "MambaLMHeadModel", TABLE, to_ours, to_theirs, claims=lambda tree: "ssm_cfg" in tree, binary=True
)

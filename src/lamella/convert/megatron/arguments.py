"""Megatron-LM's training arguments, which its checkpoints hold, to a stack of ours.

Which layer holds what is read from the names of its tensors, not from the arguments: they are two ways to say it, and
several arguments together make up the second. A hybrid's pattern (`M-M*-`) is compared with them.
"""

import itertools
import re
from collections.abc import Iterable
from typing import Any

from lamella.config import ModelConfig
from lamella.convert.family import Keys, Tree, stack_of
from lamella.model.stack import plan_layers

SCAN_EPS = 1e-5  # of the norm inside its Mamba layers, whatever `norm_epsilon` is
SCAN_TAPS = 4
LETTERS = {"mamba2": "M", "attention": "*", "mlp": "-", "moe": "E"}
TOLD_BY = {"mixer.A_log": "mamba2", "self_attention.linear_proj.weight": "attention",
           "mlp.router.weight": "moe", "mlp.linear_fc2.weight": "mlp"}  # fmt: skip
# What the stacks here compute; an argument that is missing is taken for the first value.
ONLY: dict[str, tuple[Any, ...]] = {
    "multi_latent_attention": (False, None),
    "attention_output_gate": (False, None),
    "qk_l2_norm": (False, None),
    "use_rope_scaling": (False, None),
    "rotary_interleaved": (False, None),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "no_rope_freq": (None, [], 0),
    "window_size": (None,),
    "softmax_type": ("vanilla",),
    "apply_layernorm_1p": (False, None),
    "apply_residual_connection_post_layernorm": (False, None),
    "openai_gelu": (False, None),
    "quick_geglu": (False, None),
    "activation_func_clamp_value": (None,),
    "glu_linear_offset": (0.0, None),
    "mtp_num_layers": (None, 0),
    "moe_router_score_function": ("softmax",),
    "moe_router_num_groups": (None,),
    "moe_router_topk_scaling_factor": (None, 1.0),
    "moe_router_enable_expert_bias": (False, None),
    "moe_router_force_load_balancing": (False, None),
    "moe_expert_capacity_factor": (None,),
    "moe_shared_expert_gate": (False, None),
    "moe_apply_probs_on_input": (False, None),
    "moe_latent_size": (None,),
}
ROUTED = {"aux_loss", "seq_aux_loss", "global_aux_loss", "none"}  # how loads are evened out; sinkhorn chooses otherwise


def layers_of(names: Iterable[str], count: int, stacked: bool) -> list[list[str]]:
    """What each of its layers holds, in order: `mamba2`, `attention`, `mlp`, `moe`."""
    found: list[list[str]] = [[] for _ in range(count)]
    for (told, kind), name in itertools.product(TOLD_BY.items(), sorted(names)):
        match = re.fullmatch(rf"decoder\.layers(?:\.(\d+))?\.{re.escape(told)}", name)
        if match and (match[1] is None) == stacked and (stacked or int(match[1]) < count):
            for layer in range(count) if stacked else [int(match[1])]:
                found[layer].append(kind)
    return found


def is_hybrid(names: Iterable[str]) -> bool:
    return "decoder.final_norm.weight" in names


def to_ours(keys: Keys, layers: list[list[str]], hybrid: bool, tied: bool, rows: int) -> Tree:
    """`rows`: of the embedding, which is padded."""
    for name, values in ONLY.items():
        value = keys.tree.get(name, values[0])
        if value not in values:
            raise keys.refuse(f"{name}={value}: the stack here has {name}={values[0]} alone")
    if (norm := keys.tree.get("normalization", "LayerNorm")) not in ("RMSNorm", "LayerNorm"):
        raise keys.refuse(f"normalization={norm}: the norms here are RMSNorm or LayerNorm")
    eps = keys.float("norm_epsilon", 1e-5)
    if hybrid:
        _check_pattern(keys, layers)
        words = _pairs([kind for kinds in layers for kind in kinds])
        if any("mamba2" in kinds for kinds in layers) and eps != SCAN_EPS:
            raise keys.refuse(f"norm_epsilon={eps}: its Mamba layers have {SCAN_EPS} inside, here all norms have one")
    else:
        words = ["/".join(kinds) for kinds in layers]
    used = {kind for kinds in layers for kind in kinds}
    readers = {"mamba2": _read_scan, "attention": _read_heads, "mlp": _read_mlp, "moe": _read_experts}
    return {
        "d_model": keys.int("hidden_size"),
        "vocab_size": rows,
        "norm": "rms" if norm == "RMSNorm" else "layer",
        "norm_eps": eps,
        "tie_embeddings": tied,
        "init_std": keys.float("init_method_std", 0.02),
        "parts": {kind: read(keys) for kind, read in readers.items() if kind in used},
        "stack": stack_of(words),
    }


def pattern_of(model: ModelConfig) -> str:
    """A layer of theirs for each branch: M Mamba-2, * attention, - MLP, E experts."""
    return "".join(LETTERS[kind] for kinds in kinds_of(model) for kind in kinds)


def kinds_of(model: ModelConfig) -> list[list[str]]:
    """What each of our layers holds."""
    branches = [[part for part in (plan.mixer, plan.channel) if part is not None] for plan in plan_layers(model)]
    return [[getattr(part, "mixer", None) or getattr(part, "channel", "") for part in parts] for parts in branches]


def _read_scan(keys: Keys) -> Tree:
    size, heads = keys.int("mamba_head_dim", 64), keys.tree.get("mamba_num_heads")
    return {
        "mixer": "mamba2",
        "d_state": keys.int("mamba_state_dim", 128),
        "d_conv": SCAN_TAPS,
        "head_dim": size,
        "num_heads": keys.int("mamba_num_heads") if heads else 2 * keys.int("hidden_size") // size,
        "num_groups": keys.int("mamba_num_groups", 8),
    }


def _read_heads(keys: Keys) -> Tree:
    heads, d_model = keys.int("num_attention_heads"), keys.int("hidden_size")
    size = keys.int("kv_channels", d_model // heads)
    grouped = keys.flag("group_query_attention", keys.tree.get("num_query_groups") is not None)
    bias = keys.flag("add_bias_linear", True)
    tree: Tree = {
        "mixer": "attention",
        "num_heads": heads,
        "num_kv_heads": keys.int("num_query_groups", heads) if grouped else heads,
        "qkv_bias": bias or keys.flag("add_qkv_bias", False),
        "out_bias": bias,
        "qk_norm": keys.flag("qk_layernorm", False),
    }
    kind = keys.tree.get("position_embedding_type", "learned_absolute")
    if kind not in ("rope", "none"):
        raise keys.refuse(f"position_embedding_type={kind}: the positions here are rope or none")
    if kind == "rope":
        turned = int(size * keys.float("rotary_percent", 1.0))
        tree |= {"rope_theta": keys.float("rotary_base", 10000)} | ({} if turned == size else {"rope_dim": turned})
    return tree if size * heads == d_model else tree | {"head_dim": size}


def _read_mlp(keys: Keys) -> Tree:
    d_ff = keys.int("ffn_hidden_size")
    return {"channel": "mlp", "d_ff": d_ff, "bias": keys.flag("add_bias_linear", True)} | _activation(keys)


def _read_experts(keys: Keys) -> Tree:
    if keys.flag("add_bias_linear", True):
        raise keys.refuse("add_bias_linear=True: experts here have no biases")
    balance = keys.tree.get("moe_router_load_balancing_type", "aux_loss")
    balance = balance[0] if isinstance(balance, list) and len(balance) == 1 else balance
    if balance not in ROUTED:
        raise keys.refuse(f"moe_router_load_balancing_type={balance}: routers here know {', '.join(sorted(ROUTED))}")
    aux = keys.tree.get("moe_aux_loss_coeff") or 0.0
    return {
        "channel": "moe",
        "num_experts": keys.int("num_experts"),
        "d_ff": keys.int("moe_ffn_hidden_size", keys.int("ffn_hidden_size")),
        "top_k": keys.int("moe_router_topk", 2),
        "renormalize": not keys.flag("moe_router_pre_softmax", False),
        "aux_loss": float(aux[0] if isinstance(aux, list) else aux) if balance != "none" else 0.0,
        "z_loss": float(keys.tree.get("moe_z_loss_coeff") or 0.0),
        "jitter": float(keys.tree.get("moe_input_jitter_eps") or 0.0),
        "shared_d_ff": keys.int("moe_shared_expert_intermediate_size", 0),
    } | _activation(keys)


def _activation(keys: Keys) -> Tree:
    if keys.flag("swiglu", False):
        return {"activation": "swiglu"}
    if keys.flag("squared_relu", False):
        return {"activation": "relu2"}
    if keys.flag("bias_gelu_fusion", True) and keys.flag("add_bias_linear", True):
        raise keys.refuse("bias_gelu_fusion=True: that gelu is an approximation by tanh, which no MLP here has")
    return {"activation": "gelu"}


def _check_pattern(keys: Keys, layers: list[list[str]]) -> None:
    """`|` marks where its pipeline cuts, which is no part of the model."""
    given = keys.tree.get("hybrid_override_pattern") or keys.tree.get("hybrid_layer_pattern")
    found = "".join(LETTERS[kind] for kinds in layers for kind in kinds)
    if given is not None and str(given).replace("|", "") != found:
        raise keys.refuse(f"the pattern {str(given)[:80]} is not that of its tensors, {found[:80]}")


def _pairs(blocks: list[str]) -> list[str]:
    """mixer, channel -> mixer/channel; a block without its other half stands alone."""
    words: list[str] = []
    for block in blocks:
        if block in ("mamba2", "attention"):
            words.append(f"{block}/-")
        elif words and words[-1].endswith("/-"):
            words[-1] = words[-1][:-1] + block
        else:
            words.append(f"-/{block}")
    return words

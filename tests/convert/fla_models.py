"""Tiny folders as flash-linear-attention saves them, five a family, odd ones among them: names and shapes are its own.

`test_fla_peer.py` holds the names and shapes to fla's model classes, where fla is installed.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from lamella.model.init import generator

BASE = {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 50, "intermediate_size": 24}
SPEC = {"num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "window_size": 7, "rope_theta": 100.0}
RWKV6 = BASE | {"expand_k": 1.0, "num_heads": 4, "proj_low_rank_dim": 3, "gate_low_rank_dim": 5}
RWKV7 = BASE | {"head_dim": 8, "decay_low_rank_dim": 5, "gate_low_rank_dim": 6, "a_low_rank_dim": 3}
CASES = {
    "retnet": [
        BASE | {"num_heads": 2},
        BASE | {"num_heads": 4, "expand_k": 0.75, "expand_v": 1.5, "fuse_norm": False, "norm_eps": 1e-3},
        BASE | {"num_heads": 2, "use_output_gate": False, "tie_word_embeddings": True, "num_kv_heads": 2},
        BASE | {"num_heads": 2, "elementwise_affine": False, "attn": SPEC | {"layers": [1]}},
        {"hidden_size": 24, "num_hidden_layers": 1, "vocab_size": 37, "num_heads": 1, "hidden_ratio": 3}
        | {"use_output_gate": False, "elementwise_affine": False, "expand_v": 1.3333333333333333},
    ],
    "rwkv6": [
        RWKV6,
        RWKV6 | {"norm_first": False, "num_heads": 8, "norm_eps": 1e-3, "fuse_norm": False},
        RWKV6 | {"tie_word_embeddings": True, "vocab_size": 37, "intermediate_size": None, "hidden_ratio": None},
        RWKV6 | {"attn": {"layers": [0, 2], "num_heads": 2}, "gate_low_rank_dim": 1},
        RWKV6 | {"hidden_size": 24, "num_heads": 1, "num_hidden_layers": 1, "proj_low_rank_dim": 7},
    ],
    "rwkv7": [
        RWKV7,
        RWKV7 | {"norm_first": False, "head_dim": None, "num_heads": 2, "v_low_rank_dim": 2, "norm_eps": 1e-4},
        RWKV7
        | {"tie_word_embeddings": True, "decay_low_rank_dim": None, "gate_low_rank_dim": None, "vocab_size": 37}
        | {"a_low_rank_dim": None, "v_low_rank_dim": None, "value_dim": 32, "head_dim": 16, "fuse_norm": False},
        RWKV7 | {"attn": SPEC | {"layers": [1]}, "intermediate_size": None, "hidden_ratio": 2.5},
        RWKV7 | {"hidden_size": 24, "head_dim": 24, "num_hidden_layers": 2, "value_dim": [24, 24]},
    ],
}
CLASSES = {"retnet": "RetNet", "rwkv6": "RWKV6", "rwkv7": "RWKV7"}
IDS = [(family, number) for family, cases in CASES.items() for number in range(5)]


def config_of(family: str, number: int) -> dict:
    """As saved: with what every one has."""
    more = {"model_type": family, "architectures": [f"{CLASSES[family]}ForCausalLM"], "dtype": "float32"}
    return more | {"initializer_range": 0.02, "tie_word_embeddings": False} | CASES[family][number]


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a folder's tensors."""
    D, V, kind = config["hidden_size"], config["vocab_size"], config["model_type"]
    ends = ("weight",) if kind == "retnet" else ("weight", "bias")
    found = {"model.embeddings.weight": (V, D)} | {f"model.norm.{end}": (D,) for end in ends}
    if not config.get("tie_word_embeddings"):
        found["lm_head.weight"] = (V, D)
    second = "mlp_norm" if kind == "retnet" else "ffn_norm"
    for layer in range(config["num_hidden_layers"]):
        norms = ["attn_norm", second]
        if kind != "retnet" and layer == 0 and config.get("norm_first", True):
            norms.append("pre_norm")
        here = {f"{norm}.{end}": (D,) for norm in norms for end in ends}
        spec = config.get("attn") or {"layers": []}
        own = (
            _attention(spec, D)
            if layer in spec["layers"]
            else {"retnet": _retnet, "rwkv6": _6, "rwkv7": _7}[kind](config, D, layer)
        )
        here |= {f"attn.{name}": shape for name, shape in own.items()}
        here |= _channel(config, D, kind)
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in here.items()}
    return found


def _attention(spec: dict, D: int) -> dict:
    narrow = D // spec["num_heads"] * spec.get("num_kv_heads", spec["num_heads"])
    widths = {"q": D, "k": narrow, "v": narrow}
    found = {f"{p}_proj.weight": (width, D) for p, width in widths.items()} | {"o_proj.weight": (D, D)}
    return found | ({f"{p}_proj.bias": (n,) for p, n in widths.items()} if spec.get("qkv_bias") else {})


def _retnet(config: dict, D: int, layer: int) -> dict:
    keys, values = int(D * config.get("expand_k", 1.0)), int(D * config.get("expand_v", 2.0))
    found = {"q_proj.weight": (keys, D), "k_proj.weight": (keys, D), "v_proj.weight": (values, D)}
    gate = config.get("use_output_gate", True)
    found |= {"o_proj.weight": (D, values)} | ({"g_proj.weight": (values, D)} if gate else {})
    if config.get("elementwise_affine", True):
        fused = gate and config.get("fuse_norm", True)
        found[f"{'g_norm_swish_gate' if fused else 'g_norm'}.weight"] = (values // config["num_heads"],)
    return found


def _6(config: dict, D: int, layer: int) -> dict:
    mix, decay = config["proj_low_rank_dim"], config["gate_low_rank_dim"]
    found = {"x_bias": (5, D), "x_proj.0.mu": (D,), "x_proj.0.linear.weight": (5 * mix, D)}
    found |= {"x_proj.2.weight": (D, 5 * mix), "bonus": (config["num_heads"], D // config["num_heads"])}
    found |= {f"{p}_proj.linear.weight": (D, D) for p in "rkvg"} | {"o_proj.weight": (D, D)}
    lora = {"0.weight": (decay, D), "2.weight": (D, decay), "2.bias": (D,)}
    found |= {f"w_proj.linear.lora.{name}": shape for name, shape in lora.items()}
    return found | {"g_norm.weight": (D,), "g_norm.bias": (D,)}


def _7(config: dict, D: int, layer: int) -> dict:
    size = config["head_dim"] or D // config["num_heads"]
    # null: max(32, the multiple of 32 next to 2.5, 1.7 or 5 sqrt(D)), which is 32 at these widths
    rank = {"w": config["decay_low_rank_dim"], "a": config["a_low_rank_dim"], "g": config["gate_low_rank_dim"]}
    rank |= {"v": config.get("v_low_rank_dim", 16)} if layer else {}
    found = {f"x_{n}": (1, 1, D) for n in "rwkvag"} | {"k_k": (D,), "k_a": (D,), "r_k": (D // size, size)}
    found |= {f"{p}_proj.weight": (D, D) for p in "rkvo"} | {"g_norm.weight": (D,), "g_norm.bias": (D,)}
    for name, low in rank.items():
        found |= {f"{name}_lora.lora.0.weight": (low or 32, D), f"{name}_lora.lora.2.weight": (D, low or 32)}
        found |= {} if name == "g" else {f"{name}_lora.lora.2.bias": (D,)}
    return found


def _channel(config: dict, D: int, kind: str) -> dict:
    F = config.get("intermediate_size")
    if kind == "retnet":
        F = F or -(-int(D * config["hidden_ratio"] * 2 / 3) // 256) * 256
        return {"mlp.gate_proj.weight": (F, D), "mlp.up_proj.weight": (F, D), "mlp.down_proj.weight": (D, F)}
    F = F or -(-int(D * (config["hidden_ratio"] or 3.5)) // 32) * 32
    if kind == "rwkv7":
        return {"ffn.x_k": (D,), "ffn.key.weight": (F, D), "ffn.value.weight": (D, F)}
    ends = {"key.mu": (D,), "key.linear.weight": (F, D), "value.weight": (D, F)}
    return {f"ffn.{n}": s for n, s in (ends | {"receptance.mu": (D,), "receptance.linear.weight": (D, D)}).items()}


def drawn(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Nothing is left at 0 or 1, and no logit is large."""
    noise = torch.randn(shape, generator=generator(name, seed))
    if name.endswith("norm.weight") or "norm_swish" in name or (".ln" in f".{name}" and name.endswith("weight")):
        return 1 + 0.2 * noise
    if len(shape) == 1 or 1 in shape or "x_bias" in name or "bonus" in name or "r_k" in name or "faaaa" in name:
        return 0.3 + 0.3 * noise
    return noise * (0.06 if "head" in name else 0.15)


def saved(family: str, number: int, folder: Path, dtype=torch.float32) -> Path:
    path, config = folder / f"{family}-{number}", config_of(family, number)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}))
    tensors = {name: drawn(name, shape, number).to(dtype) for name, shape in shapes(config).items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path

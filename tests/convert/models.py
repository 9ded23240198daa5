"""Tiny models of transformers, five a family, odd ones among them, with weights that hide nothing."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from lamella.model.init import generator

BASE = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "pad_token_id": None}
HEADS = {"intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
JAMBA = BASE | HEADS | {"num_hidden_layers": 6, "num_experts": 4, "mamba_d_state": 8, "mamba_dt_rank": 8}
EVERY = ("attn_layer_period", "attn_layer_offset", "expert_layer_period", "expert_layer_offset")
MAMBA2 = BASE | {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2}
BAMBA = BASE | HEADS | ROPE | {"num_hidden_layers": 4, "mamba_n_heads": 4, "mamba_d_state": 8}
NEMOTRON = {
    **{key: BASE[key] for key in ("vocab_size", "hidden_size", "pad_token_id")},
    **HEADS,
    "head_dim": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 2,
}
M, A, F = "linear_attention", "full_attention", "mlp"
CASES = {
    "llama": [
        BASE | HEADS | ROPE,
        BASE | HEADS | {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
        BASE | HEADS | {"head_dim": 6, "num_key_value_heads": 1, "rms_norm_eps": 1e-3},
        BASE | HEADS | {"tie_word_embeddings": True, "vocab_size": 37, "num_hidden_layers": 1},
        BASE | HEADS | ROPE | {"attention_bias": True, "intermediate_size": 19, "head_dim": 16},
    ],
    "mixtral": [
        BASE | HEADS | {"num_local_experts": 4},
        BASE | HEADS | ROPE | {"num_local_experts": 3, "num_experts_per_tok": 1, "tie_word_embeddings": True},
        BASE | HEADS | {"num_local_experts": 5, "num_experts_per_tok": 3, "head_dim": 12},
        BASE | HEADS | {"num_local_experts": 2, "sliding_window": 7, "num_hidden_layers": 1},
        BASE | HEADS | {"num_local_experts": 4, "num_key_value_heads": 1, "router_jitter_noise": 0.1},
    ],
    "mamba": [
        BASE | {"state_size": 8},
        BASE | {"state_size": 5, "tie_word_embeddings": False, "time_step_rank": 3},
        BASE | {"conv_kernel": 2, "expand": 1, "layer_norm_epsilon": 1e-3, "vocab_size": 33},
        BASE | {"conv_kernel": 6, "expand": 3, "num_hidden_layers": 1},
        BASE | {"hidden_size": 24, "time_step_rank": "auto", "tie_word_embeddings": False},
    ],
    "falcon_mamba": [
        BASE | {"state_size": 8, "tie_word_embeddings": False},
        BASE | {"state_size": 5, "time_step_rank": 3, "mixer_rms_eps": 1e-3},
        BASE | {"conv_kernel": 2, "expand": 1, "layer_norm_epsilon": 1e-3, "vocab_size": 33},
        BASE | {"conv_kernel": 6, "expand": 3, "num_hidden_layers": 1},
        BASE | {"hidden_size": 24, "time_step_rank": "auto", "mixer_rms_eps": 1e-5},
    ],
    "mamba2": [
        MAMBA2,
        MAMBA2 | {"num_heads": 4, "head_dim": 16, "n_groups": 1, "tie_word_embeddings": True},
        MAMBA2 | {"num_heads": 3, "head_dim": 32, "expand": 3, "n_groups": 3, "conv_kernel": 2},
        MAMBA2 | {"state_size": 5, "n_groups": 8, "layer_norm_epsilon": 1e-3, "num_hidden_layers": 1},
        MAMBA2 | {"expand": 1, "num_heads": 2, "head_dim": 16, "vocab_size": 41},
    ],
    "jamba": [
        JAMBA | dict(zip(EVERY, (3, 1, 2, 1), strict=True)),
        JAMBA | dict(zip(EVERY, (4, 3, 3, 2), strict=True)) | {"tie_word_embeddings": True, "num_experts_per_tok": 1},
        JAMBA | dict(zip(EVERY, (4, 3, 1, 0), strict=True)) | {"mamba_dt_rank": 11, "num_hidden_layers": 3},
        JAMBA | dict(zip(EVERY, (5, 0, 7, 6), strict=True)) | {"mamba_d_conv": 2, "mamba_expand": 1},
        JAMBA | dict(zip(EVERY, (2, 1, 2, 0), strict=True)) | {"num_experts": 1, "num_hidden_layers": 5},
    ],
    "bamba": [
        BAMBA | {"attn_layer_indices": [1]},
        BAMBA | {"attn_layer_indices": [0, 3], "attention_bias": True, "mlp_bias": True, "mamba_n_groups": 2},
        BAMBA | {"attn_layer_indices": [], "mamba_n_heads": 8, "tie_word_embeddings": True},
        BAMBA | {"attn_layer_indices": [2], "mamba_expand": 1, "mamba_d_conv": 2, "num_key_value_heads": 1},
        BAMBA | {"attn_layer_indices": [0, 1, 3], "mamba_d_state": 5, "rms_norm_eps": 1e-3},
    ],
    "nemotron_h": [
        NEMOTRON | {"layers_block_type": [M, F, M, F, A, F]},
        NEMOTRON | {"layers_block_type": [F, M, A, A, F, F], "vocab_size": 37},
        NEMOTRON | {"layers_block_type": [M, M, A], "mamba_num_heads": 6, "n_groups": 3, "head_dim": 12},
        NEMOTRON | {"layers_block_type": [A, F, M], "mlp_hidden_act": "relu", "mlp_bias": True, "n_groups": 1},
        NEMOTRON | {"layers_block_type": [M, F] * 2, "conv_kernel": 2, "layer_norm_epsilon": 1e-3},
    ],
}
PREFIXES = {"falcon_mamba": "FalconMamba", "nemotron_h": "NemotronH"}
IDS = [(family, number) for family, cases in CASES.items() for number in range(len(cases))]


def peer(family: str, number: int):
    """A model of transformers in fp32, filled by name. Skips where this transformers lacks it."""
    transformers = pytest.importorskip("transformers")
    prefix = PREFIXES.get(family, family.capitalize())
    for word in ("Config", "ForCausalLM"):
        if not hasattr(transformers, prefix + word):
            pytest.skip(f"this transformers has no {prefix}{word}")
    config = getattr(transformers, f"{prefix}Config")(**CASES[family][number])
    torch.manual_seed(number)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator(name, number))
            # Nothing is left at 0 or 1. What a norm follows is large, or it would blow up the rounding.
            spread = 1.0 if "x_proj" in name else 0.06 if "lm_head" in name else 0.15
            parameter.copy_(spread * noise if parameter.dim() > 1 and "A_log" not in name else parameter + 0.2 * noise)
    return model


def saved(family: str, number: int, folder: Path, dtype=torch.float32) -> Path:
    path = folder / f"{family}-{number}"
    peer(family, number).to(dtype).save_pretrained(path)
    return path


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a folder, by the library's own reader."""
    load = importlib.import_module("safetensors.torch").load_file
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load(file)
    return found


def assert_same_tensors(got: Path, wanted: Path):
    got_, wanted_ = tensors(got), tensors(wanted)
    assert got_.keys() == wanted_.keys()
    for name, tensor in wanted_.items():
        assert got_[name].dtype == tensor.dtype and torch.equal(got_[name], tensor), name


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def write_config(folder: Path, tree: dict) -> None:
    (folder / "config.json").write_text(json.dumps(tree))

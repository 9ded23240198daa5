"""The options each mixer is tested with. A new mixer adds its line here; `test_contract.py` finds the file itself."""

from lamella.mixers.base import names

D_MODEL = 8  # of every case

OPTIONS = {
    "attention": [
        {"num_heads": 2},
        {"num_heads": 4, "num_kv_heads": 2, "head_dim": 2, "rope_theta": 100.0, "qkv_bias": True},
        {"num_heads": 2, "num_kv_heads": 1, "window": 3, "rope_theta": 10.0, "qk_norm": True},
        {"num_heads": 2, "window": 1},
        {"num_heads": 2, "rope_theta": 10.0, "rope_dim": 2, "out_bias": True},
    ],
    "mamba": [
        {"d_state": 3, "dt_rank": 2},
        {"d_state": 2, "dt_rank": 3, "d_conv": 2, "expand": 1, "norms": False},
        {"d_state": 3, "dt_rank": 4, "norm_weights": False, "norms_eps": 1e-3},
    ],
    "mamba2": [
        {"d_state": 3, "head_dim": 4},
        {"d_state": 2, "head_dim": 2, "num_groups": 2, "d_conv": 2, "expand": 1},
        {"d_state": 4, "head_dim": 3, "num_heads": 2, "num_groups": 2},
    ],
    # Its norm blows up the rounding of a token whose output nearly cancels: sizes at which none of the rows' does.
    "retention": [
        {"num_heads": 2, "head_dim": 6, "value_head_dim": 8},
        {"num_heads": 2, "variant": "fla"},
        {"num_heads": 2, "variant": "fla", "gate": False, "norm_weight": False, "group_eps": 0.1},
    ],
    # A group norm over this few channels amplifies rounding where all are small: hence the eps.
    "rwkv6": [
        {"head_size": 4, "mix_rank": 2, "decay_rank": 3},
        {"head_size": 8, "mix_rank": 1, "decay_rank": 2, "group_eps": 1.0},
    ],
    "rwkv7": [
        {"head_size": 4, "decay_rank": 3, "rate_rank": 2, "value_rank": 2, "gate_rank": 5, "group_eps": 0.1},
        {"head_size": 8, "decay_rank": 2, "rate_rank": 3, "value_rank": 1, "gate_rank": 2, "group_eps": 1.0},
    ],
}

# A mixer without a line is tried with its defaults; where it has options that must be set, its tests say so.
CASES = [(name, options) for name in names() for options in OPTIONS.get(name, [{}])]
IDS = [f"{name}-{','.join(f'{k}={v}' for k, v in options.items()) or 'defaults'}" for name, options in CASES]

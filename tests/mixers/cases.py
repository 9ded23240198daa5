"""The options each mixer is tested with. A new mixer adds its line here; `test_contract.py` finds the file itself."""

from lamella.mixers.base import names

D_MODEL = 8  # of every case

OPTIONS = {
    "attention": [
        {"num_heads": 2},
        {"num_heads": 4, "num_kv_heads": 2, "head_dim": 2, "rope_theta": 100.0, "qkv_bias": True},
        {"num_heads": 2, "num_kv_heads": 1, "window": 3, "rope_theta": 10.0, "qk_norm": True},
        {"num_heads": 2, "window": 1},
    ],
    "mamba": [
        {"d_state": 3, "dt_rank": 2},
        {"d_state": 2, "dt_rank": 3, "d_conv": 2, "expand": 1, "norms": False},
    ],
}

# A mixer without a line is tried with its defaults; where it has options that must be set, its tests say so.
CASES = [(name, options) for name in names() for options in OPTIONS.get(name, [{}])]
IDS = [f"{name}-{','.join(f'{k}={v}' for k, v in options.items()) or 'defaults'}" for name, options in CASES]

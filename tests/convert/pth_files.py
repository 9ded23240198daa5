"""Tiny files as BlinkDL/RWKV-LM saves them."""

import torch

from tests.convert.fla_models import drawn


def six(D=32, layers=3, V=50, F=20, size=8, mix=3, decay=5) -> dict[str, tuple[int, ...]]:
    """Names and shapes of RWKV-v5/src/model.py's x060."""
    here = {f"att.time_maa_{n}": (1, 1, D) for n in "xwkvrg"} | {f"ffn.time_maa_{n}": (1, 1, D) for n in "kr"}
    here |= {"att.time_maa_w1": (D, 5 * mix), "att.time_maa_w2": (5, mix, D), "att.time_decay": (1, 1, D)}
    here |= {"att.time_decay_w1": (D, decay), "att.time_decay_w2": (decay, D), "att.time_faaaa": (D // size, size)}
    here |= {f"att.{n}.weight": (D, D) for n in ("receptance", "key", "value", "gate", "output")}
    here |= {"ffn.key.weight": (F, D), "ffn.value.weight": (D, F), "ffn.receptance.weight": (D, D)}
    return whole(here, D, layers, V)


def seven(D=32, layers=3, V=50, F=20, size=8, ranks=(5, 3, 2, 6), unused=False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of RWKV-v7/train_temp/src/model.py's x070; `unused`: as older files have them."""
    here = {f"att.x_{n}": (1, 1, D) for n in "rwkvag"} | {f"att.{n}": (1, 1, D) for n in ("k_k", "k_a")}
    for name, rank in zip("wavg", ranks, strict=True):
        here |= {f"att.{name}1": (D, rank), f"att.{name}2": (rank, D)}
        here |= {} if name == "g" else {f"att.{name}0": (1, 1, D)}
    here |= {"att.r_k": (D // size, size), "ffn.x_k": (1, 1, D), "ffn.key.weight": (F, D), "ffn.value.weight": (D, F)}
    here |= {f"att.{n}.weight": (D, D) for n in ("receptance", "key", "value", "output")}
    gone = () if unused else tuple(f"blocks.0.att.v{i}" for i in range(3))
    return {name: shape for name, shape in whole(here, D, layers, V).items() if name not in gone}


def whole(here, D, layers, V):
    here |= {f"{norm}.{end}": (D,) for norm in ("ln1", "ln2", "att.ln_x") for end in ("weight", "bias")}
    found = {"emb.weight": (V, D), "head.weight": (V, D)}
    found |= {f"{norm}.{end}": (D,) for norm in ("blocks.0.ln0", "ln_out") for end in ("weight", "bias")}
    return found | {f"blocks.{layer}.{name}": shape for layer in range(layers) for name, shape in here.items()}


def weights_of(shapes, dtype=torch.float32):
    return {name: drawn(name, shape, 0).to(dtype) for name, shape in shapes.items()}


def write(path, weights):
    torch.save(weights, path)
    return path

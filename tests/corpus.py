"""A small prepared corpus and a small run over it, for tests that train."""

import sysconfig
from pathlib import Path

from lamella.config import DataConfig, RunConfig
from lamella.data.prepare.prepare import prepare

MODEL = {
    "d_model": 32,
    "vocab_size": 512,
    "parts": {
        "mamba": {"mixer": "mamba", "d_state": 4},
        "attention": {"mixer": "attention", "num_heads": 4, "num_kv_heads": 2, "rope_theta": 10000.0},
        "mlp": {"channel": "mlp", "d_ff": 48},
        "moe": {"channel": "moe", "num_experts": 4, "d_ff": 32, "jitter": 0.05},
    },
    "stack": [{"layers": ["mamba/moe", "attention/mlp"]}],
    "dropout": 0.05,
}


def prepare_corpus(folder: Path) -> DataConfig:
    """The standard library's json and asyncio packages, prepared in `folder`."""
    library = sysconfig.get_path("stdlib")
    sources = [{"format": "text", "path": f"{library}/{name}/*.py"} for name in ("json", "asyncio")]
    config = DataConfig.model_validate(
        {
            "path": str(folder / "prepared"),
            "sources": sources,
            "tokenizer": {"vocab_size": 500, "train_megabytes": 1},
            "heldout": 0.2,
        },
        strict=False,
    )
    prepare(config)
    return config


def tiny_run(data: DataConfig, runs: Path, name: str = "tiny", **layout) -> RunConfig:
    """Six steps of eight rows, a checkpoint every second one."""
    train = {
        "steps": 6,
        "sequence_length": 64,
        "global_batch_size": 8,
        "optimizer": {"lr": 3e-3, "clip_norm": 0.5},
        "schedule": {"kind": "cosine", "warmup_steps": 2},
        "evaluate": {"every": 3, "rows": 4},
        "checkpoint": {"every": 2, "keep": 10},
        "seed": 7,
    }
    tree = {"name": name, "model": MODEL, "data": data, "layout": layout, "train": train, "runs": str(runs)}
    tree["tracking"] = {"enabled": False}
    return RunConfig.model_validate(tree, strict=False)

"""What a run has come to: its state made whole, and its history."""

import math

import torch

from lamella.parallel.local import run_local
from lamella.train.metrics_file import read_metrics
from tests.train.workers import held_after_load


def whole_state(config, nproc, *opened):
    """Masters and moments of the newest checkpoint, assembled from what `nproc` processes hold of them."""
    outcomes = run_local(nproc, held_after_load, config, *opened, timeout=120)
    assert [o.code for o in outcomes] == [0] * nproc
    whole = {}
    for held, _, _, _ in (o.value for o in outcomes):
        for name, shape, offset, tensor in held:
            place = tuple(slice(o, o + n) for o, n in zip(offset, tensor.shape, strict=True))
            whole.setdefault(name, torch.full(shape, math.nan))[place] = tensor
    return whole, [o.value for o in outcomes]


def assert_equal(got, want):
    """Bit for bit; a NaN would be an element that no process held."""
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


def history(config):
    """What must not change: everything of the metrics but the speed."""
    lines = read_metrics(config.folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "seconds")} for line in lines]

"""bf16 computes in bf16 and keeps fp32 where it must; accumulation does not change a step."""

import pytest
import torch

from lamella.config import change
from lamella.parallel.local import exit_code, run_local
from lamella.train import loop
from lamella.train.metrics_file import read_metrics
from tests.corpus import tiny_run
from tests.train.workers import held_after_load


def losses(config, nproc=1):
    assert exit_code(run_local(nproc, loop.enter, config, timeout=120)) == 0
    return [line["loss"] for line in read_metrics(config.folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def fp32(corpus, tmp_path_factory):
    return losses(tiny_run(corpus, tmp_path_factory.mktemp("fp32"), micro_batch=8))


@pytest.mark.parametrize("layout", [{}, {"tensor": 2, "sequence_parallel": True}], ids=["whole", "tensor"])
def test_bf16_follows_fp32(layout, corpus, tmp_path, fp32):
    config = tiny_run(corpus, tmp_path, **layout)
    config = change(config, train=config.train.model_dump(mode="json") | {"precision": "bf16"})
    got = losses(config, 2)
    assert got != fp32
    assert got == pytest.approx(fp32, rel=2e-3)
    held, parameters, _, _ = run_local(2, held_after_load, config, timeout=60)[0].value
    assert {t.dtype for _, _, _, t in held} == {torch.float32}
    assert {t.dtype for t in parameters.values()} == {torch.float32}


def test_accumulation_changes_nothing(corpus, tmp_path, fp32):
    assert losses(tiny_run(corpus, tmp_path, micro_batch=1)) == pytest.approx(fp32, rel=1e-6)

"""`lamella checkpoint inspect|verify|diff|average|export`."""

import json
import shutil

import pytest
import torch

from lamella.checkpoint import series, store
from lamella.checkpoint.planner import Pieces
from lamella.config import change
from lamella.parallel.local import run_local
from lamella.train.restore import load_model
from tests.checkpoint import workers
from tests.checkpoint.damages import flip
from tests.commands import call
from tests.corpus import tiny_run
from tests.train.untrained import save_untrained


@pytest.fixture
def run(corpus, tmp_path):
    """With checkpoints of steps 3 and 5."""
    config = tiny_run(corpus, tmp_path)
    save_untrained(config, 3, heldout_loss=2.5)
    save_untrained(config, 5)
    return config


def checkpoint(run, step):
    return series.step_folder(run.folder / "checkpoints", step)


def masters(path):
    """All masters of a checkpoint, in fp64."""
    held = {}
    for name in (n for n in store.names(path) if n.startswith("master/")):
        shape = shapes(path)[name]
        held[name] = Pieces(shape, torch.float32, [((0,) * len(shape), torch.empty(shape))])
    store.load(path, held, partial=True)
    return {name: next(iter(x.held.values())).double() for name, x in held.items()}


def shapes(path):
    from lamella.checkpoint.source import Source

    return {name: tuple(kind.shape) for name, kind in Source(path).kinds.items()}


def test_inspect_lists_a_runs_checkpoints_and_describes_the_newest(run, capfd):
    assert call("checkpoint", "inspect", run.folder) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("step-00000003 ") and lines[0].endswith("held-out loss 2.5000")
    assert lines[1].startswith("step-00000005 ")
    assert lines[2] == f"{checkpoint(run, 5)}: step 5 of tiny, 40 rows read"
    parameters = sum(x.numel() for x in masters(checkpoint(run, 5)).values())
    for kind, line in zip(("exp_avg", "exp_avg_sq", "master"), lines[4:], strict=True):
        assert line.split() == [kind, str(len(masters(checkpoint(run, 5)))), "tensors", f"{parameters:,}", "numbers"]


def test_inspect_of_one(run, capfd):
    assert call("checkpoint", "inspect", checkpoint(run, 3), "--tensors", "--config") == 0
    out = capfd.readouterr().out
    assert "step-00000005" not in out
    assert "master/embedding.weight" in out and "float32 [512, 32]   1 pieces" in out
    assert "sequence_length: 64" in out
    assert call("checkpoint", "inspect", checkpoint(run, 3), "--json") == 0
    found = json.loads(capfd.readouterr().out)
    assert found["values"]["step"] == 3
    assert found["tensors"]["exp_avg/embedding.weight"] == {"shape": [512, 32], "dtype": "float32"}


def test_verify_names_what_is_damaged(run, capfd):
    assert call("checkpoint", "verify", run.folder) == 0
    assert [line.split(": ")[1][:5] for line in capfd.readouterr().out.splitlines()] == ["whole", "whole"]
    flip(checkpoint(run, 3) / "__0_0.distcp")
    assert call("checkpoint", "verify", run.folder) == 2
    first, second = capfd.readouterr().out.splitlines()
    assert first == f"{checkpoint(run, 3)}: damaged: {checkpoint(run, 3)}/__0_0.distcp: altered"
    assert second.startswith(f"{checkpoint(run, 5)}: whole, ")
    assert call("checkpoint", "verify", checkpoint(run, 5)) == 0


def test_diff(run, tmp_path, capfd):
    copy = shutil.copytree(checkpoint(run, 5), tmp_path / "copy" / "step-00000005")
    assert call("checkpoint", "diff", run.folder, copy) == 0
    count = len(masters(copy))
    assert f"master: {count} of {count} tensors are the same bit for bit" in capfd.readouterr().out
    assert call("checkpoint", "diff", checkpoint(run, 3), copy, "--most", 1) == 1
    out = capfd.readouterr().out
    assert "step: 3 -> 5\n" in out and "heldout_loss: 2.5 -> None\n" in out
    before, after = masters(checkpoint(run, 3)), masters(copy)
    worst = max(before, key=lambda n: (after[n] - before[n]).norm() / before[n].norm())
    relative = (after[worst] - before[worst]).norm() / before[worst].norm()
    largest = (after[worst] - before[worst]).abs().max()
    assert f"  {worst}: relative {relative:.2e}, largest {largest:.2e}\n" in out
    assert call("checkpoint", "diff", checkpoint(run, 3), copy, "--json") == 1
    assert {x["name"] for x in json.loads(capfd.readouterr().out)["tensors"]} >= before.keys()


def test_diff_of_two_models_names_their_tensors(run, corpus, tmp_path, capfd):
    model = run.model.model_dump(mode="json")
    model["parts"]["mlp"]["d_ff"] = 40
    other, _ = save_untrained(change(run, name="other", model=model), 5)
    assert call("checkpoint", "diff", run.folder, other) == 1
    out = capfd.readouterr().out
    assert "config.model.parts.mlp.d_ff: 48 -> 40\n" in out
    assert "master/layers.1.channel.w_out.weight: float32 [32, 48] -> float32 [32, 40]\n" in out


def test_diff_knows_no_layout(tmp_path):
    """Saved by one process and by four; random bits, NaN among them."""
    for count, layout in ((1, (1, 1)), (4, (2, 2))):
        path = series.step_folder(tmp_path / str(count) / "checkpoints", 1)
        outcomes = run_local(count, workers.save, path, *layout, timeout=60)
        assert [o.code for o in outcomes] == [0] * count
    assert call("checkpoint", "diff", tmp_path / "1", tmp_path / "4") == 0


def test_average(run, tmp_path):
    target = tmp_path / "mean"
    assert call("checkpoint", "average", checkpoint(run, 3), run.folder, "--into", target, "--weights", "1,3") == 0
    path = series.step_folder(target / "checkpoints", 5)
    one, two, mean = (masters(p) for p in (checkpoint(run, 3), checkpoint(run, 5), path))
    for name, got in mean.items():
        assert torch.equal(got, (0.25 * one[name] + 0.75 * two[name]).float().double())
    assert all(name.startswith("master/") for name in store.names(path))
    values = store.read_values(path)
    assert values["averaged"] == [str(checkpoint(run, 3)), str(checkpoint(run, 5))]
    assert "heldout_loss" not in values
    model = load_model(path, run.model, torch.float32)
    assert torch.equal(model.embedding.weight.double(), mean["master/embedding.weight"])
    assert call("eval", target) == 0


def test_average_averages_routers(run, corpus, tmp_path):
    config = change(run, name="routed")
    for step, bias in ((1, [1.0, 0.0]), (2, [0.0, 3.0])):
        save_untrained(config, step, routers={"layer0/channel": {"load": [0.5, 0.5], "bias": bias}})
    assert call("checkpoint", "average", checkpoint(config, 1), config.folder, "--into", tmp_path / "mean") == 0
    values = store.read_values(series.step_folder(tmp_path / "mean" / "checkpoints", 2))
    assert values["routers"] == {"layer0/channel": {"load": [0.5, 0.5], "bias": [0.5, 1.5]}}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_export(run, tmp_path, dtype):
    from safetensors.torch import load_file

    file = tmp_path / "weights.safetensors"
    assert call("checkpoint", "export", run.folder, file, "--dtype", dtype) == 0
    got, want = load_file(file), masters(checkpoint(run, 5))
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    assert got.keys() == {name.removeprefix("master/") for name in want}
    for name, tensor in got.items():
        assert tensor.dtype == kind and torch.equal(tensor, want[f"master/{name}"].to(kind))


def mistakes(run, tmp_path):
    one, none = checkpoint(run, 3), tmp_path / "none"
    (tmp_path / "there.safetensors").touch()
    return {
        "no such folder": ["inspect", none],
        "average: takes two checkpoints or more": ["average", one, "--into", none],
        "is there already; name a new folder": ["average", one, one, "--into", run.folder],
        "--weights 1,x: give 2 numbers of 0 or more": ["average", one, one, "--into", none, "--weights", "1,x"],
        "--weights 0,0: give 2 numbers of 0 or more": ["average", one, one, "--into", none, "--weights", "0,0"],
        "name a file that ends in .safetensors": ["export", one, none],
        "is there already; name a new file": ["export", one, tmp_path / "there.safetensors"],
        "no such file or directory": ["export", one, none / "x.safetensors"],
    }


def test_mistakes_are_one_line(run, tmp_path, capfd):
    for line, words in mistakes(run, tmp_path).items():
        assert call("checkpoint", *words) == 2, words
        out, err = capfd.readouterr()
        assert line.lower() in err.lower() and err.count("\n") == 1 and out == "", (words, err)
        assert not (tmp_path / "none").exists()


def test_what_cannot_be_averaged_leaves_nothing(run, tmp_path, capfd):
    wider = run.model.model_dump(mode="json") | {"vocab_size": 520}
    save_untrained(change(run, name="wider", model=wider), 1)
    save_untrained(change(run, name="worded"), 1, tokenizer="another")
    save_untrained(change(run, name="words"), 1, tokenizer="one")
    flip(save_untrained(change(run, name="bad"), 1)[0] / "run.json")
    for a, b, line in [
        ("tiny", "wider", "embedding.weight: float32 [512, 32] in"),
        ("words", "worded", "were trained with different tokenizers"),
        ("tiny", "bad", "run.json: altered"),
    ]:
        words = [run.folder.with_name(a), run.folder.with_name(b), "--into", tmp_path / "mean"]
        assert call("checkpoint", "average", *words) == 2
        assert line in capfd.readouterr().err
        assert not (tmp_path / "mean").exists()

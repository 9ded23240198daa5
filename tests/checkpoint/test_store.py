import hashlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import zipfile
from pathlib import Path
from random import Random

import pytest
import torch

from lamella.checkpoint import files, manifest, series, store
from lamella.checkpoint.planner import Pieces
from lamella.errors import UserError
from lamella.parallel.local import run_local
from tests.checkpoint import workers
from tests.checkpoint.damages import flip, lengthen, truncate, zero_page
from tests.checkpoint.workers import VALUES, empty, filled, message, true

CURE = "; delete this checkpoint to continue from an earlier one"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = series.step_folder(tmp_path, 100)
    store.save(path, filled(0, 1, 1), VALUES)
    return path


@pytest.mark.parametrize(
    ("saving", "loadings"), [((1, 2), [(1, 1), (2, 2)]), ((2, 1), [(4, 1)]), ((2, 2), [(1, 3)])], ids=str
)
def test_another_layout_loads_the_same_bits(tmp_path: Path, saving, loadings):
    path = series.step_folder(tmp_path, 100)
    assert [o.code for o in run_local(saving[0] * saving[1], workers.save, path, *saving, timeout=60)] == [0] * (
        saving[0] * saving[1]
    )
    held = empty(0, 1, 1)
    store.load(path, held)
    assert true(held)
    for tensor, data in loadings:
        outcomes = run_local(tensor * data, workers.load, path, tensor, data, timeout=60)
        assert [o.value for o in outcomes] == [(True, VALUES)] * (tensor * data)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.uint8], ids=str)
def test_dtypes(tmp_path: Path, dtype: torch.dtype):
    path = series.step_folder(tmp_path, 1)
    store.save(path, filled(0, 1, 1, dtype), {})
    held = empty(0, 1, 1, dtype)
    store.load(path, held)
    assert true(held)


def test_snapshot_is_a_copy():
    held = filled(0, 1, 2)
    copies = {name: x.snapshot() for name, x in held.items()}
    for x in held.values():
        for view in x.held.values():
            view.zero_()
    assert true(copies) and not true(held)


DAMAGES = [
    (flip, "__0_0.distcp", "altered"),
    (zero_page, "__0_0.distcp", "altered"),
    (lengthen, "__0_0.distcp", "altered"),
    (truncate, "__0_0.distcp", "truncated"),
    (Path.unlink, "__0_0.distcp", "missing"),
    (flip, ".metadata", "altered"),
    (truncate, ".metadata", "truncated"),
    (flip, "run.json", "altered"),
    (flip, "manifest.json", "altered"),
    (truncate, "manifest.json", "altered"),
    (Path.unlink, "manifest.json", "missing"),
]


def test_damage_is_named_on_every_rank(saved: Path):
    copies = [shutil.copytree(saved, saved.with_name(f"step-{i:08d}")) for i in range(len(DAMAGES))]
    for copy, (harm, name, _) in zip(copies, DAMAGES, strict=True):
        harm(copy / name)
    outcomes = run_local(2, workers.load_damaged, copies, timeout=60)
    for i, (_, name, verdict) in enumerate(DAMAGES):
        for outcome in outcomes:
            assert outcome.value[i] == (f"{copies[i] / name}: {verdict}{CURE}", True)


def test_manifests_with_sha256_are_read(saved: Path):
    entries = {name: manifest.measure(saved / name, "sha256") for name in manifest.read(saved)}
    files = {e.name: [e.bytes, e.digest] for e in entries.values()}
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    (saved / "manifest.json").write_text(json.dumps({"files": files, "sha256": digest}))
    held = empty(0, 1, 1)
    store.load(saved, held)
    assert true(held)
    flip(saved / "run.json")
    assert message(store.load, saved, held) == f"{saved}/run.json: altered{CURE}"


class Malicious:
    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_a_malicious_checkpoint_executes_nothing(tmp_path: Path, monkeypatch):
    """Its digests are right: whoever writes a pickle can write them too."""
    executed, raw = tmp_path / "executed", pickle.dumps(Malicious(tmp_path / "executed"))
    refused = f"holds {os.system.__module__}.system, which is never loaded"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        packed.writestr("archive/data.pkl", raw)
    with monkeypatch.context() as patch:
        patch.setattr(files, "_serialised", lambda tensor, _: memoryview(buffer.getvalue()))
        store.save(series.step_folder(tmp_path, 1), filled(0, 1, 1), VALUES)
    path = series.step_folder(tmp_path, 2)
    store.save(path, filled(0, 1, 1), VALUES)
    (path / ".metadata").write_bytes(raw)
    entries = [manifest.measure(path / name) for name in manifest.read(path)]
    (path / "manifest.json").unlink()
    manifest.write(path, entries)
    for step in (1, 2):
        with pytest.raises(UserError, match=refused):
            store.load(series.step_folder(tmp_path, step), empty(0, 1, 1))
    assert not executed.exists()


def test_all_damaged_files_are_named(saved: Path):
    flip(saved / "__0_0.distcp")
    (saved / ".metadata").unlink()
    expected = f"{saved}/.metadata: missing; {saved}/__0_0.distcp: altered{CURE}"
    assert message(store.load, saved, empty(0, 1, 1)) == expected


def test_damaged_values_are_named(saved: Path):
    assert store.read_values(saved) == VALUES
    zero = (saved / "run.json").read_text().replace("12", "13")
    (saved / "run.json").write_text(zero)
    assert message(store.read_values, saved) == f"{saved}/run.json: altered{CURE}"


@pytest.mark.parametrize("number", range(120))
def test_any_damage_anywhere_is_named(saved: Path, number: int):
    """100 flipped bits, 10 truncations and 10 deletions, of random files at random places."""
    random = Random(number)
    file = random.choice(sorted(saved.iterdir()))
    if number < 100:
        flip(file, random)
    elif number < 110:
        truncate(file, random)
    else:
        file.unlink()
    held = empty(0, 1, 1)
    error = message(store.load, saved, held) or ""
    assert re.fullmatch(rf"{re.escape(str(file))}: (altered|truncated|missing){CURE}", error)
    assert all(bool((view == 1).all()) for view, _ in workers.pairs(held))


def test_no_checkpoint(tmp_path: Path):
    for use in (store.read_values, lambda path: store.load(path, {})):
        assert message(use, tmp_path / "none") == f"{tmp_path}/none: no checkpoint there; name one of {tmp_path}"


def test_another_model_is_refused(saved: Path):
    def error(**change: Pieces) -> str | None:
        return message(store.load, saved, empty(0, 1, 1) | change)

    start, end = f"{saved}: of another model: ", "; use the model it was saved from"
    ones = torch.ones(7)
    assert error(bias=Pieces((7,), ones.dtype, [((0,), ones)])) == f"{start}bias is not in the checkpoint{end}"
    wider = Pieces((8,), ones.dtype, [((0,), ones)])
    assert error(norm=wider) == f"{start}norm is float32 [8] here and float32 [7] in the checkpoint{end}"
    double = Pieces((7,), torch.float64, [((0,), ones.double())])
    assert error(norm=double) == f"{start}norm is float64 [7] here and float32 [7] in the checkpoint{end}"
    fewer = empty(0, 1, 1)
    del fewer["row"]
    assert message(store.load, saved, fewer) == f"{start}row is not in the model{end}"
    store.load(saved, fewer, partial=True)
    assert true(fewer)
    many = {f"n{i}": wider for i in range(5)}
    assert (error(**many) or "").endswith("n2 is not in the checkpoint and 2 more; use the model it was saved from")


def test_holes_and_overlaps_are_refused_on_every_rank(tmp_path: Path):
    outcomes = run_local(2, workers.save_wrong, series.step_folder(tmp_path, 100), timeout=60)
    assert outcomes[0].value == outcomes[1].value
    start = "the ranks' pieces do not make up the tensors: "
    found = outcomes[0].value
    assert "overlapping chunks" in found.pop("compensated")
    assert found == {
        "hole": f"{start}column has 72 of 96 elements",
        "overlap": f"{start}norm has two pieces at (0,)",
        "nobody": f"{start}norm has 0 of 7 elements",
        "shapes": f"{start}row is float32 [6, 16] and float32 [6, 17]",
    }
    assert list(tmp_path.iterdir()) == []


def test_a_hole_is_refused_where_one_process_saves(tmp_path: Path):
    held = filled(0, 1, 1)
    held["row"].held.popitem()
    with pytest.raises(RuntimeError, match=r"row has \d+ of 96 elements"):
        store.save(series.step_folder(tmp_path, 100), held, {})
    assert list(tmp_path.iterdir()) == []


def test_a_failing_rank_fails_all_and_harms_nothing(tmp_path: Path):
    outcomes = run_local(2, workers.save_failing, tmp_path, timeout=60)
    first, second = (o.value for o in outcomes)
    path = series.step_folder(tmp_path, 200)
    assert first.pop(2) == "step-00000100"
    assert (
        first
        == second
        == [
            f"{path}: cannot save: File too large; choose a folder that can be read and written",
            f"{path}: cannot save: No space left on device; free some space, or keep fewer checkpoints",
            None,
            f"{path}: already saved; delete it, or give the run another name",
        ]
    )
    for step in (100, 200):
        held = empty(0, 1, 1)
        store.load(series.step_folder(tmp_path, step), held)
        assert true(held)


@pytest.mark.parametrize(("victim", "where"), [(1, "pieces"), (0, "manifest")])
def test_a_killed_rank_leaves_the_earlier_checkpoint(tmp_path: Path, victim: int, where: str):
    outcomes = run_local(2, workers.save_killed, tmp_path, victim, where, timeout=60)
    assert outcomes[victim].code == -signal.SIGKILL and outcomes[1 - victim].code == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000100", "step-00000200.tmp"]
    assert series.latest(tmp_path) == series.step_folder(tmp_path, 100)
    held = empty(0, 1, 1)
    store.load(series.step_folder(tmp_path, 100), held)
    assert true(held)
    store.save(series.step_folder(tmp_path, 200), held, VALUES)  # clears what was left
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000100", "step-00000200"]
    store.load(series.step_folder(tmp_path, 200), held)


def test_a_file_where_the_folder_should_be(tmp_path: Path):
    file = tmp_path / "checkpoints"
    file.write_text("mine")
    for use in (lambda: store.save(series.step_folder(file, 1), filled(0, 1, 1), {}), lambda: series.steps(file)):
        with pytest.raises(UserError, match="a file stands where a folder should be; move it away"):
            use()
    assert file.read_text() == "mine"


def test_values_are_readable_without_us(saved: Path):
    assert json.loads((saved / "run.json").read_text()) == VALUES

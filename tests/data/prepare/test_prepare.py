"""Preparing: what lies on disk, what a second time does, and one clear line for everything that can be wrong."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lamella.cli.data import app
from lamella.config import change, dump
from lamella.data.prepare.prepare import prepare
from lamella.data.store.manifest import MODEL, SPLITS, open_prepared
from lamella.data.stream import TrainRows
from lamella.errors import UserError


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def texts_of(prepared) -> list[str]:
    """Every stored document, source by source."""
    files = [stored for splits in prepared.sources.values() for stored in splits.values()]
    return [prepared.tokenizer.decode(s.read(d)[:-1].tolist()) for s in files for d in range(len(s))]


def leftovers(target: Path) -> list[Path]:
    return [f for f in target.parent.iterdir() if f.name.startswith(f".{target.name}.preparing")]


@pytest.fixture
def copied(config, tmp_path):
    """A copy of the prepared corpus, to damage."""
    shutil.copytree(config.path, tmp_path / "small")
    return change(config, path=str(tmp_path / "small"))


def test_what_is_prepared(config):
    prepared = open_prepared(config)
    manifest = prepared.manifest
    assert list(prepared.sources) == list(manifest.sources) == ["texts"]
    assert sum(manifest.total(s).documents for s in SPLITS) == 121
    assert manifest.skipped == {"empty": 1, "not text": 1}
    assert manifest.sources["texts"].duplicates == 60
    assert snapshot(Path(config.path)).keys() == {"manifest.json", *manifest.files}
    assert not leftovers(Path(config.path))
    texts = {f.read_bytes().decode() for f in Path(config.sources[0].path).iterdir() if f.suffix != ".png"} - {""}
    stored = texts_of(prepared)
    assert set(stored) == texts
    assert sum(len(text.encode()) for text in stored) == sum(manifest.total(s).text_bytes or 0 for s in SPLITS)


def test_a_second_time_does_nothing_and_force_gives_the_same(copied):
    folder = Path(copied.path)
    before = snapshot(folder), (folder / "texts" / "train.bin").stat().st_mtime_ns
    assert prepare(copied).already
    assert (snapshot(folder), (folder / "texts" / "train.bin").stat().st_mtime_ns) == before
    summary = prepare(copied, force=True)
    assert not summary.already and summary.seconds
    kept = before[0].keys() - {"manifest.json"}  # which says the path
    assert kept and {n: snapshot(folder)[n] for n in kept} == {n: before[0][n] for n in kept}
    again = snapshot(folder)
    prepare(copied, force=True)
    assert snapshot(folder) == again
    assert not leftovers(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heldout": 0.3}, r"heldout \(0.2, not 0.3\)"),
        ({"tokenizer": {"vocab_size": 500, "train_megabytes": 1}}, r"tokenizer.vocab_size \(400, not 500\)"),
        ({"sources": [{"format": "stdlib"}]}, "sources"),
    ],
)
def test_another_configuration(copied, changes, words):
    other = change(copied, **changes)
    with pytest.raises(UserError, match=f"already prepared with another {words}.*--force"):
        prepare(other)
    with pytest.raises(UserError, match=f"prepared with another {words}"):
        open_prepared(other)


def test_a_given_model_counts_by_its_content(copied, tmp_path):
    model = tmp_path / "given.model"
    shutil.copy(Path(copied.path) / MODEL, model)
    given = change(copied, tokenizer={"model": str(model)})
    assert open_prepared(given).tokenizer.fingerprint == open_prepared(copied).tokenizer.fingerprint
    prepared = prepare(change(given, path=str(tmp_path / "second"))).manifest
    assert prepared.fingerprint == open_prepared(copied).manifest.fingerprint
    model.write_bytes(model.read_bytes() + b" ")
    with pytest.raises(UserError, match=r"another tokenizer.model"):
        open_prepared(given)
    with pytest.raises(UserError, match=r"no such tokenizer model"):
        prepare(change(copied, path=str(tmp_path / "third"), tokenizer={"model": "nowhere.model"}))


def test_changed_sources(corpus, make, tmp_path):
    texts = tmp_path / "texts"
    shutil.copytree(corpus, texts)
    config = make(texts, tmp_path / "out")
    prepare(config)
    (texts / "one more.txt").write_text("new")
    with pytest.raises(UserError, match=r"sources have changed.*--force"):
        prepare(config)
    assert open_prepared(config)  # what was prepared stays usable
    assert not prepare(config, force=True).already


def test_nothing_prepared(config, tmp_path):
    with pytest.raises(UserError, match=r"no prepared data here; run `lamella data prepare FILE`"):
        TrainRows(change(config, path=str(tmp_path / "none")), 8, 1, 0)


def records(folder: Path, lines: list[str]) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "records.jsonl").write_text("".join(line + "\n" for line in lines))
    return str(folder / "records.jsonl")


def fault(tmp_path: Path, kind: str) -> dict:
    """The change of a good configuration that makes it fail."""
    folder = tmp_path / "in"
    folder.mkdir()
    match kind:
        case "missing path":
            return {"sources": [{"format": "text", "path": str(folder / "none")}]}
        case "missing glob":
            return {"sources": [{"format": "text", "path": str(folder / "*.py")}]}
        case "empty folder":
            return {"sources": [{"format": "parquet", "path": str(folder)}]}
        case "binary file":
            (folder / "b.txt").write_bytes(b"\xff\xfe\x80")
            return {"sources": [{"format": "text", "path": str(folder / "b.txt")}]}
        case "only empty documents":
            (folder / "a.txt").write_text("")
            return {"sources": [{"format": "text", "path": str(folder)}]}
        case "one document":
            (folder / "a.txt").write_text("alone")
            return {"sources": [{"format": "text", "path": str(folder)}]}
        case "missing column":
            path = records(folder, ['{"content": "a", "id": 1}'])
            return {"sources": [{"format": "jsonl", "path": path}]}
        case "numbers":
            return {"sources": [{"format": "jsonl", "path": records(folder, ['{"text": 3}'])}]}
        case "broken record":
            return {"sources": [{"format": "jsonl", "path": records(folder, ['{"text": "a"}', '{"text": oops'])}]}
        case "file in the way":
            (tmp_path / "out").write_text("precious")
            return {}
        case "other folder in the way":
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "notes.txt").write_text("precious")
            return {}
        case "file as parent":
            (tmp_path / "file").write_text("precious")
            return {"path": str(tmp_path / "file" / "out")}
        case "not a model":
            (folder / "a.model").write_text("no")
            return {"tokenizer": {"model": str(folder / "a.model")}}
    raise AssertionError(kind)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing path", "none: no such file or folder"),
        ("missing glob", r"\*.py: no file matches"),
        ("empty folder", "no parquet file in this folder; expected names in .parquet"),
        ("binary file", "b.txt: not UTF-8 text"),
        ("only empty documents", "no document in these sources"),
        ("one document", "none of the 1 documents falls to the (heldout|train) split at heldout=0.2; (raise|lower)"),
        ("missing column", "no column 'text'; there is content, id: set sources.column"),
        ("numbers", "column 'text' holds int64, not text"),
        ("broken record", "cannot be read as jsonl"),
        ("file in the way", "a file lies where the folder"),
        ("other folder in the way", "a folder with other files in it"),
        ("file as parent", "cannot be written"),
        ("not a model", "not a sentencepiece model"),
    ],
)
@pytest.mark.parametrize("force", [False, True])
def test_faults(corpus, make, tmp_path, kind, words, force):
    config = change(make(corpus, tmp_path / "out"), **fault(tmp_path, kind))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=words) as caught:
        prepare(config, force=force)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command(make, corpus, tmp_path):
    dump(make(corpus, tmp_path / "out"), tmp_path / "data.yaml")
    run = CliRunner().invoke
    first = run(app, ["prepare", str(tmp_path / "data.yaml"), "heldout=0.25"])
    assert first.exit_code == 0, first.output
    for words in ("prepared:", "121 documents", "tokens per byte", "held out:", "skipped: 1 empty, 1 not text"):
        assert words in first.stdout
    again = run(app, ["prepare", str(tmp_path / "data.yaml"), "heldout=0.25"])
    assert "already prepared" in again.stdout
    other = run(app, ["prepare", str(tmp_path / "data.yaml")])
    assert isinstance(other.exception, UserError)
    assert run(app, ["prepare", str(tmp_path / "data.yaml"), "--force"]).exit_code == 0
    assert "duplicates: 60 documents, kept" in again.stdout
    assert json.loads(run(app, ["prepare", str(tmp_path / "data.yaml"), "--json"]).stdout)["already"]

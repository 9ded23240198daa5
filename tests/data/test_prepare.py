"""Preparing: what lies on disk, what a second time does, and one clear line for everything that can be wrong."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lamella.cli.data import app
from lamella.config import SourceConfig, TokenizerConfig, change, dump
from lamella.data.manifest import MODEL, open_prepared
from lamella.data.prepare import prepare
from lamella.data.stream import TrainRows
from lamella.data.tokens import TokenWriter
from lamella.errors import UserError


def snapshot(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


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
    assert sum(s.documents for s in manifest.splits.values()) == 121
    assert manifest.skipped == {"empty": 1, "not text": 1}
    assert {f.name for f in Path(config.path).iterdir()} == {"manifest.json", *manifest.files}
    assert not leftovers(Path(config.path))
    texts = {f.read_bytes().decode() for f in Path(config.sources[0].path).iterdir() if f.suffix != ".png"} - {""}
    decode = prepared.tokenizer.decode
    stored = [s.read(d)[:-1].tolist() for s in prepared.splits.values() for d in range(len(s))]
    assert {decode(ids) for ids in stored} == texts
    assert sum(len(decode(ids).encode()) for ids in stored) == sum(s.text_bytes for s in manifest.splits.values())


def test_megatron_opens_it(config):
    prepared = open_prepared(config)
    script = (
        "import sys, json; from megatron.core.datasets.indexed_dataset import IndexedDataset\n"
        "d = IndexedDataset(sys.argv[1])\n"
        "print(json.dumps([d.document_indices.tolist(), [d[i].tolist() for i in range(len(d))], str(d.index.dtype)]))"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(prepared.folder / "train")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    documents, tokens, dtype = json.loads(done.stdout.splitlines()[-1])
    stored = prepared.splits["train"]
    assert documents == list(range(len(stored) + 1))
    assert tokens == [stored.read(d).tolist() for d in range(len(stored))]
    assert "uint16" in dtype


def test_a_second_time_does_nothing_and_force_gives_the_same(copied):
    folder = Path(copied.path)
    before = snapshot(folder), (folder / "train.bin").stat().st_mtime_ns
    assert prepare(copied).already
    assert (snapshot(folder), (folder / "train.bin").stat().st_mtime_ns) == before
    summary = prepare(copied, force=True)
    assert not summary.already and summary.seconds
    after = snapshot(folder)
    assert {n: b for n, b in after.items() if n != "manifest.json"} == {
        n: b for n, b in before[0].items() if n != "manifest.json"
    }
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
    assert prepared.files["train.bin"] == open_prepared(copied).manifest.files["train.bin"]
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


@pytest.mark.parametrize("name", ["train.bin", "heldout.idx", "tokenizer.model"])
def test_damaged_files(copied, name):
    file = Path(copied.path) / name
    raw = file.read_bytes()
    file.write_bytes(raw[:-1])
    with pytest.raises(UserError, match=rf"{name}: has {len(raw) - 1:,} bytes, the manifest says {len(raw):,}"):
        open_prepared(copied)
    file.unlink()
    with pytest.raises(UserError, match=f"{name}: missing; .*--force"):
        open_prepared(copied)
    assert not prepare(copied, force=True).already
    open_prepared(copied)


def test_another_tokenizer_of_the_same_size(copied):
    file = Path(copied.path) / MODEL
    raw = bytearray(file.read_bytes())
    raw[raw.index(b"self")] ^= 1
    file.write_bytes(raw)
    with pytest.raises(UserError, match=r"not the tokenizer that these tokens were made with"):
        open_prepared(copied)


def test_a_damaged_manifest(copied):
    file = Path(copied.path) / "manifest.json"
    text = file.read_text()
    file.write_text(text[:-20])
    with pytest.raises(UserError, match=r"damaged or of another version"):
        open_prepared(copied)
    file.write_text(text.replace('"version": 1', '"version": 99'))
    with pytest.raises(UserError, match=r"format version 99, this Lamella reads 1"):
        open_prepared(copied)


def test_an_index_of_the_right_size_with_wrong_content(copied):
    file = Path(copied.path) / "train.idx"
    raw = file.read_bytes()
    file.write_bytes(b"X" + raw[1:])
    with pytest.raises(UserError, match=r"train.idx: not an index"):
        open_prepared(copied)
    file.write_bytes(raw[:34] + b"\x01\x01" + raw[36:])
    with pytest.raises(UserError, match=r"train.idx: does not fit train.bin"):
        open_prepared(copied)


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
        ("numbers", "column 'text' holds int in record 0, not text"),
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


def test_a_hub_data_set_without_network(make, corpus, tmp_path, monkeypatch):
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    config = make(corpus, tmp_path / "out", sources=(SourceConfig(format="hub", path="nobody/nothing-here"),))
    with pytest.raises(UserError, match=r"nobody/nothing-here: cannot be read as hub .*; check its name and split"):
        prepare(config)
    assert not list(tmp_path.iterdir())


def test_a_full_disk(corpus, make, tmp_path, monkeypatch):
    def full(self, stored):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(TokenWriter, "add", full)
    with pytest.raises(UserError, match=r"cannot be written .No space left on device"):
        prepare(make(corpus, tmp_path / "out"))
    assert not list(tmp_path.iterdir())


KILLED = """
import sys, time
from lamella.config import load_data
from lamella.data.prepare import prepare
def progress(phase, documents, size):
    if phase == sys.argv[2]:
        print("now", flush=True)
        time.sleep(60)
prepare(load_data(sys.argv[1]), progress, force="--force" in sys.argv)
"""


@pytest.mark.parametrize("phase", ["training the tokenizer", "encoding"])
def test_a_kill_leaves_nothing_half_written(corpus, make, tmp_path, phase):
    config = make(corpus, tmp_path / "out")
    dump(config, tmp_path / "data.yaml")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "data.yaml"), phase]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout and child.stdout.readline() == "now\n"
        child.send_signal(signal.SIGKILL)
    target = tmp_path / "out"
    assert not target.exists() and len(leftovers(target)) == 1
    assert not prepare(config).already
    assert not leftovers(target)
    if phase == "encoding":  # a killed replacement leaves the old one whole
        before = snapshot(target)
        with subprocess.Popen([*command, "--force"], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout and child.stdout.readline() == "now\n"
            assert prepare(config).already  # a live neighbour's folder is left alone
            assert len(leftovers(target)) == 1
            child.send_signal(signal.SIGKILL)
        assert snapshot(target) == before


def test_records_and_globs(make, corpus, tmp_path):
    import pyarrow
    import pyarrow.parquet

    texts = [f"document {i}\r\n\t\u2581 🦀 {'word ' * i}" for i in range(40)]
    records(tmp_path / "in", [json.dumps({"body": t, "id": i}) for i, t in enumerate([*texts[:20], None, ""])])
    pyarrow.parquet.write_table(pyarrow.table({"body": texts[20:]}), tmp_path / "in" / "more.parquet")
    (tmp_path / "in" / "empty.jsonl").write_text("")
    (tmp_path / "in" / "note.txt").write_bytes(b"a text\r\nfile")
    sources = (
        SourceConfig(format="jsonl", path=str(tmp_path / "in"), column="body"),
        SourceConfig(format="parquet", path=str(tmp_path / "in" / "*.parquet"), column="body"),
        SourceConfig(format="text", path=str(tmp_path / "in" / "note.txt")),
    )
    config = make(corpus, tmp_path / "out", sources=sources, tokenizer=TokenizerConfig(vocab_size=300))
    assert prepare(config).manifest.skipped == {"empty": 2, "not text": 0}
    prepared = open_prepared(config)
    decode = prepared.tokenizer.decode
    found = [decode(s.read(d)[:-1].tolist()) for s in prepared.splits.values() for d in range(len(s))]
    assert sorted(found) == sorted([*texts, "a text\r\nfile"])


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
    assert json.loads(run(app, ["prepare", str(tmp_path / "data.yaml"), "--json"]).stdout)["already"]

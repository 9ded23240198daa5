"""Every format there and back: the same texts, wherever they lie, and one line for what cannot be read."""

import gzip
import json
from pathlib import Path

import pytest

from lamella.config import DataConfig, SourceConfig, TokenizerConfig, change
from lamella.data import sources
from lamella.data.prepare.prepare import prepare
from lamella.data.store.manifest import SPLITS, open_prepared
from lamella.errors import UserError

TEXTS = [f"document {i}\r\n\t\u2581 🦀 {'word ' * i}" for i in range(150)]


def write(folder: Path, kind: str, texts: list) -> SourceConfig:
    """The texts as a source of this kind, in two files where that can be."""
    folder.mkdir()
    half = len(texts) // 2
    lines = ["".join(json.dumps({"id": i, "body": t}) + "\n" for i, t in enumerate(part)) for part in
             (texts[:half], texts[half:])]  # fmt: skip
    fields = {"format": kind.split(".")[0], "path": str(folder), "column": "body"}
    match kind:
        case "text":
            for number, text in enumerate(texts):
                (folder / f"{number:04}.txt").write_bytes((text or "").encode())
        case "jsonl":
            for number, part in enumerate(lines):
                (folder / f"{number}.jsonl").write_text(part)
            (folder / "2.jsonl").write_text("")
        case "jsonl.json":
            (folder / "all.json").write_text(json.dumps([{"id": i, "body": t} for i, t in enumerate(texts)]))
        case "jsonl.gz":
            for number, part in enumerate(lines):
                (folder / f"{number}.jsonl.gz").write_bytes(gzip.compress(part.encode()))
        case "jsonl.zst":
            zstandard = pytest.importorskip("zstandard")
            (folder / "0.jsonl.zst").write_bytes(zstandard.compress("".join(lines).encode()))
        case "parquet":
            import pyarrow
            import pyarrow.parquet

            for number, part in enumerate((texts[:half], texts[half:])):
                table = pyarrow.table({"body": part, "id": list(range(len(part)))})
                pyarrow.parquet.write_table(table, folder / f"{number}.parquet", row_group_size=20)
        case "arrow":
            import datasets

            saved = datasets.Dataset.from_dict({"body": texts, "id": list(range(len(texts)))})
            saved.save_to_disk(str(folder / "saved"), num_shards=2)
            fields["path"] = str(folder / "saved")
        case "hub" | "hub.streaming":  # a folder of files is such a data set too
            for number, part in enumerate(lines):
                (folder / f"{number}.jsonl").write_text(part)
            fields["streaming"] = kind == "hub.streaming"
    return SourceConfig.model_validate(fields)


KINDS = ["text", "jsonl", "jsonl.json", "jsonl.gz", "jsonl.zst", "parquet", "arrow", "hub", "hub.streaming"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """`datasets` keeps what it has built of a hub data set: here."""
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_from_any_position(tmp_path, kind):
    texts = [*TEXTS, "", TEXTS[0]]
    if kind != "text":
        texts.append(None)
    source = write(tmp_path / "in", kind, texts)
    assert list(sources.read(source)) == [t or "" for t in texts]
    seen = list(sources.batches(source))
    assert len(seen) > 1 or kind == "text"
    for number in {0, len(seen) // 2, len(seen) - 1}:
        position = seen[number][1]
        rest = [raw for raws, _ in sources.batches(source, json.loads(json.dumps(position))) for raw in raws]
        assert rest == [raw for raws, _ in seen[number + 1 :] for raw in raws]


def test_several_sources(tmp_path, make, corpus):
    parts = {"text": TEXTS[:50], "jsonl": [*TEXTS[50:100], None, TEXTS[3]], "parquet": [*TEXTS[100:], TEXTS[3]]}
    given = [write(tmp_path / kind, kind, texts) for kind, texts in parts.items()]
    weighted = [change_source(s, name=n, weight=w) for s, n, w in zip(given, ("a", None, "c"), (1, 2, 3), strict=True)]
    config = make(corpus, tmp_path / "out", sources=tuple(weighted), tokenizer=TokenizerConfig(vocab_size=300))
    manifest = prepare(config).manifest
    assert list(manifest.sources) == ["a", "jsonl", "c"]
    assert [entry.duplicates for entry in manifest.sources.values()] == [0, 1, 1]
    assert [entry.skipped["empty"] for entry in manifest.sources.values()] == [0, 1, 0]
    prepared = open_prepared(config)
    for (name, files), texts in zip(prepared.sources.items(), parts.values(), strict=True):
        found = [prepared.tokenizer.decode(f.read(d)[:-1].tolist()) for f in files.values() for d in range(len(f))]
        assert sorted(found) == sorted(t for t in texts if t), name
    heavier = change(config, sources=[s.model_dump() | {"weight": 5.0} for s in weighted])
    assert prepare(heavier).already and open_prepared(heavier)  # weights are training's
    dropped = prepare(change(config, path=str(tmp_path / "fewer"), duplicates="drop")).manifest
    assert [entry.duplicates for entry in dropped.sources.values()] == [0, 1, 1]
    total = sum(dropped.total(split).documents for split in SPLITS)
    assert total == len({t for texts in parts.values() for t in texts if t})
    with pytest.raises(UserError, match=r"another duplicates \(keep, not drop\)"):
        open_prepared(change(config, duplicates="drop"))


def change_source(source: SourceConfig, **changes) -> SourceConfig:
    return source.model_copy(update=changes)


def test_names():
    def names(*fields: dict) -> list[str]:
        return sources.names(SourceConfig.model_validate({"format": "text"} | f) for f in fields)

    same = {"path": "x/pages/**/*.md"}
    assert names({"path": "a/b.c.txt"}, {"path": "b"}, {"path": "b/"}) == ["b", "b-2", "b-3"]
    assert names({"path": "b"}, {"path": "c", "name": "b"}) == ["b-2", "b"]
    assert names(same, same, {"format": "stdlib"}) == ["text", "text-2", "stdlib"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ([{"weight": 1.0}, {}], "weight is missing of b.txt: give one to every source, or to none"),
        ([{"name": "x"}, {"name": "x"}], "two sources are named x: name them apart"),
        ([{"name": "../x"}, {}], "name"),
        ([{"name": ".x"}, {}], "name"),
        ([{"streaming": True}, {}], "streaming is for hub alone"),
        ([{"format": "megatron"}, {}], "tokenizer.model must name the tokenizer that made them"),
    ],
)
def test_sources_that_do_not_fit(fields, words):
    base = [{"format": "text", "path": "a.txt"}, {"format": "text", "path": "b.txt"}]
    tree = {"path": "out", "sources": [one | more for one, more in zip(base, fields, strict=True)]}
    with pytest.raises(ValueError, match=words):
        DataConfig.model_validate(tree, strict=False)


@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet", "arrow"])
def test_a_truncated_file(tmp_path, make, corpus, kind):
    source = write(tmp_path / "in", kind, TEXTS)
    file = max((tmp_path / "in").rglob("*.arrow" if kind == "arrow" else "*.*"))
    file.write_bytes(file.read_bytes()[:-300])
    config = make(corpus, tmp_path / "out", sources=(source,))
    with pytest.raises(UserError, match=rf"{file.name}: cannot be read as .*; mend or leave out that file"):
        prepare(config)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["in"]


def test_zst_without_its_package(tmp_path, make, corpus, monkeypatch):
    from lamella.data.sources import records

    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    monkeypatch.setattr(records, "find_spec", lambda name: None)
    source = SourceConfig(format="jsonl", path=str(tmp_path / "a.jsonl.zst"))
    with pytest.raises(UserError, match=r"a.jsonl.zst: .zst files need the package zstandard: pip install zstandard"):
        prepare(make(corpus, tmp_path / "out", sources=(source,)))


def test_a_hub_data_set_without_network(make, corpus, tmp_path, monkeypatch):
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for streaming in (False, True):
        source = SourceConfig(format="hub", path="nobody/nothing-here", streaming=streaming)
        with pytest.raises(UserError, match=r"nothing-here: cannot be read as hub .*; check its name and split"):
            prepare(make(corpus, tmp_path / "out", sources=(source,)))
        assert not (tmp_path / "out").exists()


def test_the_rest_of_an_interrupted_stream(make, corpus, tmp_path, monkeypatch):
    """A network that fails costs nothing that was done."""
    source = write(tmp_path / "in", "hub.streaming", TEXTS)
    config = make(corpus, tmp_path / "out", sources=(source,))
    whole = prepare(change(config, path=str(tmp_path / "whole"))).manifest
    from lamella.data.prepare import write as writing
    from lamella.data.sources import records

    real, calls = records._texts, iter([True, True, False])

    def failing(*arguments):
        if not next(calls, True):
            raise ConnectionError("gone")
        return real(*arguments)

    monkeypatch.setattr(writing, "EVERY", 0.0)
    monkeypatch.setattr(writing, "TASK", 1)
    monkeypatch.setattr(records, "_texts", failing)
    given = change(config, tokenizer={"model": str(tmp_path / "whole" / "tokenizer.model")})
    with pytest.raises(UserError, match=r"ConnectionError: gone.*; what is done is kept.*: the same command goes on"):
        prepare(given)
    assert not (tmp_path / "out").exists()
    summary = prepare(given)
    assert summary.resumed and summary.manifest.fingerprint == whole.fingerprint

"""Megatron's data sets: theirs are used in place, ours are theirs."""

import json
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lamella.config import DataConfig, SourceConfig, TokenizerConfig, change
from lamella.data.prepare.prepare import prepare
from lamella.data.store.blocks import Damaged
from lamella.data.store.manifest import MODEL, SPLITS, Prepared, open_prepared
from lamella.errors import UserError

SCRIPT = Path(__file__).with_name("run_megatron.py")
DTYPES = {"closed": "uint16", "bare": "int32", "pieces": "int64"}


def megatron(tasks: list[dict]) -> list[dict]:
    lines = "".join(json.dumps(task) + "\n" for task in tasks)
    command = [sys.executable, "-W", "ignore", str(SCRIPT)]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def foreign(config, tmp_path_factory):
    """Megatron's own builder's data sets by name (its folder), what is in them, and ours as Megatron reads it."""
    folder = tmp_path_factory.mktemp("foreign")
    eod = open_prepared(config).tokenizer.eod
    rng = random.Random(0)
    sequences = [[rng.randrange(2, 351) for _ in range(rng.randrange(1, 60))] for _ in range(90)]
    sequences[70] = sequences[3]  # a copy
    documents = {
        "closed": [[[*ids, eod]] for ids in sequences],
        "bare": [[ids] for ids in sequences],
        "pieces": [[*([i] for i in ids[:3]), [*ids[3:], eod]] for ids in sequences] + [[]],
    }
    tasks = [{"write": str(folder / n), "dtype": DTYPES[n], "documents": d} for n, d in documents.items()]
    *_, ours = megatron([*tasks, {"read": str(Path(config.path) / "texts" / "train")}])
    return folder, {n: [[i for part in d for i in part] for d in some if d] for n, some in documents.items()}, ours


@pytest.fixture
def theirs(foreign, config, tmp_path):
    """A configuration over one of those data sets."""

    def choose(path: str, **changes) -> DataConfig:
        source = SourceConfig(format="megatron", path=str(foreign[0] / path))
        tokenizer = TokenizerConfig(model=str(Path(config.path) / MODEL))
        fields = {"path": str(tmp_path / "out"), "sources": (source,), "tokenizer": tokenizer, "heldout": 0.2}
        return DataConfig(**(fields | changes))

    return choose


def read_all(prepared: Prepared) -> list[list[int]]:
    files = [stored for splits in prepared.sources.values() for stored in splits.values()]
    for stored in files:
        assert [len(stored.read(d)) for d in range(len(stored))] == stored.lengths.tolist()
    return [stored.read(d).tolist() for stored in files for d in range(len(stored))]


def test_megatron_opens_ours(foreign, config):
    ours = foreign[2]
    stored = open_prepared(config).sources["texts"]["train"]
    assert ours["documents"] == list(range(len(stored) + 1))
    assert ours["sequences"] == [stored.read(d).tolist() for d in range(len(stored))]
    assert ours["dtype"] == "uint16"


@pytest.mark.parametrize("name", ["closed", "bare", "pieces"])
def test_theirs_in_place(theirs, foreign, name):
    config = theirs(name)
    manifest = prepare(config).manifest
    prepared = open_prepared(config)
    entry = manifest.sources[name]
    assert entry.closed == (name != "bare") and entry.duplicates == 1
    assert entry.skipped["empty"] == (1 if name == "pieces" else 0)
    eod = prepared.tokenizer.eod
    expected = [ids if entry.closed else [*ids, eod] for ids in foreign[1][name]]
    assert sorted(read_all(prepared)) == sorted(expected)
    assert sum(manifest.total(s).tokens for s in SPLITS) == sum(map(len, expected))
    held = [prepared.tokenizer.decode(stored.read(d).tolist()) for stored in [prepared.sources[name]["heldout"]]
            for d in range(len(stored))]  # fmt: skip
    assert manifest.total("heldout").text_bytes == sum(len(text.encode()) for text in held) > 0
    assert manifest.total("train").text_bytes is None
    for split in SPLITS:
        link = prepared.folder / name / f"{split}.bin"
        assert link.is_symlink() and link.readlink() == foreign[0].absolute() / f"{name}.bin"
    split_of = {tuple(s.read(d).tolist()): n for n, s in prepared.sources[name].items() for d in range(len(s))}
    assert len(split_of) == len(expected) - 1  # the copy lies where its first lies
    stored = prepared.sources[name]["train"]
    whole = stored.read(0).tolist()
    for offset in range(len(whole)):
        assert stored.read(0, offset).tolist() == whole[offset:]
        assert stored.read(0, 0, offset).tolist() == whole[:offset]


def test_the_same_documents_fall_to_the_same_split(theirs):
    held = []
    for name in DTYPES:
        prepared = open_prepared(change(theirs(name), **prepare_at(theirs, name)))
        stored = prepared.sources[name]["heldout"]
        held.append([stored.read(d).tolist() for d in range(len(stored))])
    assert held[0] == held[1] == held[2]


def prepare_at(theirs, name: str) -> dict[str, str]:
    config = theirs(name)
    place = f"{config.path}-{name}"
    prepare(change(config, path=place))
    return {"path": place}


def test_a_folder_of_them_is_several_sources(theirs, foreign, corpus):
    text = SourceConfig(format="text", path=str(corpus), weight=2.0)
    config = theirs("", duplicates="drop")
    config = change(
        config, sources=[config.sources[0].model_dump() | {"name": "old", "weight": 1.0}, text.model_dump()]
    )
    manifest = prepare(config).manifest
    assert [(name, entry.origin) for name, entry in manifest.sources.items()] == [
        ("old", 0),
        ("old-2", 0),
        ("old-3", 0),
        ("texts", 1),
    ]
    assert [entry.duplicates for entry in manifest.sources.values()] == [1, 90, 90, 60]
    assert [sum(s.documents for s in entry.splits.values()) for entry in manifest.sources.values()] == [89, 0, 0, 61]
    assert len(read_all(open_prepared(config))) == 150
    glob = change(theirs("[bc]*"), path=f"{config.path}-2")
    assert [entry.origin for entry in prepare(glob).manifest.sources.values()] == [0, 0]


def test_their_file_changed_behind_our_back(theirs, foreign, tmp_path):
    for suffix in ("bin", "idx"):
        shutil.copy(foreign[0] / f"closed.{suffix}", tmp_path / f"mine.{suffix}")
    config = theirs("", sources=(SourceConfig(format="megatron", path=str(tmp_path / "mine.bin")),))
    prepare(config)
    file = tmp_path / "mine.bin"
    raw = bytearray(file.read_bytes())
    raw[7] ^= 1
    file.write_bytes(raw)
    prepared = open_prepared(config)
    with pytest.raises(Damaged, match=r"train.bin: damaged: bytes 0 to .*block 0"):
        prepared.sources["mine"]["train"].read(0)
    file.unlink()
    with pytest.raises(UserError, match=r"mine/train.bin: its .*mine.bin is not there; restore it"):
        open_prepared(config)


def broken(folder: Path, kind: str) -> None:
    """Makes a.bin and a.idx wrong."""
    lengths = np.array([2, 3], "<i4")
    offsets, documents = np.array([0, 4], "<i8"), np.array([0, 1, 2], "<i8")
    tokens, code, magic = np.array([5, 6, 7, 8, 9], "<u2"), 8, b"MMIDIDX\0\0"
    match kind:
        case "magic":
            magic = b"MMIDIDX\0\1"
        case "floats":
            code = 7
        case "too short":
            tokens = tokens[:-1]
        case "odd":
            tokens = np.frombuffer(tokens.tobytes() + b"1", np.uint8)
        case "large id":
            tokens = np.array([5, 6, 7, 60000, 9], "<u2")
        case "negative id":
            tokens, code = np.array([5, 6, -7, 8, 9], "<i2"), 3
        case "in pieces":
            offsets, documents = np.array([0, 6], "<i8"), np.array([0, 2], "<i8")
            tokens = np.append(tokens, [5, 5]).astype("<u2")
        case "documents":
            documents = np.array([0, 1, 1], "<i8")
    head = struct.pack("<9sQBQQ", magic, 1, code, len(lengths), len(documents))
    index = head + lengths.tobytes() + offsets.tobytes() + documents.tobytes()
    (folder / "a.idx").write_bytes(index[:-5] if kind == "truncated" else index)
    if kind != "no bin":
        (folder / "a.bin").write_bytes(tokens.tobytes())


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("magic", "a.idx: not an index of Megatron's format"),
        ("floats", "a.idx: its tokens are of type code 7, not whole numbers"),
        ("truncated", r"a.idx: has \d+ bytes, its header says \d+: damaged; restore it"),
        ("too short", "a.idx: does not fit a.bin of 8 bytes"),
        ("odd", "a.bin: 11 bytes are no whole number of tokens"),
        ("large id", "a.bin: document 1 holds id 60000, the tokenizer knows 0 to 350: set tokenizer.model"),
        ("negative id", "a.bin: document 1 holds id -7"),
        ("in pieces", "a.idx: document 0 lies in several pieces"),
        ("documents", "a.idx: its documents do not cover its 2 sequences"),
        ("no bin", "a.bin: missing beside its .idx"),
    ],
)
def test_foreign_faults(theirs, tmp_path, kind, words):
    (tmp_path / "in").mkdir()
    broken(tmp_path / "in", kind)
    config = theirs("", sources=(SourceConfig(format="megatron", path=str(tmp_path / "in" / "a")),))
    with pytest.raises(UserError, match=words):
        prepare(config)
    assert [f.name for f in tmp_path.iterdir()] == ["in"]


def test_nothing_of_theirs_there(theirs):
    for path in ("none", "none*", "closed.txt"):
        with pytest.raises(UserError, match=r"no Megatron data set; sources.path is what stands before .bin and .idx"):
            prepare(theirs(path))
    with pytest.raises(UserError, match=r"nowhere: no such tokenizer|nowhere.*no such"):
        prepare(theirs("closed", tokenizer=TokenizerConfig(model="nowhere")))

"""Whatever happens to a prepared folder's files is found before a token of it is used, and named."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from lamella.config import DataConfig, SourceConfig, TokenizerConfig, change
from lamella.data.prepare.prepare import prepare
from lamella.data.store.blocks import BLOCK, Damaged
from lamella.data.store.manifest import MANIFEST, MODEL, open_prepared
from lamella.errors import UserError

KINDS = ["flip", "truncate", "missing", "swap", "tokenizer", "manifest", "append", "zeros", "same size"]
Documents = dict[tuple[str, str, int], list[int]]


@pytest.fixture(scope="module")
def large(config, tmp_path_factory) -> tuple[DataConfig, Documents]:
    """Two sources of some blocks each, and what is in them."""
    folder = tmp_path_factory.mktemp("large")
    rng = random.Random(1)
    for name in ("a", "b"):
        (folder / name).mkdir()
        for number in range(40):
            words = "".join(chr(rng.randrange(33, 500)) for _ in range(rng.randrange(4000, 30_000)))
            (folder / name / f"{number}.txt").write_text(words)
    sources = [SourceConfig(format="text", path=str(folder / name)) for name in ("a", "b")]
    tokenizer = TokenizerConfig(model=str(Path(config.path) / MODEL))
    made = DataConfig(path=str(folder / "out"), sources=tuple(sources), tokenizer=tokenizer, heldout=0.2)
    prepare(made)
    return made, read_all(made)


def read_all(config: DataConfig) -> Documents:
    files = [(name, split, s) for name, splits in open_prepared(config).sources.items() for split, s in splits.items()]
    assert all(s.blocks is not None and len(s.blocks) > (1 if split == "train" else 0) for _, split, s in files)
    return {(name, split, d): stored.read(d).tolist() for name, split, stored in files for d in range(len(stored))}


def damage(folder: Path, kind: str, rng: random.Random) -> list[str]:
    """Does it; returns the names of the files that it hits."""
    files = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
    name = rng.choice(files)
    raw = bytearray((folder / name).read_bytes())
    match kind:
        case "flip":
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        case "truncate":
            raw = raw[: rng.randrange(len(raw))]
        case "append":
            raw += b"{}"
        case "missing":
            (folder / name).unlink()
            return [name]
        case "swap":  # another file of its kind
            suffix = rng.choice([".idx", ".sums", ".bin"])
            name, other = rng.sample([f for f in files if f.endswith(suffix)], 2)
            shutil.copy(folder / other, folder / "aside")
            (folder / name).replace(folder / other)
            (folder / "aside").replace(folder / name)
            return [name, other]
        case "tokenizer":
            name, raw = MODEL, bytearray((folder / MODEL).read_bytes())
            raw[raw.index(b"self")] ^= 1
        case "manifest":
            name, tree = MANIFEST, json.loads((folder / MANIFEST).read_text())
            split = tree["sources"][rng.choice("ab")]["splits"][rng.choice(["train", "heldout"])]
            split[rng.choice(list(split))] += 1
            raw = bytearray(json.dumps(tree, indent=1).encode())
        case "zeros":
            name = rng.choice([f for f in files if f.endswith(".bin")])
            raw = bytearray((folder / name).read_bytes())
            begin = rng.randrange(len(raw) - 100)
            raw[begin : begin + 100] = bytes(100)
        case "same size":
            raw = bytearray(rng.randbytes(len(raw)))
    (folder / name).write_bytes(raw)
    return [name]


def found(config: DataConfig, names: list[str], whole: Documents) -> str:
    """How the damage was found. Fails when it was not, or a token was read from a damaged block."""
    try:
        prepared = open_prepared(config)
    except UserError as error:
        assert any(name in str(error) for name in names) and "\n" not in str(error)
        return "opening"
    (name,) = names
    file = Path(config.path) / name
    source, split = Path(name).parent.name, file.stem
    good = b"".join(np.array(ids, "<u2").tobytes() for key, ids in whole.items() if key[:2] == (source, split))
    raw = file.read_bytes()
    blocks = [n for n in range(0, -(-len(raw) // BLOCK)) if raw[n * BLOCK :][:BLOCK] != good[n * BLOCK :][:BLOCK]]
    assert name.endswith(".bin") and blocks
    hit = set()
    begin = 0
    for (of, part, document), ids in whole.items():
        stored = prepared.sources[of][part]
        end = begin + 2 * len(ids)
        bad = (of, part) == (source, split) and any(n * BLOCK < end and begin < (n + 1) * BLOCK for n in blocks)
        if bad:
            with pytest.raises(Damaged) as caught:
                stored.read(document)
            assert caught.value.file == file and caught.value.block in blocks and document in caught.value.documents
            assert str(file) in str(caught.value)
            hit.add(document)
        else:
            assert stored.read(document).tolist() == ids
        begin = end if (of, part) == (source, split) else 0
    assert hit
    return "first touch"


@pytest.mark.parametrize("count", [10, pytest.param(200, marks=pytest.mark.full)])
def test_random_damages(large, tmp_path, count):
    config, whole = large
    rng = random.Random(count)
    ways = []
    for number in range(count):
        folder = tmp_path / "out"
        shutil.copytree(config.path, folder)
        names = damage(folder, KINDS[number % len(KINDS)], rng)
        ways.append(found(change(config, path=str(folder)), names, whole))
        shutil.rmtree(folder)
    assert set(ways) == {"opening", "first touch"}
    print(f"{ways.count('opening')} of {count} found at opening, {ways.count('first touch')} at first touch")


def test_a_quarantined_block(large):
    config, whole = large
    stored = open_prepared(config).sources["a"]["train"]
    stored.quarantine(1)
    for document in range(len(stored)):
        begin = int(stored.lengths[:document].sum()) * 2
        end = begin + int(stored.lengths[document]) * 2
        if begin < 2 * BLOCK and end > BLOCK:
            with pytest.raises(Damaged) as caught:
                stored.read(document)
            assert caught.value.block == 1 and caught.value.begin == BLOCK
        else:
            assert stored.read(document).tolist() == whole["a", "train", document]


def test_a_manifest_of_another_version(large, tmp_path):
    shutil.copytree(large[0].path, tmp_path / "out")
    file = tmp_path / "out" / MANIFEST
    copied = change(large[0], path=str(tmp_path / "out"))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 1}))
    with pytest.raises(UserError, match=r"format version 1, this Lamella reads 2; prepare it again"):
        open_prepared(copied)
    for text in ("[]", "null", "{", ""):
        file.write_text(text)
        with pytest.raises(UserError, match=r"manifest.json: damaged"):
            open_prepared(copied)
    file.unlink()
    with pytest.raises(UserError, match=r"manifest.json: missing; restore it"):
        open_prepared(copied)

"""A small corpus, prepared once: 60 short programs with odd characters, each twice, one long text, one empty file."""

import random
from pathlib import Path

import pytest

from lamella.config import DataConfig, SourceConfig, TokenizerConfig
from lamella.data.prepare.prepare import prepare

WORDS = [
    "def",
    "return",
    "self",
    "index",
    "0",
    "17",
    "203",
    "(",
    ")",
    "=",
    "#",
    "\t",
    "\u2581",
    "😀",
    "café",
    "中文",
    "'x'",
]


def program(rng: random.Random, lines: int) -> str:
    def line() -> str:
        words = " ".join(rng.choices(WORDS, k=rng.randrange(1, 9)))
        return " " * 4 * rng.randrange(4) + words + rng.choice(["\n", "\n", "\r\n"])

    return "".join(line() for _ in range(lines))


def write_corpus(folder: Path, documents: int = 60) -> Path:
    folder.mkdir(parents=True)
    rng = random.Random(0)
    for number in range(documents):
        text = program(rng, rng.randrange(1, 30))
        (folder / f"{number:03}.py").write_bytes(text.encode())
        (folder / f"{number:03}-copy.py").write_bytes(text.encode())
    (folder / "long.txt").write_bytes(program(rng, 400).encode())
    (folder / "empty.txt").write_bytes(b"")
    (folder / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    return folder


def make_config(folder: Path, target: Path, **changes) -> DataConfig:
    fields = {
        "sources": (SourceConfig(format="text", path=str(folder)),),
        "tokenizer": TokenizerConfig(vocab_size=400, train_megabytes=1),
        "heldout": 0.2,
    }
    return DataConfig(path=str(target), **(fields | changes))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "texts")


@pytest.fixture(scope="session")
def config(corpus, tmp_path_factory) -> DataConfig:
    """A prepared corpus; tests only read it."""
    config = make_config(corpus, tmp_path_factory.mktemp("prepared") / "small")
    prepare(config)
    return config


@pytest.fixture(scope="session")
def make():
    """make_config, for tests that prepare their own."""
    return make_config

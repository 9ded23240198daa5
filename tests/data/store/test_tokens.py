"""Stored tokens and their checksums come back, also over a kill."""

import random
from pathlib import Path

import numpy as np
import pytest
import xxhash

from lamella.data.store.blocks import BLOCK, Damaged, Summer
from lamella.data.store.tokens import TokenFile, TokenWriter, Written, part, token_dtype
from lamella.errors import UserError


def documents(seed: int, count: int, high: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, high, size=rng.integers(1, 9000), dtype=np.int32) for _ in range(count)]


def write(prefix: Path, some: list[np.ndarray], high: int) -> None:
    writer = TokenWriter(prefix, token_dtype(high))
    for ids in some:
        writer.add(ids)
    writer.close()


def files(prefix: Path) -> dict[str, bytes]:
    return {f.suffix: f.read_bytes() for f in prefix.parent.iterdir() if f.name.startswith(f"{prefix.name}.")}


@pytest.mark.parametrize("high", [300, 65_535, 65_536, 200_000])
def test_there_and_back(tmp_path, high):
    some = documents(0, 200, high)
    write(tmp_path / "some.name", some, high)
    assert files(tmp_path / "some.name").keys() == {".bin", ".idx", ".sums"}
    for sums in (True, False):
        stored = TokenFile(tmp_path / "some.name", sums)
        assert stored.lengths.tolist() == [len(ids) for ids in some]
        for document in range(len(stored)):
            assert (stored.read(document) == some[document]).all()
            offset = len(some[document]) // 3
            assert (stored.read(document, offset, 1) == some[document][offset : offset + 1]).all()


def test_the_sums_are_xxh3_of_each_block():
    rng = random.Random(0)
    for size in (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5):
        raw, summer, sums, place = rng.randbytes(size), Summer(), b"", 0
        while place < size:
            step = rng.randrange(1, BLOCK)
            sums += summer.add(raw[place : place + step])
            place += step
        sums += summer.end()
        expected = [xxhash.xxh3_64_intdigest(raw[begin : begin + BLOCK]) for begin in range(0, size, BLOCK)]
        assert np.frombuffer(sums, "<u8").tolist() == expected


def test_going_on_from_what_was_synced(tmp_path):
    """With rubbish behind it, as a kill may leave."""
    some = documents(1, 120, 300)
    write(tmp_path / "whole", some, 300)
    for cut in (0, 1, 60, 120):
        prefix, lengths = tmp_path / f"cut{cut}", tmp_path / f"lengths{cut}"
        writer = TokenWriter(prefix, token_dtype(300), lengths)
        for ids in some[:cut]:
            writer.add(ids)
        written = writer.sync()
        for ids in some[cut : cut + 30]:
            writer.add(ids[::-1])
        writer.abandon()
        again = TokenWriter(prefix, token_dtype(300), lengths, written)
        for ids in some[cut:]:
            again.add(ids)
        again.close()
        assert files(prefix) == files(tmp_path / "whole")


def test_no_document_at_all(tmp_path):
    write(tmp_path / "none", [], 300)
    assert len(TokenFile(tmp_path / "none")) == 0
    assert Written() == Written(0, 0)


def test_only_blocks_that_are_touched_are_looked_at(tmp_path):
    some = documents(2, 200, 300)
    write(tmp_path / "a", some, 300)
    file = part(tmp_path / "a", "bin")
    raw = bytearray(file.read_bytes())
    raw[2 * BLOCK + 17] ^= 4
    file.write_bytes(raw)
    stored = TokenFile(tmp_path / "a")
    ends = np.cumsum(stored.lengths) * 2
    bad = range(int(np.searchsorted(ends, 2 * BLOCK, "right")), int(np.searchsorted(ends, 3 * BLOCK)) + 1)
    for document in range(len(some)):
        if document in bad:
            with pytest.raises(Damaged) as caught:
                stored.read(document)
            assert (caught.value.block, caught.value.documents) == (2, bad)
            assert (caught.value.begin, caught.value.end) == (2 * BLOCK, 3 * BLOCK)
        else:
            assert (stored.read(document) == some[document]).all()
    first = bad.start
    if ends[first] - 2 * stored.lengths[first] < 2 * BLOCK:  # its head lies in a good block
        assert stored.read(first, 0, 1)[0] == some[first][0]


def test_an_index_that_does_not_fit(tmp_path):
    write(tmp_path / "a", documents(3, 5, 300), 300)
    write(tmp_path / "b", documents(4, 9, 300), 300)
    part(tmp_path / "b", "idx").replace(part(tmp_path / "a", "idx"))
    with pytest.raises(UserError, match=r"a.idx: does not fit a.bin"):
        TokenFile(tmp_path / "a")

"""A piece in a damaged block is never trained on: the run stops, or another piece of its length stands in, the same one
however the rows are dealt.
"""

import json
import random
import shutil

import pytest
import torch

from lamella.config import change
from lamella.data.damage import FILE
from lamella.data.prepare.prepare import prepare
from lamella.data.store import blocks, tokens
from lamella.data.store.blocks import Damaged
from lamella.data.store.manifest import open_prepared
from lamella.data.stream import TrainRows
from lamella.errors import UserError

T, G, SHIFT = 96, 4, 10
STEPS = range(40)
FIELDS = ("tokens", "targets", "document", "position", "source")


@pytest.fixture(scope="module")
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "SHIFT", SHIFT)
        for module in (blocks, tokens):
            patch.setattr(module, "BLOCK", 1 << SHIFT)
        yield


@pytest.fixture(scope="module")
def whole(corpus, make, tmp_path_factory, small_blocks):
    config = make(corpus, tmp_path_factory.mktemp("blocks") / "whole")
    prepare(config)
    return config


@pytest.fixture
def damaged(whole, tmp_path):
    """A copy with two damaged blocks: the numbers of the steps whose rows they touch are not known."""
    copy = tmp_path / "damaged"
    shutil.copytree(whole.path, copy)
    (file,) = copy.glob("*/train.bin")
    raw = bytearray(file.read_bytes())
    for block in (3, 17):
        raw[(block << SHIFT) + random.Random(block).randrange(1 << SHIFT)] ^= 0x10
    file.write_bytes(raw)
    return change(whole, path=str(copy))


def read(config, quarantine=None, order=STEPS, rows=(0, 1, 2, 3), seed=5):
    data = TrainRows(config, T, G, seed, quarantine=quarantine)
    return {step: data.batch(step, rows) for step in order}


def differing(a, b) -> list[tuple[int, int]]:
    """(step, row) of what two readings have differently; all but tokens and targets must be the same."""
    found = []
    for step in a:
        for field in FIELDS[2:]:
            assert torch.equal(getattr(a[step], field), getattr(b[step], field))
        unlike = (a[step].targets != b[step].targets).any(1) | (a[step].tokens != b[step].tokens).any(1)
        found += [(step, row) for row in unlike.nonzero().flatten().tolist()]
    return found


def lines(folder):
    entries = [json.loads(line) for line in (folder / FILE).read_text().splitlines()]
    return [e for e in entries if "block" in e], [e for e in entries if "block" not in e]


def test_the_run_stops(damaged):
    with pytest.raises(Damaged, match=r"train\.bin: damaged: bytes [\d,]+ to [\d,]+ \(block (3|17), documents? "):
        read(damaged)


def test_other_pieces_stand_in(whole, damaged, tmp_path):
    right, mended = read(whole), read(damaged, tmp_path)
    replaced = differing(right, mended)
    assert replaced
    found, pieces = lines(tmp_path)
    assert sorted(e["block"] for e in found) == [3, 17] and len(pieces) >= len(replaced)
    bytes_of = {e["block"]: e["bytes"] for e in found}
    assert bytes_of[3] == [3 << SHIFT, 4 << SHIFT]
    (stored,) = (splits["train"] for splits in open_prepared(whole).sources.values())
    for piece in pieces:
        other, begin = piece["replaced_by"]
        assert begin >= 0 and begin + piece["length"] <= stored.lengths[other]


def test_only_what_lies_in_the_blocks_is_replaced(whole, damaged, tmp_path):
    right, mended = read(whole), read(damaged, tmp_path)
    replaced = set(differing(right, mended))
    (stored,) = (splits["train"] for splits in open_prepared(whole).sources.values())
    data = TrainRows(whole, T, G, 5)
    for step in STEPS:
        for row, number in enumerate(data.step_rows(step).tolist()):
            plan, place = data.plans.find(number)
            touched = set()
            for _, document, offset, length in plan.pieces(place):
                begin = (int(stored._offsets[document]) >> 1) + max(offset - 1, 0)
                end = (int(stored._offsets[document]) >> 1) + offset + length
                touched |= set(range(2 * begin >> SHIFT, (2 * end - 1 >> SHIFT) + 1))
            assert ((step, row) in replaced) <= bool(touched & {3, 17})
            assert bool(touched & {3, 17}) <= ((step, row) in replaced)


def test_the_same_in_any_order_and_deal(damaged, tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
    forward, backward = read(damaged, tmp_path / "a"), read(damaged, tmp_path / "b", reversed(STEPS))
    assert differing(forward, backward) == []
    halves = [read(damaged, tmp_path / "c", STEPS, rows) for rows in ((1, 3), (0, 2))]  # two ranks, one folder
    for step in STEPS:
        for half, rows in zip(halves, ((1, 3), (0, 2)), strict=True):
            assert torch.equal(half[step].targets, forward[step].targets[list(rows)])


def test_a_block_stays_out_when_the_file_is_mended(whole, damaged, tmp_path):
    once = read(damaged, tmp_path)
    again = read(change(damaged, path=whole.path), tmp_path)
    assert differing(once, again) == []


def test_too_much_damage_stops_the_run(damaged, tmp_path):
    file = next(iter(open_prepared(damaged).folder.glob("*/train.bin")))
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(Damaged):
        read(damaged, tmp_path)


def test_a_damaged_list(whole, tmp_path):
    for line in ("{", '{"source": "none", "block": 1}', '{"source": "texts", "block": "x"}'):
        (tmp_path / FILE).write_text(line + "\n")
        with pytest.raises(UserError, match="line 1 is none of ours"):
            read(whole, tmp_path)

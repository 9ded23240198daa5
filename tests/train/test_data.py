"""A step's rows are the same for every layout, after any stop, and with damaged blocks; losses are told by source."""

import json
import random
import shutil
import sysconfig
from types import SimpleNamespace

import pytest
import torch

from lamella.config import DataConfig, change
from lamella.data.damage import FILE
from lamella.data.prepare.prepare import prepare
from lamella.data.store.blocks import BLOCK, Damaged
from lamella.parallel.local import exit_code, run_local
from lamella.train import loop
from lamella.train.feed import Feed
from lamella.train.rows import open_rows
from tests.corpus import tiny_run
from tests.train.states import history

ROWS = 64
STOPS = random.Random(0).sample(range(1, 200), 50)


def run_with(run, **train):
    return change(run, train=run.train.model_dump(mode="json") | train)


def large_steps(corpus, folder, window, steps=6):
    rows = {"window": window}
    return run_with(tiny_run(corpus, folder), global_batch_size=ROWS, sequence_length=48, rows=rows, steps=steps)


def rows_of(data, step, ranks) -> list[dict[str, torch.Tensor]]:
    """A step's rows by their numbers, as so many ranks read them; each rank must read as many, and no row twice."""
    found = {}
    layout = SimpleNamespace(
        data=ranks, micro_batch_count=ROWS // ranks, micro_batches=lambda rows: [[row] for row in rows]
    )
    for rank in range(ranks):
        mesh = SimpleNamespace(layout=layout, data_rank=rank, device=torch.device("cpu"))
        mine = list(Feed(data, mesh).step(step))
        assert len(mine) == ROWS // ranks
        found |= {number: {k: t[0] for k, t in vars(batch).items()} for (number,), batch in mine}
    assert sorted(found) == list(range(ROWS))
    return [found[n] for n in range(ROWS)]


def same(ours, theirs) -> bool:
    return all(torch.equal(a[k], b[k]) for a, b in zip(ours, theirs, strict=True) for k in a)


@pytest.mark.parametrize("window", [1, 4])
def test_a_step_has_the_same_rows_for_any_number_of_ranks(window, corpus, tmp_path):
    data = open_rows(large_steps(corpus, tmp_path, window))
    for step in (0, 1, 5, 30):
        alone = rows_of(data, step, 1)
        assert all(same(rows_of(data, step, ranks), alone) for ranks in (2, 8, 64))
        assert sum(int((row["targets"] >= 0).sum()) for row in alone) == data.target_count(step)


@pytest.mark.parametrize("stops", [STOPS[:5], pytest.param(STOPS, marks=pytest.mark.full)], ids=["some", "all"])
@pytest.mark.parametrize("window", [1, 4])
def test_a_stopped_or_longer_run_has_the_same_rows(window, stops, corpus, tmp_path):
    whole = open_rows(large_steps(corpus, tmp_path, window))
    for step in stops:  # on other ranks, from there on, in a run of other length
        resumed = open_rows(large_steps(corpus, tmp_path, window, steps=step + 100))
        for later in (step, step + 1):
            assert same(rows_of(resumed, later, 8), rows_of(whole, later, 1))


@pytest.fixture(scope="module")
def damaged(corpus, tmp_path_factory):
    """A copy of the corpus with a bit of its first block turned."""
    folder = tmp_path_factory.mktemp("damaged") / "prepared"
    shutil.copytree(corpus.path, folder)
    file = next(folder.glob("*/train.bin"))
    raw = bytearray(file.read_bytes())
    assert len(raw) > BLOCK
    raw[BLOCK // 2] ^= 1
    file.write_bytes(raw)
    return change(corpus, path=str(folder))


def test_damage_stops_the_run_with_one_line(damaged, tmp_path):
    with pytest.raises(Damaged, match=r"train\.bin: damaged: bytes 0 to 262,143 \(block 0, documents 0 to \d+\)"):
        run_local(2, loop.enter, tiny_run(damaged, tmp_path), timeout=120)


def test_damage_is_replaced_alike_under_every_layout(damaged, tmp_path):
    found = {}
    for name, nproc, layout in (("one", 1, {}), ("two", 2, {}), ("pipeline", 2, {"pipeline": 2, "deal": "order"})):
        run = run_with(tiny_run(damaged, tmp_path, name, **layout), rows={"damaged": "replace"})
        assert exit_code(run_local(nproc, loop.enter, run, timeout=120)) == 0
        lines = [json.loads(line) for line in (run.folder / FILE).read_text().splitlines()]
        assert {line["block"] for line in lines if "block" in line} == {0}
        replaced = {(e["document"], e["offset"], *e["replaced_by"]) for e in lines if "block" not in e}
        found[name] = [line["loss"] for line in history(run)], replaced
    assert found["two"][0] == pytest.approx(found["one"][0], rel=1e-6)
    assert found["pipeline"][0] == pytest.approx(found["one"][0], rel=1e-6)
    assert found["one"][1] <= found["two"][1] | found["pipeline"][1] and found["one"][1]


def by_source(line, key):
    return {name: one[key] for name, one in line["sources"].items() if one["tokens"]}


def test_losses_by_source(tmp_path):
    library = sysconfig.get_path("stdlib")
    sources = [
        {"format": "text", "path": f"{library}/{name}/*.py", "name": name, "weight": weight}
        for name, weight in (("json", 1.0), ("asyncio", 1.0))
    ]
    tree = {"path": str(tmp_path / "two"), "sources": sources, "heldout": 0.2}
    data = DataConfig.model_validate(tree | {"tokenizer": {"vocab_size": 500, "train_megabytes": 1}}, strict=False)
    prepare(data)
    found = []
    for name, nproc, layout in (("one", 1, {}), ("two", 2, {}), ("pipeline", 2, {"pipeline": 2})):
        run = tiny_run(data, tmp_path, name, **layout)
        assert exit_code(run_local(nproc, loop.enter, run, timeout=120)) == 0
        found.append(history(run))
        for line in found[-1]:
            tokens, losses = by_source(line, "tokens"), by_source(line, "loss")
            assert sum(tokens.values()) == line["tokens"]
            nats = sum(tokens[name] * losses[name] for name in tokens)
            assert nats == pytest.approx(line["loss"] * line["tokens"], rel=1e-6)
        assert any(len(by_source(line, "loss")) == 2 for line in found[-1])
    for other in found[1:]:
        for ours, theirs in zip(found[0], other, strict=True):
            for name, one in ours["sources"].items():
                assert theirs["sources"][name]["tokens"] == one["tokens"]
                assert theirs["sources"][name]["loss"] == pytest.approx(one["loss"], rel=1e-5)

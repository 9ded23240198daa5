"""The numbers against hand-counted cases, and the command on a small corpus."""

import json
from fractions import Fraction

import numpy as np
import pytest

from lamella.config import SourceConfig, change, dump, load_run
from lamella.data import inspect
from lamella.data.plan import Plan, Plans
from lamella.data.prepare.prepare import prepare
from lamella.data.steps import Steps
from lamella.data.store.manifest import open_prepared
from lamella.data.stream import TrainRows
from tests.commands import call
from tests.corpus import tiny_run

T, G = 96, 8


@pytest.fixture(scope="module")
def file(config, tmp_path_factory):
    file = tmp_path_factory.mktemp("file") / "small.yaml"
    dump(config, file)
    return file


@pytest.fixture(scope="module")
def run_file(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    run = tiny_run(config, folder)
    dump(change(run, train=run.train.model_dump(mode="json") | {"rows": {"window": 3}}), folder / "run.yaml")
    return folder / "run.yaml"


def told(capsys, *words):
    assert call("data", "inspect", *words, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_lengths_are_counted():
    found = inspect.lengths_of(np.array([2, 3, 4, 9, 16, 16, 31, 40], np.int32))
    assert found.edges.tolist() == [2, 4, 8, 16, 32, 64]
    assert found.counts.tolist() == [2, 1, 1, 3, 1]
    assert found.tokens.tolist() == [5, 4, 9, 63, 40]
    assert (found.mean, found.longest, found.quantiles[0.5], found.quantiles[0.9]) == (121 / 8, 40, 16, 40)


def test_packing_tells_what_a_plan_does():
    """Rows of 8. Document 0 of source 0 (11 tokens) must be cut, document 1 (6) is cut although it fits, 3 tokens of
    source 1's document are nowhere.
    """
    pieces = [(0, 0, 0, 8), (0, 0, 8, 3), (0, 1, 0, 4), (0, 1, 4, 2), (1, 0, 0, 4)]
    source, document, offset, length = map(np.array, zip(*pieces, strict=True))
    plan = Plan(8, np.array([0, 1, 3, 5]), source, document, offset, length)
    found = inspect.packing_of(plan, [np.array([11, 6]), np.array([7])])
    assert found == inspect.Packing(3, 3, pytest.approx(3 / 24), pytest.approx(1.0), 2, 3)
    lengths = np.array([11, 6, 3, 2, 8], np.int32)
    ours = inspect.packing_of(Plans([lengths], None, 8, 0).plan(0), [lengths])
    assert ours == inspect.Packing(4, 5, pytest.approx(2 / 32), pytest.approx(0.2), 0, 0)


def test_balance_is_the_dearest_over_the_mean():
    found = inspect.balance_of([np.array([5, 5, 1, 1]), np.array([2, 2, 2, 2])], 2)
    assert found.in_order.tolist() == pytest.approx([10 / 6, 1]) and found.dealt.tolist() == [1, 1]
    assert inspect.squared(np.array([3, 0, 70_000], np.int32)).tolist() == [9, 0, 4_900_000_000]


def test_the_command_tells_what_training_reads(config, file, capsys):
    """Every figure against the batches themselves."""
    words = ("--sequence-length", T, "--rows", G, "--seed", 3, "--steps", 4, "--ranks", 4)
    found = told(capsys, file, *words)
    rows = TrainRows(config, T, G, seed=3, cost=inspect.squared)
    batches = [rows.batch(step, range(G)) for step in range(4)]
    assert found["padding"] == pytest.approx([float((b.targets < 0).float().mean()) for b in batches])
    assert found["drawn"] == [[int((b.targets >= 0).sum())] for b in batches]
    (train,) = (splits["train"] for splits in open_prepared(config).sources.values())
    (source,) = found["sources"]
    assert (source["documents"], source["tokens"]) == (len(train), int(train.lengths.sum()))
    assert source["planned"] == source["drawn"] == 1
    assert source["epochs"] == pytest.approx(sum(n for (n,) in found["drawn"]) / int(train.lengths.sum()))
    assert sum(source["skipped"].values()) == 2 and source["duplicates"] == 60
    assert found["rows_per_epoch"] == found["packing"]["rows"] == rows.plans.begin(1)
    assert found["packing"]["cut"] == pytest.approx(float((train.lengths > T).mean()))
    assert found["packing"]["avoidable"] == found["packing"]["discarded"] == 0
    assert sum(found["lengths"]["counts"]) == len(train)
    for step in range(4):
        costs = np.array([(np.bincount(d[d >= 0]) ** 2).sum() + (d < 0).sum() ** 2 for d in batches[step].document])
        for key, dealt in (("dealt", rows.deal(step, 4)), ("in_order", np.arange(G).reshape(4, 2))):
            loads = costs[np.array(dealt)].sum(axis=1)
            assert found["balance"][key][step] == pytest.approx(loads.max() / loads.mean())
    assert call("data", "inspect", file, *words) == 0
    text = capsys.readouterr().out
    for part in (f"{len(train):,}", f"{source['tokens']:,}", "tokens discarded: 0", "dealt by cost", "of 4 ranks"):
        assert part in text


def test_a_mixture_is_told(corpus, make, tmp_path, capsys):
    sources = tuple(
        SourceConfig(format="text", path=str(corpus / pattern), name=name, weight=weight)
        for name, pattern, weight in (("programs", "*.py", 1.0), ("long", "long.txt", 2.0))
    )
    config = make(corpus, tmp_path / "two", sources=sources, heldout=0.1)
    prepare(config)
    dump(config, tmp_path / "two.yaml")
    found = told(capsys, tmp_path / "two.yaml", "--sequence-length", T, "--rows", G, "--steps", 30)
    assert [s["planned"] for s in found["sources"]] == pytest.approx([1 / 3, 2 / 3])
    drawn = np.array(found["drawn"]).sum(axis=0)
    assert [s["drawn"] for s in found["sources"]] == pytest.approx((drawn / drawn.sum()).tolist())
    figure = tmp_path / "two.png"
    assert call("data", "inspect", tmp_path / "two.yaml", "--steps", 3, "--figure", figure) == 0
    assert figure.read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.glob("two.png*"))) == 1
    assert "programs" in capsys.readouterr().out


def test_a_row_as_text(config, file, capsys):
    """The row's documents, one behind the other, are the row's targets."""
    rows = TrainRows(config, T, G, seed=0)
    tokenizer = rows.tokenizer
    kinds = set()
    for row in range(12):
        words = (file, "--sequence-length", T, "--rows", G, "--row", row)
        found = told(capsys, *words)
        assert (found["step"], found["place"]) == divmod(row, G)
        targets = rows.batch(row // G, [row % G]).targets[0].tolist()
        begin = 0
        for piece in found["documents"]:
            assert piece["begin"] == begin
            begin += piece["length"]
            assert piece["text"] == tokenizer.decode(targets[piece["begin"] : begin])
            kinds.add((piece["length"] == piece["stored"], piece["offset"] > 0))
        assert found["padding"] == T - begin == sum(t < 0 for t in targets)
        assert call("data", "inspect", *words) == 0
        text = capsys.readouterr().out
        assert text.count("\n=== slot ") == len(found["documents"]) + 1
        assert (f"{found['padding']} of padding" in text) == bool(found["padding"])
    assert kinds == {(True, False), (False, False), (False, True)}


def test_of_a_run_its_own_rows(config, run_file, capsys):
    """Sizes, seed, window and cost are the run's; a row is found in the step that trains it."""
    run = load_run(run_file)
    found = told(capsys, run_file, "--steps", 3, "--ranks", 4)
    from lamella.train.rows import open_rows

    rows = open_rows(run)
    for step in range(3):
        costs = rows.costs(step)[np.array(rows.deal(step, 4))].sum(axis=1)
        assert found["balance"]["dealt"][step] == pytest.approx(costs.max() / costs.mean())
    assert (found["sequence_length"], found["rows_per_step"], found["window"]) == (64, 8, 3)
    places = [tuple(told(capsys, run_file, "--row", row)[key] for key in ("step", "place")) for row in range(6)]
    assert places == [
        next((s, rows.step_rows(s).tolist().index(row)) for s in range(3) if row in rows.step_rows(s))
        for row in range(6)
    ]


def test_a_run_is_timed(run_file, capsys):
    """What is printed is an override that the run's file takes."""
    from lamella.train.rows import row_cost

    found = told(capsys, run_file, "--measure", "--steps", 1)["measured"]
    assert found["lengths"] == [64, 32, 16] and min(found["seconds"]) > 0
    run = load_run(run_file, [found["set"]])
    assert run.train.rows.cost is not None
    rows = [row_cost(run)(np.array([n]))[0] * (64 // n) for n in found["lengths"]]
    line = [64 * (found["token"] + found["pair"] * n) for n in found["lengths"]]
    assert np.array(rows) / rows[0] == pytest.approx(np.array(line) / line[0], rel=1e-4)


def test_the_line_is_the_one_of_least_squares():
    from lamella.train.row_timing import fit_line

    assert fit_line([8, 4, 2], [8 * (3 + 0.5 * n) for n in (8, 4, 2)], 8) == pytest.approx((3, 0.5))
    token, pair = fit_line([8, 4], [1.0, 1.5], 8)  # the slope would fall
    assert pair == 0 and Fraction(1, 8) < token < Fraction(3, 16)
    token, pair = fit_line([8, 2], [64.0, 8.0], 8)  # the line would begin below 0
    assert token == 0 and pair > 0


MISTAKES = [
    (["--ranks", "3"], "--ranks 3 does not divide the 8 rows of a step; take 1"),
    (["--row", "-1"], "rows 0 to 399"),
    (["--row", "400"], "rows 0 to 399"),
    (["--row", "1", "--measure"], "--row prints one row"),
    (["--measure"], "name a run's file"),
    (["--figure", "nowhere/x.png"], "a folder that is there"),
    (["--figure", "x.gif"], ".png"),
    (["path=nowhere"], "no prepared data here"),
    (["heldout=7"], "heldout"),
]


@pytest.mark.parametrize(("words", "line"), MISTAKES, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_mistakes(file, words, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("data", "inspect", file, "--rows", G, *words) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_mistakes_about_a_run(run_file, tmp_path, capsys):
    assert call("data", "inspect", run_file, "--rows", "4") == 2
    assert "train.global_batch_size=4" in capsys.readouterr().err
    assert call("data", "inspect", tmp_path / "none.yaml") == 2
    assert "no such file" in capsys.readouterr().err
    assert call("data", "inspect", run_file, "--measure", "train.sequence_length=17") == 2
    assert "even length" in capsys.readouterr().err.splitlines()[-1]


def test_steps_need_no_torch(config):
    """Lengths are enough: the same steps as those that training reads."""
    prepared = open_prepared(config)
    steps = Steps(config, prepared, T, G, 1, 2, inspect.squared)
    rows = TrainRows(config, T, G, 1, 2, inspect.squared)
    for step in range(4):
        assert steps.step_rows(step).tolist() == rows.step_rows(step).tolist()
        assert inspect.find_step(steps, int(steps.step_rows(step)[0]), G, 2) == (step, 0)

"""Figures say what the metrics say, in numbers, units and files."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from torch.distributed.pipelining import schedules as torchs

from lamella.cli import main as command
from lamella.config import DataConfig, dump
from lamella.errors import UserError
from lamella.model.cuts import imbalance, layer_costs
from lamella.parallel.layout import resolve
from lamella.train import charts, figures, layout_chart, plot, reports
from lamella.train.history import Bins, History, in_order, smooth
from lamella.train.layout_record import LayoutRecord, describe, order, timeline
from tests.corpus import MODEL, tiny_run

LOAD = [0.5, 0.25, 0.125, 0.125]


def line(step, **changes):
    found = {
        "step": step,
        "loss": 8.0 - 0.01 * step,
        "grad_norm": 2.0 if step % 4 == 0 else 0.5,
        "lr": 1e-3,
        "tokens": 100,
        "tokens_per_second": 1000.0 + step,
        "seconds": {"data": 0.01, "forward": 0.1, "backward": 0.25, "optimizer": 0.04},
        "moe": {
            f"layer{n}/channel": {"load": LOAD if n == 2 else LOAD[::-1], "dropped": 0.03, "entropy": 1.2}
            for n in (10, 2)
        },
        "sources": {"code": {"tokens": 30, "loss": 7.0 - 0.01 * step}, "web": {"tokens": 70, "loss": 9.0}},
    }
    if step % 20 == 19:
        found |= {"heldout_loss": 4.0, "heldout_bits_per_byte": 2.0}
    return found | changes


def history(steps=400):
    return History("tiny", [line(s) for s in range(steps)], clip_norm=1.0)


def write(folder, lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


def drawn(axes):
    return {x.get_label(): (np.asarray(x.get_xdata()), np.asarray(x.get_ydata())) for x in axes.get_lines()}


@pytest.mark.parametrize("name", charts.CHARTS)
@pytest.mark.parametrize("lines", [[line(0)], [line(s) for s in range(9)]], ids=["one step", "nine"])
def test_every_axis_is_named(name, lines):
    figure = charts.CHARTS[name](History("tiny", lines, 1.0))
    figure.draw_without_rendering()
    assert figure.get_suptitle().startswith("tiny: ")
    panels = [a for a in figure.axes if a.get_label() != "<colorbar>"]
    assert panels[-1].get_xlabel() == "step"
    heat = [a for a in panels if a.images]
    assert all(a.get_ylabel() for a in figure.axes if a not in heat)
    assert len(heat) == (name == "experts")


def test_loss():
    figure = charts.loss(history())
    figure.draw_without_rendering()
    (axes,) = figure.axes
    found = drawn(axes)
    x, y = found["training, each step"]
    assert (x[0], x[-1]) == (1, 400)  # finished steps
    np.testing.assert_allclose(y, 8.0 - 0.01 * np.arange(400))
    assert found["training, smoothed"][1][200] == pytest.approx(6.0)
    x, y = found["held-out"]
    assert x.tolist() == list(range(20, 401, 20))
    assert set(y) == {4.0}
    (second,) = axes.child_axes
    assert "bits per byte" in second.get_ylabel()
    np.testing.assert_allclose(second.get_ylim(), np.array(axes.get_ylim()) / 2)
    assert [t.get_text() for t in axes.texts] == ["2.000 bits per byte"]


def test_gradient_norm_says_how_much_was_clipped():
    above, below = charts.optimization(history()).axes
    assert below.get_yscale() == "log"
    assert below.get_legend().get_texts()[-1].get_text() == "clipped above 1 (25% of steps)"
    np.testing.assert_allclose(drawn(above)["learning rate"][1], 1e-3)


def test_throughput_has_its_median():
    (axes,) = charts.throughput(history(401)).axes
    assert set(drawn(axes)["median 1,200"][1]) == {1200.0}
    assert axes.get_ylim()[0] == 0


def test_experts():
    figure = charts.experts(history(100))
    heat, drop, entropy = figure.axes[:3]
    (image,) = heat.images
    values = image.get_array()
    assert values.shape == (8, 100)
    np.testing.assert_allclose(values[:, 50], [2, 1, 0.5, 0.5, 0.5, 0.5, 1, 2])  # layer 2 above layer 10
    assert [t.get_text() for t in heat.get_yticklabels()] == ["layer 2\n4 experts", "layer 10\n4 experts"]
    np.testing.assert_allclose(drawn(drop)["layer 10"][1], 3.0)
    np.testing.assert_allclose(drawn(entropy)["layer 2"][1], 1.2)
    assert set(drawn(entropy)["even: ln 4 = 1.39"][1]) == {math.log(4)}
    assert charts.experts(History("dense", [{"step": 0, "loss": 1.0}])) is None


def test_many_layers_are_summed_up():
    layers = {f"layer{n}/channel": {"load": LOAD, "dropped": 0.01 * n, "entropy": 1.0} for n in range(21)}
    _, drop, _ = charts.experts(History("deep", [line(s, moe=layers) for s in range(5)])).axes[:3]
    np.testing.assert_allclose(drawn(drop)["median layer"][1], 10.0)
    low_high = drop.collections[0].get_paths()[0].vertices[:, 1]
    assert (low_high.min(), low_high.max()) == pytest.approx((0, 20))


def test_time_is_stacked():
    (axes,) = charts.seconds(history()).axes
    tops = [patch.get_data().values for patch in axes.patches]
    np.testing.assert_allclose([t[0] for t in tops], [10, 110, 360, 400])
    texts = [t.get_text().split() for t in axes.get_legend().get_texts()]
    assert ["backward", "250.0", "ms", "62.5%"] in texts
    assert "400.0 ms" in axes.get_legend().get_title().get_text()


def luminance(colour):
    return float(np.dot([0.2126, 0.7152, 0.0722], to_rgb(colour)))


def test_reads_in_grey():
    fills = [luminance(colour) for colour, _ in plot.FILLS[:4]]
    assert all(a - b > 0.1 for a, b in itertools.pairwise(fills))
    assert len({style for _, style in plot.LINES[:4]}) == 4
    image = charts.experts(history(9)).axes[0].images[0]
    grey = [luminance(c[:3]) for c in image.cmap(np.linspace(0, 1, 50))]
    assert all(np.diff(grey) > 0)


def test_missing_and_broken_numbers():
    lines = [line(s, loss=math.nan, grad_norm=math.inf, heldout_bits_per_byte=math.nan) for s in range(30)]
    (axes,) = charts.loss(History("nan", lines)).axes
    assert "no finite value was logged" in [t.get_text() for t in axes.texts]
    old = [{k: v for k, v in line(s).items() if k not in ("seconds", "moe")} for s in range(5)]
    assert charts.seconds(History("old", old)) is None
    grown = History("grown", old + [line(s) for s in range(5, 9)])
    assert charts.seconds(grown) is not None
    assert np.isnan(grown.load("layer2/channel")[:5]).all()
    assert grown.load("layer2/channel")[5].tolist() == [2, 1, 0.5, 0.5]


def test_a_step_logged_twice_counts_once():
    found = History("again", [line(0), line(1), line(1, loss=1.0), line(2)])
    assert found.step.tolist() == [1, 2, 3]
    assert found.column("loss").tolist() == [8.0, 1.0, 7.98]


def test_many_steps_keep_their_extremes():
    step = np.arange(1, 1_000_001)
    values = np.zeros(len(step))
    values[123_456], values[7] = 9.0, np.nan
    bins = Bins(step, 1500)
    low, high = bins.range(values)
    assert len(bins.center) <= 1500
    assert (np.nanmin(low), np.nanmax(high)) == (0.0, 9.0)
    assert np.nansum(bins.mean(values)) == pytest.approx(9.0 / 667)
    figure = charts.throughput(History("long", [{"step": s, "tokens_per_second": 1.0} for s in range(5000)]))
    assert max(len(x) for x, _ in drawn(figure.axes[0]).values()) <= 2 * 1500


def test_bins_leave_gaps_empty():
    step = np.array([1, 2, 9, 10])
    bins = Bins(step, 5)
    values = bins.spread(bins.mean(np.array([1.0, 3.0, np.nan, 7.0])))
    np.testing.assert_array_equal(values, [2.0, np.nan, np.nan, np.nan, 7.0])


def test_smooth_skips_what_is_not_finite():
    values = np.ones(300)
    values[100] = np.nan
    np.testing.assert_allclose(smooth(values), 1.0)
    assert np.isnan(smooth(np.full(3, np.nan))).all()
    assert in_order(["layer10/channel", "layer2/channel"]) == ["layer2/channel", "layer10/channel"]


def test_draw_writes_pictures_alone(tmp_path):
    folder = write(tmp_path / "tiny", [line(s) for s in range(3)])
    files = figures.draw(folder)
    names = ["loss", "optimization", "throughput", "sources", "experts", "time"]
    assert [f.stem for f in files] == names
    assert sorted((folder / "figures").iterdir()) == sorted(files)
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in files)
    bare = write(tmp_path / "bare", [{"step": 0, "loss": 1.0}])
    assert [f.name for f in figures.draw(bare)] == ["loss.png", "optimization.png", "throughput.png"]


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    folder = write(tmp_path / "tiny", [line(0)])
    old = folder / "figures" / "loss.png"
    old.parent.mkdir()
    old.write_text("old")

    def full(self, data):
        self.open("wb").close()
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        figures.draw(folder)
    assert old.read_text() == "old"
    assert list(old.parent.iterdir()) == [old]


def test_what_cannot_be_drawn(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="no step was logged yet"):
        figures.draw(write(tmp_path / "fresh", []))
    monkeypatch.setattr(sys, "argv", ["lamella", "figures", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.err == f"lamella: {tmp_path}: holds no run (there is no metrics.jsonl); name a folder as runs/NAME\n"


def test_the_command_prints_the_files(tmp_path, monkeypatch, capsys):
    folder = write(tmp_path / "tiny", [{"step": 0, "loss": 1.0}])
    monkeypatch.setattr(sys, "argv", ["lamella", "figures", str(folder)])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code in (0, None)
    assert capsys.readouterr().out.splitlines()[0] == str(folder / "figures" / "loss.png")


def nowhere(tmp_path, **layout):
    source = {"format": "text", "path": "nowhere"}
    data = DataConfig.model_validate({"path": "nowhere", "sources": [source]}, strict=False)
    config = tiny_run(data, tmp_path, **layout)
    config.folder.mkdir(exist_ok=True)
    return config


def test_a_run_outlives_its_figures(tmp_path, monkeypatch, capsys):
    config = nowhere(tmp_path)

    def broken(folder):
        raise RuntimeError("no\nfonts")

    monkeypatch.setattr(reports, "draw", broken)
    found = reports.Reports(config, resolve(config, 1), 0)
    found.step(line(0))
    found.close(False)
    found.metrics.file.close()
    assert capsys.readouterr().err == "lamella: the figures were not drawn (RuntimeError: no fonts)\n"
    assert [f.name for f in (config.folder / "figures").iterdir()] == ["layout.png"]  # drawn at the run's start


def test_a_run_outlives_its_layout(tmp_path, monkeypatch, capsys):
    def broken(config, layout):
        raise RuntimeError("no room")

    monkeypatch.setattr(reports, "describe", broken)
    config = nowhere(tmp_path)
    found = reports.Reports(config, resolve(config, 1), 0)
    found.step(line(0))
    found.close(False)
    found.metrics.file.close()
    assert capsys.readouterr().err == "lamella: the figure of the layout was not drawn (RuntimeError: no room)\n"


def test_help_imports_nothing_heavy():
    code = "import sys, lamella.cli.main; print(*{'torch', 'matplotlib', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


LAYOUTS = {  # ranks, layers and words of the layout
    "one": (1, 2, {}),
    "cube": (8, 4, {"tensor": 2, "pipeline": 2}),
    "dealt": (8, 4, {"tensor": 2, "pipeline": 2, "expert": 4, "schedule": "gpipe"}),
    "zbv": (8, 8, {"pipeline": 4, "schedule": "zbv", "expert": 2}),
    "interleaved": (8, 8, {"pipeline": 2, "schedule": "interleaved", "stages_per_rank": 3}),
    "wide": (512, 2, {"zero": 2, "expert": 4}),
    "big": (512, 8, {"tensor": 2, "pipeline": 8, "schedule": "gpipe"}),
}


def recorded(tmp_path, name):
    world, layers, words = LAYOUTS[name]
    config = nowhere(tmp_path, **words)
    stack = [{"layers": ["mamba/moe", "attention/mlp"], "repeat": layers // 2}]
    rows = max(8, 2 * world)
    tree = config.model_dump() | {"model": MODEL | {"stack": stack}}
    tree["train"]["global_batch_size"] = rows
    config = type(config).model_validate(tree, strict=False)
    layout = resolve(config, world)
    describe(config, layout).save(config.folder / "layout.json")
    return config, layout, LayoutRecord.load(config.folder / "layout.json")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_recorded(tmp_path, name):
    config, layout, record = recorded(tmp_path, name)
    assert record == describe(config, layout)
    assert record.world == layout.world
    for rank in range(layout.world):
        p, d, t = record.place(rank)
        assert rank == t + layout.tensor * (d + layout.data * p)
        assert (p < layout.pipeline, d < layout.data, t < layout.tensor) == (True, True, True)
    for p in range(layout.pipeline):
        assert record.stages_of(p) == [stage.index for stage in layout.stages_of(p)]
    assert [s.rank for s in record.stages] == [layout.rank_of(i) for i in range(len(layout.stages))]
    assert [range(s.first, s.first + len(s.layers)) for s in record.stages] == [s.layers for s in layout.stages]
    assert all(len({record.place(r)[0] for r in group}) == 1 for group in record.expert_groups())
    assert math.fsum(s.cost for s in record.stages) == pytest.approx(1)
    assert all(s.forward + s.backward == pytest.approx(s.cost) and s.input > 0 < s.weight for s in record.stages)
    costs = [s.cost for s in record.stages]
    starts = [s.first for s in record.stages[1:]]
    found = imbalance(layer_costs(config.model, config.train.sequence_length, layout.recompute), starts)
    assert max(costs) * len(costs) == pytest.approx(found)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_drawn(tmp_path, name):
    config, layout, record = recorded(tmp_path, name)
    write(config.folder, [])
    (file,) = figures.draw(config.folder)  # before the first step, too
    assert file == config.folder / "figures" / "layout.png"
    assert file.read_bytes().startswith(b"\x89PNG")
    figure = layout_chart.chart("tiny", record)
    ranks, stages = figure.axes[:2]
    assert len(figure.axes) == 2 + (layout.pipeline > 1)
    assert stages.get_xlabel().startswith("predicted share of the model's cost, forward and backward (%)")
    grid = layout_chart.Grid(record)
    cells = [cell for r in range(layout.world) if (cell := grid.cell(r)) is not None]
    assert len(set(cells)) == len(cells) == grid.drawn * layout.tensor * layout.pipeline
    assert all(0 <= x < grid.columns - 0.99 and 0 <= y < grid.rows - 0.99 for x, y in cells)
    if grid.drawn < layout.data:
        assert f"to {layout.data - 1} are like these and not drawn" in ranks.get_xlabel()
    numbers = [t.get_text() for t in ranks.texts if t.get_text().isdecimal()]
    assert numbers in ([], [str(r) for r in range(layout.world)])
    assert bool(numbers) == (layout.world < 100)
    if layout.pipeline > 1:
        assert "(%)" in figure.axes[2].get_xlabel()
        said = next(t.get_text() for t in stages.texts if " x even" in t.get_text())
        assert said.endswith(f"{len(record.stages) * record.stages[0].cost:.2f} x even")


def torch_order(schedule, pipeline, stages, count, rank):
    """What torch's own schedule does, from its private methods: they need no process group."""
    several = {"interleaved": torchs.ScheduleInterleaved1F1B, "zbv": torchs.ScheduleZBVZeroBubble}
    if schedule in several:
        made = object.__new__(several[schedule])
        made._n_microbatches, made.num_stages, made.pp_group_size = count, stages, pipeline
        made.n_local_stages = stages // pipeline
        made.microbatches_per_round = count // max(1, count // pipeline)
        kinds = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
        actions = [a for a in made._calculate_single_rank_operations(rank) if a is not None]
        return [(kinds[a.computation_type.name], a.stage_index, a.microbatch_index) for a in actions]
    made = MagicMock(_n_microbatches=count, _num_stages=stages)
    made._check_inputs.return_value = [()] * count, [{}] * count
    stage = made._stage
    stage.stage_index = rank
    for name in ("fwd_recv", "fwd_send", "bwd_recv", "bwd_send"):
        getattr(stage, f"get_{name}_ops").return_value = []
    {"gpipe": torchs.ScheduleGPipe, "1f1b": torchs.Schedule1F1B}[schedule]._step_microbatches(made)
    kinds = {"forward_one_chunk": "F", "backward_one_chunk": "B"}
    return [(kinds[name], rank, words[0]) for name, words, _ in stage.method_calls if name in kinds]


SCHEDULES = [
    *[("gpipe", p, p, m) for p in (2, 3, 4) for m in (1, 4, 7)],
    *[("1f1b", p, p, m) for p in (2, 3, 4) for m in (4, 7)],
    *[("interleaved", p, v * p, m * p) for p in (2, 3, 4) for v in (2, 3) for m in (1, 2, 3)],
    ("interleaved", 4, 8, 10),
    *[("zbv", p, 2 * p, m) for p in (2, 3, 4) for m in (1, 2, 5, 7, 12)],
]


@pytest.mark.parametrize(("schedule", "pipeline", "stages", "count"), SCHEDULES)
def test_the_order_is_torchs(schedule, pipeline, stages, count):
    for rank in range(pipeline):
        assert order(schedule, pipeline, stages, count, rank) == torch_order(schedule, pipeline, stages, count, rank)


@pytest.mark.parametrize("name", [name for name, (_, _, words) in LAYOUTS.items() if "pipeline" in words])
def test_the_step(tmp_path, name):
    _, _, record = recorded(tmp_path, name)
    rows = timeline(record)
    begin = {slot: start for row in rows for slot, start, _ in row}
    end = {slot: start + length for row in rows for slot, start, length in row}
    kinds = "FIW" if record.schedule == "zbv" else "FB"
    count = len(record.stages)
    every = set(itertools.product(kinds, range(count), range(record.micro_batches)))
    assert sorted(every) == sorted(slot for row in rows for slot, *_ in row)  # each once
    assert all(slot.stage in record.stages_of(p) for p, row in enumerate(rows) for slot, *_ in row)
    for row in rows:
        assert all(b[1] >= a[1] + a[2] for a, b in itertools.pairwise(row))
    back = kinds[1]
    for stage, number in itertools.product(range(count), range(record.micro_batches)):
        assert end["F", stage, number] <= begin[back, stage, number]
        if stage:
            assert end["F", stage - 1, number] <= begin["F", stage, number]
            assert end[back, stage, number] <= begin[back, stage - 1, number]
        if "W" in kinds:
            assert end["I", stage, number] <= begin["W", stage, number]
    assert math.fsum(n for row in rows for *_, n in row) == pytest.approx(record.micro_batches)


def test_layers_in_short():
    assert layout_chart.short(["a"] * 3 + ["b"]) == "a x3, b"
    assert layout_chart.short(["a", "a", "b", "c", "b", "c"]) == "a x2, (b, c) x2"
    assert layout_chart.short(["a", "b", "a", "b", "c"] * 4) == "((a, b) x2, c) x4"
    assert layout_chart.short([]) == ""


def test_a_record_of_another_version_is_left_out(tmp_path):
    folder = write(tmp_path / "tiny", [{"step": 0, "loss": 1.0}])
    for text in ("", "[]", "{}", '{"stages": [{}]}', '{"stages": [], "tensor": 1}', '{"stages": 7}'):
        (folder / "layout.json").write_text(text)
        assert "layout.png" not in [f.name for f in figures.draw(folder)]


@pytest.mark.parametrize("command", ["figures", "track"])
def test_commands_do_without_torch(tmp_path, command):
    config, *_ = recorded(tmp_path, "cube")
    write(config.folder, [line(s) for s in range(3)])
    dump(config, config.folder / "config.yaml")
    code = "import sys; from lamella.cli.main import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    words = [sys.executable, "-c", code, command, str(config.folder)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"


def test_loss_is_told_apart_by_source():
    def of(step):
        seen = step % 2
        return {"code": {"tokens": 30, "loss": 3.0 - 0.01 * step}, "web": {"tokens": 70 * seen, "loss": None}}

    assert charts.sources(History("one", [{"step": 0, "loss": 1.0}])) is None
    loss, share = charts.sources(History("two", [line(s, sources=of(s)) for s in range(90)])).axes
    assert drawn(loss)["code"][1][45] == pytest.approx(2.55)
    assert np.isnan(drawn(loss)["web"][1]).all()
    assert drawn(share)["code"][1][:2].tolist() == [100, 30] and drawn(share)["web"][1][:2].tolist() == [0, 70]

"""Figures say what the metrics say, in numbers, units and files."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from lamella.cli import main as command
from lamella.config import DataConfig
from lamella.errors import UserError
from lamella.train import charts, figures, reports
from lamella.train.history import Bins, History, in_order, smooth
from tests.corpus import tiny_run

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
    fills = [luminance(colour) for colour, _ in charts.FILLS[:4]]
    assert all(a - b > 0.1 for a, b in itertools.pairwise(fills))
    assert len({style for _, style in charts.LINES[:4]}) == 4
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
    assert [f.name for f in files] == ["loss.png", "optimization.png", "throughput.png", "experts.png", "time.png"]
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


def test_a_run_outlives_its_figures(tmp_path, monkeypatch, capsys):
    source = {"format": "text", "path": "nowhere"}
    data = DataConfig.model_validate({"path": "nowhere", "sources": [source]}, strict=False)
    config = tiny_run(data, tmp_path)
    config.folder.mkdir()

    def broken(folder):
        raise RuntimeError("no\nfonts")

    monkeypatch.setattr(reports, "draw", broken)
    found = reports.Reports(config, 0)
    found.step(line(0))
    found.close(False)
    found.metrics.file.close()
    assert capsys.readouterr().err == "the figures were not drawn (RuntimeError: no fonts)\n"


def test_help_imports_nothing_heavy():
    code = "import sys, lamella.cli.main; print(*{'torch', 'matplotlib', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""

"""What a run says: exact lines where programs and logs read, the right numbers where people look."""

import io
import math
import sys
import threading
import time

import pytest
from rich.console import Console

from lamella.config import DataConfig, change
from lamella.parallel.layout import resolve
from lamella.train import terminal
from lamella.train.screen import Screen, Trace, bars, clock
from tests.corpus import tiny_run


def line(step, **changes):
    found = {
        "step": step,
        "loss": 8.0 - step,
        "grad_norm": 0.25,
        "lr": 3e-3,
        "tokens": 512,
        "tokens_per_second": 4584.0,
        "seconds": {"data": 0.0, "forward": 0.1, "backward": 0.3, "optimizer": 0.1},
        "moe": {"layer1/channel": {"load": [0.5, 0.25, 0.25, 0.0], "dropped": 0.125, "entropy": math.log(4) / 2}},
    }
    return found | changes


HELDOUT = {"heldout_loss": 4.5, "heldout_bits_per_byte": 2.25}


@pytest.fixture
def config(tmp_path):
    source = {"format": "text", "path": "nowhere"}
    found = tiny_run(DataConfig.model_validate({"path": "nowhere", "sources": [source]}, strict=False), tmp_path)
    found.folder.mkdir()
    return found


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def test_plain_lines(config, capsys):
    view = terminal.View(config, resolve(config, 1), 2)
    view.step(line(2))
    view.step(line(3, **HELDOUT))
    (config.folder / "checkpoints" / "step-00000004").mkdir(parents=True)
    (config.folder / "figures").mkdir()  # nothing in it: not named
    view.close(stopped=True)
    said = capsys.readouterr()
    folder = config.folder
    assert said.out.splitlines() == [
        f"tiny: from step 2 of 6, in {folder}",
        "step      3/6  loss 6.0000  grad 0.250  lr 3.00e-03  4,584 tokens/s",
        "step      4/6  loss 5.0000  grad 0.250  lr 3.00e-03  4,584 tokens/s  held-out 4.5000 (2.2500 bits per byte)",
        "tiny: 2 steps, 1,024 tokens in 0:00, median 4,584 tokens/s",
        "  training loss  6.0000 at step 3, 5.0000 at step 4",
        "  held-out loss  4.5000 (2.2500 bits per byte) at step 4",
        f"  run            {folder}",
        f"  checkpoints    {folder / 'checkpoints'}",
        "next:",
        f"  lamella generate {folder} --prompt 'def main('",
        f"  lamella figures {folder}",
    ]
    assert said.err == "stopped at step 4 and saved; the same command continues\n"


def test_nothing_left_to_train(config, capsys):
    config = change(config, tracking={"enabled": True})
    terminal.View(config, resolve(config, 1), 6).close(stopped=False)
    out = capsys.readouterr().out
    assert "tiny: nothing to train, step 6 of 6 is done\n" in out
    assert out.endswith(f"  lamella track {config.folder}\n")


@pytest.mark.parametrize(("variable", "live"), [("xterm-256color", True), ("dumb", False), (None, False)])
def test_live_on_terminals_alone(monkeypatch, variable, live):
    monkeypatch.setattr(sys, "stdout", Terminal())
    if variable is None:
        monkeypatch.delenv("TERM", raising=False)
    else:
        monkeypatch.setenv("TERM", variable)
    assert terminal.draws_live() is live
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert not terminal.draws_live()


def test_live_view_leaves_the_terminal_clean(config, monkeypatch):
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    before = threading.active_count()
    view = terminal.View(config, resolve(config, 1), 0)
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex(
        "\x1b[?25l"
    )  # from the start: a kill leaves it so
    view.step(line(0))
    view.close(stopped=False)
    text = out.getvalue()
    assert sys.stdout is out
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() == before
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert "\x1b[3" not in text  # no colour
    assert "parameters" in text
    assert "step      1/6" not in text
    assert text.index("1 of 6") < text.index("tiny: 1 steps, 512 tokens")


def shown(screen, width, height=24):
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None)
    console.print(screen)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 120])
def test_screen(width):
    screen = Screen("tiny   1,234 parameters", 0, 10)
    assert "the first step is under way" in "\n".join(shown(screen, width))
    for step in range(4):
        screen.add(line(step, **(HELDOUT if step == 1 else {})))
    rows = shown(screen, width)
    assert max(map(len, rows)) <= width
    by_name = {row[:10].strip(): row[10:] for row in reversed(rows)}
    assert rows[0] == "tiny   1,234 parameters"
    assert by_name["step"].startswith("4 of 10   █")
    filled, empty = by_name["step"].count("█"), by_name["step"].count("░")
    assert filled / (filled + empty) == pytest.approx(0.4, abs=0.02)
    assert " 40.0% " in by_name["step"]
    assert by_name["step"].endswith("0:00, 0:00 left")
    assert by_name["loss"] == "6.5000   █▆▃▁   from 8.0000"
    assert by_name["held-out"] == "4.5000   2.2500 bits per byte   at step 2"
    assert by_name["rate"] == "3.00e-03   gradient norm 0.250"
    assert by_name["speed"] == "4,584 tokens/s   median 4,584"
    assert by_name["time"].startswith("500 ms   ░")
    assert by_name["time"].count("▒") / (width - 19) == pytest.approx(0.6, abs=0.03)
    assert any("▒ backward 60%" in row for row in rows)
    assert by_name["layer 1"].split() == ["█▅▅▁", "2.00x", "50.0%", "12.5%"]


def test_screen_fits_the_height_and_shows_the_worst_layers():
    layers = {f"layer{n}/channel": {"load": [0.25] * 4, "dropped": 0.0, "entropy": 1.0} for n in range(40)}
    layers["layer33/channel"] = {"load": [1.0, 0.0, 0.0, 0.0], "dropped": 0.0, "entropy": 0.0}
    screen = Screen("deep", 0, 10)
    screen.add(line(0, moe=layers))
    rows = shown(screen, 80)
    assert len(rows) <= 24
    assert sum(row.startswith("layer ") for row in rows) == 11
    assert any(row.startswith("layer 33") and "4.00x" in row for row in rows)
    assert any("and 29 layers that are more even" in row for row in rows)


def test_screen_without_the_newer_keys_and_without_a_number():
    bare = {k: v for k, v in line(0, loss=math.nan).items() if k not in ("moe", "seconds")}
    screen = Screen("old", 0, 10)
    screen.add(bare)
    rows = shown(screen, 80)
    assert any(row.startswith("loss      nan") for row in rows)
    assert not any(row.startswith(("time", "experts")) for row in rows)


def test_a_trace_is_bounded_and_keeps_its_course():
    trace = Trace(most=8)
    for value in range(8192):
        trace.add(float(value))
    trace.add(math.nan)
    assert len(trace.means) == 8
    assert trace.means == sorted(trace.means)
    assert trace.means[0] == pytest.approx((trace.stride - 1) / 2)
    assert trace.line(4) == "▁▃▆█"
    assert Trace().line(10) == ""
    assert bars([0.0, 1.0, 2.0, math.nan, -1.0]) == "▁██ ▁"
    assert (clock(3723), clock(59.6)) == ("1:02:03", "1:00")

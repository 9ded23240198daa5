"""Draws a run's figures into `runs/NAME/figures/`, from its metrics file; at any time, also while it trains.

    lamella figures RUN, and the run's end:  all of them
    the run's start:                         that of its layout, in a process of its own (this file, run)
"""

import contextlib
import io
import os
import subprocess
import sys
import threading
from pathlib import Path

from lamella.errors import UserError
from lamella.train.layout_record import FILE, LayoutRecord

DPI = 150
PRIORITY = 10  # niceness of the process at the run's start
LONGEST = 60.0  # seconds


def draw(folder: Path) -> list[Path]:
    """Draws all that the run `folder` has numbers for, and returns the files.

    A file is replaced in one move, so whoever looks at it sees a whole picture. Raises UserError where the folder is
    no run, or has nothing to draw yet.
    """
    lines = folder / "metrics.jsonl"
    if not lines.is_file():
        raise UserError(f"{folder}: holds no run (there is no metrics.jsonl); name a folder as runs/NAME")
    # Only now: matplotlib takes a second.
    from lamella.train.charts import CHARTS
    from lamella.train.history import History
    from lamella.train.metrics_file import read_metrics

    found = read_metrics(lines)
    files = draw_layout(folder)
    if not found and not files:
        raise UserError(f"{folder}: no step was logged yet; draw again once the run has trained one")
    if not found:
        return files
    history = History(folder.absolute().name, found, _clip_norm(folder))
    charts = {name: chart(history) for name, chart in CHARTS.items()}
    return [_write(folder, name, figure) for name, figure in charts.items() if figure is not None] + files


def draw_layout(folder: Path) -> list[Path]:
    """Draws the layout alone; nothing where an older run has left no word of it."""
    try:
        record = LayoutRecord.load(folder / FILE)
    except (OSError, ValueError):
        return []
    from lamella.train.layout_chart import chart

    return [_write(folder, "layout", chart(folder.absolute().name, record))]


def draw_layout_aside(folder: Path) -> threading.Thread:
    """Draws the layout while the run goes on: neither matplotlib's import nor the drawing holds it up."""
    command = [sys.executable, "-m", "lamella.train.figures", str(folder.absolute())]

    def wait() -> None:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # it is drawn again at the run's end
            subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=LONGEST, start_new_session=True
            )

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def _clip_norm(folder: Path) -> float | None:
    """The run's clipping norm, or None: a run of another version may be unreadable here, and is drawn all the same."""
    from lamella.config import load_run

    try:
        return load_run(folder / "config.yaml").train.optimizer.clip_norm
    except UserError:
        return None


def _write(folder: Path, name: str, figure) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)  # whatever MPLBACKEND says, nothing here opens a window
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DPI)
    file = folder / "figures" / f"{name}.png"
    file.parent.mkdir(exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        temporary.write_bytes(picture.getvalue())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    return file


if __name__ == "__main__":
    os.nice(PRIORITY)
    draw_layout(Path(sys.argv[1]))

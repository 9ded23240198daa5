"""Draws a run's figures into `runs/NAME/figures/`, from its metrics file; at any time, also while it trains."""

import io
import os
from pathlib import Path

from lamella.errors import UserError

DPI = 150


def draw(folder: Path) -> list[Path]:
    """Draws all that the run `folder` has numbers for, and returns the files.

    A file is replaced in one move, so whoever looks at it sees a whole picture. Raises UserError where the folder is
    no run or no step was logged.
    """
    lines = folder / "metrics.jsonl"
    if not lines.is_file():
        raise UserError(f"{folder}: holds no run (there is no metrics.jsonl); name a folder as runs/NAME")
    # Only now: matplotlib takes a second.
    from lamella.train.charts import CHARTS
    from lamella.train.history import History
    from lamella.train.metrics import read_metrics

    found = read_metrics(lines)
    if not found:
        raise UserError(f"{folder}: no step was logged yet; draw again once the run has trained one")
    history = History(folder.absolute().name, found, _clip_norm(folder))
    charts = {name: chart(history) for name, chart in CHARTS.items()}
    home = folder / "figures"
    home.mkdir(exist_ok=True)
    return [_write(home / f"{name}.png", figure) for name, figure in charts.items() if figure is not None]


def _clip_norm(folder: Path) -> float | None:
    """The run's clipping norm, or None: a run of another version may be unreadable here, and is drawn all the same."""
    from lamella.config import load_run

    try:
        return load_run(folder / "config.yaml").train.optimizer.clip_norm
    except UserError:
        return None


def _write(file: Path, figure) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)  # whatever MPLBACKEND says, nothing here opens a window
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DPI)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        temporary.write_bytes(picture.getvalue())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    return file

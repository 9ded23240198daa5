"""`lamella figures`: draw a run."""

from pathlib import Path
from typing import Annotated

import typer


def figures(folder: Annotated[Path, typer.Argument(metavar="RUN_FOLDER", help="as runs/NAME")]) -> None:
    """Draw the figures of a run from its metrics into RUN_FOLDER/figures; also while the run goes on."""
    from lamella.train.figures import draw

    for file in draw(folder):
        print(file)

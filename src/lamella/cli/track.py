"""`lamella track`: send a run, or what is missing of it, to MLflow."""

from pathlib import Path
from typing import Annotated

import typer


def track(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run's folder, runs/NAME")],
    uri: Annotated[str | None, typer.Option(help="http://HOST:PORT or sqlite:///FILE; else the run's own")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="go on until the run's last step")] = False,
) -> None:
    """Send RUN to MLflow: all of it, or what is missing there. A step that is there is never sent again.

    A run does this by itself while it trains, unless tracking.enabled=false.
    """
    from lamella.train import tracking

    store = tracking.replay(run.absolute(), uri, follow)
    print(f"{run}: steps up to {store.note.next - 1} are in MLflow, experiment {store.config.tracking.experiment}")
    print(f"look at it: {tracking.how_to_look(store.uri)}")

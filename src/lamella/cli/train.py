"""`lamella train`: pretrain a run, or continue it."""

from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[list[str] | None, typer.Argument(help="a.b=c words, as train.steps=10 or model=NAME")]


def train(
    run: Annotated[Path, typer.Argument(metavar="RUN.yaml")],
    overrides: Overrides = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="start this many processes here, after validating")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="validate, say what would run, and end")] = False,
) -> None:
    """Pretrain RUN.yaml; the same command continues from the newest checkpoint. A process under torchrun is one rank.

    Exit codes: 0 done, 1 a fault, 2 the input is wrong, 75 stopped by a signal and saved.
    """
    from lamella.config import load_run

    config = load_run(run, overrides or [])
    from lamella.convert.origin import opened
    from lamella.parallel import local
    from lamella.parallel.seat import find_seat
    from lamella.train import check, loop

    if nproc is None and not dry_run:
        local.end(loop.train(config, opened))

    world = nproc or find_seat().world
    print(check.describe(config, check.check(config, world, opened)), flush=True)
    if dry_run:
        raise typer.Exit(0)
    raise typer.Exit(local.exit_code(local.run_local(world, loop.enter, config, opened, forward_signals=True)))

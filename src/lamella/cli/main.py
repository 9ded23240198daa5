"""The command `lamella`. Each command's imports are made when it is called, so help and mistakes answer at once."""

import sys

import typer

from lamella.cli import checkpoint, cluster, convert, data, evaluate, figures, generate, kernels, track, train, verify
from lamella.errors import EXIT_USER, UserError

app = typer.Typer(
    help="Pretrain stacks of sequence and channel mixers, under layouts that never change the model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("train")(train.train)
app.command("submit")(cluster.submit)
app.command("status")(cluster.status)
app.command("watch")(cluster.watch)
app.command("stop")(cluster.stop)
app.command("job", hidden=True)(cluster.job)
app.command("verify")(verify.verify)
app.command("generate")(generate.generate)
app.command("eval")(evaluate.evaluate)
app.command("convert")(convert.convert)
app.command("figures")(figures.figures)
app.command("track")(track.track)
app.add_typer(data.app, name="data")
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(kernels.app, name="kernels")


def main() -> None:
    """Runs the command line; a mistake of the user is one line and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"lamella: {error}", file=sys.stderr)
        sys.exit(EXIT_USER)


if __name__ == "__main__":
    main()

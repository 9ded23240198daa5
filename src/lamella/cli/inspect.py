"""`lamella data inspect`: what a corpus, or a run on it, trains in its first steps."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lamella.errors import UserError

if TYPE_CHECKING:
    from lamella.config import DataConfig, RunConfig
    from lamella.data.inspect import Lengths, Look, PieceText
    from lamella.data.plan import RowCost
    from lamella.data.steps import Steps
    from lamella.data.store.manifest import Prepared

LENGTH, ROWS, RANKS = 2048, 64, 8
BAR = 40  # characters
PICTURES = (".png", ".svg", ".pdf")


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is looked at: a run's steps, or those of a run with these sizes."""

    data: "DataConfig"
    sequence_length: int
    rows: int
    seed: int
    window: int
    cost: "RowCost"
    cost_name: str
    steps: int  # of the run; of a data file those looked at


def inspect(
    file: Annotated[str, typer.Argument(metavar="FILE", help="configs/data/NAME.yaml, or a run's file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[a.b=c]...", help="Changes to it.")] = None,
    sequence_length: Annotated[int | None, typer.Option(min=1, help=f"Of a data file: {LENGTH}.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help=f"A step, of a data file: {ROWS}.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of a data file: 0.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="How many are looked at.")] = 50,
    ranks: Annotated[int | None, typer.Option(min=1, help=f"That rows are dealt to: {RANKS}.")] = None,
    row: Annotated[int | None, typer.Option(metavar="N", help="Print row N of the run as text.")] = None,
    figure: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw it too.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Time the run's model: what do rows cost?")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print it for programs.")] = False,
) -> None:
    """Shows lengths, packing, mixture and balance of the first steps, or a row as text. No token is changed."""
    run, asked = _asked(file, overrides or [], sequence_length, rows, seed, steps)
    if row is not None and (measure or figure is not None):
        raise UserError("--row prints one row and nothing else; leave out --measure and --figure")
    if measure and run is None:
        raise UserError(f"{file}: --measure times a run's model; name a run's file, as configs/run/quickstart.yaml")
    if figure is not None and (figure.suffix not in PICTURES or not figure.absolute().parent.is_dir()):
        raise UserError(f"{figure}: --figure takes a {', '.join(PICTURES)} file in a folder that is there")
    from lamella.data.inspect import look
    from lamella.data.steps import Steps
    from lamella.data.store.manifest import open_prepared

    wanted = RANKS if ranks is None else ranks
    over = math.gcd(wanted, asked.rows)
    if ranks is not None and over != ranks:
        raise UserError(f"--ranks {ranks} does not divide the {asked.rows} rows of a step; take {over}")
    prepared = open_prepared(asked.data)
    plans = Steps(asked.data, prepared, asked.sequence_length, asked.rows, asked.seed, asked.window, asked.cost)
    if row is not None:
        _check_row(row, asked)
        _print_row(row, asked, prepared, plans, as_json)
        return
    found = look(prepared, plans, asked.sequence_length, steps, over)
    told = dataclasses.asdict(found) | {"seed": asked.seed, "window": asked.window, "cost": asked.cost_name}
    if not as_json:
        print("\n".join(_lines(found, asked)))
    if measure:
        from lamella.train.row_timing import time_rows

        assert run is not None
        timed = time_rows(run)
        told["measured"] = dataclasses.asdict(timed) | {"set": timed.words}
        if not as_json:
            print("\n".join(timed.lines()))
    if as_json:
        print(json.dumps(told, default=lambda array: array.tolist()))
    if figure is not None:
        from lamella.train.data_chart import write

        write(figure, str(asked.data.path), asked.cost_name, found)
        if not as_json:
            print(figure)


def _asked(
    file: str, overrides: list[str], sequence_length: int | None, rows: int | None, seed: int | None, steps: int
) -> "tuple[RunConfig | None, Asked]":
    from lamella.config import is_run, load_data, load_run
    from lamella.data.inspect import squared

    if not is_run(file):
        data = load_data(file, overrides)
        sizes = (sequence_length or LENGTH, rows or ROWS, seed or 0)
        return None, Asked(data, *sizes, 1, squared, "squared document lengths", steps)
    run = load_run(file, overrides)
    train = run.train
    given = {"sequence_length": sequence_length, "global_batch_size": rows, "seed": seed}
    for key, value in given.items():
        if value is not None:
            option = "--rows" if key == "global_batch_size" else f"--{key.replace('_', '-')}"
            raise UserError(f"{file}: {option} is for data files; of a run say train.{key}={value}")
    from lamella.train.rows import row_cost

    name = "counted from the model" if train.rows.cost is None else "train.rows.cost"
    sizes = (train.sequence_length, train.global_batch_size, train.seed, train.rows.window)
    return run, Asked(run.data, *sizes, row_cost(run), name, train.steps)


def _check_row(row: int, asked: Asked) -> None:
    end = asked.steps * asked.rows
    if not 0 <= row < end:
        raise UserError(
            f"--row {row}: {asked.steps:,} steps of {asked.rows:,} rows have rows 0 to {end - 1:,};"
            " choose one of these, or look at more steps"
        )


def _print_row(row: int, asked: Asked, prepared: "Prepared", plans: "Steps", as_json: bool) -> None:
    from lamella.data.inspect import find_step, row_text

    step, place = find_step(plans, row, asked.rows, asked.window)
    pieces = list(row_text(prepared, plans, row))
    end = pieces[-1].begin + pieces[-1].length
    padding = asked.sequence_length - end
    if as_json:
        print(json.dumps({
            "row": row,
            "step": step,
            "place": place,
            "documents": [dataclasses.asdict(piece) for piece in pieces],
            "padding": padding,
        }))  # fmt: skip
        return
    count = "1 document" if len(pieces) == 1 else f"{len(pieces)} documents"
    print(f"row {row:,}: place {place} of step {step:,}; {count} in {asked.sequence_length:,} slots")
    for piece in pieces:
        print(f"=== slot {piece.begin:,}: {_where(piece)} ===")
        print(piece.text)
    print(f"=== slot {end:,}: {padding:,} of padding ===" if padding else f"=== slot {end:,}: the end ===")


def _where(piece: "PieceText") -> str:
    stop = piece.offset + piece.length
    words = f"{piece.source}, document {piece.document:,}, "
    if piece.length == piece.stored:
        return words + f"whole, {piece.length:,} tokens"
    rest = "its end" if stop == piece.stored else "goes on in another row"
    return words + f"tokens {piece.offset:,} to {stop - 1:,} of {piece.stored:,}, {rest}"


def _lines(found: "Look", asked: Asked) -> list[str]:
    heads = ("source", "documents", "tokens", "bytes", "duplicates", "skipped", "planned", "drawn", "epochs")
    table = [
        (
            s.name,
            f"{s.documents:,}",
            f"{s.tokens:,}",
            "?" if s.text_bytes is None else f"{s.text_bytes:,}",
            f"{s.duplicates:,}",
            f"{sum(s.skipped.values()):,}",
            f"{s.planned:.2%}",
            f"{s.drawn:.2%}",
            f"{s.epochs:.3f}",
        )
        for s in found.sources
    ]
    packing, balance, steps = found.packing, found.balance, len(found.padding)
    return [
        f"{asked.data.path}: rows of {asked.sequence_length:,} tokens, {asked.rows:,} a step, seed {asked.seed}"
        + (f", window of {asked.window} steps" if asked.window > 1 else ""),
        "",
        *_columns([heads, *table]),
        f"planned: share of the tokens; drawn, epochs: over the first {steps:,} steps",
        "",
        *_histogram(found.lengths),
        "",
        f"{found.rows_per_epoch:,} rows an epoch, padding {packing.padding:.3%}, of the first {steps:,} steps"
        f" {found.padding.mean():.3%} (worst {found.padding.max():.3%})",
        f"{packing.cut:.1%} of the documents are longer than a row and cut; cut although they fit:"
        f" {packing.avoidable:,}; tokens discarded: {packing.discarded:,}",
        "",
        f"cost of the dearest of {balance.ranks} ranks over the mean, by {asked.cost_name}:",
        *_columns([
            ("", "mean", "worst step"),
            ("dealt by cost", f"{balance.dealt.mean():.4f}", f"{balance.dealt.max():.4f}"),
            ("in order", f"{balance.in_order.mean():.4f}", f"{balance.in_order.max():.4f}"),
        ]),
    ]  # fmt: skip


def _histogram(lengths: "Lengths") -> list[str]:
    """A line a power of two: the documents' share as a bar, and both shares."""
    documents, tokens = lengths.counts / lengths.counts.sum(), lengths.tokens / lengths.tokens.sum()
    bars = ["#" * round(BAR * share / documents.max()) for share in documents]
    rows = [
        (f"{low:,}-{high - 1:,}", bar, f"{share:.1%}", f"{mass:.1%}")
        for low, high, bar, share, mass in zip(lengths.edges, lengths.edges[1:], bars, documents, tokens, strict=False)
    ]
    quantiles = "   ".join(f"{share:.0%} {n:,}" for share, n in lengths.quantiles.items())
    head = ("tokens", "", "of documents", "of tokens")
    return [
        *_columns([head, *rows], left=(0, 1)),
        f"mean {lengths.mean:,.0f}, longest {lengths.longest:,}; quantiles: {quantiles}",
    ]


def _columns(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Rows as lines, the cells of a column equally wide."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if n in left else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]

"""`lamella convert`: a Hugging Face model to a checkpoint of ours, and back."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from lamella.errors import EXIT_FAULT, UserError


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="a Hugging Face folder; or a run's, or one of its checkpoints")
    ],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="the folder to make")],
    to: Annotated[Literal["hf", "lamella"], typer.Option(help="what TARGET is to be")],
    family: Annotated[str | None, typer.Option(help="of TARGET, with --to hf; default: the one that fits")] = None,
    dtype: Annotated[
        Literal["fp32", "bf16"] | None,
        typer.Option(help="of TARGET, with --to hf; default: as an imported model came, else fp32"),
    ] = None,
    shard_gigabytes: Annotated[float, typer.Option(help="largest file of weights, with --to hf")] = 5.0,
    check: Annotated[
        bool | None, typer.Option("--check/--no-check", help="compare logits; default: where the model is small")
    ] = None,
) -> None:
    """Convert SOURCE to TARGET, tensor by tensor, and compare the logits of both with transformers.

    Exit codes: 0 done, 1 the logits differ, 2 the input is wrong or cannot be expressed.
    """
    if to == "lamella" and (dtype or family):
        raise UserError(f"--{'dtype' if dtype else 'family'}: goes with --to hf; a checkpoint here holds fp32 masters")
    if not shard_gigabytes > 0:
        raise UserError(f"--shard-gigabytes {shard_gigabytes}: must be above 0")
    if not source.is_dir():
        raise UserError(f"{source}: no such folder")
    if target.exists():
        raise UserError(f"{target}: is there already; name a new folder")
    if to == "lamella":
        from lamella.convert.convert import to_lamella

        done = to_lamella(source, target)
    else:
        from lamella.convert.convert import to_hf

        done = to_hf(source, target, dtype, family, int(shard_gigabytes * 1e9))
    print(f"{target}: {done.family.name}, {str(done.dtype).removeprefix('torch.')} weights, every tensor in its place")
    for note in done.notes:
        print(note)
    from lamella.convert.check import BOUND, LENGTH, ROWS, compare, skipped

    reason = "--no-check" if check is False else skipped(done.model, done.family)
    if reason is not None and not (check and "--check" in reason):
        if check:
            raise UserError(f"--check: {reason}")
        print(f"logits not compared: {reason}")
        return
    parity = compare(done.checkpoint, done.model, done.family, done.theirs, done.rounded)
    print(
        f"logits against transformers, {ROWS} x {LENGTH} random tokens, fp32: largest difference {parity.absolute:.1e}"
        f" (largest logit {parity.scale:.1e}), relative {parity.relative:.1e}"
    )
    if not parity.same:
        print(f"they differ: relative {BOUND:.0e} is the bound; do not use {target}")
        raise typer.Exit(EXIT_FAULT)

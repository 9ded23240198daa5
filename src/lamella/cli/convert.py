"""`lamella convert`: a model of Hugging Face, Megatron-LM or DeepSpeed to a checkpoint of ours, and back."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from lamella.errors import EXIT_FAULT, UserError


def convert(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="a folder of theirs, or RWKV's .pth; or a run's, or its checkpoint"),
    ],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="the folder to make")],
    to: Annotated[Literal["hf", "lamella", "megatron", "universal"], typer.Option(help="what TARGET is to be")],
    family: Annotated[
        str | None,
        typer.Option(help="of TARGET, with --to hf: default the one that fits; with --to universal: megatron, or ours"),
    ] = None,
    dtype: Annotated[
        Literal["fp32", "bf16"] | None,
        typer.Option(help="of TARGET, with --to hf or megatron; default: as an imported model came, else fp32"),
    ] = None,
    shard_gigabytes: Annotated[float, typer.Option(help="largest file of weights, with --to hf")] = 5.0,
    check: Annotated[
        bool | None, typer.Option("--check/--no-check", help="compare logits; default: where the model is small")
    ] = None,
) -> None:
    """Convert SOURCE to TARGET, tensor by tensor, and compare the logits of both with transformers.

    Exit codes: 0 done, 1 the logits differ, 2 the input is wrong or cannot be expressed.
    """
    _check_options(to, family, dtype)
    if not shard_gigabytes > 0:
        raise UserError(f"--shard-gigabytes {shard_gigabytes}: must be above 0")
    if not source.is_dir() and not (to == "lamella" and source.suffix == ".pth" and source.is_file()):
        what = "a file; give a folder, or RWKV's .pth with --to lamella" if source.is_file() else "no such folder"
        raise UserError(f"{source}: {what}")
    if target.exists():
        raise UserError(f"{target}: is there already; name a new folder")
    from lamella.convert.kinds import WORDS, kind_of

    found = kind_of(source)
    if found == "lamella" and to == "lamella":
        raise UserError(f"{source}: {WORDS[found]}; name a folder of theirs")
    if found not in ("lamella", None) and to != "lamella":
        raise UserError(f"{source}: {WORDS[found]}; convert it --to lamella, then that --to {to}")
    if to in ("megatron", "universal") or found in ("megatron", "universal"):
        _other(source, target, found == "megatron", to, family, dtype, check)
        return
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
        f"logits against {done.family.runs_in}, {ROWS} x {LENGTH} random tokens, fp32:"
        f" largest difference {parity.absolute:.1e} (largest logit {parity.scale:.1e}), relative {parity.relative:.1e}"
    )
    if not parity.same:
        print(f"they differ: relative {BOUND:.0e} is the bound; do not use {target}")
        raise typer.Exit(EXIT_FAULT)


def _check_options(to: str, family: str | None, dtype: str | None) -> None:
    if dtype and to not in ("hf", "megatron"):
        raise UserError("--dtype: goes with --to hf or megatron; what is made here holds fp32 masters")
    if family and to not in ("hf", "universal"):
        raise UserError("--family: goes with --to hf or universal")
    if to == "universal" and family not in (None, "ours", "megatron"):
        raise UserError(f"--family {family}: parameters of a universal folder are named as ours or as megatron's")


def _other(
    source: Path, target: Path, megatron: bool, to: str, family: str | None, dtype: str | None, check: bool | None
) -> None:
    """To and from what transformers does not read."""
    from lamella.convert.megatron.convert import from_megatron, to_megatron
    from lamella.convert.universal.convert import from_universal, to_universal

    if check:
        raise UserError("--check: goes with Hugging Face's models; those of others run in their own launcher alone")
    if to == "lamella":
        done = (from_megatron if megatron else from_universal)(source, target)
    else:
        done = to_megatron(source, target, dtype) if to == "megatron" else to_universal(source, target, family)
    print(f"{target}: {done.what}, {str(done.dtype).removeprefix('torch.')} weights, every tensor in its place")
    for note in done.notes:
        print(note)
    print("logits not compared: no program at hand runs it in one process")

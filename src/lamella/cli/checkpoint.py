"""`lamella checkpoint`: look at checkpoints, prove them whole, compare them, average them, export their weights."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lamella.errors import EXIT_FAULT, EXIT_USER, UserError

app = typer.Typer(no_args_is_help=True, help="Look at checkpoints, prove them whole, compare, average, export.")
Where = Annotated[Path, typer.Argument(metavar="WHERE", help="a checkpoint, or a run's folder for its newest")]
AsJson = Annotated[bool, typer.Option("--json", help="Print it for programs.")]


@app.command()
def inspect(
    where: Where,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    config: Annotated[bool, typer.Option("--config", help="Print the run's configuration.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what a checkpoint holds; of a run's folder, first which ones there are."""
    from lamella.train.find import find_checkpoint

    path = find_checkpoint(where)
    from lamella.checkpoint import manifest, series, store
    from lamella.checkpoint.source import Source

    values, source = store.read_values(path), Source(path)
    files = manifest.read(path)
    held: dict[str, list[int]] = {}
    for name, kind in source.kinds.items():
        count = held.setdefault(name.split("/")[0], [0, 0])
        count[0] += 1
        count[1] += kind.elements
    if as_json:
        found: dict[str, Any] = {"path": str(path), "values": values, "bytes": sum(f.bytes for f in files.values())}
        found["tensors"] = {
            name: {"shape": list(kind.shape), "dtype": str(kind.dtype).removeprefix("torch.")}
            for name, kind in source.kinds.items()
        }
        print(json.dumps(found))
        return
    if path.parent.name == "checkpoints" and path.absolute() != where.absolute():
        for step in series.steps(path.parent):
            one = series.step_folder(path.parent, step)
            loss = store.read_values(one).get(series.LOSS)
            size = sum(f.bytes for f in manifest.read(one).values())
            print(f"{one.name}   {_size(size):>10}" + (f"   held-out loss {loss:.4f}" if loss is not None else ""))
    saved = values["config"]
    print(f"{path}: step {values['step']:,} of {saved['name']}, {values['rows']:,} rows read")
    print(f"{len(files)} files, {_size(sum(f.bytes for f in files.values()))}, every digest as written")
    for kind, (count, elements) in held.items():
        print(f"{kind:<12}{count:>6} tensors {elements:>16,} numbers")
    for key in ("averaged", "converted"):
        if key in values:
            what = values[key] if isinstance(values[key], list) else [values[key].get("family", "")]
            print(f"{key}: {', '.join(what)}")
    if config:
        import yaml

        print(yaml.safe_dump(saved, sort_keys=False, allow_unicode=True).rstrip())
    if tensors:
        for name, kind in source.kinds.items():
            print(f"{name:<60} {kind}   {len(source.boxes(name))} pieces")


@app.command()
def verify(where: Where) -> None:
    """Compare every file with its digest; of a run's folder, all checkpoints. Exit code 2 where one is damaged."""
    from lamella.train.find import find_checkpoint

    newest = find_checkpoint(where)
    from lamella.checkpoint import manifest, series, store

    paths = [newest]
    if newest.absolute() != where.absolute():
        paths = [series.step_folder(newest.parent, step) for step in series.steps(newest.parent)]
    damaged = 0
    for path in paths:
        try:
            store.verify(path)
            files = manifest.read(path).values()
            print(f"{path}: whole, {len(files)} files, {_size(sum(f.bytes for f in files))}")
        except manifest.Damaged as error:
            damaged += 1
            print(f"{path}: damaged: {error.what}")
    if damaged:
        raise typer.Exit(EXIT_USER)


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="a checkpoint, or a run's folder for its newest")],
    b: Annotated[Path, typer.Argument(metavar="B", help="another")],
    most: Annotated[int, typer.Option(help="how many tensors of each kind to name, the farthest first")] = 3,
    as_json: AsJson = False,
) -> None:
    """Say what differs from A to B: values, configuration, every tensor, whatever layouts saved them.

    Exit codes: 0 the tensors are the same bit for bit, 1 they differ.
    """
    from lamella.train.find import find_checkpoint

    one, two = find_checkpoint(a), find_checkpoint(b)
    from lamella.checkpoint import compare, store
    from lamella.checkpoint.source import Source

    first, second = Source(one), Source(two)
    lines = list(compare.values(store.read_values(one), store.read_values(two)))
    unlike, apart = compare.unlike(first, second), list(compare.tensors(first, second))
    differing = [x for x in apart if not x.same]
    if as_json:
        found = {"values": lines, "unlike": unlike, "tensors": [vars(x) for x in apart]}
        print(json.dumps(found))
    else:
        for line in lines + unlike:
            print(line)
        for kind in dict.fromkeys(x.name.split("/")[0] for x in apart):
            those = [x for x in apart if x.name.split("/")[0] == kind]
            off = sorted((x for x in those if not x.same), key=lambda x: -x.relative)
            print(f"{kind}: {len(those) - len(off)} of {len(those)} tensors are the same bit for bit")
            for x in off[:most]:
                print(f"  {x.name}: relative {x.relative:.2e}, largest {x.largest:.2e}")
    if differing or unlike:
        raise typer.Exit(EXIT_FAULT)


@app.command()
def average(
    sources: Annotated[list[Path], typer.Argument(metavar="CHECKPOINT...", help="two or more")],
    into: Annotated[Path, typer.Option(metavar="TARGET", help="the folder to make")],
    weights: Annotated[str | None, typer.Option(help="one a checkpoint, as 1,2,2; default: equal")] = None,
) -> None:
    """Write the mean of checkpoints' weights into TARGET, to generate, evaluate, convert or begin a run with."""
    from lamella.train.find import find_checkpoint

    if len(sources) < 2:
        raise UserError("average: takes two checkpoints or more")
    shares = _weights(weights, len(sources))
    if into.exists():
        raise UserError(f"{into}: is there already; name a new folder")
    paths = [find_checkpoint(source) for source in sources]
    from lamella.checkpoint import series
    from lamella.checkpoint.average import average as run

    target = series.step_folder(into / "checkpoints", max(series.step_of(path) for path in paths))
    try:
        run(paths, target, shares)
    except BaseException:
        _remove_empty(into)
        raise
    print(f"{target}: the mean of {len(paths)} checkpoints; weights alone, so a run begins with it, and none goes on")


@app.command()
def export(
    where: Where,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="the .safetensors file to make")],
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="of the weights in it")] = "bf16",
) -> None:
    """Write the weights under our names into one safetensors file; `lamella convert --to hf` for others' names."""
    from lamella.train.find import find_checkpoint

    if file.suffix != ".safetensors":
        raise UserError(f"{file}: name a file that ends in .safetensors")
    if file.exists():
        raise UserError(f"{file}: is there already; name a new file")
    path = find_checkpoint(where)
    from lamella.convert.export import export as run

    print(f"{file}: {run(path, file, dtype):,} parameters in {dtype}")


def _weights(text: str | None, count: int) -> list[float] | None:
    if text is None:
        return None
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = []
    if len(found) != count or not all(0 <= x < float("inf") for x in found) or not sum(found) > 0:
        raise UserError(f"--weights {text}: give {count} numbers of 0 or more, as 1,2,2")
    return found


def _remove_empty(folder: Path) -> None:
    for path in (folder / "checkpoints", folder):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"

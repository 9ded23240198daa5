"""`lamella kernels`: what the Triton kernels of a run compile to, compiled beforehand, and with tiles measured anew."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lamella.cli.train import Overrides
from lamella.errors import UserError

if TYPE_CHECKING:
    import torch

    from lamella.config import RunConfig
    from lamella.parallel.layout import Layout

app = typer.Typer(help="The Triton kernels of a run: report, warm-up, tune.", no_args_is_help=True)
RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml")]


@app.command("report")
def report(
    arch: Annotated[list[int] | None, typer.Option(help="80, 90 or 100; all where it is left out")] = None,
    op: Annotated[list[str] | None, typer.Option(metavar="NAME", help="of some operators alone")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object a line, for each kernel")] = False,
) -> None:
    """Compile every kernel for GPUs that need not be here: registers, spills, shared memory, tensor cores.

    Exit codes: 0 fine, 1 a kernel has a fault, 2 the input is wrong.
    """
    from lamella_kernels.forms import operators
    from lamella_kernels.tiles import ARCHITECTURES

    _need_triton()
    known = {"--arch": (arch, ARCHITECTURES), "--op": (op, operators())}
    for option, (given, there) in known.items():
        for word in given or []:
            if word not in there:
                raise UserError(f"{option} {word}: there is {', '.join(map(str, there))}")
    words = [word for a in arch or [] for word in ("--arch", str(a))]
    words += [word for name in op or [] for word in ("--op", name)] + ["--json"] * as_json
    raise typer.Exit(subprocess.run([sys.executable, "-m", "lamella_kernels.report", *words]).returncode)


@app.command("warm-up")
def warm_up(run: RunFile, overrides: Overrides = None) -> None:
    """Compile what a run's step launches, into Triton's cache (TRITON_CACHE_DIR). A run does so itself as it starts."""
    from lamella.config import load_run
    from lamella.train import rehearse

    config = load_run(run, overrides or [])
    device, begin = _need_gpu(), time.monotonic()
    rehearse.warm_up(config, _layout(config), device)
    print(f"every kernel of {config.name} is compiled: {time.monotonic() - begin:.0f} s")


@app.command("tune")
def tune(
    run: RunFile,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(metavar="FILE.json", help="the table, for LAMELLA_TILES")] = Path("tiles.json"),
    seconds: Annotated[float, typer.Option(min=1, help="begin no further call after so long")] = 1800,
) -> None:
    """Measure a run's kernels with other tiles, and write down those that are faster. A run itself never tunes."""
    from lamella.config import load_run

    config = load_run(run, overrides or [])
    if out.exists() or not out.absolute().parent.is_dir():
        what = "is there already; name another" if out.exists() else "lies in a folder that is not there; make it"
        raise UserError(f"--out {out} {what}")
    device = _need_gpu()
    from lamella.train.rehearse import rehearse
    from lamella_kernels import tuning

    layout = _layout(config)
    calls = tuning.collect(lambda: rehearse(config, layout, device))
    table = tuning.tune(calls, say=print, limit=seconds)
    aside = out.with_name(out.name + ".tmp")
    aside.write_text(json.dumps(table, indent=1) + "\n")
    aside.replace(out)
    print(f"{out}: {sum(map(len, table.values()))} entries of {len(table)} kernels; use them with LAMELLA_TILES={out}")


def _layout(config: "RunConfig") -> "Layout":
    """On as many processes as the run's layout needs at least."""
    from lamella.parallel.layout import resolve

    wanted = config.layout
    data = wanted.data or max(1, wanted.expert // wanted.tensor)
    return resolve(config, wanted.tensor * wanted.pipeline * data)


def _need_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise UserError("triton is not installed: pip install triton (Linux)")


def _need_gpu() -> "torch.device":
    _need_triton()
    import torch

    if not torch.cuda.is_available():
        raise UserError("no GPU here: run this where the run will, as with srun --gpus=1 lamella kernels ...")
    return torch.device("cuda", torch.cuda.current_device())

"""`lamella verify`: prove that a layout computes the same model as one process."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from lamella.cli.train import Overrides

KINDS = ("output", "loss", "norm", "gradient", "weight", "adam")


def verify(
    run: Annotated[Path, typer.Argument(metavar="RUN.yaml")],
    overrides: Overrides = None,
    layout: Annotated[
        list[str] | None, typer.Option(help="as tensor=2,pipeline=2; may be given several times; else the run's own")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="every legal layout on 1, 2, 4, ... processes")] = False,
    processes: Annotated[int, typer.Option(min=1, help="of the largest layout of --all")] = 8,
    steps: Annotated[int, typer.Option(min=1)] = 3,
    full: Annotated[bool, typer.Option("--full", help="the model as it is, not shrunk; it must fit")] = False,
    precision: Annotated[str, typer.Option(help="fp32, or bf16 at its own distance from fp32")] = "fp32",
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object a line, for each comparison")] = False,
) -> None:
    """Compare losses, gradients, weights and optimizer state of a layout with one process's, with 1 and 4 micro-
    batches, or 8 in a pipeline.

    Exit codes: 0 equal, 1 not, 2 the input is wrong.
    """
    from lamella.config import load_run, parse_layout
    from lamella.errors import UserError

    config = load_run(run, overrides or [])
    if precision not in ("fp32", "bf16"):
        raise UserError(f"--precision {precision}: choose fp32 or bf16")
    if every and layout:
        raise UserError("--all takes every layout; leave --layout out, or --all")
    layouts = [parse_layout(words) for words in layout or []] or [config.layout]
    from lamella.train import verify as verification
    from lamella.train.matrix import every_layout
    from lamella.train.reference import References

    if every:
        layouts = every_layout(config, processes)
    references = References(config, steps, full, precision)
    reports, shown = [], set()
    began = time.monotonic()
    for number, wanted in enumerate(layouts, 1):
        reference = references.of(wanted)
        if not as_json and id(reference) not in shown:
            shown.add(id(reference))
            _introduce(reference, full)
        for count in verification.micro_batch_counts(wanted):
            reports.append(verification.compare(reference, wanted, count))
            if as_json:
                print(json.dumps(_plain(reports[-1])), flush=True)
            else:
                _show(reports[-1], brief=every)
        if every and not as_json and number % 10 == 0:
            left = (time.monotonic() - began) * (len(layouts) / number - 1)
            print(f"{number} of {len(layouts)} layouts, about {left / 60:.0f} minutes left", flush=True)
    failed = [report for report in reports if not report.passed]
    if len(reports) > 1 and not as_json:
        print(f"{len(reports) - len(failed)} of {len(reports)} equal")
        for report in failed:
            print(f"not equal: {report.name()}: {report.verdict()}")
    raise typer.Exit(1 if failed else 0)


def _introduce(reference, full: bool) -> None:
    model, train = reference.run.model, reference.run.train
    layers = [word for block in model.stack for _ in range(block.repeat) for word in block.layers]
    kept = "whole" if full else "shrunk, every kind of layer kept"
    print(f"model ({kept}): d_model {model.d_model}, vocabulary {model.vocab_size}, layers {' '.join(layers)}")
    print(
        f"steps of {train.global_batch_size} rows x {train.sequence_length}, dropout {model.dropout}; after the first"
        f" step the weights moved by another {100 * reference.moved():.1f}%"
    )
    for line in reference.skipped:
        print(line + "; another seed taken")


def _show(report, brief: bool) -> None:
    print(f"{report.name()}: {report.verdict()}", flush=True)
    if not report.differences:
        return
    worst = {kind: report.worst(kind) for kind in KINDS}
    if brief:
        print("    worst " + "  ".join(f"{kind} {d.error:.1e}" for kind, d in worst.items()), flush=True)
        return
    for kind, d in worst.items():
        noise = f"noise floor {d.noise:.1e}" if kind != "adam" else "from given gradients"
        print(f"    worst {kind:<9} {d.error:.1e}  limit {d.limit:.1e}  {noise}  {d.name}", flush=True)


def _plain(report) -> dict:
    return {
        "layout": report.layout.model_dump(mode="json"),
        "processes": report.processes,
        "micro_batches": report.micro_batches,
        "passed": report.passed,
        "verdict": report.verdict(),
        "differences": [
            {"kind": d.kind, "step": d.step, "name": d.name, "error": d.error, "noise": d.noise, "limit": d.limit}
            for d in report.differences
        ],
    }

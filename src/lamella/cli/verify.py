"""`lamella verify`: prove that a layout computes the same model as one process."""

import json
from pathlib import Path
from typing import Annotated

import typer

from lamella.cli.train import Overrides

MICRO_BATCHES = (1, 4)


def verify(
    run: Annotated[Path, typer.Argument(metavar="RUN.yaml")],
    overrides: Overrides = None,
    layout: Annotated[
        list[str] | None, typer.Option(help="as tensor=2,sequence_parallel=true; may be given several times")
    ] = None,
    steps: Annotated[int, typer.Option(min=1)] = 3,
    full: Annotated[bool, typer.Option("--full", help="the model as it is, not shrunk; it must fit")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="a machine-readable report")] = False,
) -> None:
    """Compare losses, gradients, weights and optimizer state of a layout with one process's, with 1 and 4 micro-
    batches.

    Exit codes: 0 equal, 1 not, 2 the input is wrong.
    """
    from lamella.config import load_run, parse_layout

    config = load_run(run, overrides or [])
    layouts = [parse_layout(words) for words in layout or []] or [config.layout]
    from lamella.train import verify as verification

    reference = verification.make_reference(config, layouts, steps, full)
    if not as_json:
        _introduce(reference, full)
    reports = []
    for wanted in layouts:
        for count in MICRO_BATCHES:
            reports.append(verification.compare(reference, wanted, count))
            if not as_json:
                _show(reports[-1])
    if as_json:
        print(json.dumps([_plain(report) for report in reports]))
    raise typer.Exit(0 if all(report.passed for report in reports) else 1)


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


def _show(report) -> None:
    words = {k: v for k, v in report.layout.model_dump().items() if k not in ("zero", "micro_batch") and v}
    name = ",".join(f"{k}={str(v).lower()}" for k, v in words.items())
    print(f"{name}, {report.micro_batches} micro-batches of {report.layout.micro_batch} rows: {report.verdict()}")
    if report.differences:
        for kind in ("output", "loss", "norm", "gradient", "weight", "adam"):
            d = report.worst(kind)
            noise = f"noise floor {d.noise:.1e}" if kind != "adam" else "from given gradients"
            print(f"    worst {kind:<9} {d.error:.1e}  limit {d.limit:.1e}  {noise}  {d.name}")


def _plain(report) -> dict:
    return {
        "layout": report.layout.model_dump(),
        "micro_batches": report.micro_batches,
        "passed": report.passed,
        "verdict": report.verdict(),
        "differences": [
            {"kind": d.kind, "step": d.step, "name": d.name, "error": d.error, "noise": d.noise, "limit": d.limit}
            for d in report.differences
        ],
    }

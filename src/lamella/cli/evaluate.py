"""`lamella eval`: the loss of a checkpoint on held-out or other text."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from lamella.cli.generate import Checkpoint, Dtype, TokenizerFile
from lamella.errors import UserError


def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[Path | None, typer.Option(metavar="DATA.yaml", help="another prepared data set")] = None,
    split: Annotated[Literal["heldout", "train"] | None, typer.Option(help="of the data; default: heldout")] = None,
    text: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="a text file instead; may be given several times")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="of lm-evaluation-harness: names or YAML files, with commas between")
    ] = None,
    shots: Annotated[int | None, typer.Option(help="with --tasks: solved examples before each question")] = None,
    rows: Annotated[int | None, typer.Option(help="only the first so many rows, or examples of each task")] = None,
    tokenizer: TokenizerFile = None,
    dtype: Dtype = None,
    as_json: Annotated[bool, typer.Option("--json", help="a machine-readable result")] = False,
) -> None:
    """Loss in nats a token, perplexity and bits per byte, over rows as long as the run's; or tasks. One process.

    On the run's held-out rows it is the figure of the run's own last evaluation.
    """
    if text and (data is not None or split is not None):
        raise UserError("--text goes without --data and --split: it names what to evaluate on by itself")
    if tasks and (text or data is not None or split is not None):
        raise UserError("--tasks goes without --text, --data and --split: tasks bring their own data")
    if shots is not None and (shots < 0 or not tasks):
        raise UserError(f"--shots {shots}: " + ("must be at least 0" if tasks else "goes with --tasks"))
    if rows is not None and rows < 1:
        raise UserError(f"--rows {rows}: must be at least 1")
    from lamella.config import load_data
    from lamella.train.find import find_checkpoint

    path = find_checkpoint(checkpoint)
    other = None if data is None else load_data(data)
    from lamella.train.restore import restore
    from lamella.train.score import prepared_rows, score, text_rows

    if tasks:
        _print_tasks(path, tasks.split(","), rows, shots, tokenizer, dtype, as_json)
        return
    restored = restore(path, dtype, tokenizer)
    chosen = other or restored.run.data
    if text:
        what, found = ", ".join(text), text_rows(text, restored)
    else:
        what, found = f"{chosen.path}, {split or 'heldout'}", prepared_rows(chosen, split or "heldout", restored)
    result = score(restored, found, rows)
    if as_json:
        figures = {"loss": result.loss, "perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte}
        plain = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        where = {"checkpoint": str(path), "step": restored.step, "data": what}
        print(json.dumps(where | {"rows": result.rows, "tokens": result.tokens} | plain))
        return
    print(f"{path} on {what}: {result.rows:,} of {found.num_rows:,} rows, {result.tokens:,} tokens")
    bits = f"{result.bits_per_byte:.4f} bits per byte"
    print(f"loss {result.loss:.4f} nats a token, perplexity {result.perplexity:.2f}, {bits}")


def _print_tasks(
    path: Path,
    tasks: list[str],
    examples: int | None,
    shots: int | None,
    tokenizer: Path | None,
    dtype: Literal["fp32", "bf16"] | None,
    as_json: bool,
) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks: lm-evaluation-harness is not installed; pip install lamella[eval]")
    from lamella.train.harness import evaluate as run
    from lamella.train.restore import restore

    restored = restore(path, dtype, tokenizer, capacity=False)
    found = run(restored, tasks, examples, shots)
    if as_json:
        print(json.dumps({"checkpoint": str(path), "step": restored.step, "tasks": found}, default=str))
        return
    for note in restored.notes:
        print(note)
    for task, results in found.items():
        for name, value in results.items():
            metric, _, way = name.partition(",")
            if isinstance(value, float) and not metric.endswith("_stderr"):
                print(f"{task:<30} {metric:<16} {value:10.4f}   {way if way != 'none' else ''}".rstrip())

"""`lamella eval`: the loss of a checkpoint on held-out or other text."""

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
    rows: Annotated[int | None, typer.Option(help="only the first so many rows")] = None,
    tokenizer: TokenizerFile = None,
    dtype: Dtype = None,
    as_json: Annotated[bool, typer.Option("--json", help="a machine-readable result")] = False,
) -> None:
    """Loss in nats a token, perplexity and bits per byte, over rows as long as the run's. One process.

    On the run's held-out rows it is the figure of the run's own last evaluation.
    """
    if text and (data is not None or split is not None):
        raise UserError("--text goes without --data and --split: it names what to evaluate on by itself")
    if rows is not None and rows < 1:
        raise UserError(f"--rows {rows}: must be at least 1")
    from lamella.config import load_data
    from lamella.train.find import find_checkpoint

    path = find_checkpoint(checkpoint)
    other = None if data is None else load_data(data)
    from lamella.train.restore import restore
    from lamella.train.score import prepared_rows, score, text_rows

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

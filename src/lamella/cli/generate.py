"""`lamella generate`: text from a checkpoint, as it comes."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lamella.errors import UserError

if TYPE_CHECKING:
    from lamella.data.tokenizer import Tokenizer
    from lamella.model.generate import Sampling
    from lamella.train.restore import Restored

Checkpoint = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="a run's folder, or one of its checkpoints")]
TokenizerFile = Annotated[Path | None, typer.Option("--tokenizer", help="its file or folder, where the data's is gone")]
Dtype = Annotated[Literal["fp32", "bf16"] | None, typer.Option(help="to compute in; default: as trained")]
SMALL = 100_000_000  # parameters whose steps are over before threads have met, and far later on a busy machine


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[list[str] | None, typer.Option(help="a text's beginning; may be given several times")] = None,
    whole: Annotated[bool, typer.Option("--whole", help="all of standard input is one prompt, not each line")] = False,
    max_tokens: Annotated[int, typer.Option(help="at most as many new tokens")] = 128,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token")] = 0.8,
    top_p: Annotated[float, typer.Option(help="draw from the likeliest tokens that have this chance together")] = 1.0,
    top_k: Annotated[int, typer.Option(help="draw from so many of the likeliest tokens; 0: all")] = 0,
    seed: Annotated[int, typer.Option(help="the same seed gives the same text")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="end before this text; may be given several times")] = None,
    batch: Annotated[int, typer.Option(help="prompts that are continued together")] = 16,
    tokenizer: TokenizerFile = None,
    dtype: Dtype = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object a prompt")] = False,
) -> None:
    """Continue each prompt to its end of document, a stop text, or max-tokens. Without --prompt: the lines of a pipe.

    Prints the prompt and what follows it; with --json an object with prompt, text, tokens and why it ended.
    """
    for name, value, fits, range_ in (
        ("--max-tokens", max_tokens, max_tokens >= 1, "at least 1"),
        ("--temperature", temperature, 0 <= temperature < float("inf"), "at least 0"),
        ("--top-p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
        ("--top-k", top_k, top_k >= 0, "at least 0"),
        ("--seed", seed, 0 <= seed < 2**63, "at least 0"),
        ("--batch", batch, batch >= 1, "at least 1"),
        ("--stop", '""', "" not in (stop or []), "a text of at least one character"),
        ("--whole", "with --prompt", not (whole and prompt), "without it: it is about standard input"),
    ):
        if not fits:
            raise UserError(f"{name} {value}: must be {range_}")
    from lamella.train.find import find_checkpoint

    path = find_checkpoint(checkpoint)
    prompts = prompt or _piped(whole)
    from lamella.model.generate import Sampling
    from lamella.train.restore import restore

    restored = restore(path, dtype, tokenizer, capacity=False)
    for note in restored.notes:
        print(f"lamella: {note}", file=sys.stderr)
    _set_threads(restored)
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a model may spell half a surrogate pair
    try:
        _continue(restored, prompts, Sampling(temperature, top_p, top_k, seed), stop or [], max_tokens, batch, as_json)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as `head` does; nothing is left to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _piped(whole: bool) -> list[str]:
    """The prompts of standard input. Raises UserError: a terminal, nothing, or what is no text."""
    if sys.stdin.isatty():
        raise UserError("no prompt: give --prompt TEXT, or pipe one a line into standard input")
    raw = sys.stdin.buffer.read()
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: not UTF-8 text (byte {error.start}); pipe text, or give --prompt") from None
    if not text:
        raise UserError("no prompt: standard input is empty; give --prompt TEXT, or pipe one a line")
    return [text] if whole else [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def _set_threads(restored: "Restored") -> None:
    import torch

    if "OMP_NUM_THREADS" not in os.environ and sum(p.numel() for p in restored.model.parameters()) < SMALL:
        torch.set_num_threads(1)


def _continue(
    restored: "Restored",
    prompts: list[str],
    sampling: "Sampling",
    stops: list[str],
    max_tokens: int,
    size: int,
    as_json: bool,
) -> None:
    """Batch by batch. Texts are printed in the prompts' order: the first that has not ended as it comes."""
    from lamella.model.generate import Generation

    tokenizer = restored.tokenizer
    for first in range(0, len(prompts), size):
        some = prompts[first : first + size]
        ids = [row.tolist() for row in tokenizer.encode_batch(some)]
        texts = [_Continuation(tokenizer, text, row, stops) for text, row in zip(some, ids, strict=True)]
        batch = Generation(restored.model, ids, tokenizer.eod, tokenizer.vocab_size, sampling, first)
        printer = _print_json(texts, first) if as_json else _print_text(texts, first, len(prompts))
        while batch.rows:
            for row, token in batch.step():
                texts[row - first].add(token, max_tokens)
            batch.leave([row for row in batch.rows if texts[row - first].ended])
            next(printer, None)


class _Continuation:
    """A prompt and what follows it. `ended`: "eod", "stop" or "max_tokens" once nothing more comes."""

    def __init__(self, tokenizer: "Tokenizer", prompt: str, ids: list[int], stops: list[str]):
        from lamella.data.tokenizer.detokenize import Text

        self.prompt, self.text, self.tokens = prompt, "", 0
        self.ended: str | None = None
        self._coming, self._eod = Text(tokenizer, ids, stops), tokenizer.eod

    def add(self, token: int, max_tokens: int) -> None:
        self.tokens += 1
        if token == self._eod:
            self.ended = "eod"
        else:
            self.text += self._coming.add(token)
            if self._coming.stopped:
                self.ended = "stop"
            elif self.tokens == max_tokens:
                self.ended = "max_tokens"
        if self.ended:
            self.text += self._coming.end()
            self.ended = "stop" if self._coming.stopped else self.ended  # in what was half a character


def _print_text(texts: list[_Continuation], first: int, count: int) -> Iterator[None]:
    """Prints what has come since the last turn; each `next` is a turn."""
    for number, text in enumerate(texts, first + 1):
        print("" if number == 1 else "\n", end="")
        if count > 1:
            print(f"==> {number} <==")
        print(text.prompt, end="")
        shown = 0
        while True:
            print(text.text[shown:], end="", flush=sys.stdout.isatty())
            shown = len(text.text)
            if text.ended:
                break
            yield
        print()


def _print_json(texts: list[_Continuation], first: int) -> Iterator[None]:
    for number, text in enumerate(texts, first):
        while not text.ended:
            yield
        print(json.dumps({"index": number} | {k: getattr(text, k) for k in ("prompt", "text", "tokens", "ended")}))

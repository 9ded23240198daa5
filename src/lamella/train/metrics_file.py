"""`metrics.jsonl`, one line a step, the truth of a run. This file never imports torch."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lamella.errors import UserError


class MetricsFile:
    """Appends one JSON object a step; opened at a step, it forgets what was logged from that step on.

    `packed`: what `packed` gave of the steps before, for a file that has lost them.
    """

    def __init__(self, path: Path, step: int, packed: bytes | None = None):
        self.path = path
        kept = [line for line in read_metrics(path) if line["step"] < step] if path.exists() else []
        if packed is not None and len(kept) < step:
            kept = [json.loads(line) for line in gzip.decompress(packed).splitlines()]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(path)
        self.file = path.open("a", buffering=1)

    def write(self, values: dict[str, Any]) -> None:
        self.file.write(json.dumps(values) + "\n")

    def packed(self) -> Callable[[], bytes]:
        """What makes the lines up to now, gzipped, though the file may grow before it is called."""
        size = self.path.stat().st_size

        def pack() -> bytes:
            with self.path.open("rb") as file:
                return gzip.compress(file.read(size), mtime=0)

        return pack


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line cut off by a kill is left out. Raises UserError on a damaged line."""
    lines = path.read_text().splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise UserError(f"{path}: line {number} is damaged; mend or remove it") from None
    return found

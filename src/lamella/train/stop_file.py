"""A file in a run's folder that asks it to save and stop: for whoever cannot send its processes a signal.

torchrun passes no signal on, and a user on another machine has none. It holds one word: "requeue", start it again, or
"stop". This file never imports torch.
"""

from pathlib import Path
from typing import Literal

FILE = "stop"
Why = Literal["requeue", "stop"]


def request(folder: Path, why: Why) -> None:
    aside = folder / f"{FILE}.tmp"
    aside.write_text(why)
    aside.replace(folder / FILE)


def requested(folder: Path) -> Why | None:
    try:
        return "stop" if (folder / FILE).read_text().strip() == "stop" else "requeue"
    except OSError:
        return None


def clear(folder: Path) -> None:
    (folder / FILE).unlink(missing_ok=True)

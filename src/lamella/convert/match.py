"""Whether a folder of theirs holds what a model of its configuration has: each tensor, its shape, a known type."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from lamella.convert.map import Link
from lamella.errors import UserError


class Entry(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...


def match(
    tensors: Mapping[str, Entry],
    linked: Iterable[Link],
    folder: Path,
    file: Callable[[str], Path],
    what: str,
    said: str,
) -> set[str]:
    """The names that have no place among `linked`. `file(name)` holds a tensor; `what` they are by what `said` says.

    Raises UserError for the first that is missing or of another shape, or stored as no float of ours.
    """
    wanted = {link.theirs: link for link in linked}
    for name, link in wanted.items():
        entry = tensors.get(name)
        if entry is None:
            raise UserError(f"{folder}: lacks {name}, which {what} has")
        if entry.shape != link.their_shape:
            shapes = f"is {list(entry.shape)}, by {said} it must be {list(link.their_shape)}"
            raise UserError(f"{file(name)}: {name} {shapes}")
        if isinstance(entry.dtype, str):
            raise UserError(f"{file(name)}: {name} is stored as {entry.dtype}; convert weights of fp32, bf16 or fp16")
    return tensors.keys() - wanted.keys()

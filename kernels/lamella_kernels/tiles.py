"""Block sizes, warps and stages of the Triton kernels: looked up, never searched for in a run.

tiles.json holds, by kernel, a list of entries; the first whose conditions hold is taken, the last has none:

    "rmsnorm_forward": [{"arch": [80], "up_to": {"W": 256}, "ROWS": 32, "num_warps": 4}, {"ROWS": 1, "num_warps": 8}]

arch: compute capabilities without the dot; up_to: the largest sizes of the call. The environment variable LAMELLA_TILES
names a file of the same form, as tuning writes it, whose entries come first. `table` is what a run records.
"""

import functools
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ARCHITECTURES = (80, 90, 100)
CONDITIONS = ("arch", "up_to")

_target: list[int] = []
_trials: list[dict[str, dict[str, int]]] = []
_lookups: list[dict[str, dict[str, Any]]] = []


@functools.cache
def table() -> Mapping[str, list[dict[str, Any]]]:
    """Every kernel's entries, a user's before the shipped ones. ValueError: the user's file is no such table."""
    shipped = json.loads(Path(__file__).with_suffix(".json").read_text())
    path = os.environ.get("LAMELLA_TILES")
    own = _read(Path(path), shipped) if path else {}
    return {kernel: own.get(kernel, []) + entries for kernel, entries in shipped.items()}


def _read(path: Path, shipped: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    try:
        own = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"LAMELLA_TILES={path}: {error}; mend the file or unset the variable") from error
    for kernel, entries in own.items():
        names = [sorted(entry.keys() - CONDITIONS) for entry in entries]
        if any(found != sorted(shipped.get(kernel, [{}])[-1]) for found in names):
            raise ValueError(f"LAMELLA_TILES={path}: {kernel} has other names than the shipped table; tune anew")
    return own


@contextmanager
def compiled_for(arch: int) -> Iterator[None]:
    """Tiles of this architecture, whatever machine it is."""
    _target.append(arch)
    try:
        yield
    finally:
        _target.pop()


def architecture() -> int:
    """That of the current GPU; without one, that of the H100."""
    if _target:
        return _target[-1]
    return _capability(torch.cuda.current_device()) if torch.cuda.is_available() else 90


@functools.cache
def _capability(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def tiles(kernel: str, **sizes: int) -> dict[str, int]:
    """The kernel's block sizes and options for a call of these sizes, widths of the model all."""
    found = dict(_entry(kernel, architecture(), tuple(sizes.items())))
    for trial in _trials:
        found |= trial.get(kernel, {})
    for lookup in _lookups:
        lookup[kernel] = {"arch": [architecture()], "up_to": dict(sizes), **found}
    return found


@contextmanager
def trying(entries: dict[str, dict[str, int]]) -> Iterator[None]:
    """These in place of the table's, by kernel."""
    _trials.append(entries)
    try:
        yield
    finally:
        _trials.remove(entries)


@contextmanager
def lookups() -> Iterator[dict[str, dict[str, Any]]]:
    """The entry that each kernel is given inside, as a user's table would have it for just these sizes."""
    found: dict[str, dict[str, Any]] = {}
    _lookups.append(found)
    try:
        yield found
    finally:
        _lookups.remove(found)


@functools.cache
def _entry(kernel: str, arch: int, sizes: tuple[tuple[str, int], ...]) -> dict[str, int]:
    given = dict(sizes)
    for entry in table()[kernel]:
        limits = entry.get("up_to", {})
        if arch in entry.get("arch", [arch]) and all(given[name] <= limit for name, limit in limits.items()):
            return {name: value for name, value in entry.items() if name not in CONDITIONS}
    raise AssertionError(f"tiles.json: the last entry of {kernel} must have no condition")

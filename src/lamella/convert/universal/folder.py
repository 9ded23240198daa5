"""A universal folder of DeepSpeed's: a file for each parameter and each state of it, whatever layout trained it.

    FOLDER/latest_universal                             global_step500
           global_step500/ zero/NAME/fp32.pt            the master, whole; so exp_avg.pt, exp_avg_sq.pt, step.pt
                           zero/optimizer_state.pt      what the optimizer is, for all parameters
                           mp_rank_00_model_states.pt   steps, shapes, what the client added; ZeRO 3 adds a prefix

Its converter writes {"param": tensor, ...} of ZeRO 1 and 2, and of ZeRO 3 the flat tensor itself. All files are read as
data (`lamella.checkpoint.unpickle`).
"""

import dataclasses
import math
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamella.checkpoint.saved import Saved, read_saved
from lamella.convert.map import Slices
from lamella.convert.read import FLOATS
from lamella.errors import UserError

LATEST, ZERO, OPTIMIZER, STATES = "latest_universal", "zero", "optimizer_state.pt", "*model_states.pt"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A state of a parameter. `shape` is flat where ZeRO 3 wrote it."""

    file: Path
    saved: Saved

    @property
    def dtype(self) -> torch.dtype:
        return self.saved.dtype


def is_universal(folder: Path) -> bool:
    return (folder / LATEST).is_file() or (folder / ZERO).is_dir()


class Folder:
    """`names` of its parameters; `client`: what its model states hold. Raises UserError: not there, damaged."""

    def __init__(self, source: Path):
        self.folder = _step(source)
        try:
            self.names = sorted(path.name for path in (self.folder / ZERO).iterdir() if path.is_dir())
        except OSError as error:
            raise UserError(f"{self.folder / ZERO}: cannot be read ({error.strerror or error})") from None
        states = sorted(self.folder.glob(STATES))
        if not states:
            raise UserError(f"{self.folder}: lacks {STATES}; copy the folder again")
        found = read_saved(states[0])
        if not isinstance(found, dict):
            raise UserError(f"{states[0]}: holds no mapping; copy the folder again")
        self.states, self.client = states[0], found
        self._known: dict[tuple[str, str], Entry | None] = {}

    def entry(self, name: str, state: str = "fp32") -> Entry | None:
        """None where there is no such file. Raises UserError where it holds no tensor of floats."""
        if (name, state) not in self._known:
            file = self.folder / ZERO / name / f"{state}.pt"
            found = read_saved(file) if file.is_file() else None
            found = found.get("param") if isinstance(found, dict) else found
            if file.is_file() and not isinstance(found, Saved):
                raise UserError(f"{file}: holds no tensor; copy the folder again")
            if isinstance(found, Saved) and found.dtype not in FLOATS.values():
                raise UserError(f"{file}: holds {found.dtype}, and masters and moments are fp32")
            self._known[name, state] = Entry(file, found) if isinstance(found, Saved) else None
        return self._known[name, state]

    def read(self, name: str, state: str, shape: tuple[int, ...], slices: Slices) -> Tensor:
        """A box of the state, which is flat or of the shape."""
        entry = self.entry(name, state)
        assert entry is not None and math.prod(entry.saved.shape) == math.prod(shape), (name, state)
        return entry.saved.tensor().reshape(shape)[slices].clone()

    @cached_property
    def step(self) -> int:
        """Of the optimizer, which its moments are of; else of the engine. Raises UserError."""
        found: Any = None
        for name in self.names[:1]:
            file = self.folder / ZERO / name / "step.pt"
            found = read_saved(file) if file.is_file() else None
        if found is None:
            file = self.folder / ZERO / OPTIMIZER
            whole = read_saved(file) if file.is_file() else {}
            try:
                found = whole["optimizer_state_dict"]["state"][0]["step"]
            except (KeyError, TypeError, IndexError):
                found = self.client.get("global_steps", 0)
        one = isinstance(found, Saved) and found.shape in ((), (1,))
        number = found.tensor().reshape(-1)[0].item() if one else found
        if not isinstance(number, int | float) or not 0 <= number < 2**53 or number != int(number):
            raise UserError(f"{self.folder}: its step is no whole number: {str(number)[:40]}")
        return int(number)


def _step(source: Path) -> Path:
    latest = source / LATEST
    if not latest.is_file():
        return source
    name = latest.read_text(errors="replace").strip()
    if not name or Path(name).name != name or not (source / name / ZERO).is_dir():
        raise UserError(f"{latest}: names {name[:60]!r}, and there is no such folder with a {ZERO} in it")
    return source / name

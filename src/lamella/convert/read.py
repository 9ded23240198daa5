"""A folder of Hugging Face's: `config.json` and the weights, in slices, one file open at a time.

Weights are safetensors, whole or in shards with an index, or what `torch.save` wrote (`pytorch_model.bin`, or a .pth
that is given by its name), of which tensors alone are read (`weights_only`).
"""

import dataclasses
import json
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lamella.convert.map import Slices
from lamella.errors import UserError

CONFIG = "config.json"
SAFE, BINARY = "model.safetensors", "pytorch_model.bin"
SAVED = (".bin", ".pth")  # by torch.save
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Entry:
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | str  # a text: one that is no float here


def read_config(folder: Path) -> dict[str, Any]:
    """Raises UserError: not there, not JSON, no mapping."""
    file = folder / CONFIG
    try:
        tree = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{folder}: has no {CONFIG}; name a folder that holds a Hugging Face model") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{file}: holds no mapping of keys to values")
    return tree


class Weights:
    """`tensors`: what there is, by name. `folder` may be a .pth. Raises UserError: no weights, a damaged file, or one
    that is missing.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.tensors: dict[str, Entry] = {}
        for file, listed in _files(folder):
            found = dict(_entries(file))
            if listed is not None and (missing := sorted(listed - found.keys())):
                raise UserError(f"{file}: lacks {missing[0]}, which the index says it holds; fetch the file again")
            if twice := sorted(found.keys() & self.tensors.keys()):
                raise UserError(f"{file}: {twice[0]} is there twice; keep the files of one model in {folder}")
            self.tensors |= found

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor of floats."""
        dtype = self.tensors[name].dtype
        assert isinstance(dtype, torch.dtype), (name, dtype)
        return dtype

    def read(self, name: str, slices: Slices | None = None) -> Tensor:
        """The tensor, or a box of it, in the file's dtype. Raises UserError."""
        entry = self.tensors[name]
        box = slices or tuple(slice(0, n) for n in entry.shape)
        with _damage(entry.file):
            if entry.file.suffix in SAVED:
                return _load(entry.file)[name][box].clone()
            with safe_open(entry.file, framework="pt") as file:  # closed, its pages leave the memory
                return file.get_slice(name)[box].clone() if box else file.get_tensor(name).clone()


def _files(folder: Path) -> list[tuple[Path, set[str] | None]]:
    """The files of weights, with the names that an index lists for each."""
    if folder.is_file():
        return [(folder, None)]
    for whole in (folder / SAFE, folder / BINARY):
        index = whole.with_name(whole.name + ".index.json")
        if index.is_file():
            return [(folder / name, names) for name, names in sorted(_index(index).items())]
        if whole.is_file():
            return [(whole, None)]
    raise UserError(f"{folder}: has no {SAFE}, nor {BINARY}, nor an index of shards of either")


def _index(index: Path) -> dict[str, set[str]]:
    listed: dict[str, set[str]] = {}
    try:
        for name, file in json.loads(index.read_bytes())["weight_map"].items():
            if Path(file).name != file:
                raise ValueError(f"{file} is no name of a file")
            listed.setdefault(file, set()).add(name)
    except OSError as error:
        raise UserError(f"{index}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: no index of tensors ({error}); fetch the file again") from None
    return listed


def _entries(file: Path) -> Iterator[tuple[str, Entry]]:
    with _damage(file):
        if file.suffix in SAVED:
            _compare_sums(file)
            for name, tensor in _load(file).items():
                kind = next((word for word, dtype in FLOATS.items() if dtype == tensor.dtype), str(tensor.dtype))
                yield name, Entry(file, tuple(tensor.shape), FLOATS.get(kind, kind))
            return
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                held = opened.get_slice(name)
                kind: str = held.get_dtype()  # type: ignore[assignment]
                yield name, Entry(file, tuple(held.get_shape()), FLOATS.get(kind, kind))


def _load(file: Path) -> dict[str, Tensor]:
    loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(loaded, dict) or not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in loaded.items()):
        raise ValueError("no mapping of names to tensors")
    return loaded


def _compare_sums(file: Path) -> None:
    """What torch.save writes is a zip archive, whose checksums torch.load does not look at."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            wrong = archive.testzip()
        if wrong is not None:
            raise ValueError(f"{wrong} inside it differs from its checksum; fetch the file again")


@contextmanager
def _damage(file: Path) -> Iterator[None]:
    """What libraries raise where a file is not what it should be, as one line."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{file}: missing; fetch the file again") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    except UserError:
        raise
    except (SafetensorError, RuntimeError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{file}: damaged or no weights ({' '.join(str(error).split())[:120]})") from None
    except Exception as error:  # torch.load tells a foreign pickle by an error of pickle's
        if type(error).__module__ not in ("_pickle", "pickle"):
            raise
        found = re.search(r"(?:GLOBAL|class|function) (\S+)", str(error))
        what = f" ({found[1]})" if found else ""
        said = f"holds more than tensors, which is never loaded{what}"
        raise UserError(f"{file}: {said}; save it as safetensors") from None

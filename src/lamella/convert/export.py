"""A checkpoint's weights under our own names in one safetensors file: any stack, also what no other program has."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lamella.checkpoint.disk import disk_errors
from lamella.checkpoint.source import Source
from lamella.convert.write import Kind, write_file
from lamella.train.restore import DTYPES

MASTER = "master/"


def export(path: Path, file: Path, dtype: Literal["fp32", "bf16"]) -> int:
    """Writes the file, a tensor at a time. Returns the number of parameters. Raises UserError."""
    source = Source(path)
    masters = {name.removeprefix(MASTER): kind for name, kind in source.kinds.items() if name.startswith(MASTER)}
    kinds = {name: Kind(tuple(kind.shape), DTYPES[dtype]) for name, kind in masters.items()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, kind in kinds.items():
            whole = torch.empty(kind.shape, dtype=kind.dtype)
            for offset, size in source.boxes(MASTER + name):
                box = tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))
                whole[box] = source.read(MASTER + name, offset, size).to(kind.dtype)
            yield name, whole

    temporary = file.with_name(file.name + ".tmp")
    with disk_errors(file, "cannot write"):
        try:
            write_file(temporary, kinds, tensors())
            temporary.replace(file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    return sum(kind.elements for kind in masters.values())

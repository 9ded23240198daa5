"""A checkpoint as megatron-core's `dist_checkpointing` reads it, written a piece at a time by one process."""

import argparse
import io
import json
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from lamella.convert.megatron.folder import COMMON, FORMAT, LATEST, METADATA
from lamella.convert.write import Kinds

DATA = "__0_0.distcp"
VERSION = 3.0  # Megatron-LM's own, of the meaning of its tensors


def write_iteration(
    folder: Path,
    iteration: int,
    args: dict[str, Any],
    content: dict[str, Any],
    kinds: Kinds,
    pieces: Iterator[tuple[str, tuple[int, ...], Tensor]],
    objects: Iterable[str],
) -> None:
    """`pieces`: name of a tensor, offset in it, block. Iteration 0 is a release, which starts a run. Raises OSError."""
    name = f"iter_{iteration:07d}" if iteration else "release"
    here = folder / name
    here.mkdir()
    state: dict[str, Any] = {
        tensor: TensorStorageMetadata(TensorProperties(dtype=kind.dtype), torch.Size(kind.shape), [])
        for tensor, kind in kinds.items()
    }
    stored: dict[MetadataIndex, _StorageInfo] = {}
    with (here / DATA).open("xb") as file:
        for tensor, offset, block in pieces:
            at = torch.Size(offset)
            state[tensor].chunks.append(ChunkStorageMetadata(at, block.size()))
            stored[MetadataIndex(tensor, at)] = _append(file, block.contiguous().clone())
        for name_ in objects:
            state[name_] = BytesStorageMetadata()
            stored[MetadataIndex(name_)] = _append(file, [None])
    metadata = Metadata(state, planner_data=None, storage_data=stored)
    (here / METADATA).write_bytes(pickle.dumps(metadata))
    common = {
        "args": argparse.Namespace(**args),
        "checkpoint_version": VERSION,
        "iteration": iteration,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": content,
    }
    with (here / COMMON).open("xb") as file:
        _append(file, common)
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (here / FORMAT).write_text(json.dumps(backends | {"common_backend": "torch", "common_backend_version": 1}))
    (folder / LATEST).write_text(str(iteration) if iteration else name)


def _append(file: Any, value: Any) -> _StorageInfo:
    buffer = io.BytesIO()  # on a full disk torch.save into a file tells of the zip format
    torch.save(value, buffer)
    raw, at = buffer.getbuffer(), file.tell()
    file.write(raw)
    return _StorageInfo(DATA, at, len(raw))

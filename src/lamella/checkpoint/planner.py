"""How torch.distributed.checkpoint (DCP) saves and loads `Pieces`, and the checks that it leaves out.

DCP accepts a hole where one process saves, drops all but one of the pieces that share an offset, and cannot know of a
tensor that no rank owns. Here the coordinator counts every element of every tensor before a byte is written.
"""

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from lamella.errors import UserError

SHOWN = 3  # names in a message


class Pieces:
    """What one rank holds of one global tensor: live views with their offsets, as `boxes.pieces` gives them.

    `owner`: this rank writes them; of a replica set one rank does. A rank that holds nothing of a tensor may leave it
    out or hold an empty `Pieces`.
    """

    def __init__(
        self,
        shape: Iterable[int],
        dtype: torch.dtype,
        held: Iterable[tuple[tuple[int, ...], Tensor]],
        owner: bool = True,
    ):
        held = list(held)
        self.shape, self.dtype, self.owner = torch.Size(shape), dtype, owner
        self.held = {torch.Size(offset): view for offset, view in held}
        assert len(self.held) == len(held), f"two pieces at one offset of a tensor of {tuple(self.shape)}"
        assert all(view.dtype == dtype for _, view in held), (dtype, {view.dtype for _, view in held})

    def at(self, offset: torch.Size | None) -> Tensor:
        assert offset is not None
        return self.held[offset]

    def chunks(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offset, view.size()) for offset, view in self.held.items()]

    def snapshot(self, into: "Pieces | None" = None) -> "Pieces":
        """A copy in the CPU's memory, which training may outrun while it is being written; into an earlier one's."""
        kept = into.held if into is not None else {}
        copies = []
        for offset, view in self.held.items():
            copy = kept.get(offset)
            if copy is None:
                copy = torch.empty(view.shape, dtype=view.dtype, pin_memory=view.is_cuda)
            copies.append((offset, copy.copy_(view.detach())))
        return Pieces(self.shape, self.dtype, copies, self.owner)


class SavePlanner(DefaultSavePlanner):
    """Plans the saving of a dict of `Pieces`. Raises RuntimeError where they do not make up the tensors."""

    state_dict: dict[str, Pieces]

    def __init__(self):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, x in self.state_dict.items():
            properties = TensorProperties(dtype=x.dtype)
            items += [
                WriteItem(
                    MetadataIndex(name, chunk.offsets),
                    WriteItemType.SHARD,
                    tensor_data=TensorWriteData(chunk, properties, x.shape),
                )
                for chunk in x.chunks()
                if x.owner
            ]
        self.plan = SavePlan(items, planner_data={name: (x.shape, x.dtype) for name, x in self.state_dict.items()})
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        faults = _cover_faults(all_plans)
        if faults:
            raise RuntimeError(f"the ranks' pieces do not make up the tensors: {_some(faults)}")
        try:
            return super().create_global_plan(all_plans)
        except ValueError as error:  # an overlap, where a hole makes up for it
            raise RuntimeError(f"the ranks' pieces do not make up the tensors: {error}") from error

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].at(index.offset).detach()


class LoadPlanner(DefaultLoadPlanner):
    """Plans the loading into a dict of `Pieces`. Raises UserError for a name, shape or dtype that does not match.

    With `partial` the checkpoint may hold tensors that no rank asks for.
    """

    state_dict: dict[str, Pieces]

    def __init__(self, path: Path, partial: bool):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.path, self.partial = path, partial

    def set_up_planner(
        self, state_dict: dict[str, Pieces], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # The default one walks the values for tensors on the meta device and puts None for what it does not know.
        assert metadata is not None
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator
        self.saved = metadata.state_dict_metadata

    def create_local_plan(self) -> LoadPlan:
        items, faults = [], []
        for name, x in self.state_dict.items():
            saved = self.saved.get(name)
            if not isinstance(saved, TensorStorageMetadata):
                faults.append(f"{name} is not in the checkpoint")
            elif (saved.size, saved.properties.dtype) != (x.shape, x.dtype):
                faults.append(
                    f"{name} is {_text(x.shape, x.dtype)} here and {_text(saved.size, saved.properties.dtype)} "
                    "in the checkpoint"
                )
            else:
                found = create_read_items_for_chunk_list(name, saved, x.chunks())
                if sum(math.prod(i.lengths) for i in found) != sum(view.numel() for view in x.held.values()):
                    faults.append(f"{name} has a hole in the checkpoint")
                items += found
        self._refuse(faults)
        return LoadPlan(items, planner_data=tuple(self.state_dict))

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        if not self.partial:
            asked = {name for plan in global_plan for name in plan.planner_data}
            self._refuse([f"{n} is not in the model" for n in self.saved if n not in asked])
        return super().create_global_plan(global_plan)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].at(index.offset)

    def _refuse(self, faults: list[str]) -> None:
        if faults:
            raise UserError(f"{self.path}: of another model: {_some(faults)}; use the model it was saved from")


def _cover_faults(plans: list[SavePlan]) -> list[str]:
    """One line for each tensor whose pieces, over all ranks, leave a hole, overlap, or disagree about the whole."""
    kinds: dict[str, set[tuple[torch.Size, torch.dtype]]] = {}
    for plan in plans:
        for name, kind in plan.planner_data.items():
            kinds.setdefault(name, set()).add(kind)
    chunks = [(item.index.fqn, item.tensor_data.chunk) for plan in plans for item in plan.items if item.tensor_data]
    offsets = Counter((name, chunk.offsets) for name, chunk in chunks)
    twice = {name: offset for (name, offset), n in offsets.items() if n > 1}
    elements: Counter[str] = Counter()
    for name, chunk in chunks:
        elements[name] += math.prod(chunk.sizes)
    faults = []
    for name, kind in kinds.items():
        wanted = math.prod(next(iter(kind))[0])
        if len(kind) > 1:
            faults.append(f"{name} is {' and '.join(sorted(_text(*k) for k in kind))}")
        elif name in twice:
            faults.append(f"{name} has two pieces at {tuple(twice[name])}")
        elif elements[name] != wanted:
            faults.append(f"{name} has {elements[name]} of {wanted} elements")
    return faults


def _some(faults: list[str]) -> str:
    return ", ".join(faults[:SHOWN]) + (f" and {len(faults) - SHOWN} more" if len(faults) > SHOWN else "")


def _text(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"

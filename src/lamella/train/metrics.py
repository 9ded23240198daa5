"""A step's metrics: sums gathered in the model and over the ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lamella.data.stream import TrainRows
from lamella.parallel.mesh import Mesh


class Totals:
    """Sums over all processes of what each has recorded. Which names there are is told once, in the first call."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self.shapes: dict[str, torch.Size] = {}

    def sum(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The sums over the step's rows, on the CPU. The ranks of a tensor group have seen the same rows."""
        if not self.shapes:
            self.shapes = self._agree({name: value.shape for name, value in values.items()})
        zero = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        flat = [values.get(n, zero).expand(shape).reshape(-1) for n, shape in self.shapes.items()]
        total = (self.mesh.sum(torch.cat(flat)) / self.mesh.layout.tensor).cpu()
        pieces = total.split([shape.numel() for shape in self.shapes.values()])
        return {n: p.view(shape) for (n, shape), p in zip(self.shapes.items(), pieces, strict=True)}

    def _agree(self, mine: dict[str, torch.Size]) -> dict[str, torch.Size]:
        """All names in one order: the stages of a pipeline record different ones."""
        everyone: list[dict[str, torch.Size]] = [mine] * self.mesh.layout.world
        if self.mesh.layout.pipeline > 1:
            dist.all_gather_object(everyone, mine)
        return {name: shape for one in everyone for name, shape in one.items()}


def source_metrics(sums: dict[str, Tensor], data: TrainRows, step: int) -> dict[str, Any]:
    """Per source of the data: tokens, and loss in nats a token; nothing where there is one source.

    {"sources": {name: {...}}}
    """
    if "source/nats" not in sums:
        return {}
    each = zip(data.names, sums["source/nats"].tolist(), data.source_counts(step), strict=True)
    return {"sources": {name: {"tokens": n, "loss": nats / n if n else None} for name, nats, n in each}}


def moe_metrics(sums: dict[str, Tensor], tokens: int, rows: int) -> dict[str, Any]:
    """Per mixture of experts: share of the slots by expert, share dropped, share of tokens that no expert sees, experts
    without a token, entropy (nats a token), losses (a row).

    {"moe": {layer: {...}}}, or nothing where the model has none.
    """
    layers = sorted(name.removesuffix("/load") for name in sums if name.endswith("/load"))
    found = {
        layer: {
            "load": [round(x, 6) for x in (sums[f"{layer}/load"] / sums[f"{layer}/load"].sum()).tolist()],
            "dropped": 1 - float(sums[f"{layer}/kept"] / sums[f"{layer}/load"].sum()),
            "missed": float(sums[f"{layer}/missed"]) / tokens,
            "dead": int((sums[f"{layer}/load"] == 0).sum()),
            "entropy": float(sums[f"{layer}/entropy"]) / tokens,
            "aux_loss": float(sums[f"{layer}/aux_loss"]) / rows,
            "z_loss": float(sums[f"{layer}/z_loss"]) / rows,
        }
        for layer in layers
    }
    return {"moe": found} if found else {}

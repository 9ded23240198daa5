"""Launches of the kernels: forward keeps the state before each chunk in v's dtype, backward computes the rest anew.

What heads of a group, chunks and rows contribute is added up in a fixed order.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lamella_kernels.ops import cdiv, launch, power_of_2, rows_of
from lamella_kernels.scalar_decay import backward, forward
from lamella_kernels.tiles import tiles


class Gradients(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    dt: Tensor | None  # as the factor of v alone
    log_decay: Tensor  # [B, T, H]
    D: Tensor | None
    initial: Tensor | None


class Call:
    """Sizes, rows and tiles of a call, and its decays exp(rate scale), which both passes compute.

    q, k [B, T, G, K], v [B, T, H, V]; dt and rate [B, T, H], scale [H], 1 where absent.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, dt: Tensor | None, rate: Tensor | None, scale: Tensor | None,
        reset: Tensor | None,
    ):  # fmt: skip
        self.batch, self.time = v.shape[:2]
        self.G, self.K, self.H, self.V = map(int, (*q.shape[2:], *v.shape[2:]))
        self.device, self.dtype, self.shape = v.device, v.dtype, v.shape
        self.sizes = {"BYTES": v.element_size(), "K": self.K, "V": self.V, "GROUPED": int(self.G < self.H)}
        tile = self.tile("decays")
        self.L = tile["L"]
        self.chunks = cdiv(self.time, self.L)
        self.lengths = self.time, self.chunks
        self.widths = {"H": self.H, "G": self.G, "K": self.K, "V": self.V, "L": self.L}
        self.q, self.k, self.v = (self.rows(t) for t in (q, k, v))
        self.dt, rate = (None if t is None else rows_of(t) for t in (dt, rate))
        padded = self.chunks * self.L
        document = None if reset is None else self.new(self.batch, padded, dtype=torch.int32)
        self.decays = *(self.new(self.batch, self.H, padded) for _ in range(2)), document
        launch(
            forward.decays, (self.chunks, self.batch, cdiv(self.H, tile["BH"])),
            *self.decays, rate, scale, None if reset is None else reset.contiguous().view(torch.uint8), self.time,
            stride(rate), H=self.H, **tile,
        )  # fmt: skip

    def new(self, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=self.device)

    def rows(self, tensor: Tensor) -> Tensor:
        return rows_of(tensor.flatten(2))

    def tile(self, kernel: str) -> dict[str, int]:
        """No block is larger than the width, or smaller than a product's least."""
        found = tiles(f"scalar_decay_{kernel}", **self.sizes)
        least = {f"B{width}": max(power_of_2(self.sizes[width]), 16) for width in "KV"}
        return {name: min(size, least.get(name, size)) for name, size in found.items()}

    def launch(self, kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
        """For each chunk of each row."""
        launch(kernel, (programs, self.chunks, self.batch), *arguments, **self.widths, **options)

    def states(
        self, v: Tensor, k: Tensor, divisor: Tensor | None, first: Tensor | None, before: Tensor | None = None,
        first_sums: Tensor | None = None, summed: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        """Before each chunk and behind all, also z and w where `summed`.

        Given those before, the gradients of those after each and before all, and what passes the chunks.
        """
        tile = self.tile("states")
        blocks = cdiv(self.V, tile["BV"]) * cdiv(self.K, tile["BK"])
        found = self.new(self.batch, self.chunks, self.H, self.V, self.K, dtype=self.dtype)
        last = self.new(self.batch, self.H, self.V, self.K)
        passed = None if before is None else self.new(self.batch, self.chunks, self.H, blocks)
        sums = self.new(self.batch, self.chunks, self.H, self.K + 1) if summed else None
        last_sums = self.new(self.batch, self.H, self.K + 1) if summed else None
        launch(
            forward.states, (blocks, self.H, self.batch),
            v, k, self.dt, divisor, *self.decays, None if first is None else first.contiguous(), found, last, before,
            passed, first_sums, sums, last_sums, *self.lengths, *map(stride, (v, k, self.dt)),
            BACK=before is not None, **self.widths, **tile,
        )  # fmt: skip
        return found, last, passed, sums, last_sums

    def forward(
        self, D: Tensor | None, initial: Tensor | None, first_sums: Tensor | None = None, summed: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """y, the states [B, H, V, K] behind all tokens and before each chunk; `summed`, z and w too and the divisor."""
        before, last, _, sums, last_sums = self.states(
            self.v, self.k, None, initial, first_sums=first_sums, summed=summed
        )
        y = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        divisor = self.new(self.batch, self.time, self.H) if summed else None
        tile = self.tile("outputs")
        self.launch(
            forward.outputs, self.H * cdiv(self.V, tile["BV"]),
            self.q, self.k, self.v, self.dt, D, *self.decays, before, sums, y, divisor, *self.lengths,
            *map(stride, (self.q, self.k, self.v, self.dt)), **tile,
        )  # fmt: skip
        return y, last, before, last_sums, divisor

    def backward(
        self, dy: Tensor | None, dlast: Tensor | None, D: Tensor | None, before: Tensor, divisor: Tensor | None = None
    ) -> Gradients:
        """The gradients by head and chunk, and those by group of heads, apart where a group has several."""
        dy = torch.zeros_like(self.v) if dy is None else self.rows(dy)
        after, dinitial, passed, _, _ = self.states(dy, self.q, divisor, dlast, before)
        assert passed is not None
        dv = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        dlog = self.new(self.batch, self.time, self.H)
        ddt = None if self.dt is None else self.new(self.batch, self.time, self.H)
        dD = None if D is None else self.new(self.batch, self.chunks, self.H)
        grouped = self.G < self.H
        dq, dk = self.group_gradients(dy, before, after) if grouped else (self.of_groups(1)[0] for _ in range(2))
        self.launch(
            backward.head_gradients, self.H,
            dy, self.q, self.k, self.v, self.dt, D, divisor, *self.decays, before, after, passed,
            *((None, None) if grouped else (dq, dk)), dv, ddt, dlog, dD, *self.lengths,
            *map(stride, (dy, self.q, self.k, self.v, self.dt)), PASSED=passed.shape[-1],
            WIDE=power_of_2(passed.shape[-1]), **self.tile("heads"),
        )  # fmt: skip
        dD = None if dD is None else dD.sum((0, 1), dtype=torch.float64).float()
        return Gradients(dq, dk, dv, ddt, dlog, dD, dinitial)

    def of_groups(self, parts: int) -> Tensor:
        dtype = self.dtype if parts == 1 else torch.float32
        return self.new(parts, self.batch, self.time, self.G, self.K, dtype=dtype)

    def group_gradients(self, dy: Tensor, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        tile = self.tile("groups")
        parts = cdiv(self.H // self.G, tile.pop("HEADS"))
        dq, dk = self.of_groups(parts), self.of_groups(parts)
        self.launch(
            backward.group_gradients, cdiv(self.K, tile["BK"]) * parts * self.G,
            dy, self.q, self.k, self.v, self.dt, *self.decays, before, after, dq, dk, *self.lengths,
            *map(stride, (dy, self.q, self.k, self.v, self.dt)), PARTS=parts, **tile,
        )  # fmt: skip
        dq, dk = (d[0] if parts == 1 else d.sum(0).to(self.dtype) for d in (dq, dk))
        return dq, dk


def stride(rows: Tensor | None) -> int:
    """Between rows; absent ones are not read."""
    return 0 if rows is None else rows.stride(0)

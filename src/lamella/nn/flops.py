"""The unit of work that parts report from their configuration alone."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Flops:
    """Forward floating-point operations of one row, multiply and add counted apart.

    `matmul`: products with weights, as torch's counter counts them; `scores`: attention's two products over the causal
    half; `scan`: the elementwise recurrence, by the formula in the mixer's file.
    """

    matmul: float = 0
    scores: float = 0
    scan: float = 0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.matmul + other.matmul, self.scores + other.scores, self.scan + other.scan)

    @property
    def total(self) -> float:
        return self.matmul + self.scores + self.scan

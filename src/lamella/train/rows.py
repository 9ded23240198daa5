"""A run's rows: how they are opened, and what they cost by the documents in them, which `deal` and `window` go by."""

import numpy as np

from lamella.config import RunConfig
from lamella.data.plan import RowCost
from lamella.data.stream import TrainRows
from lamella.model.cuts import layer_costs

POINTS = 256  # between them the cost is taken for linear
UNIT = 2**40  # of a row that is one document


def open_rows(run: RunConfig, quarantine: bool = False) -> TrainRows:
    """The rows of a run. With `quarantine`, damaged ones are replaced where the run says so. Raises UserError."""
    train = run.train
    return TrainRows(
        run.data,
        train.sequence_length,
        train.global_batch_size,
        train.seed,
        train.rows.window,
        row_cost(run),
        run.layout.deal == "cost",
        run.folder if quarantine and train.rows.damaged == "replace" else None,
    )


def row_cost(run: RunConfig) -> RowCost:
    """By the model's own count of work (model/cuts.py): linear in the tokens for what is recurrent or dense, with the
    square of documents' lengths where they are attended whole; or by `train.rows.cost`, as it was measured.

    Whole numbers: every rank of every machine finds the same ones. They do not depend on the layout.
    """
    length, given = run.train.sequence_length, run.train.rows.cost

    def of(n: int) -> float:
        if given is not None:
            return given.token * n + given.pair * n * n
        costs = layer_costs(run.model, n)
        return costs.stage(0, len(costs.layers))

    points = np.unique(np.linspace(0, length, POINTS + 1).astype(np.int64))
    whole = of(length)
    values = np.array([round(of(n) / whole * UNIT) if n else 0 for n in points.tolist()], np.int64)

    def cost(lengths: np.ndarray) -> np.ndarray:
        lengths = lengths.astype(np.int64)
        right = np.searchsorted(points, lengths).clip(min=1)
        low, high, step = points[right - 1], values[right] - values[right - 1], points[right] - points[right - 1]
        return values[right - 1] + high * (lengths - low) // step

    return cost

"""Where a pipeline cuts the stack: what each layer costs, and the contiguous stages whose largest cost is least.

Costs come from the parts' own `flops` and one table of rates, so every rank of every machine finds the same cuts.
The unit is the time of one forward matmul operation (a multiply or an add).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from lamella.config import ModelConfig
from lamella.errors import UserError
from lamella.model.stack import plan_layers
from lamella.nn.rows import Recompute

# Time of one operation in forward and in backward, against a matmul's in forward: `matmul`, `scores` and `scan` per
# operation of `Flops`, `loss` per logit, `embedding` per value of the stream. Measured on one core of a Xeon (Sapphire
# Rapids), fp32, compiled kernels: two runs of `OMP_NUM_THREADS=1 python tools/bench_rates.py`, medians over its widths.
RATES: Mapping[str, tuple[float, float]] = {
    "matmul": (1, 2),
    "scores": (1.7, 4.1),
    "scan": (16, 28),
    "loss": (60, 40),
    "embedding": (310, 850),
}
AGAIN: Mapping[Recompute, tuple[str, ...]] = {  # the layers' work that backward computes anew
    "none": (),
    "selective": ("scores", "scan"),
    "full": ("matmul", "scores", "scan"),
}
Split = tuple[tuple[float, ...], tuple[float, ...], tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Costs:
    """Forward and backward of one row, in times of a forward matmul operation. The head's holds the loss."""

    layers: tuple[float, ...]
    embedding: float
    head: float

    def stage(self, start: int, stop: int) -> float:
        """Of layers start to stop - 1, with the embedding before layer 0 and the head behind the last one."""
        ends = (self.embedding if start == 0 else 0, self.head if stop == len(self.layers) else 0)
        return math.fsum((*self.layers[start:stop], *ends))  # equal layers in any order: equal to the last bit


def layer_costs(
    config: ModelConfig,
    length: int,
    recompute: Recompute = "none",
    rates: Mapping[str, tuple[float, float]] = RATES,
) -> Costs:
    """Costs of rows that are one document of `length` tokens.

    What `recompute` computes anew in backward is counted twice in forward; of the head nothing is. Raises UserError
    where the configuration is wrong.
    """
    again = AGAIN[recompute]
    layers = []
    for plan in plan_layers(config):
        work = plan.flops(config.d_model, length)
        times = [n * _time(rates[kind], 1 + (kind in again)) for kind, n in dataclasses.asdict(work).items()]
        layers.append(math.fsum(times))
    values, logits = length * config.d_model, length * config.vocab_size
    head = 2 * config.d_model * logits * _time(rates["matmul"]) + logits * _time(rates["loss"])
    return Costs(tuple(layers), values * _time(rates["embedding"]), head)


def _time(rate: tuple[float, float], forwards: int = 1) -> float:
    return forwards * rate[0] + rate[1]


def cut(costs: Costs, stages: int) -> tuple[int, ...]:
    """The first layers of stages 1, 2, ...: the largest stage costs as little as contiguous stages can.

    Among equals the second largest stage is least, then the third, and so on; of the same costs in another order the
    lighter stages come last. Exact, by dynamic programming over prefixes: adding one stage to two of them never
    changes which is the better. Raises UserError where there are more stages than layers.
    """
    total = len(costs.layers)
    _check_stages(stages, total)
    # By number of layers: stage costs from the largest down, stage costs from the last stage back, starts.
    best: dict[int, Split] = {0: ((), (), ())}
    for stage in range(1, stages + 1):
        found: dict[int, Split] = {}
        for stop in range(total if stage == stages else stage, total - stages + stage + 1):
            for start in (n for n in reversed(best) if n < stop):
                cost = costs.stage(start, stop)
                if stop in found and cost > found[stop][0][0]:
                    break
                ordered, backwards, starts = best[start]
                split = (tuple(sorted((*ordered, cost), reverse=True)), (cost, *backwards), (*starts, start))
                found[stop] = min(split, found.get(stop, split))
        best = found
    return best[total][2][1:]


def stage_costs(costs: Costs, starts: Sequence[int]) -> tuple[float, ...]:
    """What each stage costs. Raises UserError as `check_cuts` does."""
    total = len(costs.layers)
    check_cuts(starts, len(starts) + 1, total)
    return tuple(costs.stage(a, b) for a, b in zip((0, *starts), (*starts, total), strict=True))


def imbalance(costs: Costs, starts: Sequence[int]) -> float:
    """The largest stage's cost over the mean, 1 if all are equal."""
    return _over_mean(stage_costs(costs, starts))


def rank_imbalance(costs: Costs, starts: Sequence[int], rank_of_stage: Sequence[int]) -> float:
    """The largest rank's cost over the mean, where rank `rank_of_stage[s]` of 0, 1, ... computes stage s."""
    by_stage = stage_costs(costs, starts)
    assert len(rank_of_stage) == len(by_stage) and set(rank_of_stage) == set(range(max(rank_of_stage) + 1))
    owned = [[] for _ in set(rank_of_stage)]
    for rank, cost in zip(rank_of_stage, by_stage, strict=True):
        owned[rank].append(cost)
    return _over_mean([math.fsum(costs) for costs in owned])


def _over_mean(parts: Sequence[float]) -> float:
    return max(parts) * len(parts) / math.fsum(parts)


def check_cuts(starts: Sequence[int], stages: int, num_layers: int) -> None:
    """Raises UserError where `starts` are not the first layers of stages 1 to `stages` - 1 of a stack."""
    _check_stages(stages, num_layers)
    given, most = list(starts), num_layers - 1
    example = f"for example {[i * num_layers // stages for i in range(1, stages)]}"
    if len(given) != stages - 1:
        raise UserError(
            f"layout: cuts={given} names {len(given)} first layers, {stages} stages need {stages - 1}, one for each"
            f" stage but the first; {example}"
        )
    outside = [n for n in given if not 1 <= n <= most]
    if outside:
        raise UserError(
            f"layout: cuts={given}: a stage cannot begin at layer {outside[0]}; of {num_layers} layers, counted from 0,"
            f" stages but the first begin at 1 to {most}, {example}"
        )
    ordered = sorted(set(given))
    if given != ordered:
        cure = f"did you mean {ordered}?" if len(ordered) == len(given) else example
        raise UserError(f"layout: cuts={given} must increase, every stage holds at least one layer; {cure}")


def _check_stages(stages: int, num_layers: int) -> None:
    assert stages > 0
    if stages > num_layers:
        raise UserError(
            f"layout: {stages} pipeline stages for {num_layers} layers; every stage holds at least one layer, so"
            f" choose {num_layers} or fewer"
        )

"""Every layout that a run has on so many processes, for `lamella verify --all`."""

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import get_args

from lamella.config import LayoutConfig, RunConfig
from lamella.errors import UserError
from lamella.nn.rows import Recompute
from lamella.parallel.layout import resolve
from lamella.train.probe import ROWS, shrink_run

KINDS = [{"recompute": r, "offload_optimizer": o} for o in (False, True) for r in get_args(Recompute)]
LOGITS = [{"logits": kind} for kind in ("whole", "pieces")]
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zbv")


def every_layout(run: RunConfig, most: int) -> list[LayoutConfig]:
    """All legal layouts on 1, 2, 4, ... up to `most` processes.

    All combinations of tensor, sequence_parallel, pipeline, schedule, expert, data and zero. Recomputation and offload,
    and whole logits or pieces, are not multiplied with them: each layout has what its dimensions have met least.
    """
    worlds = [2**i for i in range(most.bit_length()) if 2**i <= most]
    worlds += [most] if most not in worlds else []
    met: Counter = Counter()
    found = []
    for world in worlds:
        for keys in _combinations(world):
            if not legal(run, LayoutConfig(**keys), world):
                continue
            found.append(LayoutConfig(**keys, **_least_met(met, keys, KINDS), **_least_met(met, keys, LOGITS)))
    return found


def _least_met(met: Counter, keys: dict, choices: list[dict]) -> dict:
    """The choice that these dimensions have had least, which is counted then."""
    best = min(choices, key=lambda choice: sum(met[str(choice), value] for value in keys.items()))
    met.update((str(best), value) for value in keys.items())
    return best


def legal(run: RunConfig, layout: LayoutConfig, world: int) -> bool:
    """Whether the run, shrunk for the layout, may have it."""
    try:
        resolve(shrink_run(run, layout).model_copy(update={"layout": layout}), world)
    except UserError:
        return False
    return True


def _combinations(world: int) -> Iterator[dict]:
    for tensor, pipeline in itertools.product(_divisors(world), repeat=2):
        if world % (tensor * pipeline):
            continue
        data = world // (tensor * pipeline)
        if data > ROWS:
            continue
        for sequence, schedule, expert, zero in itertools.product(
            (False, True) if tensor > 1 else (False,),
            SCHEDULES if pipeline > 1 else ("1f1b",),
            _divisors(tensor * data),
            (1, 2, 3),
        ):
            yield {
                "tensor": tensor,
                "sequence_parallel": sequence,
                "pipeline": pipeline,
                "schedule": schedule,
                "expert": expert,
                "data": data,
                "zero": zero,
            }


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]

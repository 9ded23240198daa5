"""A layout deals a step's rows to ranks, each row once, whatever the sizes."""

import pytest

from lamella.config import load_run
from lamella.errors import UserError
from lamella.parallel.layout import resolve

RUN = "configs/run/quickstart.yaml"


@pytest.mark.parametrize(
    ("world", "words"),
    [
        (1, []),
        (2, []),
        (4, ["tensor=2"]),
        (8, ["tensor=2", "micro_batch=2"]),
        (4, ["tensor=4", "sequence_parallel=true"]),
    ],
)
def test_every_row_once(world, words):
    overrides = [f"layout.{w}" for w in ["micro_batch=1", *words]] + ["train.global_batch_size=16"]
    # Heads and widths that four ranks divide.
    overrides += ["model.parts.attention.num_heads=8", "model.parts.attention.num_kv_heads=4"]
    layout = resolve(load_run(RUN, overrides), world)
    assert layout.world == world
    dealt = [row for rank in range(layout.data) for rows in layout.micro_batches(rank) for row in rows]
    assert dealt == list(range(16))
    assert {len(rows) for rank in range(layout.data) for rows in layout.micro_batches(rank)} == {layout.micro_batch}


def test_the_processes_decide_the_data_size():
    run = load_run(RUN, ["layout.micro_batch=1", "train.global_batch_size=16"])
    assert [resolve(run, world).data for world in (1, 2, 4)] == [1, 2, 4]
    assert not resolve(load_run(RUN, ["layout.sequence_parallel=true"]), 1).sequence_parallel
    with pytest.raises(UserError, match="needs 8 processes, there are 2"):
        resolve(load_run(RUN, ["layout.data=8"]), 2)

"""Tuning by a clock of our own: what it times, what it takes, and what it must not take."""

import json

import pytest
import torch

from lamella_kernels import rmsnorm, swiglu, tiles, tuning


@pytest.fixture
def calls():
    x, weight = torch.randn(3, 64, requires_grad=True), torch.randn(64, requires_grad=True)

    def run():
        y = swiglu(rmsnorm(x, weight, eps=1e-6), rmsnorm(x, weight, eps=1e-6))
        y.sum().backward()

    return tuning.collect(run)


def sizes(run):
    """Of all entries that it looks up."""
    with tiles.lookups() as found:
        run()
    return {f"{k}.{n}": v for k, entry in found.items() for n, v in entry.items() if n not in tiles.CONDITIONS}


def test_each_call_is_noted_once_with_its_arguments(calls):
    assert [call.name for call in calls] == ["rmsnorm", "swiglu"]
    assert calls[0].signature == "rmsnorm(float32[3, 64], None, float32[64], 64, 1e-06, True)"
    assert {kernel.split(".")[0] for kernel in sizes(calls[0].run)} == {"rmsnorm_forward", "rmsnorm_backward"}


def test_the_fastest_neighbours_are_found_and_are_a_table(calls, tmp_path, monkeypatch):
    """The clock likes 8 rows and 2 warps, far from the shipped numbers in both directions."""
    best = {"ROWS": 8, "PROGRAMS": 528, "num_warps": 2, "SIZE": 2048, "BLOCK": 1024}

    def clock(run):
        return 1 + sum(abs(v - best[k.split(".")[1]]) for k, v in sizes(run).items())

    said: list[str] = []
    table = tuning.tune(calls, clock, said.append)
    assert len(said) == 2 and "times as fast with" in said[0]
    (entry,) = table["rmsnorm_forward"]
    assert entry == {"arch": [tiles.architecture()], "up_to": {"W": 64}, "ROWS": 8, "num_warps": 2}
    file = tmp_path / "tiles.json"
    file.write_text(json.dumps(table))
    monkeypatch.setenv("LAMELLA_TILES", str(file))
    tiles.table.cache_clear(), tiles._entry.cache_clear()
    try:
        assert tiles.tiles("rmsnorm_forward", W=64) == {"ROWS": 8, "num_warps": 2}
        assert tiles.tiles("rmsnorm_forward", W=128)["ROWS"] == 32
    finally:
        monkeypatch.undo()
        tiles.table.cache_clear(), tiles._entry.cache_clear()


def test_what_changes_a_result_or_does_not_compile_is_never_taken(calls, monkeypatch):
    """Any other tiles would be a thousand times as fast, but a result is off by 1e-4, or the launch fails."""
    right = tuning.Call.run

    def wrong(call):
        found = right(call)
        if any(trial for trial in tiles._trials):
            if "num_warps" in str(tiles._trials):
                raise RuntimeError("out of resources")
            found[0] = found[0] * (1 + 1e-4)
        return found

    monkeypatch.setattr(tuning.Call, "run", wrong)
    assert tuning.tune(calls, lambda run: 1e-3 if tiles._trials else 1.0) == {}


def test_a_little_faster_is_noise(calls):
    assert tuning.tune(calls, lambda run: 0.99 if tiles._trials else 1.0) == {}


def test_after_its_time_no_call_is_begun(calls):
    said: list[str] = []
    assert tuning.tune(calls, lambda run: 1.0, said.append, limit=0) == {}
    assert said == ["2 calls are left, the time is over"]

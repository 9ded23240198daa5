"""Packing, balance and reading beside what others do, on the same documents, in one run.

    OMP_NUM_THREADS=1 python -m tools.bench_data --cache DIR [--megabytes 64] [--seconds 10] [--only packing ...]

Two sets of documents. `real`: the Python sources of this machine's standard library and an even draw of those of its
installed packages, a file a document, by a BPE of 8,192 pieces; prepared once in the cache folder. `web`: 100,000
lengths drawn from a lognormal with mean 1,000 tokens and sigma 1.2 (median 487), no text. Rates are by processor time,
which others on the machine disturb less than the clock on the wall; medians of the rounds, sides in turn.

balance: the dearest rank's cost over the mean, averaged over the steps; `jamba` is what configs/model/jamba-1.5-mini
counts for its layers, `squared` the sum of squared document lengths. search: the same steps' best deal that a local
search with restarts finds in `--seconds` of processor time a step (tools/data_peers.py); the search begins from our
deal, and ends when it has reached a lower bound. ranks: a small attention model on two processes.
"""

import argparse
import hashlib
import json
import shutil
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from lamella.config import DataConfig, RunConfig, load_run
from lamella.data.deal import deal
from lamella.data.inspect import over_mean, packing_of, squared
from lamella.data.pack import pack
from lamella.data.plan import Plans, RowCost
from lamella.data.prepare.prepare import prepare
from lamella.data.steps import Steps
from lamella.data.store.manifest import open_prepared
from lamella.data.stream import TrainRows
from tools import data_peers

ROOT = Path(__file__).parent.parent
ROWS = (2048, 8192)
RANKS = (8, 64)
WINDOWS = (1, 8, 32, 64, 128)
WEB = {"documents": 100_000, "mean": 1000, "sigma": 1.2}
Line = dict[str, Any]


def real_corpus(cache: Path, megabytes: int) -> DataConfig:
    """Prepared in the cache, if it is not yet."""
    texts = cache / f"texts-{megabytes}"
    if not texts.exists():
        whole = cache / "texts.part"
        shutil.rmtree(whole, ignore_errors=True)
        whole.mkdir(parents=True)
        for number, file in enumerate(_chosen(megabytes * 10**6)):
            shutil.copyfile(file, whole / f"{number:05}.py")
        whole.rename(texts)
    config = DataConfig.model_validate(
        {
            "path": str(cache / f"real-{megabytes}"),
            "sources": [{"format": "text", "path": f"{texts}/*.py"}],
            "tokenizer": {"vocab_size": 8192},
        },
        strict=False,
    )
    prepare(config)
    return config


def _chosen(most: int) -> Iterator[Path]:
    library, packages = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    inner = [f for f in sorted(library.rglob("*.py")) if "site-packages" not in f.parts and f.is_file()]
    others = [f for f in packages.rglob("*.py") if f.is_file()]
    others.sort(key=lambda f: hashlib.sha256(str(f.relative_to(packages)).encode()).digest())
    for file in [*inner, *others]:
        most -= file.stat().st_size
        if most < 0:
            return
        yield file


def web_lengths() -> np.ndarray:
    mean, sigma = WEB["mean"], WEB["sigma"]
    drawn = np.random.default_rng(0).lognormal(np.log(mean) - sigma**2 / 2, sigma, int(WEB["documents"]))
    return np.maximum(2, drawn).astype(np.int32)


def jamba(row: int) -> RowCost:
    from lamella.train.rows import row_cost

    return row_cost(
        load_run(ROOT / "configs/run/quickstart.yaml", ["model=jamba-1.5-mini", f"train.sequence_length={row}"])
    )


COSTS: dict[str, Callable[[int], RowCost]] = {"jamba": jamba, "squared": lambda row: squared}


def steps_of(lengths: np.ndarray, row: int, rows: int, cost: RowCost, window: int = 1) -> Steps:
    """The product's own steps over lengths that belong to no prepared files."""
    config: Any = SimpleNamespace(sources=[SimpleNamespace(weight=None)])
    prepared: Any = SimpleNamespace(sources={"": {"train": SimpleNamespace(lengths=lengths)}}, manifest=None)
    return Steps(config, prepared, row, rows, 0, window, cost)


def cpu(work: Callable[..., Any], *args: Any) -> float:
    """Processor time of `work(*args)`, seconds."""
    start = time.process_time()
    work(*args)
    return time.process_time() - start


def packing(sets: dict[str, np.ndarray], rounds: int) -> Iterator[Line]:
    peers = {
        "concat and chunk": data_peers.concat_and_chunk,
        "next-fit": data_peers.next_fit,
        "first-fit, 8 open rows": data_peers.first_fit,
    }
    for name, lengths in sets.items():
        mixed = lengths[np.random.default_rng(0).permutation(len(lengths))]
        tokens = int(lengths.sum(dtype=np.int64))
        for row in ROWS:
            plan = Plans([lengths], None, row, 0).plan(0)
            ours = packing_of(plan, [lengths])
            found = {"ours": data_peers.Packed(ours.rows, ours.avoidable, ours.discarded)}
            found |= {peer: function(mixed, row) for peer, function in peers.items()}
            ways = {"ours": pack} | peers
            rates: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(rounds):
                for way, function in ways.items():
                    rates[way].append(len(mixed) / cpu(function, mixed, row))
            for way, (rows, avoidable, discarded) in found.items():
                yield {
                    "documents": name,
                    "row": row,
                    "way": way,
                    "padding %": round(100 * (1 - (tokens - discarded) / (rows * row)), 4),
                    "cut though they fit": avoidable,
                    "tokens discarded": discarded,
                    "M documents/s": round(statistics.median(rates[way]) / 1e6, 2),
                }


def balance(sets: dict[str, np.ndarray], count: int) -> Iterator[Line]:
    for name, lengths in sets.items():
        for row in ROWS:
            for kind, make in COSTS.items():
                cost = make(row)
                for ranks in RANKS:
                    steps = steps_of(lengths, row, 4 * ranks, cost)
                    costs = [steps.costs(step) for step in range(count)]
                    dealt = [over_mean(some[deal(some, ranks)]) for some in costs]
                    order = [over_mean(some.reshape(ranks, -1)) for some in costs]
                    bound = [data_peers.lower_bound(some, ranks) * ranks / some.sum() for some in costs]
                    yield {
                        "documents": name,
                        "row": row,
                        "cost": kind,
                        "ranks": ranks,
                        "in order": round(float(np.mean(order)), 4),
                        "dealt": round(float(np.mean(dealt)), 4),
                        "worst step": round(float(np.max(dealt)), 4),
                        "no deal is below": round(float(np.mean(bound)), 4),
                    }


def windows(sets: dict[str, np.ndarray]) -> Iterator[Line]:
    """One row a rank, over the 128 steps of the longest window."""
    for name, lengths in sets.items():
        for row in ROWS:
            for kind, make in COSTS.items():
                cost = make(row)
                for ranks in RANKS:
                    line: Line = {"documents": name, "row": row, "cost": kind, "ranks": ranks}
                    for window in WINDOWS:
                        steps = steps_of(lengths, row, ranks, cost, window)
                        found = [over_mean(steps.costs(step)[:, None]) for step in range(max(WINDOWS))]
                        line[f"window {window}"] = round(float(np.mean(found)), 4)
                    yield line


def near_the_best(sets: dict[str, np.ndarray], seconds: float, sampled: int = 5) -> Iterator[Line]:
    """Evenly sampled steps of 4 rows a rank, squared lengths, rows of 8,192: 20 in all."""
    row = max(ROWS)
    for name, lengths in sets.items():
        for ranks in RANKS:
            steps = steps_of(lengths, row, 4 * ranks, squared)
            over, loads, proved = [], [], 0
            for step in range(0, 10 * sampled, 10):
                costs = steps.costs(step)
                ours = deal(costs, ranks)
                best, none_below = data_peers.search(costs, ranks, seconds, ours)
                over.append(int(costs[ours].sum(axis=1).max()) / best)
                loads.append(best * ranks / costs.sum())
                proved += none_below
            yield {
                "documents": name,
                "row": row,
                "ranks": ranks,
                "steps": sampled,
                "best found": round(float(np.mean(loads)), 4),
                "ours over it": round(float(np.mean(over)), 4),
                "at worst": round(max(over), 4),
                "proved best": proved,
            }


def dealing(sets: dict[str, np.ndarray], rounds: int) -> Iterator[Line]:
    """512 rows: each of `rounds` steps once."""
    for name, lengths in sets.items():
        for ranks in (8, 64, 128, 512):
            costs = steps_of(lengths, max(ROWS), 512, squared)
            steps = [costs.costs(step) for step in range(rounds)]
            times = [1000 * cpu(deal, some, ranks) for some in steps]
            yield {"documents": name, "rows": 512, "ranks": ranks, "ms": round(statistics.median(times), 2)}


def reading(config: DataConfig, rounds: int) -> Iterator[Line]:
    import torch

    torch.set_num_threads(1)
    (name,) = open_prepared(config).sources
    prefix = Path(config.path) / name / "train"
    for row in ROWS:
        count = 2**19 // row
        with tempfile.TemporaryDirectory() as folder:
            fresh = TrainRows(config, row, 8, seed=0)
            reader = fresh.tokenizer
            plain, reset = (
                data_peers.gpt_dataset(prefix, row, reader.vocab_size, reader.eod, again, Path(folder))
                for again in (False, True)
            )
            fresh.plans.plan(0)

            tokens, few = count * row / 1e6, max(1, 4 * ROWS[0] // row)
            rates = [
                (tokens / cpu(_ours, fresh, count), tokens / cpu(_theirs, plain, count)) for _ in range(rounds + 1)
            ]
            slow = few * row / 1e6 / cpu(_theirs, reset, few)
            mine, other = (statistics.median(side) for side in zip(*rates[1:], strict=True))
            yield {
                "row": row,
                "ours, first time": round(rates[0][0], 1),
                "GPTDataset, first time": round(rates[0][1], 1),
                "ours": round(mine, 1),
                "GPTDataset": round(other, 1),
                "times": round(mine / other, 2),
                "reset_attention_mask": round(slow, 3),
                "times that": round(mine / slow),
            }


def _ours(rows: TrainRows, count: int) -> None:
    for step in range(count // 8):
        rows.batch(step, range(8))


def _theirs(data: Any, count: int) -> None:
    for number in range(count):
        data[number]


def ranks_run(config: DataConfig, folder: str, row: int, rows: int) -> RunConfig:
    words = [
        "model=transformer-nano",
        "model.vocab_size=8192",
        "layout.data=2",
        "layout.micro_batch=1",
        f"train.sequence_length={row}",
        f"train.global_batch_size={rows}",
        f"runs={folder}",
    ]
    run = load_run(ROOT / "configs/run/quickstart.yaml", words)
    return run.model_copy(update={"data": config})


def rank(run: RunConfig, count: int) -> dict[str, list[float]]:
    """What one process computes: seconds of forward and backward by step, both ways to deal in turn."""
    import torch

    from lamella.nn.draw import Draw
    from lamella.nn.rows import Rows
    from lamella.parallel import mesh as meshes
    from lamella.parallel.apply import build_model
    from lamella.parallel.layout import resolve
    from lamella.parallel.passes import MicroBatch, Sequential
    from lamella.parallel.seat import find_seat
    from lamella.train.loss import make_loss
    from lamella.train.rows import row_cost

    seat = find_seat()
    mesh = meshes.join(seat, resolve(run, seat.world))
    torch.set_num_threads(1)
    model = build_model(run.model, mesh, "fp32", 0)
    passes = Sequential(model, make_loss())
    train = run.train
    sizes = (run.data, train.sequence_length, train.global_batch_size, 0, 1, row_cost(run))
    ways = {"dealt": TrainRows(*sizes), "in order": TrainRows(*sizes, balanced=False)}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for step in range(-1, count):  # the first warms up
        for way, data in ways.items():
            mine = data.deal(max(step, 0), 2)[mesh.data_rank]
            batches = []
            for number in mine:
                batch = data.batch(max(step, 0), [number])
                draw = Draw(0, step + 1, torch.tensor([number]))
                batches.append(MicroBatch(batch.tokens, batch.targets, Rows(batch.document, batch.position, draw)))
            mesh.sum(torch.zeros(1))
            taken = cpu(passes.train, batches, 1e-6, lambda part: None)
            model.zero_grad(set_to_none=True)
            if step >= 0:
                seconds[way].append(taken)
    meshes.leave()
    return seconds


def two_ranks(config: DataConfig, count: int, row: int = 4096, rows: int = 4) -> Iterator[Line]:
    from lamella.parallel.local import run_local

    with tempfile.TemporaryDirectory() as folder:
        run = ranks_run(config, folder, row, rows)
        found = [outcome.value for outcome in run_local(2, rank, run, count, timeout=1500)]
    if None in found:
        raise SystemExit("a process failed; its traceback is above")
    from lamella.train.rows import row_cost

    data = TrainRows(config, row, rows, 0, cost=row_cost(run))
    costs = [data.costs(step) for step in range(count)]
    counted = {
        "in order": [over_mean(some.reshape(2, -1)) for some in costs],
        "dealt": [over_mean(some[deal(some, 2)]) for some in costs],
    }
    for way in counted:
        times = np.array([one[way] for one in found if one])
        over = times.max(axis=0) / times.mean(axis=0)
        yield {
            "rows a step": rows,
            "row": row,
            "way": way,
            "steps": count,
            "s of the slower": round(float(times.max(axis=0).sum()), 2),
            "max/mean": round(float(over.mean()), 3),
            "worst step": round(float(over.max()), 3),
            "counted": round(float(np.mean(counted[way])), 3),
        }


def show(title: str, lines: Iterator[Line], as_json: bool) -> None:
    """A table, line by line as they come."""
    if not as_json:
        print(f"\n{title}\n", flush=True)
    for number, line in enumerate(lines):
        if as_json:
            print(json.dumps({"table": title} | line), flush=True)
            continue
        if not number:
            print("| " + " | ".join(line) + " |\n" + "|---" * len(line) + "|")
        print("| " + " | ".join(f"{v:,}" if isinstance(v, int) else str(v) for v in line.values()) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="where the corpus is kept from one call to the next")
    parser.add_argument("--megabytes", type=int, default=64, help="of text")
    parser.add_argument("--seconds", type=float, default=10, help="of the search, a step")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    config = real_corpus(given.cache, given.megabytes)
    (source,) = open_prepared(config).sources.values()
    sets = {"real": source["train"].lengths, "web": web_lengths()}
    for name, lengths in sets.items():
        size, total = len(lengths), int(lengths.sum(dtype=np.int64))
        words = (
            f"{name}: {size:,} documents, {total:,} tokens, mean {total / size:,.0f}, median {np.median(lengths):,.0f}"
        )
        if not given.json:
            print(words)
    tables = {
        "packing": lambda: packing(sets, given.rounds),
        "balance": lambda: balance(sets, given.steps),
        "windows": lambda: windows(sets),
        "dealing": lambda: dealing(sets, given.steps),
        "reading": lambda: reading(config, given.rounds),
        "ranks": lambda: two_ranks(config, min(given.steps, 10)),
        "search": lambda: near_the_best(sets, given.seconds),
    }
    for name, table in tables.items():
        if not given.only or name in given.only:
            show(name, table(), given.json)


if __name__ == "__main__":
    main()

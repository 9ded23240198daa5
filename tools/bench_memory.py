"""What each layout keeps in memory, rank by rank, against what it promises.

    OMP_NUM_THREADS=1 python tools/bench_memory.py [--layout tensor=2 ...] [--length 512] [--rows 4] [--bf16]

A hybrid of 37 M parameters takes four steps through the trainer's own objects, in fresh processes for every layout. By
kind, from live tensors (storages counted once): `parameters`; `gradients`, everything else that is alive after backward
and right before the update, but the `bucket` that DeepSpeed reduces them in (touched only as far as it is filled);
`optimizer`, masters and moments; `activations`, the most that autograd keeps for backward at once, `of them weights`
what ZeRO 3 had gathered. `tensors` is the most of everything alive at once in a step, by watching
every operation; `resident` the peak of the process's memory in the first two steps, less its level before the model was
built. In brackets what the layout promises, from the parameters that the rank is dealt. Ranks that differ have a slash.
"""

import argparse
import dataclasses
import functools
import gc
import re
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lamella.config import LayoutConfig, ModelConfig, RunConfig, load_run, parse_layout
from lamella.data.batch import Batch
from lamella.model.init import generator
from lamella.model.lm import LanguageModel
from lamella.parallel.layout import Layout, resolve
from lamella.parallel.local import run_local
from lamella.parallel.zero import Zero

MIB = 2**20
MODEL: dict[str, Any] = {
    "d_model": 384,
    "vocab_size": 8192,
    "parts": {
        "mamba": {"mixer": "mamba"},
        "attention": {"mixer": "attention", "num_heads": 6, "num_kv_heads": 2},
        "mlp": {"channel": "mlp", "d_ff": 1024},
        "moe": {"channel": "moe", "num_experts": 8, "d_ff": 512},
    },
    "stack": [{"layers": ["mamba/mlp", "mamba/moe", "attention/mlp", "mamba/moe"], "repeat": 2}],
}
LAYOUTS = (
    "",
    "tensor=2",
    "tensor=2,sequence_parallel=true",
    "pipeline=2,schedule=1f1b",
    "pipeline=2,schedule=gpipe",
    "pipeline=2,schedule=zbv",
    "data=2,expert=2",
    "data=2,zero=1",
    "data=2,zero=2",
    "data=2,zero=3",
    "recompute=selective",
    "recompute=full",
    "data=2,zero=3,recompute=full",
    "offload_optimizer=true",
)


@dataclasses.dataclass
class Found:
    """Bytes of one rank: measured, and promised."""

    parameters: int
    after_backward: int
    bucket: int
    before_update: int
    optimizer: int
    activations: int
    weights_held: int  # of the activations: gathered weights that autograd keeps (ZeRO 3)
    tensors: int
    resident: int
    promised: dict[str, float]


@dataclasses.dataclass(frozen=True)
class FullRows:
    """Rows of random tokens, one document each."""

    vocab_size: int
    length: int
    rows: int

    def batch(self, step: int, rows: Sequence[int]) -> Batch:
        random = [generator(f"{step}/{row}", 0) for row in rows]
        tokens = torch.stack([torch.randint(self.vocab_size, (self.length + 1,), generator=g) for g in random]).int()
        position = torch.arange(self.length, dtype=torch.int32).expand(len(rows), -1)
        zeros = torch.zeros_like(position)
        return Batch(tokens[:, :-1], tokens[:, 1:], zeros, position, zeros)

    def deal(self, step: int, ranks: int) -> list[list[int]]:
        return torch.arange(self.rows).view(ranks, -1).tolist()

    def target_count(self, step: int) -> int:
        return self.rows * self.length


class Saved(saved_tensors_hooks):
    """Counts what autograd keeps; parameters themselves are not counted, gathered copies that a view holds are."""

    def __init__(self, model: LanguageModel):
        self.parameters = list(model.parameters())
        self.itself = {id(p) for p in self.parameters}
        self.lasting = {p.untyped_storage()._cdata for p in self.parameters if p.numel()}
        self.times: dict[int, int] = {}
        self.bytes = self.peak = self.weights = self.weights_peak = 0
        super().__init__(self.pack, lambda kept: kept if isinstance(kept, Tensor) else kept.tensor)

    def pack(self, tensor: Tensor) -> Any:
        key = tensor.untyped_storage()._cdata
        if id(tensor) in self.itself or key in self.lasting:
            return tensor if id(tensor) in self.itself else tensor.detach()
        gathered = any(p.numel() and p.untyped_storage()._cdata == key for p in self.parameters)
        kept = _Kept(tensor.detach())
        size = tensor.untyped_storage().nbytes()
        self.change(key, size, gathered, 1)
        weakref.finalize(kept, self.change, key, size, gathered, -1)
        return kept

    def change(self, key: int, size: int, gathered: bool, by: int) -> None:
        before = self.times.get(key, 0)
        self.times[key] = before + by
        if bool(before) != bool(before + by):
            self.bytes += by * size
            self.weights += by * size * gathered
        if self.bytes > self.peak:
            self.peak, self.weights_peak = self.bytes, self.weights


class _Kept:
    """What autograd is given in a tensor's place."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class Alive(TorchDispatchMode):
    """The most bytes of tensors alive at once, from those given on."""

    def __init__(self, tensors: Iterable[Tensor]):
        super().__init__()
        self.held: dict[int, weakref.ref] = {}
        self.bytes = self.peak = 0
        for tensor in tensors:
            self.hold(tensor)

    def hold(self, tensor: Tensor) -> None:
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.held:
            self.held[key] = weakref.ref(storage, functools.partial(self.release, key, size))
            self.bytes += size
            self.peak = max(self.peak, self.bytes)

    def release(self, key: int, size: int, _: object) -> None:
        del self.held[key]
        self.bytes -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.hold(leaf)
        return result


def reachable(model: LanguageModel) -> Iterator[Tensor]:
    """Every tensor that Python can see, and the gradients."""
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and thing.device.type != "meta":
            yield thing
    for parameter in model.parameters():
        if parameter.grad is not None:
            yield parameter.grad


def sizes(tensors: Iterable[Tensor], without: Iterable[Tensor] = ()) -> list[int]:
    """Bytes of the tensors' storages, each once, that are not among those of `without`."""
    skipped = {t.untyped_storage()._cdata for t in without}
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return [n for key, n in storages.items() if key not in skipped]


def buckets(zero: Zero) -> Iterator[Tensor]:
    """What DeepSpeed reduces gradients in."""
    for bucket in zero.optimizer.ipg_buckets.values():
        buffers = bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer]
        yield from (buffer for buffer in buffers if buffer is not None)


def resident(word: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    found = re.search(rf"{word}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def rank(run: RunConfig) -> Found:
    """What one process does."""
    from lamella.nn.record import Record
    from lamella.parallel import mesh as meshes
    from lamella.parallel.apply import build_model, make_passes
    from lamella.parallel.seat import find_seat
    from lamella.train.clock import Clock
    from lamella.train.feed import Feed
    from lamella.train.loss import make_loss
    from lamella.train.optimizer import make_optimizer
    from lamella.train.step import accumulate_gradients

    seat, train = find_seat(), run.train
    mesh = meshes.join(seat, resolve(run, seat.world), timeout=300)
    mesh.sum(torch.zeros(1))
    level = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    model = build_model(run.model, mesh, train.precision, train.seed)
    promised = promise(model, mesh.layout, mesh.pipeline.rank())
    inner = make_optimizer(model, train.optimizer)
    zero = Zero(model, inner, train.optimizer.clip_norm, mesh)
    passes = make_passes(model, zero, make_loss(), mesh, train.sequence_length)
    rows = FullRows(run.model.vocab_size, train.sequence_length, train.global_batch_size)
    data = Feed(rows, mesh)

    def gradients(step: int) -> None:
        accumulate_gradients(passes, data, mesh, step, 0, Record(), Clock(mesh.device))

    for step in range(2):
        gradients(step)
        zero.step(train.optimizer.lr)
    peak = resident("VmHWM") - level
    saved, updates = Saved(model), []
    with saved:
        gradients(2)
    gc.collect()
    weights = [getattr(p, "ds_tensor", p) for p in model.parameters()]
    weights += [p for p in model.parameters() if p.numel()]
    moments = (t for state in zero.optimizer.optimizer.state.values() for t in state.values())
    states = [*zero._flats(), *(t for t in moments if torch.is_tensor(t))]

    def gradients_alive() -> int:
        return sum(sizes(reachable(model), [*weights, *states, *buckets(zero)]))

    backward, bucket = gradients_alive(), sum(sizes(buckets(zero)))
    register_optimizer_step_pre_hook(lambda *_: updates.append(gradients_alive()))
    zero.step(train.optimizer.lr)
    with Alive(reachable(model)) as alive:
        gradients(3)
        zero.step(train.optimizer.lr)
    found = Found(
        sum(sizes(weights)),
        backward,
        bucket,
        max(updates),
        sum(sizes(states, weights)),
        saved.peak,
        saved.weights_peak,
        alive.peak,
        peak,
        promised,
    )
    meshes.leave()
    return found


def promise(model: LanguageModel, layout: Layout, pipeline: int) -> dict[str, float]:
    """Bytes of parameters, gradients, optimizer by what the rank is dealt; the activations' share of one process's.

    Activations: a tensor rank holds its share of the branches' (all but the stream, which sequence parallelism splits
    too); a pipeline rank a stage's share for each micro-batch under way.
    """
    split = {True: layout.tensor * layout.data // layout.expert, False: layout.data}
    numbers = [(p.numel(), split[p.place.expert]) for p in model.parameters()]  # type: ignore[attr-defined]
    whole, share = sum(n for n, _ in numbers), sum(n / d for n, d in numbers)
    micro_batches = layout.micro_batch_count
    under_way = {"gpipe": micro_batches, "1f1b": layout.pipeline - pipeline}.get(layout.schedule, layout.pipeline)
    held = sum(len(s.layers) for s in model.stages) / len(model.config.stack[0].layers) / model.config.stack[0].repeat
    stages = 1 if layout.pipeline == 1 else held * min(under_way, micro_batches)
    return {
        "parameters": 4 * (share if layout.zero == 3 else whole),
        "gradients": 4 * (share if layout.zero > 1 else whole),
        "optimizer": 12 * share,
        "activations": stages / layout.tensor,
    }


def cell(values: list[str]) -> str:
    return values[0] if len(set(values)) == 1 else " / ".join(values)


def row(words: str, ranks: list[Found], one: Found) -> str:
    def mebibytes(pick, kind: str | None = None) -> str:
        text = [f"{pick(r) / MIB:.0f}" for r in ranks]
        return cell(text) + ("" if kind is None else f" ({cell([f'{r.promised[kind] / MIB:.0f}' for r in ranks])})")

    shares = cell([f"{r.activations / one.activations:.2f}" for r in ranks])
    recomputed = "recompute" in words
    promised = "less" if recomputed else cell([f"{r.promised['activations']:.2f}" for r in ranks])
    return " | ".join([
        f"| {words or 'one process'}",
        mebibytes(lambda r: r.parameters, "parameters"),
        mebibytes(lambda r: r.after_backward, "gradients"),
        mebibytes(lambda r: r.before_update),
        mebibytes(lambda r: r.bucket),
        mebibytes(lambda r: r.optimizer, "optimizer"),
        mebibytes(lambda r: r.activations) + f": {shares} ({promised})",
        mebibytes(lambda r: r.weights_held),
        mebibytes(lambda r: r.tensors),
        mebibytes(lambda r: r.resident) + " |",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", action="append")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--bf16", action="store_true")
    given = parser.parse_args()
    precision = "bf16" if given.bf16 else "fp32"
    sizes = [f"train.sequence_length={given.length}", f"train.global_batch_size={given.rows}"]
    base = load_run("configs/run/quickstart.yaml", [*sizes, f"train.precision={precision}"])
    base = base.model_copy(update={"model": ModelConfig.model_validate(MODEL, strict=False)})
    columns = "layout | parameters | gradients | before the update | bucket | optimizer | activations | of them weights"
    print(f"| {columns} | tensors | resident |\n|" + 10 * "---|", flush=True)
    one = None
    for words in ["", *given.layout] if given.layout else LAYOUTS:
        layout = parse_layout(words) if words else LayoutConfig()
        run = base.model_copy(update={"layout": layout})
        world = layout.tensor * layout.pipeline * (layout.data or 1)
        outcomes = run_local(world, rank, run, timeout=500)
        ranks = [outcome.value for outcome in outcomes]
        if None in ranks:
            print(f"| {words} | failed: {[o.code for o in outcomes]} |", flush=True)
            continue
        one = one or ranks[0]
        print(row(words, ranks, one), flush=True)


if __name__ == "__main__":
    main()

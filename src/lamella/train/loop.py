"""Pretraining, from a validated run to its last checkpoint."""

import signal
import sys
import time
from types import FrameType

from lamella.checkpoint import store
from lamella.config import RunConfig, dump
from lamella.data.stream import HeldoutRows, TrainRows
from lamella.errors import EXIT_REQUEUE
from lamella.parallel import layout as layouts
from lamella.parallel import mesh as meshes
from lamella.parallel.apply import build_model
from lamella.parallel.mesh import Mesh
from lamella.parallel.zero import Zero
from lamella.train import state
from lamella.train.evaluate import evaluate
from lamella.train.folder import open_folder
from lamella.train.metrics import MetricsFile, Sums, moe_metrics
from lamella.train.optimizer import learning_rate, make_optimizer
from lamella.train.step import accumulate_gradients


class Run:
    """Everything of a run that one process holds, at the step where it starts."""

    def __init__(self, config: RunConfig, mesh: Mesh):
        train = config.train
        self.config, self.mesh, self.folder = config, mesh, config.folder
        self.data = TrainRows(config.data, train.sequence_length, train.global_batch_size, train.seed)
        self.heldout = HeldoutRows(config.data, train.sequence_length)
        newest = store.latest(self.folder / "checkpoints")
        if newest is not None:
            state.check_same_run(newest, config, self.data.fingerprint)
        self.model = build_model(config.model, mesh, train.precision, train.seed)
        self.zero = Zero(self.model, make_optimizer(self.model, train.optimizer), train.optimizer.clip_norm, mesh)
        self.step = 0 if newest is None else state.load(newest, self.zero)
        self.saved = self.step
        self.metrics = MetricsFile(self.folder / "metrics.jsonl", self.step) if mesh.first else None

    def train_step(self, asked: list[int]) -> bool:
        """One step, logged. Returns whether any process was asked to stop, the same on all."""
        train, started = self.config.train, time.perf_counter()
        lr = learning_rate(self.step, train.steps, train.optimizer.lr, train.schedule)
        sums = Sums()
        sums.add("nats", accumulate_gradients(self.model, self.data, self.mesh, self.step, train.seed, sums))
        grad_norm = self.zero.step(lr)
        sums.add("stop", self.model.norm.weight.new_tensor(float(bool(asked))))
        total = sums.over_ranks(self.mesh)
        tokens = self.data.target_count(self.step)
        line = {
            "step": self.step,
            "loss": float(total["nats"]) / tokens,
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens": tokens,
            "tokens_per_second": tokens / (time.perf_counter() - started),
        }
        moe = moe_metrics(total, tokens, train.global_batch_size)
        self.step += 1
        if self.step % train.evaluate.every == 0 or self.step == train.steps:
            limit = None if self.step == train.steps else train.evaluate.rows
            found = evaluate(self.model, self.heldout, self.mesh, limit)
            line |= {"heldout_loss": found.loss, "heldout_bits_per_byte": found.bits_per_byte}
        if self.metrics is not None:
            self.metrics.write(line | ({"moe": moe} if moe else {}))
            self.say(line)
        return float(total["stop"]) > 0

    def save(self) -> None:
        """Publishes a checkpoint of the steps done, once."""
        if self.saved == self.step:
            return
        checkpoints = self.folder / "checkpoints"
        state.save(checkpoints, self.step, self.zero, self.config, self.data.fingerprint)
        self.saved = self.step
        if self.mesh.first:
            store.prune(checkpoints, self.config.train.checkpoint.keep)

    def say(self, line: dict) -> None:
        """One plain line a step for the log."""
        text = f"step {line['step'] + 1:>6}/{self.config.train.steps}  loss {line['loss']:.4f}  "
        text += f"grad {line['grad_norm']:.3f}  lr {line['lr']:.2e}  {line['tokens_per_second']:,.0f} tokens/s"
        if "heldout_loss" in line:
            text += f"  held-out {line['heldout_loss']:.4f} ({line['heldout_bits_per_byte']:.4f} bits per byte)"
        print(text, flush=True)


def train(config: RunConfig) -> int:
    """Trains to the configured step, in the seat that the launcher gave this process. Returns the exit code.

    SIGTERM and SIGINT let the running step end; all ranks then save the same step, and the code is 75.
    """
    asked = _catch_signals()
    seat = meshes.find_seat()
    layout = layouts.resolve(config, seat.world)
    if seat.rank == 0:
        open_folder(config)
    mesh = meshes.join(seat, layout)
    run = Run(config, mesh)
    if mesh.first:
        dump(config, run.folder / "config.yaml")
        print(f"{config.name}: from step {run.step} of {config.train.steps}, in {run.folder}", flush=True)
    stopped = False
    while run.step < config.train.steps and not stopped:
        stopped = run.train_step(asked)
        if stopped or run.step % config.train.checkpoint.every == 0 or run.step == config.train.steps:
            run.save()
    meshes.leave()
    if stopped and mesh.first:
        print(f"stopped at step {run.step} and saved; the same command continues", file=sys.stderr, flush=True)
    return EXIT_REQUEUE if stopped and run.step < config.train.steps else 0


def enter(config: RunConfig) -> None:
    """`train` as the whole of a process."""
    raise SystemExit(train(config))


def _catch_signals() -> list[int]:
    """A list that holds a signal's number once one has come."""
    asked: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        asked.append(signum)

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)
    return asked

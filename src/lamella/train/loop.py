"""Pretraining, from a validated run to its last checkpoint."""

import os
import signal
from types import FrameType

from lamella.checkpoint import series, store
from lamella.config import RunConfig, change
from lamella.data.stream import heldout_rows
from lamella.errors import EXIT_REQUEUE
from lamella.nn.record import Record
from lamella.parallel import layout as layouts
from lamella.parallel import mesh as meshes
from lamella.parallel.apply import build_model, make_passes
from lamella.parallel.mesh import Mesh
from lamella.parallel.seat import find_seat
from lamella.parallel.zero import Zero
from lamella.train import state, stop_file
from lamella.train.balance import Balance
from lamella.train.clock import Clock
from lamella.train.evaluate import evaluate
from lamella.train.feed import Feed
from lamella.train.folder import open_folder
from lamella.train.init_from import Open, Saved, fill, find_start
from lamella.train.kernels import prepare_kernels
from lamella.train.loss import make_loss
from lamella.train.metrics import Totals, moe_metrics, source_metrics
from lamella.train.optimizer import learning_rate, make_optimizer
from lamella.train.reports import Reports
from lamella.train.rows import open_rows
from lamella.train.saving import Saver, mirror_of
from lamella.train.say import say
from lamella.train.step import accumulate_gradients
from lamella.train.watchdog import Watchdog

METRICS = "metrics.jsonl.gz"  # in a checkpoint: the metrics up to its step


class Run:
    """Everything of a run that one process holds, at the step where it starts."""

    def __init__(self, config: RunConfig, mesh: Mesh, opened: Open = Saved):
        train = config.train
        self.mesh, self.folder = mesh, config.folder
        self.data = open_rows(config, quarantine=True)
        self.feed = Feed(self.data, mesh, config.layout.read_ahead)
        self.heldout = heldout_rows(config.data, train.sequence_length)
        mirror = mirror_of(config) if mesh.first else None
        newest, passed_over = series.newest_whole(self.folder / "checkpoints", mirror)
        start = None
        if newest is None:
            start = find_start(config, self.data.tokenizer.fingerprint, opened)
            began = start and start.origin.path
        else:
            began = state.check_same_run(newest, config, self.data.fingerprint)["config"]["train"].get("init_from")
        self.config = config = change(config, train=train.model_dump(mode="json") | {"init_from": began})
        self.model = build_model(config.model, mesh, train.precision, train.seed)
        self.balance = Balance(config.model, self.model)
        if start is not None:
            fill(start, self.model, self.balance)
        self.zero = Zero(self.model, make_optimizer(self.model, train.optimizer), train.optimizer.clip_norm, mesh)
        loss = make_loss(len(self.data.names))
        self.passes = make_passes(self.model, self.zero, loss, mesh, train.sequence_length)
        self.totals = Totals(mesh)
        self.step = 0 if newest is None else state.load(newest, self.zero, self.balance)
        self.saver = Saver(config, mesh.first, self.step)
        self.clock = Clock(mesh.device)
        self.watchdog = Watchdog(self.folder, mesh.seat.rank, train.hang)
        self.heldout_loss: float | None = None  # where the last step was evaluated
        self.reports = None
        if mesh.first:
            for line in passed_over:
                say(line)
            if newest is not None:
                say(f"continues from {newest}")
            packed = None if newest is None else store.read_file(newest, METRICS)
            self.reports = Reports(config, mesh.layout, self.step, packed)

    def train_step(self, asked: list[int]) -> bool:
        """One step, reported. Returns whether any process was asked to stop, the same on all."""
        train, record = self.config.train, Record()
        lr = learning_rate(self.step, train.steps, train.optimizer.lr, train.schedule)
        self.clock.take()
        nats = accumulate_gradients(self.passes, self.feed, self.mesh, self.step, train.seed, record, self.clock)
        grad_norm = self.zero.step(lr)
        self.clock.mark("optimizer")
        record.add("nats", nats)
        asked_here = bool(asked) or (self.mesh.first and stop_file.requested(self.folder) is not None)
        record.add("stop", nats.new_tensor(float(asked_here)))
        total = self.totals.sum(record.values)
        self.balance.update(total)
        tokens, seconds = self.data.target_count(self.step), self.clock.take()
        line = {
            "step": self.step,
            "loss": float(total["nats"]) / tokens,
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens": tokens,
            "tokens_per_second": tokens / sum(seconds.values()),
            "seconds": seconds,
        }
        line |= moe_metrics(total, tokens, train.global_batch_size)
        line |= source_metrics(total, self.data, self.step)
        self.step += 1
        self.heldout_loss = None
        if self.step % train.evaluate.every == 0 or self.step == train.steps:
            with self.watchdog.off():
                line |= self.held_out()
            self.heldout_loss = line["heldout_loss"]
        if self.reports is not None:
            self.reports.step(line)
        return float(total["stop"]) > 0

    def held_out(self) -> dict[str, float]:
        """Held-out loss: over all rows at the end, on the way over as many as the configuration says."""
        limit = None if self.step == self.config.train.steps else self.config.train.evaluate.rows
        found = evaluate(self.passes, self.heldout, self.mesh, limit)
        return {"heldout_loss": found.loss, "heldout_bits_per_byte": found.bits_per_byte}

    def save(self) -> None:
        """Begins to publish a checkpoint of the steps done, once."""
        values = state.values(self.step, self.balance, self.config, self.data, self.heldout_loss)
        beside = {} if self.reports is None else {METRICS: self.reports.metrics.packed()}
        self.saver.save(self.step, state.tensors(self.zero), values, beside)


def train(config: RunConfig, opened: Open = Saved) -> int:
    """Trains to the configured step, in the seat that the launcher gave this process. Returns the exit code.

    `opened`: what `train.init_from` names.

    SIGTERM, SIGINT or a stop file let the running step end; all ranks then save the same step, and the code is 75.
    """
    asked = _catch_signals()
    seat = find_seat()
    layout = layouts.resolve(config, seat.world)
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and stop_file.requested(config.folder) is not None:
        return EXIT_REQUEUE  # torchrun takes the code of a stop for a failure, and starts again
    if seat.rank == 0:
        stop_file.clear(open_folder(config))
    prepare_kernels(config, layout, seat)
    mesh = meshes.join(seat, layout)
    run = Run(config, mesh, opened)
    stopped = False
    while run.step < config.train.steps and not stopped:
        stopped = run.train_step(asked)
        run.watchdog.beat()
        run.saver.settle()
        if stopped or run.step % config.train.checkpoint.every == 0 or run.step == config.train.steps:
            run.save()
    run.watchdog.close()
    run.saver.close()
    run.feed.close()
    meshes.leave()
    if run.reports is not None:
        run.reports.close(stopped)
    return EXIT_REQUEUE if stopped and run.step < config.train.steps else 0


def enter(config: RunConfig, opened: Open = Saved) -> None:
    """`train` as the whole of a process."""
    raise SystemExit(train(config, opened))


def _catch_signals() -> list[int]:
    """A list that holds a signal's number once one has come."""
    asked: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        asked.append(signum)

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)
    return asked

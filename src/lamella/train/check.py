"""Everything about a run that can be wrong, looked at before any process starts."""

from lamella.checkpoint import series
from lamella.config import RunConfig
from lamella.data.stream import heldout_rows
from lamella.errors import UserError
from lamella.model.count import count
from lamella.parallel.layout import Layout, resolve
from lamella.train.folder import open_folder
from lamella.train.init_from import Open, Saved, find_start
from lamella.train.rows import open_rows
from lamella.train.saving import mirror_of


def check(run: RunConfig, world: int, opened: Open = Saved) -> Layout:
    """Layout, model, data, tokenizer and folder, against each other. Raises UserError for the first that fails."""
    layout = resolve(run, world)
    train = run.train
    decay = train.schedule.decay_steps
    if train.schedule.kind == "wsd" and not 0 < decay <= train.steps:
        raise UserError(f"train.schedule.decay_steps={decay} must lie in 1..train.steps={train.steps}")
    data = open_rows(run)
    heldout_rows(run.data, train.sequence_length)
    if data.vocab_size > run.model.vocab_size:
        raise UserError(
            f"model.vocab_size={run.model.vocab_size} is smaller than the tokenizer's {data.vocab_size} pieces"
            f" ({run.data.path}); raise it to {data.vocab_size}"
        )
    mirror = mirror_of(run)
    if series.latest(run.folder / "checkpoints") is None and not (mirror is not None and mirror.steps()):
        find_start(run, data.tokenizer.fingerprint, opened)
    open_folder(run)
    return layout


def describe(run: RunConfig, layout: Layout) -> str:
    """What would run, in a few lines."""
    train = run.train
    sizes = count(run.model, train.sequence_length)
    per_token = sizes.training_flops / train.sequence_length
    tokens = train.steps * train.global_batch_size * train.sequence_length
    return "\n".join(
        [
            f"{run.name}: {sizes.parameters:,} parameters, {sizes.active:,} active a token,"
            f" {per_token / 1e6:.1f} MFLOP a token in training",
            f"layout: {layout.world} processes = {layout},"
            f" {layout.micro_batch_count} micro-batches of {layout.micro_batch} rows",
            f"{train.steps} steps of {train.global_batch_size} x {train.sequence_length} tokens = {tokens:,}",
        ]
    )

"""DeepSpeed's own engine over one of our models (or any module), its converter, its universal loader."""

import argparse
import warnings
from pathlib import Path

import torch

INFO, VERSION = "universal_checkpoint_info", "universal_checkpoint_version"
SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 1.0,
    "steps_per_print": 2**62,
    "zero_allow_untested_optimizer": True,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
}


def engine_of(model, zero=1, universal=False):
    import lamella.parallel.cpu_host  # noqa: F401

    warnings.simplefilter("ignore")
    import deepspeed

    if zero == 3:  # a branch's parameters are gathered together
        from lamella.channels.base import Channel
        from lamella.mixers.base import Mixer

        branches = [m for m in model.modules() if isinstance(m, Mixer | Channel)]
        deepspeed.utils.set_z3_leaf_modules(model, list({type(m) for m in branches}))
    settings = SETTINGS | {"zero_optimization": {"stage": zero}}
    settings |= {"checkpoint": {"load_universal": True}} if universal else {}
    if not torch.distributed.is_initialized():
        deepspeed.init_distributed("gloo", verbose=False)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
    return engine


def ours(config, seed=0):
    from lamella.config import ModelConfig
    from lamella.model.init import initialize
    from lamella.model.lm import LanguageModel

    model = LanguageModel(ModelConfig.model_validate(config, strict=False))
    initialize(model, seed)
    return model


def loss_of(engine, step):
    from lamella.nn.rows import one_document

    tokens = torch.randint(50, (1, 12), generator=torch.Generator().manual_seed(step))
    logits = engine(tokens, one_document(tokens))
    return torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:])


def train(engine, steps, start=0):
    """The losses of the steps, the same rows on every rank."""
    losses = []
    for step in range(start, start + steps):
        loss = loss_of(engine, step)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def save(engine, folder: Path, steps, client) -> None:
    """folder/universal, by DeepSpeed's converter. All processes together."""
    state = {INFO: {VERSION: 0.2}} | client
    engine.save_checkpoint(str(folder / "native"), tag=f"global_step{steps}", client_state=state)
    if torch.distributed.get_rank() == 0:
        from deepspeed.checkpoint import ds_to_universal

        words = {"input_folder": str(folder / f"native/global_step{steps}")}
        words |= {"output_folder": str(folder / "universal/step")}
        more = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
        (folder / "universal").mkdir(parents=True)
        ds_to_universal.main(argparse.Namespace(**words, **more, inject_missing_state=False))
    torch.distributed.barrier()


def write(config, folder: Path, zero=1, client=None, steps=3):
    """Trains some steps, saves, converts by DeepSpeed's converter; returns the next losses."""
    torch.manual_seed(0)
    engine = engine_of(ours(config), zero)
    train(engine, steps)
    save(engine, folder, steps, client or {})
    return train(engine, 2, start=steps)


def load(config, folder: Path, zero=1, steps=3):
    """DeepSpeed's own engine, its state from a universal folder; returns the next losses."""
    engine = engine_of(ours(config, seed=1), zero, universal=True)
    path, _ = engine.load_checkpoint(str(folder))
    assert path is not None
    assert engine.global_steps == steps
    return train(engine, 2, start=steps)

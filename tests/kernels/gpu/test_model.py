"""A whole model on the kernels: loss and gradients are plain torch's, and a rehearsal launches what a step does."""

import pytest
import torch

from lamella.config import LayoutConfig, load_run
from lamella.model.lm import LanguageModel
from lamella.nn.draw import Draw
from lamella.nn.record import Record
from lamella.nn.rows import Rows
from lamella.parallel.layout import resolve
from lamella.train.probe import shrink_run
from lamella.train.rehearse import of_each_kind, rehearse
from lamella_kernels import forms, tiles
from tests.kernels.gpu.building import DEVICE
from tests.nn.building import relative

LENGTHS = [[7, 1, 8], [16]]


def run_of(model, **keys):
    layout = LayoutConfig(**keys, logits="pieces")
    run = load_run("configs/run/quickstart.yaml", [f"model={model}"])
    run = shrink_run(run, layout)
    train = run.train.model_copy(update={"sequence_length": 16, "global_batch_size": 2})
    return run.model_copy(update={"layout": layout, "train": train, "model": of_each_kind(run.model)})


def model_of(run):
    model = LanguageModel(run.model)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.shard.pieces = True
    return model.to(DEVICE)


def gradients(model, form):
    position = torch.cat([torch.arange(n) for row in LENGTHS for n in row]).view(2, 16).int()
    document = torch.tensor([[i for i, n in enumerate(row) for _ in range(n)] for row in LENGTHS]).int()
    tokens = torch.randint(model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(1))
    targets, position, document = (t.to(DEVICE) for t in (tokens.roll(-1, 1), position, document))
    rows = Rows(document, position, Draw(0, 0, torch.arange(2, device=DEVICE)), 1.0, Record())
    model.zero_grad(set_to_none=True)
    with forms.use(form):
        loss = model(tokens.to(DEVICE), rows, targets_BT=targets).sum()
        loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["jamba-nano", pytest.param("every-nano", marks=pytest.mark.full)])
def test_loss_and_gradients_are_those_of_plain_torch(name):
    model = model_of(run_of(name))
    ours, plain = gradients(model, "gpu"), gradients(model, "eager")
    assert ours.keys() == plain.keys()
    for key, gradient in plain.items():
        assert relative(ours[key], gradient) < 1e-4, key


@pytest.mark.parametrize("keys", [{}, {"tensor": 2, "expert": 2}], ids=["one", "tensor, expert"])
def test_a_rehearsal_looks_up_every_tile_of_a_step(keys):
    run = run_of("jamba-nano", **keys)
    model = model_of(run)
    with tiles.lookups() as step:
        gradients(model, "gpu")
    with tiles.lookups() as rehearsed:
        rehearse(run, resolve(run, run.layout.tensor), torch.device(DEVICE))
    assert rehearsed.keys() == step.keys() and {"selective_scan_backward", "rmsnorm_backward", "swiglu"} < step.keys()

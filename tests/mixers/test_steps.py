"""Generation with a recurrence costs the same at any token: the work of a step is counted, not timed."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lamella.config import ModelConfig, check_options
from lamella.mixers.base import config_of
from lamella.model.generate import GREEDY, Generation
from lamella.model.lm import LanguageModel
from lamella.nn.rows import Rows
from tests.mixers.cases import CASES, D_MODEL, IDS
from tests.nn.building import double, filled, noise

EARLY, LATE = 10, 1000
GROWING = {"attention"}  # keeps every token, but under a window
RECURRENT = [(case, name) for case, name in zip(CASES, IDS, strict=True) if case[0] not in GROWING]


class Calls(TorchDispatchMode):
    """Every call of torch, with the shapes of the tensors that go in and come out: all that its cost depends on."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        self.made.append((str(operation), [tuple(t.shape) for t in tensors]))
        return result


def mixer_of(case):
    name, options = case
    config = check_options(config_of(name), {"mixer": name, **options}, name)
    return filled(config.build(D_MODEL, 1e-5, double())).double().requires_grad_(False)


def size_of(state) -> int:
    """The bytes that the state keeps alive."""
    return sum(value.untyped_storage().nbytes() for value in state.values())


def step(mixer, state, first, length=1):
    """`length` tokens of two rows from `first` on. Returns the calls of torch."""
    position = torch.arange(first, first + length, dtype=torch.int32).repeat(2, 1)
    x = noise(2, length, D_MODEL, seed=first)
    with Calls() as calls:
        mixer(x, Rows(torch.zeros_like(position), position), state)
    return calls.made


def two_steps(mixer, many, late=LATE):
    """Of token `EARLY`, after single ones, and of token `late`, after some at once or singly: calls, bytes kept."""
    state = {}
    for t in range(EARLY):
        step(mixer, state, t)
    early = step(mixer, state, EARLY), size_of(state)
    if many:
        step(mixer, state, EARLY + 1, late - EARLY - 20)
    for t in range(late - 19 if many else EARLY + 1, late):
        step(mixer, state, t)
    return early, (step(mixer, state, late), size_of(state))


@pytest.mark.parametrize("case", [case for case, _ in RECURRENT], ids=[name for _, name in RECURRENT])
def test_a_step_costs_the_same_early_and_late(case):
    early, late = two_steps(mixer_of(case), many=True)
    assert early == late
    assert early[0] and early[1] > 0


def test_attention_is_told_apart():
    early, late = two_steps(mixer_of(("attention", {"num_heads": 2})), many=False, late=200)
    assert early[0] != late[0] and early[1] < late[1]


def test_attention_under_a_window_costs_the_same_once_it_is_full():
    mixer = mixer_of(("attention", {"num_heads": 2, "window": 3}))
    early, late = two_steps(mixer, many=False, late=200)
    assert early == late


@pytest.mark.parametrize("case", [case for case, _ in RECURRENT], ids=[name for _, name in RECURRENT])
def test_a_model_s_step_costs_the_same_early_and_late(case):
    """The whole of `Generation.step`, after 10 tokens and after 1,000 of which a prompt is most."""
    name, options = case
    parts = {"mixer": {"mixer": name, **options}, "mlp": {"channel": "mlp", "d_ff": 8}}
    tree = {"d_model": D_MODEL, "vocab_size": 12, "parts": parts, "stack": [{"repeat": 2, "layers": ["mixer/mlp"]}]}
    model = filled(LanguageModel(ModelConfig.model_validate(tree, strict=False))).requires_grad_(False)
    made = []
    for length in (EARLY, LATE):
        batch = Generation(model, [[3] * (length - 2)], 2, 12, GREEDY)
        batch.step()
        batch.step()
        with Calls() as calls:
            batch.step()
        made.append((calls.made, [size_of(state) for state in batch._states.values()]))
    assert made[0] == made[1]

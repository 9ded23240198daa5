"""What the kernels' tests build on: numbers, packed rows, comparisons, calls counted."""

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.nn.building import Largest


def source(seed):
    """A function from a shape to normal numbers, other ones at each call."""
    random = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)


def resets(time, batch=2, seed=1):
    """Documents of random lengths, some of one token, other ones in each row; row 0 continues the initial state."""
    random = torch.Generator().manual_seed(seed)
    reset = torch.rand(batch, time, generator=random) < 0.08
    reset[:, 1:] |= reset[:, :-1] & (torch.rand(batch, time - 1, generator=random) < 0.3)
    reset[0, 0], reset[-1, 0] = False, True
    return reset


FIVE = torch.tensor([[False, False, True, False, False], [True, False, False, True, True]])  # two rows' resets


def starting(starts, time, batch=2):
    """Documents that start at these tokens in every row."""
    reset = torch.zeros(batch, time, dtype=torch.bool)
    reset[:, list(starts)] = True
    return reset


def log_decays(*shape, seed=90):
    """Logs of decays from nearly 0 to nearly 1, some of them exactly 0 and 1."""
    log_w = -(2 * source(seed)(*shape) - 1).exp()
    kind = torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1))
    return log_w.masked_fill(kind < 0.03, -1e4).masked_fill(kind > 0.97, 0.0)


def weights(*results):
    """What the gradients of results are weighed by."""
    normal = source(2)
    return [normal(*value.shape).to(value.dtype) for value in results]


def values(function, inputs, *options):
    """y and the state or its parts, if there are any, by name."""
    y, state = function(inputs, *options)
    parts = state._asdict() if hasattr(state, "_asdict") else {"state": state}
    return {"y": y} | {name: part for name, part in parts.items() if part is not None}


def values_and_gradients(function, inputs, *options):
    """Also the gradient of every input."""
    results = values(function, inputs, *options)
    driven = [value for value in results.values() if value.requires_grad]
    gradients = torch.autograd.grad(driven, list(inputs.values()), weights(*driven))
    return results | dict(zip(inputs, gradients, strict=True))


def wide_copy(inputs):
    return {name: value.detach().double().requires_grad_() for name, value in inputs.items()}


def assert_close(ours, theirs, limit):
    """The same names and shapes, and no distance over `limit` of their length."""
    assert {name: v.shape for name, v in ours.items()} == {name: v.shape for name, v in theirs.items()}
    far = {}
    for name, value in theirs.items():
        expected = value.detach().double()
        distance = float((ours[name].detach().double() - expected).norm() / (expected.norm() + 1e-300))
        if not distance <= limit:
            far[name] = distance
    assert not far


def assert_agree(function, judge, inputs, *options, limit):
    ours, theirs = (values_and_gradients(f, inputs, *options) for f in (function, judge))
    assert_close(ours, theirs, limit)


def assert_exact(function, judge, inputs, *options, limit):
    """Finite, and near to what `judge` finds in fp64; returns the values and gradients."""
    ours = values_and_gradients(function, inputs, *options)
    assert_finite(ours)
    assert_close(ours, values_and_gradients(judge, wide_copy(inputs), *options), limit)
    return ours


def assert_gradients(function, inputs, *options):
    """Of every output by every input, numerically."""

    def results(*arguments):
        return tuple(values(function, dict(zip(inputs, arguments, strict=True)), *options).values())

    assert torch.autograd.gradcheck(results, tuple(inputs.values()), fast_mode=False)


def assert_finite(results):
    assert not [name for name, value in results.items() if not value.isfinite().all()]


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert not [name for name, value in theirs.items() if not torch.equal(ours[name], value)]


def assert_apart(run, make, tokens, starts, time, dtype):
    """Bit for bit, the outputs and the gradients of other documents stay when one changes, and its own change."""
    reset = starting(starts, time)
    inputs, others = (make(time, dtype=dtype, seed=seed, initial=False) for seed in (0, 9))

    def by_token(inputs):
        y = run(inputs, reset)[0]
        gradients = torch.autograd.grad(y, [inputs[name] for name in tokens], (3 * y.detach()).cos())
        return {"y": y, **dict(zip(tokens, gradients, strict=True))}

    before = by_token(inputs)
    for start, end in zip(starts, (*starts[1:], time), strict=True):
        changed = {name: value.detach().clone() for name, value in inputs.items()}
        for name in tokens:
            other = others[name].detach()[:, start:end]
            changed[name][:, start:end] = other if name in ("a", "b") else 5 * other
        after = by_token({name: value.requires_grad_() for name, value in changed.items()})
        elsewhere = torch.ones(time, dtype=torch.bool)
        elsewhere[start:end] = False
        for name, value in before.items():
            assert torch.equal(value[:, elsewhere], after[name][:, elsewhere]), (name, start)
            here = value[:, start:end]
            # in so short a document there is no state yet for a decay or a removal to change: their gradients stay 0
            nothing = name in ("decay", "log_w", "a", "b") and end - start <= 2 and not here.any()
            assert nothing or not torch.equal(here, after[name][:, start:end]), (name, start)


def fla_file(path):
    """A module of flash-linear-attention loaded by its file: the package itself needs triton."""
    found = importlib.util.find_spec("fla")
    if found is None:
        pytest.skip("flash-linear-attention is not installed")
    for folder in found.submodule_search_locations or []:
        if (file := Path(folder) / path).is_file():
            spec = importlib.util.spec_from_file_location(file.stem, file)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    pytest.skip(f"this flash-linear-attention has no {path}")


class Calls(Largest):
    """Also how many operations there were."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += 1
        return super().__torch_dispatch__(operation, types, args, kwargs)


def cost(run, inputs):
    """The calls of the forward and of the backward pass over packed rows."""
    batch, time = next(iter(inputs.values())).shape[:2]
    with Calls() as forward:
        y = run(inputs, resets(time, batch))[0]
    with Calls() as backward:
        torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y))
    return forward, backward


def mapping(tokens, choices, dropped, unused):
    """slot_M and place_NS of moe_permute: slots in any order, a share of them dropped, and rows of no slot behind."""
    random = torch.Generator().manual_seed(0)
    slot_M = torch.randperm(tokens * choices, generator=random)
    slot_M = slot_M[: len(slot_M) - round(dropped * len(slot_M))]
    place_NS = torch.full((tokens * choices,), -1)
    place_NS[slot_M] = torch.arange(len(slot_M))
    return torch.cat([slot_M, torch.full((unused,), -1)]), place_NS.view(tokens, choices)

"""What the tests of both RWKV recurrences build on."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_decays(*shape, seed=90):
    """Logs of decays from nearly 0 to nearly 1, some of them exactly 0 and 1."""
    log_w = -(2 * normal(*shape, seed=seed) - 1).exp()
    kind = torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1))
    return log_w.masked_fill(kind < 0.03, -1e4).masked_fill(kind > 0.97, 0.0)


def resets(time, batch=2, seed=1):
    """Documents of random lengths, some of one token, other ones in each row; row 0 continues the initial state."""
    random = torch.Generator().manual_seed(seed)
    reset = torch.rand(batch, time, generator=random) < 0.08
    reset[:, 1:] |= reset[:, :-1] & (torch.rand(batch, time - 1, generator=random) < 0.3)
    reset[0, 0], reset[-1, 0] = False, True
    return reset


def values_and_gradients(function, inputs, *options):
    y, state = function(inputs, *options)
    weights = [normal(*v.shape, seed=2 + i).to(v.dtype) for i, v in enumerate((y, state))]
    gradients = torch.autograd.grad((y, state), list(inputs.values()), weights)
    return {"y": y, "state": state, **dict(zip(inputs, gradients, strict=True))}


def wide_copy(inputs):
    return {name: value.detach().double().requires_grad_() for name, value in inputs.items()}


def distances(ours, theirs):
    ours, theirs = ({name: v.detach().double() for name, v in side.items()} for side in (ours, theirs))
    return {name: float((ours[name] - theirs[name]).norm() / (theirs[name].norm() + 1e-300)) for name in theirs}


def assert_close(ours, theirs, limit):
    far = {name: distance for name, distance in distances(ours, theirs).items() if not distance <= limit}
    assert not far


def fla_file(path):
    """A module of flash-linear-attention loaded by its file: the package itself needs triton."""
    found = importlib.util.find_spec("fla")
    if found is None:
        pytest.skip("flash-linear-attention is not installed")
    for folder in found.submodule_search_locations or []:
        if (file := Path(folder) / path).is_file():
            spec = importlib.util.spec_from_file_location(file.stem, file)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    pytest.skip(f"this flash-linear-attention has no {path}")


class Calls(TorchDispatchMode):
    """Counts torch calls and the numbers in the largest tensor that one returns."""

    def __init__(self):
        super().__init__()
        self.count, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += 1
        self.largest = max([self.largest, *(v.numel() for v in tree_leaves(out) if isinstance(v, torch.Tensor))])
        return out

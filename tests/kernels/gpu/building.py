"""What the tests of Triton kernels build on: fenced memory, the reference in fp64, torch's checks of operators."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.kernels.building import assert_close, assert_finite, source, weights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FENCE = 64  # elements on each side
HALVES = {dtype: torch.finfo(dtype).eps for dtype in (torch.bfloat16, torch.float16)}  # they round inputs and outputs
LIMITS = {torch.float32: 1e-5, **HALVES}


def between_fences(tensor: Tensor) -> Tensor:
    """The same values in the middle of NaN (of -10^6 for integers): a read out of bounds shows in the results."""
    aside = torch.nan if tensor.dtype.is_floating_point else -(10**6)
    memory = torch.full((tensor.numel() + 2 * FENCE,), aside, dtype=tensor.dtype, device=DEVICE)
    inside = memory[FENCE : FENCE + tensor.numel()].view(tensor.shape)
    return inside.copy_(tensor.detach())


class Fences:
    """torch.empty whose memory is NaN, with a fence on each side."""

    def __init__(self, empty: Callable[..., Tensor]):
        self.stock, self.made = empty, []

    def empty(self, *shape: Any, dtype: torch.dtype | None = None, device: Any = None, **options: Any) -> Tensor:
        shape = tuple(shape[0]) if shape and not isinstance(shape[0], int) else shape
        plain = torch.device("cpu" if device is None else device).type == "meta" or options
        if plain or not (dtype or torch.float32).is_floating_point or torch.compiler.is_compiling():
            return self.stock(shape, dtype=dtype, device=device, **options)
        count = torch.Size(shape).numel()
        memory = torch.full((count + 2 * FENCE,), torch.nan, dtype=dtype, device=device)
        self.made.append(memory)
        return memory[FENCE : FENCE + count].view(shape)

    def check(self) -> None:
        assert self.made, "nothing was allocated with torch.empty"
        for memory in self.made:
            assert memory[:FENCE].isnan().all() and memory[-FENCE:].isnan().all()


def numbers(dtype: torch.dtype, seed: int = 0) -> Callable[..., Tensor]:
    """A function from a shape to normal numbers between fences that take a gradient."""
    normal = source(seed)
    return lambda *shape: between_fences(normal(*shape).to(dtype)).requires_grad_()


def results_and_gradients(run: Callable[[dict[str, Tensor]], Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `run` returns, a tensor or several, and the gradient of every input that takes one."""
    found = run(inputs)
    found = tuple(found) if isinstance(found, (tuple, list)) else (found,)
    named = {f"out{i}": value for i, value in enumerate(found) if value is not None}
    driven = [value for value in named.values() if value.requires_grad]
    to = [name for name, value in inputs.items() if value.requires_grad]
    weighed = [weight.to(value.device) for weight, value in zip(weights(*driven), driven, strict=True)]
    gradients = torch.autograd.grad(driven, [inputs[name] for name in to], weighed)
    return named | dict(zip(to, gradients, strict=True))


def assert_exact(
    run: Callable[[dict[str, Tensor]], Any],
    judge: Callable[[dict[str, Tensor]], Any],
    inputs: dict[str, Tensor],
    limit: float,
    steep: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Values and every gradient are finite and near to what `judge` finds in fp64; four times the limit for `steep`."""
    ours = results_and_gradients(run, inputs)
    assert_finite(ours)
    wide = {
        name: value.detach().double().requires_grad_(value.requires_grad) if value.dtype.is_floating_point else value
        for name, value in inputs.items()
    }
    theirs = results_and_gradients(judge, wide)
    assert_close({name: ours[name] for name in steep}, {name: theirs[name] for name in steep}, 4 * limit)
    rest = ours.keys() - set(steep)
    assert_close({name: ours[name] for name in rest}, {name: theirs[name] for name in rest}, limit)
    return ours


def assert_operator(run: Callable[[dict[str, Tensor]], Any], inputs: dict[str, Tensor], names: list[str]) -> None:
    """Every call of the operators lamella::NAME in `run` passes torch.library.opcheck; each is called."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: dict[str, tuple[Any, Any]] = {}

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            if operation.namespace == "lamella":
                calls[operation.__name__.partition(".")[0]] = operation, args
            return operation(*args, **kwargs or {})

    with Recorded():
        results_and_gradients(run, inputs)
    assert sorted(calls) == sorted(names)
    for operation, args in calls.values():
        copies = tuple(
            a.detach().clone().requires_grad_(a.dtype.is_floating_point) if isinstance(a, Tensor) else a for a in args
        )
        tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration")
        if operation.__name__.partition(".")[0].endswith("_backward"):  # it has no derivative of its own
            copies = tuple(a.detach() if isinstance(a, Tensor) else a for a in copies)
            tests = tests[:2]
        torch.library.opcheck(operation, copies, test_utils=tests)


def assert_compiles(run: Callable[[dict[str, Tensor]], Any], inputs: dict[str, Tensor]) -> None:
    """As one graph, forward and backward, bit for bit as without."""
    names = list(inputs)

    def flat(*values: Tensor) -> Any:
        return run(dict(zip(names, values, strict=True)))

    torch._dynamo.reset()  # it counts compilations of `flat`, of all operators that a process tests
    compiled = torch.compile(flat, backend="aot_eager", fullgraph=True)
    plain = results_and_gradients(run, inputs)
    traced = results_and_gradients(lambda given: compiled(*given.values()), inputs)
    assert plain.keys() == traced.keys()
    assert not [name for name, value in plain.items() if not torch.equal(traced[name], value)]

"""The Triton scan against the equation: states, documents, segments of time, steps at their ends."""

import pytest
import torch

from lamella_kernels import ops
from lamella_kernels.selective_scan import WIDEST, selective_scan
from tests.kernels import test_selective_scan as scan
from tests.kernels.building import assert_apart, assert_equal, resets, starting
from tests.kernels.gpu.building import (
    LIMITS,
    assert_compiles,
    assert_exact,
    assert_operator,
    between_fences,
    results_and_gradients,
)

OPERATORS = ["selective_scan", "selective_scan_backward"]


def make(time, dtype=torch.float32, packed=True, **sizes):
    inputs = scan.make(time, dtype=dtype, **sizes)
    inputs = {name: between_fences(value).requires_grad_() for name, value in inputs.items()}
    if packed:
        inputs["reset"] = between_fences(resets(time, len(inputs["x"])))
    return inputs


def ours(inputs):
    a = inputs
    named = {"reset_BT": a.get("reset"), "initial_state_BIN": a.get("initial"), "return_state": True}
    return selective_scan(a["x"], a["dt"], a["A"], a["B"], a["C"], a.get("D"), **named)


def theirs(inputs):
    D = inputs.get("D", torch.zeros_like(inputs["A"][:, 0]))
    return scan.run_reference({**inputs, "D": D}, inputs.get("reset"))


def retile(monkeypatch, **sizes):
    from lamella_kernels.selective_scan import gpu

    tiles = gpu.tiles
    monkeypatch.setattr(gpu, "tiles", lambda *a, **k: {w: sizes.get(w, v) for w, v in tiles(*a, **k).items()})


@pytest.fixture
def short(monkeypatch):
    """Segments of four tokens, two steps of two: in the interpreter every token takes its time."""
    retile(monkeypatch, EVERY=4, STEPS=2)


@pytest.fixture
def one_segment(monkeypatch):
    """As where there are programs enough without cutting time."""
    retile(monkeypatch, PROGRAMS=1)


@pytest.mark.parametrize("packed", [False, True])
def test_equals_reference(packed, short, fenced):
    """Three segments, the last short and odd; of the packed rows one drops its initial state."""
    assert_exact(ours, theirs, make(11, packed=packed), LIMITS[torch.float32])


def test_one_segment(short, one_segment, fenced):
    assert_exact(ours, theirs, make(11, batch=1), LIMITS[torch.float32])


def test_shipped_tiles(fenced):
    assert_exact(ours, theirs, make(35, batch=1), LIMITS[torch.float32])


@pytest.mark.full
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("time", "channels", "states"), [(1, 3, 16), (63, 40, 16), (100, 3, 1), (257, 3, 16), (5, 9, 70), (7, 33, 24)]
)
def test_lengths_widths_and_types(time, channels, states, packed, dtype, fenced):
    inputs = make(time, dtype, packed, channels=channels, states=states)
    found = assert_exact(ours, theirs, inputs, LIMITS[dtype])
    assert found["out0"].dtype == dtype and found["out1"].dtype == torch.float32
    assert all(found[name].dtype == value.dtype for name, value in inputs.items() if name != "reset")


@pytest.mark.full
def test_one_segment_of_many_chunks(one_segment, fenced):
    for packed in (False, True):
        assert_exact(ours, theirs, make(257, packed=packed), LIMITS[torch.float32])


def test_bfloat16(short, fenced):
    inputs = make(9, torch.bfloat16)
    found = assert_exact(ours, theirs, inputs, LIMITS[torch.bfloat16])
    half = {name for name, value in found.items() if value.dtype == torch.bfloat16}
    assert half == {"out0", "x", "B", "C"}


def test_extreme_steps(short, fenced):
    """Decays from exactly 1 to exactly 0, beside resets: no inf * 0 anywhere, no difference of large numbers."""
    inputs = make(22, batch=1)
    with torch.no_grad():
        inputs["dt"].mul_(torch.logspace(-6, 4, 22, device=inputs["dt"].device).view(1, 22, 1))
        inputs["A"][0] = 0
        inputs["A"][1] = -1e4
        inputs["dt"][:, 7:9] = 0
    assert_exact(ours, theirs, inputs, LIMITS[torch.float32])


def test_without_skip_and_state(short, fenced):
    inputs = make(6, packed=False, initial=False)
    del inputs["D"]
    assert_exact(lambda a: ours(a)[0], lambda a: theirs(a)[0], inputs, LIMITS[torch.float32])
    only_state = {name: value for name, value in inputs.items() if name != "C"}
    of_ours, of_theirs = (
        lambda a, f=f: f({**a, "C": inputs["C"].detach().to(a["x"].dtype)})[1] for f in (ours, theirs)
    )
    assert_exact(of_ours, of_theirs, only_state, LIMITS[torch.float32])


@pytest.mark.full
@pytest.mark.parametrize("segments", ["many", "one"])
@pytest.mark.parametrize("starts", [(0, 31, 66), (0, 32, 64)])
def test_other_documents_have_no_influence_at_all(starts, segments, request):
    """Borders before, at and after those of segments, chunks and steps."""
    if segments == "one":
        request.getfixturevalue("one_segment")
    assert_apart(scan.run, scan.make, scan.TOKENS, starts, 70, torch.float32)


def test_other_documents_of_a_short_row(short):
    assert_apart(scan.run, scan.make, scan.TOKENS, (0, 4, 7), 9, torch.bfloat16)


def test_reset_at_the_first_token_drops_the_initial_state(short):
    inputs = make(5, packed=False) | {"reset": starting([0], 5)}
    y, _ = ours(inputs)
    assert torch.equal(y, ours({name: value for name, value in inputs.items() if name != "initial"})[0])
    assert not torch.autograd.grad(y.sum(), inputs["initial"])[0].any()


@pytest.mark.full
def test_twice_is_the_same_to_the_last_bit():
    inputs = make(70)
    assert_equal(*(results_and_gradients(ours, inputs) for _ in range(2)))


def test_states_are_kept_for_backward_alone(short, fenced):
    """Those before every fourth token here."""
    inputs = make(5)
    ours(inputs)
    with_gradients, number = sum(map(len, fenced.made)), len(fenced.made)
    with torch.no_grad():
        ours(inputs)
    assert with_gradients - sum(map(len, fenced.made[number:])) == inputs["initial"].numel() * 2


def test_too_many_states_for_a_warp():
    """They take the form in plain torch."""
    inputs = make(2, states=WIDEST + 1, channels=1)
    assert "SelectiveScanBackward" in type(ours(inputs)[0].grad_fn).__name__


def test_more_rows_than_a_grids_second_dimension_holds():
    """65535 blocks in CUDA; so many rows are launched all the same."""
    rows = 70_000
    shapes = {"x": (rows, 1, 3), "dt": (rows, 1, 3), "A": (3, 4), "B": (rows, 1, 4), "C": (rows, 1, 4)}
    inputs = {name: torch.empty(shape, device="meta", requires_grad=True) for name, shape in shapes.items()}
    grids = []
    with ops.listening(lambda kernel, grid, arguments, options: grids.append(grid)):
        ours(inputs)[0].sum().backward()
    assert len(grids) == 6 and max(grid[0] for grid in grids) >= rows
    assert all(size <= 65535 for grid in grids for size in grid[1:])


def test_operator(short):
    assert_operator(ours, make(5), OPERATORS)


def test_torch_compile(short):
    assert_compiles(ours, make(5))

"""Linear attention against the equation: values, every gradient, packed documents, states handed over, extremes.

B batch, T time, H head, K size of a key, V of a value.
"""

import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lamella_kernels.linear_attention import State, eager, linear_attention, reference

LENGTHS = (1, 2, 31, 70, 129)
KINDS = ("constant", "varying")


def make(time, kind="varying", batch=2, heads=3, keys=4, values=6, dtype=torch.float64, seed=0, initial=True):
    """Inputs by name; the decay and the state stay fp32 where q is half precision."""
    random = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    decay = normal(heads) if kind == "constant" else normal(batch, time, heads)
    inputs = {
        "q": normal(batch, time, heads, keys).to(dtype),
        "k": normal(batch, time, heads, keys).to(dtype),
        "v": normal(batch, time, heads, values).to(dtype),
        "decay": -(decay - 2).exp().to(wide),
    }
    if initial:
        inputs["kv"] = normal(batch, heads, keys, values).to(wide)
    return {name: value.requires_grad_() for name, value in inputs.items()}


def sums(inputs):
    """The state's other parts, which no gradient reaches: z [B, H, K] and w [B, H]."""
    if "kv" not in inputs:
        return None, None
    z = inputs["kv"].detach().mean(-1)
    return z, z.abs().sum(-1)


def resets(time, batch=2, seed=1):
    """Documents of random lengths, some of one token, other ones in each row; row 0 continues the initial state."""
    random = torch.Generator().manual_seed(seed)
    reset = torch.rand(batch, time, generator=random) < 0.08
    reset[:, 1:] |= reset[:, :-1] & (torch.rand(batch, time - 1, generator=random) < 0.3)
    reset[0, 0], reset[-1, 0] = False, True
    return reset


def run(inputs, reset=None, normalize=True):
    a = inputs
    state = State(a["kv"], *sums(a)) if "kv" in a else None
    named = {"normalize": normalize, "reset_BT": reset, "initial_state": state, "return_state": True}
    return linear_attention(a["q"], a["k"], a["v"], a["decay"], **named)


def run_reference(inputs, reset=None, normalize=True):
    a = inputs
    args = a["q"], a["k"], a["v"], a["decay"], normalize, reset, a.get("kv"), *sums(a)
    y, *state = reference.linear_attention(*args)
    return y, State(*state)


def values_and_gradients(function, inputs, reset, normalize=True):
    y, state = function(inputs, reset, normalize)
    random = torch.Generator().manual_seed(2)
    results = y, state.kv_BHKV
    weights = [torch.randn(v.shape, generator=random, dtype=torch.float64).to(v.dtype) for v in results]
    gradients = torch.autograd.grad(results, list(inputs.values()), weights)
    out = {"y": y, "state": state.kv_BHKV, **dict(zip(inputs, gradients, strict=True))}
    return out | ({"keys": state.keys_BHK, "weight": state.weight_BH} if normalize else {})


def distances(ours, theirs):
    ours, theirs = ({name: v.detach().double() for name, v in side.items()} for side in (ours, theirs))
    return {name: float((ours[name] - theirs[name]).norm() / (theirs[name].norm() + 1e-300)) for name in theirs}


def assert_close(ours, theirs, limit):
    assert ours.keys() == theirs.keys()
    far = {name: distance for name, distance in distances(ours, theirs).items() if not distance <= limit}
    assert not far


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("time", LENGTHS)
def test_fp64_equals_reference(time, kind, packed, normalize):
    inputs, reset = make(time, kind), resets(time) if packed else None
    ours, theirs = (values_and_gradients(f, inputs, reset, normalize) for f in (run, run_reference))
    assert_close(ours, theirs, 1e-12)


@pytest.mark.parametrize("size", [1, 5, 16, 21, 62, 63])
@pytest.mark.parametrize("kind", KINDS)
def test_every_chunking_equals_reference(monkeypatch, kind, size):
    """Also lengths that do not divide, and documents that start and end exactly at the borders of chunks."""
    monkeypatch.setattr(eager, "chunk_size", lambda time, keys, values: size)
    inputs = make(63, kind)
    for reset in (None, resets(63), (torch.arange(63) % size == 0).expand(2, 63)):
        ours, theirs = (values_and_gradients(function, inputs, reset) for function in (run, run_reference))
        assert_close(ours, theirs, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_state(kind):
    """Neither given nor asked for: the same outputs and gradients."""
    inputs, reset = make(100, kind, initial=False), resets(100)
    names = ("q", "k", "v", "decay")
    args = [inputs[name] for name in names]
    y = linear_attention(*args, normalize=True, reset_BT=reset)
    expected = run_reference(inputs, reset)[0]
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)
    ours, theirs = (torch.autograd.grad(out, args, weight) for out in (y, expected))
    assert_close(dict(zip(names, ours, strict=True)), dict(zip(names, theirs, strict=True)), 1e-12)
    assert_close({"y": y}, {"y": expected}, 1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_parallel_recurrent_and_chunkwise_are_one(kind, monkeypatch):
    """One chunk of the whole row, chunks of one token, chunks between: with the normalisation that RetNet defines.

    The parallel form is the paper's: D over the root of its row sums, scores over max(1, |row sum|).
    """
    inputs = make(90, kind, initial=False, values=5)
    q, k, v, decay = (t.detach().permute(0, 2, 1, 3) if t.dim() == 4 else t.detach() for t in inputs.values())
    logs_BHT = decay.expand(2, 90, 3).mT.cumsum(-1)
    D = (logs_BHT.unsqueeze(-1) - logs_BHT.unsqueeze(-2)).exp().tril()
    D = D / D.sum(-1, keepdim=True).sqrt()
    scores = (q @ k.mT) * D
    scores = scores / scores.sum(-1, keepdim=True).abs().clamp(min=1)
    expected = (scores @ v).transpose(1, 2)
    for size in (90, 1, 32):
        monkeypatch.setattr(eager, "chunk_size", lambda time, keys, values, size=size: size)
        assert_close({"y": run(inputs)[0]}, {"y": expected}, 1e-13)
    assert_close({"y": run_reference(inputs)[0]}, {"y": expected}, 1e-13)


def test_the_recurrence_in_numpy():
    """Equation 6 of arXiv 2307.08621 with the two sums, written anew."""
    inputs, reset = make(40, "constant", initial=False), resets(40)
    q, k, v, decay = (t.detach().numpy() for t in inputs.values())
    expected = np.zeros_like(v)
    for b, h in np.ndindex(2, 3):
        for t in range(40):
            if t == 0 or reset[b, t]:
                S, z, w = np.zeros((4, 6)), np.zeros(4), 0.0
            S, z, w = (np.exp(decay[h]) * old + new for old, new in ((S, np.outer(k[b, t, h], v[b, t, h])),
                                                                     (z, k[b, t, h]), (w, 1.0)))  # fmt: skip
            expected[b, t, h] = q[b, t, h] @ S / max(np.sqrt(w), abs(q[b, t, h] @ z))
    np.testing.assert_allclose(run(inputs, reset)[0].detach().numpy(), expected, rtol=1e-11, atol=1e-13)


def test_retention_equals_flash_linear_attention():
    """Its equation, fp64: o = (q k^T / sqrt(K) * D) v with D_ts = gamma_h^(t-s); and its own plain form where it is
    installed, loaded from its file, since the package asks for triton.
    """
    inputs = make(50, "constant", heads=4, initial=False)
    decay = torch.log1p(-(2.0 ** (-5 - torch.arange(4, dtype=torch.float64))))
    q, k, v = (inputs[name].detach() for name in "qkv")
    ours = linear_attention(q * 4**-0.5, k, v, decay)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    back = torch.arange(50)[:, None] - torch.arange(50)
    D = (back.double() * decay[:, None, None]).exp().tril()
    assert_close({"y": ours}, {"y": ((q @ k.mT) * 4**-0.5 * D @ v).transpose(1, 2)}, 1e-13)
    found = importlib.util.find_spec("fla")
    if found is not None and found.submodule_search_locations:
        file = Path(found.submodule_search_locations[0]) / "ops" / "retention" / "naive.py"
        spec = importlib.util.spec_from_file_location("fla_naive_retention", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        theirs = module.naive_retention(q, k, v)  # computes in fp32
        assert_close({"y": ours}, {"y": theirs.transpose(1, 2)}, 2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("time", LENGTHS)
def test_fp32_equals_fp64(time, kind):
    inputs, reset = make(time, kind, dtype=torch.float32), resets(time)
    exact = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    ours = values_and_gradients(run, inputs, reset)
    assert {v.dtype for v in ours.values()} == {torch.float32}
    assert_close(ours, values_and_gradients(run_reference, exact, reset), 5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_only_inputs_and_outputs(dtype):
    inputs, reset = make(100, dtype=dtype), resets(100)
    ours = values_and_gradients(run, inputs, reset)
    assert all(ours[name].dtype == dtype for name in ("y", "q", "k", "v"))
    assert all(ours[name].dtype == torch.float32 for name in ("state", "keys", "weight", "decay", "kv"))
    assert_close(ours, values_and_gradients(run_reference, inputs, reset), torch.finfo(dtype).eps / 8)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(monkeypatch, kind, normalize):
    """Numerical derivatives. The divisor is held where it is: its own gradient is cut by definition."""
    monkeypatch.setattr(eager, "chunk_size", lambda time, keys, values: 4)
    inputs, reset = make(11, kind, heads=2, keys=2, values=3), resets(11, seed=4)
    if not normalize:
        assert torch.autograd.gradcheck(
            lambda *args: tuple(values(dict(zip(inputs, args, strict=True)), reset, False)), tuple(inputs.values())
        )
        return
    plain, divided = (run(inputs, reset, n)[0].detach() for n in (False, True))
    divisor = plain / divided  # one number for all of a token's values, by the tests above
    weight = torch.randn(plain.shape, generator=torch.Generator().manual_seed(5), dtype=plain.dtype)
    names = ("q", "k", "v", "decay", "kv")
    expected = torch.autograd.grad(run(inputs, reset, False)[0], list(inputs.values()), weight / divisor)
    ours = torch.autograd.grad(run(inputs, reset, True)[0], list(inputs.values()), weight)
    assert_close(dict(zip(names, ours, strict=True)), dict(zip(names, expected, strict=True)), 1e-10)


def values(inputs, reset, normalize):
    y, state = run(inputs, reset, normalize)
    return y, state.kv_BHKV


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [(1,), (40, 64), (7, 8, 9, 80)], ids=str)
def test_pieces_with_the_state_handed_over_equal_the_whole(kind, cuts):
    inputs, reset = make(100, kind), resets(100)
    whole = values_and_gradients(run, inputs, reset)

    def pieces(inputs, reset, normalize):
        state, out = State(inputs["kv"], *sums(inputs)), []
        for a, b in zip((0, *cuts), (*cuts, 100), strict=True):
            now = [inputs[name][:, a:b] for name in "qkv"]
            decay = inputs["decay"] if kind == "constant" else inputs["decay"][:, a:b]
            y, state = linear_attention(
                *now, decay, normalize=True, reset_BT=reset[:, a:b], initial_state=state, return_state=True
            )
            out.append(y)
        return torch.cat(out, 1), state

    assert_close(values_and_gradients(pieces, inputs, reset), whole, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_isolated(kind, dtype):
    """Bit for bit, outputs and gradients, whatever the others hold (also their decays) and wherever they are cut."""
    time = 100
    reset = torch.zeros(2, time, dtype=torch.bool)
    starts = (0, 20, 21, 64, 90, time)
    reset[:, list(starts[:-1])] = True
    inputs = make(time, kind, dtype=dtype, initial=False)
    names = [name for name in inputs if not (name == "decay" and kind == "constant")]
    before = values_and_gradients(run, inputs, reset)
    for start, end in itertools.pairwise(starts):
        other = torch.ones(2, time, dtype=torch.bool)
        other[:, start:end] = False
        changed = make(time, kind, dtype=dtype, seed=9, initial=False)
        with torch.no_grad():
            for name in names:
                mask = other.view(2, time, *[1] * (inputs[name].dim() - 2))
                changed[name].copy_(torch.where(mask, 3 * changed[name], inputs[name]))
            if kind == "constant":
                changed["decay"].copy_(inputs["decay"])
        cut = reset | other
        cut[:, 1:] |= other[:, 1:]
        cut[:, start] = True
        for now in (reset, cut):
            y, _ = run(changed, now)
            weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(y.dtype)
            gradients = torch.autograd.grad(y, [changed[n] for n in names], weight)
            assert torch.equal(y[:, start:end], before["y"][:, start:end])
            last = end == time  # its gradient also comes from the state, in `before`
            for name, gradient in zip(names, gradients, strict=True):
                if not last:
                    assert torch.equal(gradient[:, start:end], before[name][:, start:end]), (name, start)


def test_reset_at_the_first_token_drops_the_initial_state():
    inputs = make(20)
    reset = torch.zeros(2, 20, dtype=torch.bool)
    reset[:, 0] = True
    y, _ = run(inputs, reset)
    without, _ = run({name: value for name, value in inputs.items() if name != "kv"}, reset)
    assert torch.equal(y, without)
    assert not torch.autograd.grad(y.sum(), inputs["kv"])[0].any()


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_decays(kind):
    """From 1 to below the smallest number and to 0 itself, beside resets: finite, and as exact as elsewhere."""
    heads = 8
    inputs = make(300, kind, heads=heads, dtype=torch.float32)
    with torch.no_grad():
        inputs["decay"].copy_((-torch.tensor([0, 1e-7, 1e-3, 1, 90, 1e3, 1e30, torch.inf])).expand_as(inputs["decay"]))
        if kind == "varying":  # all of them in every head
            turn = (torch.arange(300)[:, None] // 3 + torch.arange(heads)) % heads
            inputs["decay"].copy_(inputs["decay"].gather(2, turn.expand(2, -1, -1)))
    exact = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    for reset in (None, resets(300)):
        ours = values_and_gradients(run, inputs, reset)
        assert all(value.isfinite().all() for value in ours.values())
        with torch.no_grad():
            exact["decay"].clamp_(min=-1e4)  # 0 times the reference's infinite gradient
        assert_close(ours, values_and_gradients(run_reference, exact, reset), 5e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e8])
@pytest.mark.parametrize("time", [1, 4096])
def test_extreme_inputs_and_lengths(time, scale):
    inputs = make(time, "constant", dtype=torch.float32, batch=1, heads=2)
    with torch.no_grad():
        for name in "qkv":
            inputs[name].mul_(scale)
        inputs["decay"].copy_(torch.tensor([-1e-5, -2.0]))
    ours = values_and_gradients(run, inputs, resets(time, batch=1) if time > 1 else None)
    assert all(value.isfinite().all() for value in ours.values())


class Calls(TorchDispatchMode):
    """The numbers in the largest tensor that a call returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(v.numel() for v in tree_leaves(out) if isinstance(v, torch.Tensor))])
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_linear_in_time(kind):
    sizes = []
    for time in (1024, 4096):
        inputs = make(time, kind, batch=1, heads=2, keys=16, values=32, dtype=torch.float32, initial=False)
        with Calls() as calls:
            torch.autograd.grad(run(inputs, resets(time, batch=1))[0].sum(), list(inputs.values()))
        sizes.append(calls.largest)
    assert sizes[1] < 4.5 * sizes[0] and sizes[1] < 4096 * 4096 / 16


@pytest.mark.parametrize("kind", KINDS)
def test_runs_are_identical(kind):
    inputs, reset = make(200, kind, dtype=torch.float32), resets(200)
    first, second = (values_and_gradients(run, inputs, reset) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def poisoned():
    """torch.empty returns NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("time", [1, 63, 130])
def test_everything_is_written(poisoned, time, kind):
    assert torch.empty(3).isnan().all()
    for reset in (None, resets(time)):
        assert all(value.isfinite().all() for value in values_and_gradients(run, make(time, kind), reset).values())


def test_autocast_changes_nothing():
    inputs, reset = make(64, dtype=torch.float32), resets(64)
    expected = values_and_gradients(run, inputs, reset)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = values_and_gradients(run, inputs, reset)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4, 3)}, "q_BTHK needs 4 dims"),
        ({"v": torch.ones(2, 5, 3, 6)}, "v_BTHV has shape .* but T is 4 in q_BTHK"),
        ({"decay": torch.ones(4)}, "log_decay_H has shape .* but H is 3"),
        ({"decay": torch.ones(2, 4, 2)}, "log_decay_BTH has shape .* but H is 3"),
        ({"kv": torch.ones(2, 3, 6, 4)}, "initial_state.kv_BHKV has shape"),
        ({"k": torch.zeros(2, 4, 3, 4, dtype=torch.int64)}, "k_BTHK must be floating point"),
        ({"decay": torch.ones(3, dtype=torch.bfloat16)}, "log_decay must be float32 or float64"),
        ({"reset": torch.zeros(2, 4)}, "reset_BT must be bool"),
        ({"k": torch.ones(2, 4, 3, 4, device="meta")}, "k_BTHK is on meta"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    inputs = {name: v.detach() for name, v in make(4, "constant").items()} | {"reset": None} | change
    with pytest.raises(ValueError, match=f"linear_attention: {message}"):
        run(inputs, inputs["reset"], False)


def test_normalising_needs_its_sums():
    inputs = make(4)
    args = [inputs[name] for name in ("q", "k", "v", "decay")]
    with pytest.raises(ValueError, match="normalize needs keys_BHK and weight_BH"):
        linear_attention(*args, normalize=True, initial_state=State(inputs["kv"]))


def test_no_tokens():
    inputs = make(3, "constant", initial=False)
    with pytest.raises(ValueError, match="at least one token"):
        linear_attention(inputs["q"][:, :0], inputs["k"][:, :0], inputs["v"][:, :0], inputs["decay"])


def test_chunk_sizes_cover_time():
    for time in (*range(1, 3000, 7), 4096, 100_000):
        for keys, width in ((4, 8), (64, 128), (256, 512)):
            size = eager.chunk_size(time, keys, width)
            chunks = -(-time // size)
            assert 1 <= size <= 256 and chunks * size - time < chunks


def test_package_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; from lamella_kernels.linear_attention import linear_attention"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

"""Linear attention: the equations of the papers, chunks, extremes, cost.

B batch, T time, H head, K size of a key, V of a value.
"""

import itertools

import numpy as np
import pytest
import torch

from lamella_kernels.linear_attention import State, eager, linear_attention, reference
from tests.kernels.building import (
    assert_agree,
    assert_close,
    assert_exact,
    assert_finite,
    assert_gradients,
    cost,
    fla_file,
    resets,
    source,
    starting,
    values_and_gradients,
    weights,
)

TOKENS = {"constant": ("q", "k", "v"), "varying": ("q", "k", "v", "decay")}


def make(time, kind="varying", batch=2, heads=3, keys=4, values=6, dtype=torch.float64, seed=0, initial=True):
    """Inputs by name; the decay and the state stay fp32 where q is half precision."""
    normal, wide = source(seed), torch.promote_types(dtype, torch.float32)
    decay = normal(heads) if kind == "constant" else normal(batch, time, heads)
    inputs = {
        "q": normal(batch, time, heads, keys).to(dtype),
        "k": normal(batch, time, heads, keys).to(dtype),
        "v": normal(batch, time, heads, values).to(dtype),
        "decay": -(decay - 2).exp().to(wide),
    }
    if initial:
        inputs["initial"] = normal(batch, heads, keys, values).to(wide)
    return {name: value.requires_grad_() for name, value in inputs.items()}


def state_of(inputs):
    """A state's other parts, which no gradient reaches, are made up: z [B, H, K] and w [B, H]."""
    state = inputs.get("initial")
    if not isinstance(state, torch.Tensor):
        return state
    z = state.detach().mean(-1)
    return State(state, z, z.abs().sum(-1))


def run(inputs, reset=None, normalize=True):
    a, state = inputs, state_of(inputs)
    named = {"normalize": normalize, "reset_BT": reset, "initial_state": state, "return_state": True}
    return linear_attention(a["q"], a["k"], a["v"], a["decay"], **named)


def run_reference(inputs, reset=None, normalize=True):
    a, state = inputs, state_of(inputs) or (None, None, None)
    y, kv, *sums = reference.linear_attention(a["q"], a["k"], a["v"], a["decay"], normalize, reset, *state)
    return y, State(kv, *sums) if normalize else State(kv)


@pytest.mark.parametrize("size", [1, 5, 16, 21, 62, 63])
@pytest.mark.parametrize("kind", TOKENS)
def test_every_chunking_equals_reference(monkeypatch, kind, size):
    """Also lengths that do not divide, and documents that start and end exactly at the borders of chunks."""
    monkeypatch.setattr(eager, "chunk_size", lambda time, keys, values: size)
    inputs = make(63, kind)
    for reset in (None, resets(63), (torch.arange(63) % size == 0).expand(2, 63)):
        assert_agree(run, run_reference, inputs, reset, limit=1e-12)


@pytest.mark.parametrize("kind", TOKENS)
def test_without_a_state(kind):
    """Neither given nor asked for: the same outputs and gradients."""
    inputs, reset = make(100, kind, initial=False), resets(100)
    assert_agree(
        lambda a: (linear_attention(a["q"], a["k"], a["v"], a["decay"], normalize=True, reset_BT=reset), None),
        lambda a: (run_reference(a, reset)[0], None),
        inputs,
        limit=1e-13,
    )


@pytest.mark.parametrize("kind", TOKENS)
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


def retention():
    """q, k, v as [B, H, T, C], the decays of four heads, and our outputs of queries over sqrt(K)."""
    inputs = make(50, "constant", heads=4, initial=False)
    decay = torch.log1p(-(2.0 ** (-5 - torch.arange(4, dtype=torch.float64))))
    q, k, v = (inputs[name].detach() for name in "qkv")
    y = linear_attention(q * 4**-0.5, k, v, decay)
    assert isinstance(y, torch.Tensor)
    return *(t.transpose(1, 2) for t in (q, k, v)), decay, y.transpose(1, 2)


def test_retention_of_the_paper():
    """o = (q k^T / sqrt(K) * D) v with D_ts = gamma_h^(t-s)."""
    q, k, v, decay, ours = retention()
    back = torch.arange(50)[:, None] - torch.arange(50)
    D = (back.double() * decay[:, None, None]).exp().tril()
    assert_close({"y": ours}, {"y": (q @ k.mT) * 4**-0.5 * D @ v}, 1e-13)


@pytest.mark.peer
def test_retention_equals_flash_linear_attention():
    """Its plain form, which computes in fp32."""
    q, k, v, _, ours = retention()
    theirs = fla_file("ops/retention/naive.py").naive_retention(q, k, v)
    assert_close({"y": ours}, {"y": theirs}, 2e-6)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", TOKENS)
def test_gradcheck(monkeypatch, kind, normalize):
    """Numerical derivatives. The divisor is held where it is: its own gradient is cut by definition."""
    monkeypatch.setattr(eager, "chunk_size", lambda time, keys, values: 4)
    inputs, reset = make(11, kind, heads=2, keys=2, values=3), resets(11, seed=4)
    if not normalize:
        assert_gradients(run, inputs, reset, False)
        return
    plain, divided = (run(inputs, reset, n)[0].detach() for n in (False, True))
    divisor = plain / divided  # one number for all of a token's values, by the tests above

    def gradients(normalize, weight):
        y = run(inputs, reset, normalize)[0]
        return dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), weight), strict=True))

    weight = source(5)(*plain.shape)
    assert_close(gradients(True, weight), gradients(False, weight / divisor), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", TOKENS)
def test_documents_are_isolated(kind, dtype):
    """Bit for bit, outputs and gradients, whatever the others hold (also their decays) and wherever they are cut."""
    time = 100
    starts = (0, 20, 21, 64, 90, time)
    reset = starting(starts[:-1], time)
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
            gradients = torch.autograd.grad(y, [changed[n] for n in names], weights(y))
            assert torch.equal(y[:, start:end], before["y"][:, start:end])
            last = end == time  # its gradient also comes from the state, in `before`
            for name, gradient in zip(names, gradients, strict=True):
                if not last:
                    assert torch.equal(gradient[:, start:end], before[name][:, start:end]), (name, start)


@pytest.mark.parametrize("kind", TOKENS)
def test_extreme_decays(kind):
    """From 1 to below the smallest number and to 0 itself, beside resets: finite, and as exact as elsewhere."""
    heads = 8
    inputs = make(300, kind, heads=heads, dtype=torch.float32)
    with torch.no_grad():
        inputs["decay"].copy_((-torch.tensor([0, 1e-7, 1e-3, 1, 90, 1e3, 1e30, torch.inf])).expand_as(inputs["decay"]))
        if kind == "varying":  # all of them in every head
            turn = (torch.arange(300)[:, None] // 3 + torch.arange(heads)) % heads
            inputs["decay"].copy_(inputs["decay"].gather(2, turn.expand(2, -1, -1)))

    def judge(inputs, reset):  # at -inf its gradient would be 0 times infinity
        return run_reference({**inputs, "decay": inputs["decay"].clamp(min=-1e4)}, reset)

    for reset in (None, resets(300)):
        assert_exact(run, judge, inputs, reset, limit=5e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e8])
@pytest.mark.parametrize("time", [1, 4096])
def test_extreme_inputs_and_lengths(time, scale):
    inputs = make(time, "constant", dtype=torch.float32, batch=1, heads=2)
    with torch.no_grad():
        for name in "qkv":
            inputs[name].mul_(scale)
        inputs["decay"].copy_(torch.tensor([-1e-5, -2.0]))
    assert_finite(values_and_gradients(run, inputs, resets(time, batch=1) if time > 1 else None))


@pytest.mark.parametrize("kind", TOKENS)
def test_memory_is_linear_in_time(kind):
    sizes = []
    for time in (1024, 4096):
        inputs = make(time, kind, batch=1, heads=2, keys=16, values=32, dtype=torch.float32, initial=False)
        sizes.append(max(calls.elements for calls in cost(run, inputs)))
    assert sizes[1] < 4.5 * sizes[0] and sizes[1] < 4096 * 4096 / 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4, 3)}, "q_BTHK needs 4 dims"),
        ({"v": torch.ones(2, 5, 3, 6)}, "v_BTHV has shape .* but T is 4 in q_BTHK"),
        ({"decay": torch.ones(4)}, "log_decay_H has shape .* but H is 3"),
        ({"decay": torch.ones(2, 4, 2)}, "log_decay_BTH has shape .* but H is 3"),
        ({"initial": torch.ones(2, 3, 6, 4)}, "initial_state.kv_BHKV has shape"),
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
        linear_attention(*args, normalize=True, initial_state=State(inputs["initial"]))


def test_chunk_sizes_cover_time():
    for time in (*range(1, 3000, 7), 4096, 100_000):
        for keys, width in ((4, 8), (64, 128), (256, 512)):
            size = eager.chunk_size(time, keys, width)
            chunks = -(-time // size)
            assert 1 <= size <= 256 and chunks * size - time < chunks

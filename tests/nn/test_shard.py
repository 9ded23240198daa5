"""Where a rank's part of a parameter lies in the whole, and that its initial values are the whole's."""

import pytest
import torch

from lamella.config import load_run
from lamella.errors import UserError
from lamella.model.init import cut, draw_local, initialize
from lamella.model.lm import LanguageModel
from lamella.nn.initializers import normal, zeros
from lamella.nn.shard import Box, Whole
from tests.nn.building import Largest, OneOf, packed, relative

MODEL = load_run("configs/run/quickstart.yaml", ["model.d_model=24", "model.parts.attention.num_heads=8"]).model
TIED = load_run(
    "configs/run/quickstart.yaml",
    [
        "model.d_model=24",
        "model.parts.attention={mixer: attention, num_heads: 4, num_kv_heads: 4}",
        "model.tie_embeddings=true",
    ],
).model


def test_segments_are_cut_one_by_one():
    """Rank 1 of 2 of a fused [4 + 2 + 6, 3]: the second half of each segment, laid end to end."""
    parameter = OneOf(1, 2).parameter((12, 3), zeros, split=0, segments=(4, 2, 6))
    assert parameter.shape == (6, 3)
    assert parameter.place.shape == (12, 3)
    assert parameter.place.boxes == (
        Box(local=(0, 0), size=(2, 3), whole=(2, 0)),
        Box(local=(2, 0), size=(1, 3), whole=(5, 0)),
        Box(local=(3, 0), size=(3, 3), whole=(9, 0)),
    )
    whole = torch.arange(36.0).view(12, 3)
    assert cut(whole, parameter.place)[:, 0].tolist() == [6, 9, 15, 27, 30, 33]


def test_a_later_dim_is_cut_too():
    parameter = OneOf(1, 2).parameter((5, 4, 3), zeros, split=1)
    assert parameter.shape == (5, 2, 3)
    assert parameter.place.boxes == (Box(local=(0, 0, 0), size=(5, 2, 3), whole=(0, 2, 0)),)
    assert parameter.place.boxes[0].local_slices == (slice(0, 5), slice(0, 2), slice(0, 3))
    assert parameter.place.boxes[0].whole_slices == (slice(0, 5), slice(2, 4), slice(0, 3))


def test_one_rank_owns_a_replica():
    for rank in (0, 1):
        whole = OneOf(rank, 2).parameter((3, 2), zeros)
        assert whole.place.boxes == (Box((0, 0), (3, 2), (0, 0)),)
        assert whole.place.replicated and whole.place.owner == (rank == 0)
        part = OneOf(rank, 2).parameter((3, 2), zeros, split=1)
        assert part.place.owner and not part.place.replicated


@pytest.mark.parametrize("segments, culprit", [(None, 9), ((4, 3, 2), 3)])
def test_a_width_that_does_not_divide_is_the_users_to_mend(segments, culprit):
    with pytest.raises(UserError, match=f"width of {culprit} cannot be split over tensor=2"):
        OneOf(0, 2).parameter((9, 2), zeros, split=0, segments=segments)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("model", [MODEL, TIED], ids=["grouped", "tied"])
def test_initial_values_are_slices_of_the_whole(model, size):
    """Bit for bit, every element held, under every size."""
    if model is MODEL and size == 4:  # it has two key-value heads
        with pytest.raises(UserError, match="num_kv_heads=2 cannot be split over tensor=4"):
            LanguageModel(model, OneOf(0, size))
        return
    whole = LanguageModel(model)
    initialize(whole, seed=5)
    values = dict(whole.named_parameters())
    missing = {name: torch.ones(value.shape, dtype=torch.bool) for name, value in values.items()}
    for rank in range(size):
        part = LanguageModel(model, OneOf(rank, size, num_layers=4))
        initialize(part, seed=5)
        assert [name for name, _ in part.named_parameters()] == list(values)
        for name, parameter in part.named_parameters():
            assert torch.equal(parameter, draw_local(name, parameter.place, seed=5))
            for box in parameter.place.boxes:
                assert torch.equal(parameter[box.local_slices], values[name][box.whole_slices])
                missing[name][box.whole_slices] = False
    assert not any(m.any() for m in missing.values())


def test_initial_values_depend_on_name_and_seed_alone():
    first, again, other = (LanguageModel(TIED) for _ in range(3))
    initialize(first, seed=5)
    torch.randn(3)
    initialize(again, seed=5)
    initialize(other, seed=6)
    a, b, c = (dict(m.named_parameters()) for m in (first, again, other))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["embedding.weight"], c["embedding.weight"])
    assert not torch.equal(a["layers.0.mixer.in_proj.weight"], a["layers.1.mixer.in_proj.weight"])


def test_what_adds_to_the_stream_starts_smaller():
    model = LanguageModel(TIED)
    initialize(model, seed=5)
    assert float(model.layers["0"].mixer.in_proj.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    for name in ("0", "2"):
        assert float(model.layers[name].channel.w_out.weight.detach().std()) == pytest.approx(0.02 / 8**0.5, rel=0.05)


def test_normal_has_its_standard_deviation():
    assert float(normal(0.3)(torch.Generator().manual_seed(0), (300, 300)).std()) == pytest.approx(0.3, rel=0.01)


def test_cross_entropy_is_fp32_whatever_the_logits_are():
    logits = torch.tensor([[[1.0, 2.0, -1.0]]], dtype=torch.bfloat16)
    loss = Whole().cross_entropy(logits, torch.tensor([[1]], dtype=torch.int32))
    assert loss.dtype == torch.float32 and loss.shape == (1, 1)
    assert float(loss) == pytest.approx(0.3490122, abs=1e-6)  # log(1 + e^-1 + e^-3)


def test_the_stream_has_the_shard_s_dtype():
    model = LanguageModel(TIED, Whole(torch.bfloat16, num_layers=4))
    initialize(model, seed=5)
    rows = packed([[4, 3]])
    seen = {}
    model.layers["1"].register_forward_hook(lambda module, given, y: seen.update(y=y))
    logits = model(torch.arange(7)[None], rows)
    assert seen["y"].dtype == logits.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_pieces_of_logits_give_the_same_loss_and_gradients():
    torch.manual_seed(3)
    x, weight = torch.randn(2, 50, 8), torch.randn(5000, 8)
    targets = torch.randint(5000, (2, 50), dtype=torch.int32)
    targets[0, :7] = -1
    found = {}
    for pieces in (False, True):
        shard, inputs = Whole(), [x.clone().requires_grad_(), torch.nn.Parameter(weight.clone())]
        shard.pieces = pieces
        with Largest() as largest:
            nats = shard.nats(*inputs, targets)
            nats.sum().backward()
        assert (largest.elements < 100 * 5000) == pieces
        assert not nats[0, :7].any()
        found[pieces] = [nats, *(t.grad for t in inputs)]
    for ours, wanted in zip(found[True], found[False], strict=True):
        assert relative(ours, wanted) < 1e-6

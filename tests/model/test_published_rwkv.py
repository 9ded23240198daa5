"""The published RWKV-6 and RWKV-7, counted from their dimensions by plain arithmetic, and whole models step by step.

Dimensions: the tables of models in arXiv 2404.05892 and 2503.14456. Counts: the elements of the released weights,
1,599,873,024 of Finch 1.6B; 191,034,624, 450,767,872, 1,527,404,544 and 2,947,735,040 of Goose 0.1B to 2.9B.
"""

import re

import pytest
import torch

from lamella.config import load_run
from lamella.model.count import count
from lamella.model.init import initialize
from lamella.model.lm import LanguageModel
from lamella.nn.shard import Whole, placed_parameters
from tests.nn.building import OneOf, filled, packed, relative, some

RUN = "configs/run/quickstart.yaml"
VOCAB = 65536
OUTSIDE = 2  # layer norms of the embedding and of the head


def model_of(name, *words):
    return load_run(RUN, [f"model={name}", *words]).model


def finch(D, L):
    """RWKV-6: r, k, v, g, o; five mixes of rank 32, a decay of 64; channel mix of 3.5 D with a receptance."""
    time = 5 * D * D + 2 * D * 5 * 32 + 2 * D * 64
    vectors = 6 * D + D + D + 2 * D  # mixes, decay, bonus, group norm
    channel = 2 * D * (7 * D // 2) + D * D + 2 * D
    return 2 * VOCAB * D + OUTSIDE * 2 * D + L * (time + vectors + channel + 2 * 2 * D)


def goose(D, L, decay, rate, value, gate):
    """RWKV-7: r, k, v, o; low ranks of w, a, v, g; channel mix of 4 D. The first layer has no value residual."""
    time = 4 * D * D + 2 * D * (decay + rate + value + gate)
    vectors = 6 * D + 3 * D + 3 * D + 2 * D  # mixes, biases of w, a, v, then k_k, k_a, r_k, group norm
    channel = 8 * D * D + D
    return 2 * VOCAB * D + OUTSIDE * 2 * D + L * (time + vectors + channel + 2 * 2 * D) - (2 * D * value + D)


PUBLISHED = {
    "rwkv6-1.6b": (finch(2048, 24), 1_599_873_024),
    "rwkv7-2.9b": (goose(2560, 32, 96, 96, 64, 320), 2_947_735_040),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_file_is_the_published_model(name):
    arithmetic, published = PUBLISHED[name]
    config = model_of(name)
    assert count(config, 4096).parameters == arithmetic == published
    assert config.norm == "layer" and config.norm_eps == 1e-5 and config.embedding_norm and not config.tie_embeddings


@pytest.mark.parametrize(
    "width, layers, words, published",
    [
        (768, 12, [], 191_034_624),
        (1024, 24, ["model.parts.time.gate_rank=128"], 450_767_872),
        (2048, 24, [], 1_527_404_544),
    ],
)
def test_the_other_sizes_of_rwkv_7_follow_from_their_width(width, layers, words, published):
    ranks = [f"model.parts.time.{name}_rank=null" for name in ("decay", "rate", "value", "gate")]
    sizes = [f"model.d_model={width}", f"model.parts.channel.d_ff={4 * width}"]
    stack = f"model.stack=[{{repeat: {layers}, layers: [time/channel]}}]"
    assert count(model_of("rwkv7-2.9b", *ranks, *sizes, stack, *words), 512).parameters == published


@pytest.mark.parametrize("name", PUBLISHED)
def test_forward_flops_are_two_a_weight_and_token(name):
    """Of the matrices alone: vectors multiply no matrix, and the embedding is looked up."""
    config = model_of(name)
    with torch.device("meta"):
        named = list(placed_parameters(LanguageModel(config)))
    weights = sum(p.numel() for name, p in named if p.dim() > 1 and name.split(".")[-1] not in ("bonus", "r_k"))
    counted = count(config, 64).forward.matmul
    assert counted == 2 * 64 * (weights - VOCAB * config.d_model)


@pytest.mark.parametrize("name, heads", [("rwkv6-1.6b", 32), ("rwkv7-2.9b", 40)])
def test_a_tensor_rank_holds_its_share(name, heads):
    """Matrices and what is by channel are split; mixes, the low ranks' first halves and norms of the stream are not."""
    config, size = model_of(name), 8
    with torch.device("meta"):
        whole = dict(placed_parameters(LanguageModel(config)))
        share = dict(placed_parameters(LanguageModel(config, OneOf(1, size, 24))))
    assert heads % size == 0 and whole.keys() == share.keys()
    for key, parameter in whole.items():
        last = key.removesuffix(".weight").removesuffix(".bias")
        replicated = re.search(r"\.mix[._]\w+$|\.down$", key) or last.endswith(("mixer_norm", "channel_norm")) or (
            last in ("norm", "embedding.norm")
        )
        assert parameter.numel() == share[key].numel() * (1 if replicated else size), key


@pytest.mark.parametrize("name", ["rwkv6-nano", "rwkv7-nano"])
def test_generation_s_states_give_the_logits_of_the_whole(name):
    """Token by token, mixer's and channel's states together."""
    model = filled(LanguageModel(model_of(name), Whole(torch.float64)), spread=0.1).double()
    tokens = torch.randint(4096, (2, 9), generator=torch.Generator().manual_seed(2))
    rows, states = packed([[9], [4, 5]]), {}
    with torch.no_grad():
        whole = model(tokens, rows)
        steps = [model(tokens[:, t : t + 1], some(rows, time=slice(t, t + 1)), states) for t in range(9)]
    assert relative(torch.cat(steps, 1), whole) < 1e-12
    names = {"shift", "wkv", "channel_shift"}
    assert all(set(state) == names for state in states.values())


@pytest.mark.parametrize("name", ["rwkv6-nano", "rwkv7-nano"])
def test_a_fresh_model_is_the_embedding_and_the_head(name):
    """Every branch ends in zeros, as published: the stream is the normed embedding, and learning starts at the ends."""
    model = LanguageModel(model_of(name))
    initialize(model, seed=0)
    tokens = torch.randint(4096, (2, 12), generator=torch.Generator().manual_seed(1))
    rows = packed([[12], [5, 7]])
    logits = model(tokens, rows)
    assert torch.equal(logits, model.head(model.norm(model.embedding(tokens))))
    logits.square().sum().backward()
    moved = {name.split(".", 2)[2] for name, p in model.layers.named_parameters(prefix="layers") if p.grad.any()}
    ends = {"mixer.out.weight", "channel.value.weight"}
    assert moved == ends

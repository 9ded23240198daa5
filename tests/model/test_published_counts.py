"""The published Jamba models, counted from their dimensions by plain arithmetic, on one process and on a rank of many.

Dimensions: config.json of ai21labs/Jamba-v0.1, of ai21labs/AI21-Jamba-1.5-Mini, the same, and of
ai21labs/AI21-Jamba-1.5-Large.
"""

import dataclasses
import math
from collections.abc import Iterable

import pytest
import torch

from lamella.config import load_run
from lamella.model.count import count
from lamella.model.lm import LanguageModel
from tests.nn.building import OneOf

RUN = "configs/run/quickstart.yaml"


@dataclasses.dataclass(frozen=True)
class Dims:
    hidden: int
    layers: int
    intermediate: int  # of the dense channel mixer, and of each expert
    heads: int
    dt_rank: int
    kv_heads: int = 8
    attn_period: int = 8
    attn_offset: int = 4
    expert_period: int = 2
    expert_offset: int = 1
    experts: int = 16
    top_k: int = 2
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    vocab: int = 65536

    def attends(self, layer: int) -> bool:
        return layer % self.attn_period == self.attn_offset

    def routes(self, layer: int) -> bool:
        return layer % self.expert_period == self.expert_offset


V01 = Dims(hidden=4096, layers=32, intermediate=14336, heads=32, dt_rank=256)
LARGE = Dims(hidden=8192, layers=72, intermediate=24576, heads=64, dt_rank=512)
PUBLISHED = {"jamba-v0.1": V01, "jamba-1.5-mini": V01, "jamba-1.5-large": LARGE}
# Parameters, those that a token uses.
BILLIONS = {"jamba-v0.1": (52, 12), "jamba-1.5-mini": (52, 12), "jamba-1.5-large": (398, 94)}


def expected_local(dims: Dims, tensor: int, layers: Iterable[int], expert: int, first: bool, last: bool) -> int:
    """Parameters of one rank that holds `layers`, with the embedding if `first`, the final norm and head if `last`.

    Split evenly over `tensor`: linears, embedding, head, conv, A_log, D. Replicated: norms, routers. With expert = 1
    each expert's width is split over `tensor` too; else a rank holds experts / expert whole ones.
    """
    total = even(dims.vocab * dims.hidden, tensor) if first else 0
    if last:
        total += dims.hidden + even(dims.vocab * dims.hidden, tensor)
    for layer in layers:
        split, whole = _attention(dims) if dims.attends(layer) else _mamba(dims)
        whole += 2 * dims.hidden  # the norms before the branches
        one = 3 * dims.hidden * dims.intermediate
        if not dims.routes(layer):
            split += one
        else:
            whole += dims.experts * dims.hidden  # the router
            if expert == 1:
                split += dims.experts * one
            else:
                whole += even(dims.experts, expert) * one
        total += even(split, tensor) + whole
    return total


def _attention(dims: Dims) -> tuple[int, int]:
    """Split over tensor, replicated: q, k, v and output, no bias."""
    head = dims.hidden // dims.heads
    return dims.hidden * head * (2 * dims.heads + 2 * dims.kv_heads), 0


def _mamba(dims: Dims) -> tuple[int, int]:
    """Split over tensor, replicated: in and out without bias, conv and dt with, norms on dt, B and C."""
    inner, ranks = dims.expand * dims.hidden, dims.dt_rank + 2 * dims.d_state
    in_out = dims.hidden * 2 * inner + inner * dims.hidden
    conv = inner * dims.d_conv + inner
    x_dt = inner * ranks + dims.dt_rank * inner + inner
    a_log, d = inner * dims.d_state, inner
    return in_out + conv + x_dt + a_log + d, ranks


def even(n: int, parts: int) -> int:
    assert n % parts == 0, (n, parts)
    return n // parts


def whole(dims: Dims) -> int:
    return expected_local(dims, 1, range(dims.layers), 1, True, True)


def model_of(name):
    return load_run(RUN, [f"model={name}"]).model


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_file_is_the_published_model(name):
    dims, config = PUBLISHED[name], model_of(name)
    counted = count(config, 4096)
    assert counted.parameters == whole(dims)
    idle = sum(dims.routes(i) for i in range(dims.layers)) * (dims.experts - dims.top_k)
    assert counted.active == whole(dims) - idle * 3 * dims.hidden * dims.intermediate
    for exact, billions in zip((counted.parameters, counted.active), BILLIONS[name], strict=True):
        assert billions in (math.floor(exact / 1e9), round(exact / 1e9))  # 398.56 was published as 398
    assert config.norm_eps == 1e-6 and not config.tie_embeddings


def test_v01_is_its_published_bytes():
    """`total_size` of ai21labs/Jamba-v0.1's model.safetensors.index.json, in bfloat16."""
    assert 2 * whole(V01) == 103_140_646_656


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.peer
def test_transformers_counts_as_many(name):
    """Its defaults are Jamba v0.1's."""
    transformers = pytest.importorskip("transformers")
    dims = PUBLISHED[name]
    sizes = {
        "hidden_size": dims.hidden,
        "num_hidden_layers": dims.layers,
        "intermediate_size": dims.intermediate,
        "num_attention_heads": dims.heads,
    }
    config = transformers.JambaConfig(**(sizes if dims is not V01 else {}))
    assert config.mamba_dt_rank == dims.dt_rank
    with torch.device("meta"):
        model = transformers.JambaForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == whole(dims)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("tensor", [2, 8])
def test_a_tensor_rank_holds_its_share(name, tensor):
    dims = PUBLISHED[name]
    with torch.device("meta"):
        model = LanguageModel(model_of(name), OneOf(tensor - 1, tensor, dims.layers))
    for layers in (range(dims.layers), range(dims.layers // 3), range(dims.layers // 3, dims.layers)):
        first, last = layers.start == 0, layers.stop == dims.layers
        held = {f"layers.{i}" for i in layers}
        held |= {"embedding"} if first else set()
        held |= {"norm", "head"} if last else set()
        named = ((".".join(n.split(".")[: 1 + n.startswith("layers.")]), p) for n, p in model.named_parameters())
        local = sum(p.numel() for room, p in named if room in held)
        assert local == expected_local(dims, tensor, layers, 1, first, last)


@pytest.mark.parametrize("dims", PUBLISHED.values(), ids=PUBLISHED)
@pytest.mark.parametrize("expert", [2, 4, 16])
def test_what_expert_ranks_hold_adds_up(dims, expert):
    """Their experts are the model's, everything else is on each of them."""
    layers = range(dims.layers)
    experts = sum(dims.routes(i) for i in layers) * dims.experts * 3 * dims.hidden * dims.intermediate
    local = expected_local(dims, 1, layers, expert, True, True)
    assert expert * local == whole(dims) + (expert - 1) * (whole(dims) - experts)

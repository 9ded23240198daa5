"""The published RetNet models, counted from their dimensions by plain arithmetic, on one process and on a rank of many.

Dimensions: arXiv 2307.08621, table 2 and section 3.1; retnet_xl, retnet_3b and retnet_7b of torchscale's fairseq
example.
"""

import dataclasses

import pytest
import torch

from lamella.config import load_run
from lamella.model.count import count
from lamella.model.lm import LanguageModel
from tests.nn.building import OneOf

RUN = "configs/run/quickstart.yaml"
VOCAB = 64000


@dataclasses.dataclass(frozen=True)
class Dims:
    hidden: int
    layers: int
    heads: int
    value: int
    ffn: int
    gated: bool = False

    @property
    def layer(self) -> tuple[int, int]:
        """Split over tensor, replicated: q, k, v, gate and output, the feed-forward layer; two norms."""
        mix = 2 * self.hidden**2 + 3 * self.hidden * self.value
        return mix + (3 if self.gated else 2) * self.hidden * self.ffn, 2 * self.hidden

    def total(self, tensor: int = 1) -> int:
        split, whole = self.layer
        assert split % tensor == 0 and self.heads % tensor == 0
        return self.layers * (split // tensor + whole) + VOCAB // tensor * self.hidden + self.hidden


PAPER = {
    "retnet-1.3b": Dims(2048, 24, 8, 4096, 4096),
    "retnet-2.7b": Dims(2560, 32, 10, 5120, 5120),
    "retnet-6.7b": Dims(4096, 32, 16, 8192, 8192),
}
TORCHSCALE = {
    "retnet-1.3b": Dims(2048, 24, 8, 3456, 3456, gated=True),
    "retnet-2.7b": Dims(2560, 32, 10, 4280, 4280, gated=True),
    "retnet-6.7b": Dims(4096, 32, 16, 6912, 6912, gated=True),
}


def model_of(name, dims=None):
    words = []
    if dims is not None:
        words = [f"model.parts.retention.value_head_dim={dims.value // dims.heads}"]
        words += [f"model.parts.mlp.d_ff={dims.ffn}", "model.parts.mlp.activation=swiglu"]
    return load_run(RUN, [f"model={name}", *words]).model


@pytest.mark.parametrize("name", PAPER)
def test_the_file_is_the_published_model(name):
    dims, config = PAPER[name], model_of(name)
    assert dims.layer[0] == 12 * dims.hidden**2  # the paper's allocation, a Transformer's
    assert dims.hidden // dims.heads == 256  # keys of a head
    assert count(config, 2048).parameters == dims.total()
    assert f"{dims.total() / 1e9:.1f}b" == name.removeprefix("retnet-")
    assert config.norm_eps == 1e-6 and config.tie_embeddings and config.vocab_size == VOCAB


@pytest.mark.parametrize("name", TORCHSCALE)
def test_the_variant_the_file_names_is_torchscale_s(name):
    """Nearly the same size: narrower values and a gated feed-forward layer."""
    dims = TORCHSCALE[name]
    assert count(model_of(name, dims), 2048).parameters == dims.total()
    assert abs(dims.layer[0] / (12 * dims.hidden**2) - 1) < 0.011


@pytest.mark.parametrize("name", PAPER)
def test_a_tensor_rank_holds_its_share(name):
    dims = PAPER[name]
    with torch.device("meta"):
        model = LanguageModel(model_of(name), OneOf(1, 2, dims.layers))
    assert sum(p.numel() for p in model.parameters()) == dims.total(tensor=2)


@pytest.mark.parametrize("name", PAPER)
def test_flops_are_twice_the_weights_and_the_recurrence(name):
    """A token: 2 for each weight of the layers and the head; 5 a number of S, 4 a number of z."""
    dims, length = PAPER[name], 2048
    keys, values = dims.hidden // dims.heads, dims.value // dims.heads
    state = dims.layers * dims.heads * (5 * keys * values + 4 * keys)
    weights = dims.layers * dims.layer[0] + VOCAB * dims.hidden
    assert count(model_of(name), length).forward.total == length * (2 * weights + state)


def test_nano_is_small():
    assert count(model_of("retnet-nano"), 256).parameters < 2e6

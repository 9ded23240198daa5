"""The published Llama 2, TinyLlama, Mixtral and Switch-Base, counted from their dimensions by plain arithmetic.

Dimensions: config.json of meta-llama/Llama-2-7b-hf, TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T and
mistralai/Mixtral-8x7B-v0.1; arXiv 2101.03961, table 9, and google/switch-base-128. Every count is the published one to
the parameter, but for Switch: there the published model is an encoder and a decoder, and ours is the decoder.
"""

import dataclasses

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
    heads: int
    kv_heads: int
    ffn: int  # gated
    vocab: int
    experts: int = 0  # 0: dense
    top_k: int = 0
    sparse_every: int = 1
    tied: bool = False

    @property
    def attention(self) -> int:
        return self.hidden * self.hidden // self.heads * (2 * self.heads + 2 * self.kv_heads)

    def total(self, seen: int, tensor: int = 1) -> int:
        """With `seen` experts in a sparse layer. Norms and routers are not split over tensor."""
        sparse = self.layers // self.sparse_every if self.experts else 0
        mlps = self.layers - sparse + sparse * seen
        split = self.layers * self.attention + mlps * 3 * self.hidden * self.ffn
        split += (1 if self.tied else 2) * self.vocab * self.hidden
        assert split % tensor == 0
        return split // tensor + (2 * self.layers + 1) * self.hidden + sparse * self.experts * self.hidden


PUBLISHED = {
    "llama-2-7b": Dims(4096, 32, 32, 32, 11008, 32000),
    "tinyllama-1.1b": Dims(2048, 22, 32, 4, 5632, 32000),
    "mixtral-8x7b": Dims(4096, 32, 32, 8, 14336, 32000, experts=8, top_k=2),
    "switch-base": Dims(768, 12, 12, 12, 2048, 32128, experts=128, top_k=1, sparse_every=2, tied=True),
}
EXACT = {"llama-2-7b": 6_738_415_616, "tinyllama-1.1b": 1_100_048_384, "mixtral-8x7b": 46_702_792_704}
SWITCH = 7_415_217_408  # elements of google/switch-base-128


def model_of(name):
    return load_run(RUN, [f"model={name}"]).model


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_file_is_the_published_model(name):
    dims, config = PUBLISHED[name], model_of(name)
    counted = count(config, 2048)
    assert counted.parameters == dims.total(dims.experts) == EXACT.get(name, counted.parameters)
    assert counted.active == dims.total(dims.top_k)
    assert config.tie_embeddings == dims.tied and config.norm_eps == (1e-6 if name == "switch-base" else 1e-5)


def test_mixtral_s_active_parameters():
    """46.7B in all and 12.9B for a token, as its announcement says (mistral.ai, December 2023)."""
    counted = count(model_of("mixtral-8x7b"), 2048)
    assert [f"{n / 1e9:.1f}" for n in (counted.parameters, counted.active)] == ["46.7", "12.9"]


def test_switch_base_is_half_of_the_published():
    """Encoder and decoder share the embedding; each layer of the decoder attends to the encoder, with a norm before it;
    either half has 32 relative positions for 12 heads. A GEGLU of 2048 has the weights of their ReLU layer of 3072.
    """
    dims = PUBLISHED["switch-base"]
    assert 3 * 2048 == 2 * 3072
    embedding, crossing = dims.vocab * dims.hidden, dims.layers * (dims.attention + dims.hidden)
    assert 2 * count(model_of("switch-base"), 512).parameters - embedding + crossing + 2 * 32 * 12 == SWITCH


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.peer
def test_transformers_counts_as_many(name):
    transformers = pytest.importorskip("transformers")
    dims = PUBLISHED[name]
    sizes = {
        "hidden_size": dims.hidden,
        "num_hidden_layers": dims.layers,
        "num_attention_heads": dims.heads,
        "num_key_value_heads": dims.kv_heads,
        "intermediate_size": dims.ffn,
        "vocab_size": dims.vocab,
    }
    if name == "switch-base":
        halves = {"num_layers": 12, "num_decoder_layers": 12}
        sparse = {"num_sparse_encoder_layers": 6, "num_sparse_decoder_layers": 6, "num_experts": dims.experts}
        config = transformers.SwitchTransformersConfig(d_model=dims.hidden, d_ff=3072, **halves, **sparse)
        kind = transformers.SwitchTransformersForConditionalGeneration
    elif dims.experts:
        config, kind = transformers.MixtralConfig(**sizes), transformers.MixtralForCausalLM
    else:
        config, kind = transformers.LlamaConfig(**sizes), transformers.LlamaForCausalLM
    with torch.device("meta"):
        model = kind(config)
    published = SWITCH if name == "switch-base" else dims.total(dims.experts)
    assert sum(p.numel() for p in model.parameters()) == published


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("tensor", [2, 4])
def test_a_tensor_rank_holds_its_share(name, tensor):
    dims = PUBLISHED[name]
    with torch.device("meta"):
        model = LanguageModel(model_of(name), OneOf(tensor - 1, tensor, dims.layers))
    assert sum(p.numel() for p in model.parameters()) == dims.total(dims.experts, tensor)


def test_switch_routes_as_published():
    """One expert a token, room for a quarter more than its share; losses, jitter and initial values."""
    published = {"top_k": 1, "capacity_factor": 1.25, "aux_loss": 0.01, "jitter": 0.01, "init_scale": 0.1}
    for name in ("switch-base", "switch-nano"):
        moe = model_of(name).parts["moe"]
        assert {key: moe[key] for key in published} == published and not moe.get("renormalize")


@pytest.mark.parametrize("name", ["transformer-nano", "switch-nano"])
def test_nano_is_small(name):
    assert count(model_of(name), 256).active < 2e6

"""The published Mamba, Mamba-2 and Nemotron-H models, counted from their dimensions by plain arithmetic.

Dimensions: config.json of state-spaces/mamba-* and mamba2-*, of nvidia/Nemotron-H-8B-Base-8K, and the defaults of
mamba_ssm (github.com/state-spaces/mamba) where those are silent. Every count is the published one to its digits; the
names round to two of them. Nothing is left to explain: both count the padded rows of the embedding (50,280 and 50,288
for 50,277 words) once, as the head is tied to it. Without the padding Mamba 2.8B would have 7,680 parameters less.
"""

import dataclasses

import pytest
import torch

from lamella.config import load_run
from lamella.model.count import count
from lamella.model.lm import LanguageModel
from lamella.model.stack import plan_layers
from tests.nn.building import OneOf

RUN = "configs/run/quickstart.yaml"
WORDS = 50277  # of GPT-NeoX's tokenizer


@dataclasses.dataclass(frozen=True)
class Dims:
    name: str  # in transformers and in our files
    layers: int
    hidden: int
    published: float  # parameters, as the name says them


MAMBA = [
    Dims("mamba-130m", 24, 768, 130e6),
    Dims("mamba-370m", 48, 1024, 370e6),
    Dims("mamba-790m", 48, 1536, 790e6),
    Dims("mamba-1.4b", 48, 2048, 1.4e9),
    Dims("mamba-2.8b", 64, 2560, 2.8e9),
]
MAMBA2 = [
    Dims("mamba2-130m", 24, 768, 130e6),
    Dims("mamba2-370m", 48, 1024, 370e6),
    Dims("mamba2-780m", 48, 1536, 780e6),
    Dims("mamba2-1.3b", 48, 2048, 1.3e9),
    Dims("mamba2-2.7b", 64, 2560, 2.7e9),
]
NEMOTRON = Dims("nemotron-h-8b", 52, 4096, 8.1e9)
PATTERN = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"  # its hybrid_override_pattern

# Elements of the published files, as those who loaded them have counted.
EXACT = {
    "mamba-130m": 129_135_360,
    "mamba-370m": 371_516_416,
    "mamba-790m": 793_204_224,
    "mamba-1.4b": 1_372_178_432,
    "mamba-2.8b": 2_768_345_600,
    "mamba2-2.7b": 2_702_599_680,
}


def padded(multiple):
    return -(-WORDS // multiple) * multiple


def mamba(d, state=16, width=4):
    """Its inner channels are 2 d, the rank of dt is d / 16; no bias but the convolution's and dt's."""
    inner, rank = 2 * d, -(-d // 16)
    projections = d * 2 * inner + inner * (rank + 2 * state) + rank * inner + inner * d
    return projections + inner * (width + 1) + inner + inner * state + inner


def mamba2(d, heads, groups, size=64, state=128, width=4):
    """(z, x, B, C, dt) in one projection, a convolution with bias over (x, B, C), three constants a head, a norm."""
    inner, shared = heads * size, 2 * groups * state
    return d * (2 * inner + shared + heads) + (inner + shared) * (width + 1) + 3 * heads + inner + inner * d


def whole(dims):
    """With a norm before every branch and before the head."""
    d = dims.hidden
    if dims is NEMOTRON:
        branch = {"M": mamba2(d, 128, 8), "*": d * 128 * (32 + 8 + 8) + 32 * 128 * d, "-": 2 * d * 21504}
        return sum(branch[kind] + d for kind in PATTERN) + d + 2 * 131072 * d
    if dims in MAMBA:
        return dims.layers * (mamba(d) + d) + d + padded(8) * d
    return dims.layers * (mamba2(d, 2 * d // 64, 1) + d) + d + padded(16) * d


def model_of(name):
    return load_run(RUN, [f"model={name}"]).model


EVERY = pytest.mark.parametrize("dims", [*MAMBA, *MAMBA2, NEMOTRON], ids=lambda d: d.name)


@EVERY
def test_the_file_is_the_published_model(dims):
    config = model_of(dims.name)
    counted = count(config, 2048)
    assert counted.parameters == counted.active == whole(dims)
    assert counted.parameters == EXACT.get(dims.name, counted.parameters)
    assert float(f"{counted.parameters:.1e}") == dims.published  # its two digits
    assert config.norm_eps == 1e-5 and config.tie_embeddings == (dims is not NEMOTRON)


def test_nemotron_s_stack_is_the_published_pattern():
    letters = {"mamba2": "M", "attention": "*", "mlp": "-"}
    plans = plan_layers(model_of(NEMOTRON.name))
    words = [word for plan in plans for word in plan.name.split("/") if word != "-"]
    assert "".join(letters[word] for word in words) == PATTERN and len(PATTERN) == NEMOTRON.layers


@EVERY
@pytest.mark.peer
def test_transformers_counts_as_many(dims):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": dims.hidden}
    if dims is NEMOTRON:
        # Its defaults are the 8B's but for the groups' name.
        config = transformers.NemotronHConfig(**sizes, hybrid_override_pattern=PATTERN, layer_norm_epsilon=1e-5)
        kind = transformers.NemotronHForCausalLM
    elif dims in MAMBA:
        sizes |= {"num_hidden_layers": dims.layers, "vocab_size": padded(8), "state_size": 16}
        config, kind = transformers.MambaConfig(**sizes, tie_word_embeddings=True), transformers.MambaForCausalLM
    else:
        sizes |= {"num_hidden_layers": dims.layers, "vocab_size": padded(16), "state_size": 128, "n_groups": 1}
        heads = 2 * dims.hidden // 64
        config = transformers.Mamba2Config(**sizes, num_heads=heads, head_dim=64, tie_word_embeddings=True)
        kind = transformers.Mamba2ForCausalLM
    with torch.device("meta"):
        model = kind(config)
        model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) == whole(dims)


@pytest.mark.parametrize("dims", [MAMBA[4], MAMBA2[4], NEMOTRON], ids=lambda d: d.name)
@pytest.mark.parametrize("tensor", [2, 8])
def test_a_tensor_rank_holds_its_share(dims, tensor):
    """All of it but the norms over the stream, also where there are more ranks than groups."""
    with torch.device("meta"):
        model = LanguageModel(model_of(dims.name), OneOf(tensor - 1, tensor, dims.layers))
    norms = (dims.layers + 1) * dims.hidden
    share, rest = divmod(whole(dims) - norms, tensor)
    assert rest == 0 and sum(p.numel() for p in model.parameters()) == share + norms

"""Against transformers' Jamba: the same weights give the same logits and the same gradients."""

import pytest
import torch

from lamella.config import ModelConfig
from lamella.model.init import generator
from lamella.model.lm import LanguageModel
from tests.nn.building import packed, relative, some
from tools.peers import copy_jamba, gathered

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

LAYERS, D_MODEL, VOCAB, EXPERTS = 6, 32, 50, 4

THEIRS = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "attn_layer_period": 3,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "mamba_d_state": 8,
    "mamba_dt_rank": 3,
    "attn_implementation": "eager",
}

OURS = {
    "d_model": D_MODEL,
    "vocab_size": VOCAB,
    "parts": {
        "mamba": {"mixer": "mamba", "d_state": 8, "dt_rank": 3},
        "attention": {"mixer": "attention", "num_heads": 4, "num_kv_heads": 2},
        "mlp": {"channel": "mlp", "d_ff": 24},
        "moe": {"channel": "moe", "num_experts": EXPERTS, "top_k": 2, "d_ff": 24},
    },
    "stack": [
        {"layers": ["mamba/mlp", "attention/moe", "mamba/mlp", "mamba/moe", "attention/mlp", "mamba/moe"]},
    ],
}

@pytest.fixture(scope="module")
def pair():
    theirs = transformers.JambaForCausalLM(transformers.JambaConfig(**THEIRS)).float().eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator(name, 0))
            # Well conditioned matrices; nothing is left at 0 or 1.
            parameter.copy_(0.2 * noise if parameter.dim() > 1 and "A_log" not in name else parameter + 0.2 * noise)
    ours = LanguageModel(ModelConfig.model_validate(OURS, strict=False))
    table = copy_jamba(theirs, ours)
    return ours, theirs, table


def loss(logits, tokens):
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def test_logits_and_gradients_equal_transformers(pair):
    ours, theirs, table = pair
    tokens = torch.randint(VOCAB, (3, 21), generator=torch.Generator().manual_seed(1))
    got = ours(tokens, packed([[21]] * 3))
    wanted = theirs(input_ids=tokens, use_cache=False).logits
    assert wanted.std() > 0.1
    assert (got - wanted).abs().max() < 1e-4
    assert relative(got, wanted) < 1e-5
    for logits in (got, wanted):
        loss(logits, tokens).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        wanted = gathered(gradients, table[name], parameter.shape)
        assert wanted.norm() > 1e-6, name
        assert relative(parameter.grad, wanted) < 1e-4, name


def test_generation_s_states_give_transformers_logits(pair):
    """Ours token by token against theirs over the whole."""
    ours, theirs, _ = pair
    tokens = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(2))
    rows, states = packed([[9]] * 2), {}
    with torch.no_grad():
        now = [slice(t, t + 1) for t in range(9)]
        steps = [ours(tokens[:, time], some(rows, time=time), states) for time in now]
        wanted = theirs(input_ids=tokens, use_cache=False).logits
    assert (torch.cat(steps, 1) - wanted).abs().max() < 1e-4

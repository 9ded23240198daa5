"""Against transformers' Jamba: the same weights give the same logits and the same gradients."""

import pytest

from tests.model.peer import assert_same, assert_same_steps, pair_of, tokens_of
from tools.peers import JAMBA

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
    return pair_of(transformers.JambaForCausalLM(transformers.JambaConfig(**THEIRS)), OURS, JAMBA)


def test_logits_and_gradients_equal_transformers(pair):
    assert_same(*pair, tokens_of(VOCAB, 3, 21, seed=1))


def test_generation_s_states_give_transformers_logits(pair):
    assert_same_steps(*pair[:2], tokens_of(VOCAB, 2, 9, seed=2))

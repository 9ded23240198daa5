"""Against transformers' Llama and Mixtral: the same weights give the same logits and the same gradients.

Grouped queries under rotary positions, RMSNorm, SwiGLU; in Mixtral two of four experts with weights that sum to 1.
Its auxiliary loss is one over the tokens of all rows and layers, and sums the choices where ours averages them: with
one row and one layer it is `top_k` times ours.
"""

import pytest

from lamella.nn.record import Record
from tests.model.peer import assert_same, assert_same_steps, loss, pair_of, tokens_of, worst_gradient
from tests.nn.building import packed
from tools.peers import LLAMA

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

VOCAB, THETA, TOP_K = 50, 100.0, 2
THEIRS = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
    "attn_implementation": "eager",
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": TOP_K}
MOE = {"channel": "moe", "num_experts": 4, "top_k": TOP_K, "d_ff": 24, "renormalize": True}


def ours(channel, layers):
    return {
        "d_model": 32,
        "vocab_size": VOCAB,
        "norm_eps": 1e-5,
        "parts": {
            "attention": {"mixer": "attention", "num_heads": 4, "num_kv_heads": 2, "rope_theta": THETA},
            "channel": channel,
        },
        "stack": [{"layers": ["attention/channel"], "repeat": layers}],
    }


def mixtral(layers=3, aux_loss=0.01, **options):
    config = transformers.MixtralConfig(**THEIRS | EXPERTS | {"num_hidden_layers": layers} | options)
    return pair_of(transformers.MixtralForCausalLM(config), ours(MOE | {"aux_loss": aux_loss}, layers), LLAMA)


def llama():
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**THEIRS))
    return pair_of(theirs, ours({"channel": "mlp", "d_ff": 24}, 3), LLAMA)


@pytest.fixture(scope="module", params=[llama, mixtral], ids=["llama", "mixtral"])
def pair(request):
    return request.param()


def test_logits_and_gradients_equal_transformers(pair):
    assert_same(*pair, tokens_of(VOCAB, 3, 21, seed=1))


def test_generation_s_states_give_transformers_logits(pair):
    assert_same_steps(*pair[:2], tokens_of(VOCAB, 2, 9, seed=2))


def test_the_auxiliary_loss_is_mixtral_s():
    """Its value, and every gradient of the sum of both losses."""
    weight, tokens = 0.5, tokens_of(VOCAB, 1, 40, seed=3)
    model, theirs, table = mixtral(layers=1, aux_loss=weight * TOP_K, router_aux_loss_coef=weight)
    record = Record()
    got = loss(model(tokens, packed([[40]], loss_scale=1.0, record=record)), tokens)
    wanted = theirs(input_ids=tokens, labels=tokens, use_cache=False, output_router_logits=True)
    aux = record.values["layer0/channel/aux_loss"] * TOP_K
    assert aux > 2.01 and abs(aux - wanted.aux_loss) < 1e-6
    assert abs(got + weight * aux - wanted.loss) < 1e-6
    got.backward()
    wanted.loss.backward()
    worst = worst_gradient(model, theirs, table)
    assert worst[0] < 1e-5, worst

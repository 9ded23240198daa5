"""The whole model: chunks equal the whole, documents are isolated, dropout is a pure function, gradients are right."""

import pytest
import torch
from torch.func import functional_call

from lamella.config import load_run
from lamella.model.init import initialize
from lamella.model.lm import LanguageModel
from lamella.nn.shard import Whole
from tests.nn.building import double, filled, noise, packed, relative, some

SMALL = [
    "model.d_model=12",
    "model.vocab_size=23",
    "model.parts.mamba={mixer: mamba, d_state: 3, dt_rank: 2}",
    "model.parts.attention={mixer: attention, num_heads: 2, num_kv_heads: 1, rope_theta: 100.0}",
    "model.parts.mlp.d_ff=7",
    "model.parts.moe={channel: moe, num_experts: 4, top_k: 2, d_ff: 5, z_loss: 0.01, jitter: 0.1}",
]
LENGTHS, PADDING = [[4, 1, 6], [11], [5, 3]], [0, 0, 3]
ROWS = packed(LENGTHS, PADDING)
TOKENS = torch.randint(23, (3, 11), generator=torch.Generator().manual_seed(0), dtype=torch.int32)


def config_for(*overrides):
    return load_run("configs/run/quickstart.yaml", [*SMALL, *overrides]).model


def make(*overrides, shard=None):
    model = filled(LanguageModel(config_for(*overrides), shard or double()))
    return model if shard else model.double()


def training(at=(0, 1, 2), numbers=(5, 2, 9), **known):
    return packed([LENGTHS[b] for b in at], [PADDING[b] for b in at], [numbers[b] for b in at], **known)


def test_layers_are_pre_norm_residual_branches():
    model = make()
    x = model.embedding.weight[TOKENS.long()]
    for layer in model.layers.values():
        x = x + layer.mixer(layer.mixer_norm(x), ROWS)
        x = x + layer.channel(layer.channel_norm(x), ROWS)
    assert relative(model(TOKENS, ROWS), model.norm(x) @ model.head.weight.t()) < 1e-14


@pytest.mark.parametrize("chunks", [[1] * 11, [3, 4, 4]], ids=str)
def test_chunks_with_states_equal_the_whole(chunks):
    model, states, pieces, start = make(), {}, [], 0
    for length in chunks:
        time = slice(start, start := start + length)
        pieces.append(model(TOKENS[:, time], some(ROWS, time=time), states))
    real = ROWS.real_BT
    assert relative(torch.cat(pieces, 1)[real], model(TOKENS, ROWS)[real]) < 1e-12


def test_documents_do_not_see_each_other():
    """With mixtures of experts to rounding: an expert's matmul has other rows when other documents route elsewhere."""
    model = make()
    y = model(TOKENS, ROWS)
    changed = TOKENS.clone()
    changed[0, :4] = (changed[0, :4] + 1) % 23
    z = model(changed, ROWS)
    assert relative(z[0, 4:], y[0, 4:]) < 1e-13
    assert relative(z[1:], y[1:]) < 1e-13
    assert relative(z[0, :4], y[0, :4]) > 1e-3


def test_tied_embeddings_are_one_parameter_with_both_gradients():
    tied, loose = make("model.tie_embeddings=true"), make()
    assert tied.head.weight is tied.embedding.weight
    values = {n: p for n, p in tied.named_parameters() if n != "embedding.weight"}
    loose.load_state_dict({**values, "embedding.weight": tied.embedding.weight, "head.weight": tied.embedding.weight})
    for model in (tied, loose):
        (model(TOKENS, ROWS) * noise(3, 11, 23)).sum().backward()
    assert relative(tied.embedding.weight.grad, loose.embedding.weight.grad + loose.head.weight.grad) < 1e-13


def test_gradients_are_right():
    """In training: with jitter, dropout and tied embeddings; the auxiliary losses are no part of the output."""
    model = make("model.dropout=0.2", "model.tie_embeddings=true")
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    rows = training()

    def function(*values):
        return functional_call(model, dict(zip(parameters, values, strict=True)), (TOKENS, rows))

    assert torch.autograd.gradcheck(function, (*parameters.values(),), atol=1e-6, rtol=1e-5, fast_mode=True)


def test_training_is_the_same_for_any_micro_batching():
    """Rows computed together or apart: the same losses' gradient, with dropout, jitter and auxiliary losses on."""
    model = make("model.dropout=0.3")
    weight = noise(3, 11, 23)

    def gradients(batches):
        model.zero_grad()
        for at in batches:
            (model(TOKENS[at], training(at, loss_scale=0.5)) * weight[at]).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    together = gradients([[0, 1, 2]])
    for batches in ([[0], [1], [2]], [[2, 0], [1]]):
        apart = gradients(batches)
        assert all(relative(apart[name], g) < 1e-12 for name, g in together.items())


def test_dropout_drops_its_share_of_each_branch_and_scales_the_rest():
    model = make("model.dropout=0.25", "model.stack=[{layers: [-/mlp]}]", shard=Whole())
    layer, x = model.layers["0"], noise(3, 11, 12, dtype=torch.float32)
    branch = layer.channel(layer.channel_norm(x), ROWS)
    rows = training()
    added = layer(x, rows) - x
    kept = added.abs() > 1e-9
    assert relative(added[kept], branch[kept] / 0.75) < 1e-5
    assert abs(kept.float().mean() - 0.75) < 4 * (0.25 * 0.75 / kept.numel()) ** 0.5
    assert torch.equal(layer(x, ROWS), x + branch)  # none outside training


def test_branches_and_layers_drop_different_places():
    model = make("model.dropout=0.5", "model.stack=[{layers: [mamba/mlp, mamba/mlp]}]")
    ones, rows = torch.ones(3, 11, 12), training()
    masks = [layer._drop(ones, rows, branch) for layer in model.layers.values() for branch in ("mixer", "channel")]
    for i, mask in enumerate(masks):
        assert all(0.4 < (mask == other).float().mean() < 0.6 for other in masks[:i])


def test_rwkvs_ends_begin_as_in_its_own_code():
    config = load_run("configs/run/quickstart.yaml", ["model=rwkv7-nano"]).model
    model = LanguageModel(config)
    initialize(model, seed=0)
    embedding, head = model.embedding.weight.detach(), model.head.weight.detach()
    assert 0.99e-4 < embedding.abs().max() <= 1e-4 and embedding.mean().abs() < 1e-6
    gain = 0.5 * (config.vocab_size / config.d_model) ** 0.5
    torch.testing.assert_close(head.T @ head, gain**2 * torch.eye(config.d_model))
    assert float(head.std()) == pytest.approx(0.5 / config.d_model**0.5, rel=0.01)

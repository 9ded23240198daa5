"""What the comparisons with transformers share: weights that hide nothing, and the comparison itself."""

import torch
import torch.nn.functional as F

from lamella.config import ModelConfig
from lamella.model.init import generator
from lamella.model.lm import LanguageModel
from tests.nn.building import packed, relative, some
from tools.peers import copy_weights, gathered


def pair_of(theirs, config, words):
    """Theirs with noise for weights, ours with the same, and the table of names."""
    theirs = theirs.float().eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator(name, 0))
            # Well conditioned matrices; nothing is left at 0 or 1.
            parameter.copy_(0.2 * noise if parameter.dim() > 1 and "A_log" not in name else parameter + 0.2 * noise)
    ours = LanguageModel(ModelConfig.model_validate(config, strict=False))
    return ours, theirs, copy_weights(theirs, ours, words)


def tokens_of(vocab, rows, length, seed):
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def loss(logits, tokens):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def worst_gradient(ours, theirs, table):
    """The largest relative difference of a parameter's gradient after backward, and the parameter's name."""
    gradients, found = {name: p.grad for name, p in theirs.named_parameters()}, []
    for name, parameter in ours.named_parameters():
        wanted = gathered(gradients, table[name], parameter.shape)
        assert wanted.norm() > 1e-6, name
        found.append((relative(parameter.grad, wanted), name))
    return max(found)


def assert_same(ours, theirs, table, tokens):
    """Logits and every gradient of the loss."""
    for model in (ours, theirs):
        model.zero_grad()
    got = ours(tokens, packed([[tokens.shape[1]]] * len(tokens)))
    wanted = theirs(input_ids=tokens, use_cache=False).logits
    assert wanted.std() > 0.1
    assert (got - wanted).abs().max() < 1e-4
    assert relative(got, wanted) < 1e-5
    for logits in (got, wanted):
        loss(logits, tokens).backward()
    worst = worst_gradient(ours, theirs, table)
    assert worst[0] < 1e-4, worst


@torch.no_grad()
def assert_same_steps(ours, theirs, tokens):
    """Ours token by token, as in generation, against theirs over the whole."""
    length, states = tokens.shape[1], {}
    rows = packed([[length]] * len(tokens))
    now = [slice(t, t + 1) for t in range(length)]
    steps = [ours(tokens[:, time], some(rows, time=time), states) for time in now]
    wanted = theirs(input_ids=tokens, use_cache=False).logits
    assert (torch.cat(steps, 1) - wanted).abs().max() < 1e-4

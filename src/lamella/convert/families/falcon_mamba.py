"""Falcon Mamba (Zuo et al. 2024, arXiv 2410.05355): Mamba with RMS norms without weights on dt, B and C."""

from lamella.convert.families import mamba as plain
from lamella.convert.family import NOTHING, Family, Keys, Stack, Tree
from lamella.mixers import mamba


def to_ours(keys: Keys) -> Tree:
    return plain.read(keys, norms=True, norm_weights=False, norms_eps=keys.float("mixer_rms_eps", 1e-6))


def to_theirs(stack: Stack) -> Tree:
    part = stack.parts({mamba.Config: {"norms": True, "norm_weights": False}}, {NOTHING: {}})[mamba.Config]
    return plain.write(stack, part) | {"mixer_rms_eps": part.norms_eps or stack.model.norm_eps}


FAMILY = Family("falcon_mamba", "FalconMambaForCausalLM", plain.TABLE, to_ours, to_theirs)

"""`train.init_from=hf:DIR`: a run that begins with a published model's weights, read where they lie.

Every process reads its own part through the family's table, whatever the layout; nothing is written.
"""

from pathlib import Path

import torch

from lamella.checkpoint import store
from lamella.checkpoint.planner import Pieces
from lamella.config import ModelConfig
from lamella.convert import extras
from lamella.convert.family import Misfit, Tree
from lamella.convert.read import CONFIG
from lamella.convert.theirs import Theirs, open_theirs, read_parts
from lamella.errors import UserError
from lamella.train.init_from import Origin, Saved

HF = "hf:"
TRAINING = {"router_aux_loss_coef", "router_jitter_noise"}  # keys that say how it is trained


def opened(name: str) -> Origin:
    """What `train.init_from` names: hf:DIR or hf:FILE.pth, else a checkpoint. Raises UserError."""
    if name.startswith(HF):
        return Published(name)
    if (Path(name) / CONFIG).is_file():
        raise UserError(f"{name}: a Hugging Face folder; write train.init_from={HF}{name}")
    return Saved(name)


class Published(Origin):
    """A folder of Hugging Face's, or RWKV's .pth. Raises UserError as reading it does; on all processes the same."""

    def __init__(self, name: str):
        self.path, where = name, Path(name.removeprefix(HF))
        found: list[Theirs] = []
        store.together(lambda: found.append(self._open(where)), where)
        self.theirs = found[0]
        self.model = self.theirs.model
        self.tokenizers = extras.fingerprints(where)
        self.routers = {}

    @staticmethod
    def _open(where: Path) -> Theirs:
        if not where.exists():
            raise UserError(f"{where}: no such folder; {HF}DIR names one of Hugging Face's")
        return open_theirs(where)

    def fit(self, model: ModelConfig, length: int) -> None:
        """It must be theirs, key by key, as their family writes both."""
        kind = self.theirs.family
        try:
            here = _sizes(model) | kind.write(model, length)
        except Misfit as error:
            raise UserError(f"{self.path}: this run's model is no {kind.name}: {error}") from None
        there = _sizes(self.model) | kind.write(self.model, length)
        had, has = (dict(_flat(tree)) for tree in (there, here))
        for key in had | has:
            if had.get(key) != has.get(key) and key not in TRAINING:
                values = f"{key}={had.get(key)}, and this run's model has {has.get(key)}"
                cure = "take its own model.yaml, which lamella convert --to lamella writes"
                raise UserError(f"{self.path}: is a {kind.name} with {values}; {cure}")

    @torch.no_grad()
    def read(self, wanted: dict[str, Pieces]) -> None:
        def fill() -> None:
            for name, pieces in wanted.items():
                for offset, view in pieces.held.items():
                    parts = read_parts(self.theirs.weights, self.theirs.by_name[name], tuple(offset), tuple(view.shape))
                    for here, part in parts:
                        view[here].copy_(part)

        store.together(fill, self.theirs.path)


def _sizes(model: ModelConfig) -> Tree:
    return {
        "hidden_size": model.d_model,
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tie_embeddings,
    }


def _flat(tree: Tree, prefix: str = ""):
    """Keys of nested mappings as `a.b`."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

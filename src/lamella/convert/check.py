"""Are the two the same model? Our logits and those of transformers, or of fla with it, on the same tokens, in fp32."""

import dataclasses
import importlib
import importlib.util
import math
from pathlib import Path
from typing import Any

import torch

from lamella.config import ModelConfig
from lamella.convert.family import Family
from lamella.convert.map import places
from lamella.errors import UserError
from lamella.nn.rows import one_document
from lamella.train.restore import load_model

LARGEST = 250_000_000  # parameters that are compared unasked: two models of 1 GB
ROWS, LENGTH = 2, 48
BOUND = 1e-3  # relative; another order of sums, in fp32, is far below


@dataclasses.dataclass(frozen=True)
class Parity:
    """Differences of the logits: `absolute` the largest, `relative` in norm; `scale` is the largest logit."""

    absolute: float
    relative: float
    scale: float

    @property
    def same(self) -> bool:
        return self.relative < BOUND


def skipped(model: ModelConfig, theirs: Family) -> str | None:
    """Why nothing is compared unasked."""
    if theirs.claims is not None:
        what = "no program is at hand that runs this file" if theirs.one_way else None
        return what or "transformers does not read this folder"
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed: pip install lamella[convert]"
    if theirs.runs_in == "fla":
        if importlib.util.find_spec("fla") is None:
            return f"transformers alone has no {theirs.name}: pip install flash-linear-attention"
        if not torch.cuda.is_available():
            return "fla's kernels need a GPU"
    count = sum(math.prod(place.shape) for place in places(model).values())
    return f"{count:,} parameters; --check compares them" if count > LARGEST else None


@torch.no_grad()
def compare(checkpoint: Path, model: ModelConfig, family: Family, theirs: Path, rounded: torch.dtype | None) -> Parity:
    """Ours with its weights rounded to `rounded`, if theirs are. Raises UserError where transformers loads nothing."""
    import transformers

    transformers.logging.set_verbosity_error()  # that slow paths are slow
    transformers.logging.disable_progress_bar()
    importlib.import_module(family.runs_in)  # fla's models are transformers' once it is imported
    tokens_BT = torch.randint(model.vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    ours = load_model(checkpoint, model, torch.float32)
    device = ours.norm.weight.device
    if rounded is not None:
        for parameter in ours.parameters():
            parameter.copy_(parameter.to(rounded))
    got = ours(tokens_BT.to(device), one_document(tokens_BT.to(device))).cpu()
    del ours
    try:
        peer: Any = transformers.AutoModelForCausalLM.from_pretrained(theirs, dtype=torch.float32, **family.unlike)
        peer = peer.eval().to(device if family.runs_in == "fla" else "cpu")
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        why = f"this transformers ({transformers.__version__}) does not load {theirs}"
        raise UserError(f"{why}, so no logits are compared ({' '.join(str(error).split())[:120]})") from None
    wanted = peer(input_ids=tokens_BT.to(peer.device), use_cache=False).logits.cpu()
    far = (got - wanted).double()
    return Parity(far.abs().max().item(), (far.norm() / wanted.double().norm()).item(), wanted.abs().max().item())

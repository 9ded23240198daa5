"""Loss of a restored model over rows of documents: the run's own, another data set's, or any text.

The figure is the training loop's own (evaluate.py), which is computed by many processes; this one needs one process and
no process group.
"""

import dataclasses
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from lamella.config import DataConfig, SourceConfig
from lamella.data import sources
from lamella.data.store.manifest import open_prepared, read_manifest
from lamella.data.store.tokens import TokenFile, TokenWriter, token_dtype
from lamella.data.stream import HeldoutRows, split_rows
from lamella.errors import UserError
from lamella.nn.rows import Rows
from lamella.train.loss import sum_nats
from lamella.train.restore import Restored


@dataclasses.dataclass(frozen=True)
class Score:
    loss: float  # nats a token
    bits_per_byte: float
    rows: int
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


def prepared_rows(data: DataConfig, split: Literal["heldout", "train"], restored: Restored) -> HeldoutRows:
    """The rows of a split. Raises UserError: as `open_prepared`, or prepared with another tokenizer than the run's."""
    used = read_manifest(Path(data.path)).config.tokenizer  # whatever `data` says: the run's is what counts
    prepared = open_prepared(data.model_copy(update={"tokenizer": used}))
    if prepared.tokenizer.fingerprint != restored.tokenizer.fingerprint:
        own = restored.run.data.path
        raise UserError(f"{data.path}: its tokens are another tokenizer's; prepare it with tokenizer.model={own}")
    if prepared.manifest.total(split).text_bytes is None:
        raise UserError(
            f"{data.path}: bytes of text are unknown for {split} tokens that were used in place; take heldout"
        )
    return split_rows(prepared, split, restored.run.train.sequence_length)


def text_rows(files: Sequence[str], restored: Restored) -> HeldoutRows:
    """The rows of text files, each one document; a name may be a folder or a glob.

    Raises UserError: nothing there, no UTF-8, no text in any.
    """
    tokenizer = restored.tokenizer
    texts = [t for file in files for t in sources.read(SourceConfig(format="text", path=file)) if t]
    if not texts:
        raise UserError(f"{', '.join(files)}: no text there; name files of UTF-8 text that are not empty")
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "text"
        writer = TokenWriter(prefix, token_dtype(tokenizer.vocab_size))
        for ids in tokenizer.encode_batch(texts):
            writer.add(np.append(ids, tokenizer.eod))
        writer.close()
        stored = TokenFile(prefix)  # the maps outlive the files' names
    text_bytes = sum(len(t.encode(errors="surrogatepass")) for t in texts)
    return HeldoutRows([stored], tokenizer, text_bytes, restored.run.train.sequence_length)


@torch.inference_mode()
def score(restored: Restored, rows: HeldoutRows, limit: int | None = None) -> Score:
    """Over all rows, or the first `limit`, in the run's micro-batches."""
    model, size = restored.model, restored.run.layout.micro_batch
    device = model.norm.weight.device
    total = min(limit or rows.num_rows, rows.num_rows)
    nats = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, total, size):
        batch = rows.batch(range(start, min(start + size, total))).to(device)
        nats += sum_nats(model(batch.tokens, Rows(batch.document, batch.position), targets_BT=batch.targets))
    tokens = rows.target_count(range(total))
    loss = nats.item() / tokens
    return Score(loss, loss / math.log(2) / rows.bytes_per_token, total, tokens)

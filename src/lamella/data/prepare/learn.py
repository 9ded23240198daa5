"""The tokenizer of a corpus: the given one, or one trained on a sample of its training split."""

import hashlib

from lamella.config import DataConfig
from lamella.data import sources
from lamella.data.prepare.encode import in_heldout
from lamella.data.prepare.progress import Progress
from lamella.data.store.manifest import MODEL, SPLITS
from lamella.data.tokenizer import Model
from lamella.data.tokenizer.train import Sample, train


def learn(config: DataConfig, progress: Progress, total: int | None) -> tuple[Model, dict[str, int], int]:
    """Also returns the documents of each split and the bytes of all. The held-out text stays unseen."""
    sample = Sample(config.tokenizer.train_megabytes * 1_000_000)
    documents = dict.fromkeys(SPLITS, 0)
    size = 0
    progress.phase("reading", total)
    for source in config.sources:
        for raws, _ in sources.batches(source):
            for raw in raws:
                if not raw or (text := sources.decode(raw)) is None:
                    continue
                held = in_heldout(hashlib.sha256(raw).digest(), config.heldout)
                documents[SPLITS[held]] += 1
                size += len(raw)
                if not held:
                    sample.add(text)
            progress.at(sum(documents.values()), size)
    if not documents["train"]:
        return Model(MODEL, {}), documents, size
    progress.phase("training the tokenizer")
    return Model(MODEL, {MODEL: train(sample.blocks(), config.tokenizer.vocab_size)}), documents, size

"""What a trained model must beat on its held-out text: bits per byte of a unigram token model and of xz -9e.

    python tools/corpus_baselines.py configs/data/stdlib.yaml [a.b=c ...] [--primed] [--json]

The unigram model predicts each stored token (the ends of documents too) by its add-one smoothed share of the training
split. xz compresses the held-out text alone; --primed also counts what the held-out text adds behind the training text
(minutes, on one core).
"""

import json
import lzma
import sys
from typing import Annotated

import numpy as np
import typer

from lamella.config import load_data
from lamella.data.store.manifest import Prepared, open_prepared
from lamella.errors import EXIT_USER, UserError

PRESET = 9 | lzma.PRESET_EXTREME


def main(
    file: Annotated[str, typer.Argument(metavar="DATA.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[a.b=c]...")] = None,
    primed: Annotated[bool, typer.Option("--primed", help="Also xz with the training text before it (slow).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Prints simple baselines of a prepared corpus in bits per byte of held-out text."""
    try:
        prepared = open_prepared(load_data(file, overrides or []))
    except UserError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(EXIT_USER) from None
    heldout = _text(prepared, "heldout")
    baselines = {"unigram": unigram_bits(prepared) / len(heldout), "xz": xz_bits(heldout) / len(heldout)}
    if primed:
        train = _text(prepared, "train")
        baselines["xz_primed"] = (xz_bits(train + heldout) - xz_bits(train)) / len(heldout)
    split = prepared.manifest.total("heldout")
    size = {"heldout_bytes": len(heldout), "heldout_tokens": split.tokens}
    if as_json:
        print(json.dumps({"bits_per_byte": baselines} | size))
        return
    print(f"{'baseline':<12}bits per byte of {len(heldout):,} held-out bytes ({split.tokens:,} tokens)")
    for name, bits in baselines.items():
        print(f"{name:<12}{bits:.4f}")


def unigram_bits(prepared: Prepared) -> float:
    """The cost of all held-out tokens under the training split's add-one smoothed shares."""
    train, heldout = (_counts(prepared, split) for split in ("train", "heldout"))
    shares = (train + 1) / (train + 1).sum()
    return float(-(heldout * np.log2(shares)).sum())


def xz_bits(text: bytes) -> int:
    return 8 * len(lzma.compress(text, preset=PRESET))


def _counts(prepared: Prepared, split: str) -> np.ndarray:
    counts = np.zeros(prepared.tokenizer.vocab_size, np.int64)
    for stored in (splits[split] for splits in prepared.sources.values()):
        for document in range(len(stored)):
            counts += np.bincount(stored.read(document), minlength=len(counts))
    return counts


def _text(prepared: Prepared, split: str) -> bytes:
    """The documents of a split, one behind the other."""
    decode = prepared.tokenizer.decode
    files = [splits[split] for splits in prepared.sources.values()]
    texts = (decode(stored.read(d).tolist()) for stored in files for d in range(len(stored)))
    return b"".join(text.encode(errors="surrogatepass") for text in texts)


if __name__ == "__main__":
    typer.run(main)

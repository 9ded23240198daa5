"""Small tokenizers of Hugging Face's kinds, trained in a moment on text that also spells their special pieces."""

import json
import sysconfig
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL = ["<unk>", "<s>", "</s>"]
LATE = "<|late|>"  # special, and not in the model's own vocabulary
WORD, SPACES = "::word::", "    "  # added, not special
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def corpus() -> list[str]:
    folder = Path(sysconfig.get_path("stdlib")) / "json"
    texts = [file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.py"))]
    return [*texts, "Grüße, 中文 and 😀 ﬁ \u2581\n" * 20, "a</s> b </s> c</s>\n" * 50]


def byte_level(vocab_size: int = 400) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return _trained(made, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=letters))


def composed() -> Tokenizer:
    """Byte-level, but it normalises: not exact."""
    made = byte_level()
    made.normalizer = normalizers.NFC()
    return made


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return _trained(made, trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>"))


def word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.WordPiece()
    return _trained(made, trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL))


def byte_fallback() -> Tokenizer:
    """As converters write sentencepiece's BPE."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made = _trained(made, trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL + BYTES))
    tree = json.loads(made.to_str())
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] not in BYTES]
    return Tokenizer.from_str(json.dumps(tree))


def _trained(made: Tokenizer, trainer: trainers.Trainer) -> Tokenizer:
    trainer.show_progress = False
    made.train_from_iterator(corpus(), trainer)
    made.add_tokens([WORD, SPACES])
    made.add_special_tokens([LATE])
    return made


KINDS = {made.__name__: made for made in (byte_level, composed, unigram, word_piece, byte_fallback)}


def save(made: Tokenizer, folder: Path, **told) -> Path:
    """A folder as Hugging Face's: tokenizer.json, and tokenizer_config.json with what is `told`."""
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    if told:
        (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return folder

"""decode(encode(text)) == text for every string, the same ids however computed, the same model from the same text."""

import io
import random
import sys

import numpy as np
import pytest
import sentencepiece

from lamella.config import SourceConfig
from lamella.data import sources
from lamella.data.store.manifest import MODEL
from lamella.data.tokenizer import load
from lamella.data.tokenizer.spm import Sentencepiece
from lamella.data.tokenizer.train import Sample, train
from lamella.errors import UserError

ODD = [
    "",
    " ",
    "\u2581",
    "a\u2581 b\u2581\u2581",
    " lead and trail  ",
    "\n\n\n\t\t  \r\r\n\x0b\x0c",
    "\0\0a\0",
    "\ud800 alone, \udc00\ud800 swapped, \ud800\udc00 as two",
    "<unk><eod><s></s><0x41><0xE2> ⁇ \u2585",
    "e\u0301 é ﬁ \uff21\uff22 ½ İ ß \u200b\ufeff\u00a0",
    "😀👩‍👩‍👧 中文 עברית \U0010ffff",
    "x" * 70_000 + "\n" + " " * 5000 + "y",
    "12345.678e-9",
]


@pytest.fixture(scope="module")
def tokenizer(config):
    return load(f"{config.path}/{MODEL}")


@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_odd_strings_come_back(tokenizer, text):
    assert tokenizer.exact
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eod not in ids


def test_every_character_comes_back(tokenizer):
    for begin in range(0, sys.maxunicode + 1, 0x1000):
        text = "".join(map(chr, range(begin, min(begin + 0x1000, sys.maxunicode + 1))))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_random_strings_come_back(tokenizer):
    rng = random.Random(1)
    common = [*" \n\t\r\u2581\0", "    ", "self.", "\r\n", "\ud83d", "😀", "<eod>"]
    texts = []
    for _ in range(5000):
        rare = [chr(rng.randrange(sys.maxunicode + 1)) for _ in range(3)]
        texts.append("".join(rng.choices(common + rare + list("abcdef0123"), k=rng.randrange(30))))
    ids = tokenizer.encode_batch(texts, threads=2)
    assert [tokenizer.decode(i.tolist()) for i in ids] == texts


def test_the_standard_library_comes_back(tokenizer):
    documents = [t for t in list(sources.read(SourceConfig(format="stdlib")))[::40] if t]
    assert len(documents) > 10
    for text, ids in zip(documents, tokenizer.encode_batch(documents), strict=True):
        assert tokenizer.decode(ids.tolist()) == text


def test_cutting_behind_newlines_changes_no_id(tokenizer, corpus, config):
    text = (corpus / "long.txt").read_bytes().decode().replace("\u2581", "_")
    plain = sentencepiece.SentencePieceProcessor(model_file=f"{config.path}/{MODEL}")
    assert tokenizer.encode(text) == plain.encode(text)
    assert tokenizer.encode(text) == tokenizer.encode_batch([text], threads=2)[0].tolist()


def test_indentation_and_digits(tokenizer):
    assert len(tokenizer.encode(" " * 8)) <= 2
    assert len(tokenizer.encode("2031")) == 4


def test_bytes_that_are_no_text_are_replaced(tokenizer):
    broken = [*tokenizer.encode("中中中中")[:-1], tokenizer.eod]
    assert "\ufffd" in tokenizer.decode(tokenizer.encode("\U0010ffff")[:-1])
    assert isinstance(tokenizer.decode(broken), str)


def test_the_same_text_trains_the_same_model():
    texts = ["def f(x):\n    return x + 1\n" * 3, "class A:\n\tpass  # \u2581 \0 \ud800\n"]
    assert train(texts, 300) == train(texts, 300)


def test_many_characters_fit_a_small_vocabulary():
    text = "".join(map(chr, range(0x4E00, 0x5E00))) + "一二三" * 5000
    tokenizer = Sentencepiece(train([text], 300))
    assert tokenizer.vocab_size <= 300
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("一二三")) < 9


def test_nothing_to_learn_from():
    with pytest.raises(UserError, match="no text to train"):
        train(["\n\n"], 300)


def test_the_sample_is_even_and_bounded():
    sample = Sample(100_000)
    for number in range(200):
        sample.add(chr(97 + number % 26) * 40_960)
    kept = sample.blocks()
    assert 100_000 <= sum(map(len, kept)) <= 100_000 + 4096
    assert len({b[0] for b in kept}) > 8  # blocks of many documents
    small = Sample(100_000)
    small.add("all of it")
    assert small.blocks() == ["all of it"]


def foreign(eos_id: int) -> bytes:
    model = io.BytesIO()
    lines = [f"some words to learn from, number {i} and {i * 7}" for i in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        eos_id=eos_id,
        minloglevel=2,
    )
    return model.getvalue()


def test_a_foreign_model_works_and_says_that_it_is_not_exact():
    tokenizer = Sentencepiece(foreign(eos_id=2))
    assert not tokenizer.exact
    assert tokenizer.decode(tokenizer.encode("some  words \ud800")) != "some  words \ud800"
    assert tokenizer.decode(tokenizer.encode("some words")) == "some words"
    assert isinstance(tokenizer.encode_batch(["a", "b"])[0], np.ndarray)


def test_unusable_models(tmp_path):
    with pytest.raises(UserError, match="no such tokenizer model"):
        load(tmp_path / "none.model")
    (tmp_path / "text.model").write_text("not a model")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        load(tmp_path / "text.model")
    with pytest.raises(UserError, match="no end piece"):
        Sentencepiece(foreign(eos_id=-1))

"""A tokenizer.json gives transformers' ids, never a control piece, and text for any ids."""

import json
import random
import subprocess
import sys
import warnings

import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer, models, processors

from lamella.config import TokenizerConfig
from lamella.data.tokenizer import load, read_model
from lamella.data.tokenizer.detokenize import Text
from lamella.errors import UserError
from tests.data.tokenizer import small

END = "</s>"
ODD = [
    "",
    " ",
    "  lead and trail  ",
    "\n\n\t\t  \r\r\n\x0b\x0c",
    "def f(x):\n    return x  # ::word:: 12345\n",
    "Grüße, 中文 and 😀 ﬁ e\u0301 \u2581\u2581 \0\u2028",
]
SPELLED = "<unk>a<s> b</s>c </s> <|late|>"
BROKEN = ["\ud800 alone, \udc00\ud800 swapped, \ud800\udc00 as two", "\udfff", "中\ud83d"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("tokenizers")
    return {name: small.save(make(), home / name, eos_token=END) for name, make in small.KINDS.items()}


@pytest.fixture(scope="module")
def loaded(folders):
    return {name: load(folder) for name, folder in folders.items()}


SOON = ("byte_level", "unigram")


@pytest.fixture(params=[pytest.param(name, marks=[] if name in SOON else pytest.mark.full) for name in small.KINDS])
def kind(request):
    return request.param


@pytest.mark.peer
def test_the_ids_are_transformers(kind, folders, loaded):
    transformers = pytest.importorskip("transformers")
    peer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folders[kind] / "tokenizer.json"), eos_token=END)
    ours, texts = loaded[kind], [*ODD, *small.corpus()[:3]]
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        assert ids.tolist() == peer.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == peer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert ours.eod == peer.eos_token_id and ours.vocab_size == 1 + max(peer.get_vocab().values())
    names = peer.convert_ids_to_tokens(list(range(ours.vocab_size)))
    assert [ours.piece(i) for i in range(ours.vocab_size)] == [n or f"<{i}>" for i, n in enumerate(names)]


def test_text_never_spells_a_control_piece(kind, folders, loaded):
    raw = Tokenizer.from_file(str(folders[kind] / "tokenizer.json"))
    ids = {raw.token_to_id(name) for name in [*small.SPECIAL, small.LATE]}
    assert ids <= set(raw.encode(SPELLED).ids)
    ours = loaded[kind]
    assert not (ids - {ours.unknown}) & set(ours.encode(SPELLED))
    raw.encode_special_tokens = True
    missed = ids & set(raw.encode(SPELLED).ids) - {ours.unknown}
    assert bool(missed) == (kind in ("unigram", "word_piece", "byte_fallback"))  # its own switch is not enough


def test_exact_ones_return_every_string(loaded):
    assert [name for name, one in loaded.items() if one.exact] == ["byte_level"]
    ours = loaded["byte_level"]
    rng = random.Random(1)
    common = [*" \n\t\0", "    ", "self.", "\ud83d", "😀", END, small.LATE, small.WORD, "<s"]
    drawn = ["".join(rng.choices([*common, chr(rng.randrange(0x110000))], k=rng.randrange(20))) for _ in range(1000)]
    texts = [*ODD, *BROKEN, SPELLED, *small.corpus(), *drawn]
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        assert ours.decode(ids) == text


def test_lone_surrogates_are_replaced_where_they_cannot_be_spelled(kind, loaded):
    if not loaded[kind].exact:
        plain = [text.encode(errors="replace").decode() for text in BROKEN]
        assert [loaded[kind].encode(text) for text in BROKEN] == [loaded[kind].encode(text) for text in plain]


def test_any_ids_are_text_together_and_one_by_one(kind, folders, loaded):
    ours, raw = loaded[kind], Tokenizer.from_file(str(folders[kind] / "tokenizer.json"))
    rng = random.Random(2)
    for size in (ours.vocab_size, 260) * 150:
        ids = [rng.randrange(size) for _ in range(12)]
        assert ours.decode(ids) == raw.decode([i for i in ids if ours.piece(i) not in (*small.SPECIAL, small.LATE)])
        if kind == "byte_fallback":  # there a broken byte breaks its neighbours, those to come too
            ids = [i for i in ids if ours.piece(i) not in small.BYTES]
        coming = Text(ours)
        assert "".join(coming.add(i) for i in ids) + coming.end() == ours.decode(ids)
    for wrong in (-1, ours.vocab_size):
        with pytest.raises(IndexError):
            ours.decode([wrong])


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_half_characters_wait(kind, loaded):
    ours, text = loaded[kind], "ẽ 㐀丟 𝄞🤷\u0300! def"
    ids = ours.encode(text)
    coming = Text(ours)
    pieces = [coming.add(i) for i in ids]
    assert "" in pieces
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


def test_threads_change_nothing(kind, loaded):
    texts = [*ODD, *BROKEN, *small.corpus()]
    one, three = (loaded[kind].encode_batch(texts, threads) for threads in (1, 3))
    assert [a.tolist() for a in one] == [b.tolist() for b in three]
    assert loaded[kind].encode_batch([], 3) == []


def test_what_the_file_asks_of_training_is_off(folders, loaded, tmp_path):
    """Cuts, pads, pieces around a text, and merges left out by chance."""
    made = Tokenizer.from_file(str(folders["byte_level"] / "tokenizer.json"))
    made.enable_truncation(5)
    made.enable_padding(length=50)
    made.model.dropout = 0.5
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))])
    text = small.corpus()[0]
    assert load(small.save(made, tmp_path / "made", eos_token=END)).encode(text) == loaded["byte_level"].encode(text)


def test_a_fork_says_nothing(folders):
    script = f"""
import os, sys
from lamella.config import TokenizerConfig
from lamella.data.tokenizer import load
one = load({str(folders["byte_level"])!r})
wanted = [one.encode_batch(["some words"] * 9, threads=2)[0].tolist()]
if os.fork() == 0:
    os._exit([one.encode_batch(["some words"] * 9, threads=2)[4].tolist()] != wanted)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_ids_with_gaps(tmp_path):
    made = Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="b"))
    made.add_special_tokens([END])
    ours = load(small.save(made, tmp_path / "gaps", eos_token=END))
    assert ours.vocab_size == 1 + max(made.get_vocab().values())
    assert (ours.piece(3), ours.decode([3, 0, 3]), ours.unknown) == ("<3>", "a", 7)


TELLING = {
    "its config": {"tokenizer_config.json": {"eos_token": END}},
    "its config, in detail": {"tokenizer_config.json": {"eos_token": {"content": END, "special": True}}},
    "the map": {"special_tokens_map.json": {"eos_token": END}},
    "the map, where the config is silent": {
        "tokenizer_config.json": {"eos_token": None},
        "special_tokens_map.json": {"eos_token": {"content": END}},
    },
}


@pytest.mark.parametrize("files", TELLING.values(), ids=TELLING.keys())
def test_the_end_is_told_by(files, folders, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folders["byte_level"] / "tokenizer.json").read_bytes())
    for name, tree in files.items():
        (tmp_path / name).write_text(json.dumps(tree))
    for where in (tmp_path, tmp_path / "tokenizer.json"):
        assert load(where).fingerprint == load(folders["byte_level"]).fingerprint
        assert load(where).piece(load(where).eod) == END
    chosen = load(tmp_path, small.LATE)
    assert chosen.piece(chosen.eod) == small.LATE and chosen.fingerprint != load(tmp_path).fingerprint


@pytest.mark.peer
def test_what_is_stored_is_whole(kind, folders, tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "given.json").write_bytes((folders[kind] / "tokenizer.json").read_bytes())
    stored = read_model(tmp_path / "given.json", END)
    assert stored.fingerprint == stored.open().fingerprint == read_model(folders[kind]).fingerprint
    (tmp_path / "stored").mkdir()
    stored.write(tmp_path / "stored")
    assert read_model(tmp_path / "stored").files == stored.files
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = transformers.AutoTokenizer.from_pretrained(tmp_path / "stored")
    for text in ODD:
        assert peer.encode(text) == load(tmp_path / "stored").encode(text)
    assert peer.eos_token == END


def test_mistakes_are_one_line(folders, tmp_path):
    tree = json.loads((folders["byte_level"] / "tokenizer.json").read_text())
    given, model = tmp_path / "tokenizer.json", tmp_path / "a.model"
    model.write_bytes(b"\n\0")
    (tmp_path / "empty").mkdir()
    cut = json.dumps(tree)[:5000]
    no_model = json.dumps(tree | {"model": None})
    doubled = json.loads(json.dumps(tree))
    doubled["model"]["merges"].append(["no such piece", "a"])
    lone = json.dumps(tree).replace("</s>", "\\ud800")
    plain = json.loads(json.dumps(tree))
    plain["model"] = {"type": "WordLevel", "vocab": {END: 0, "a": 1}, "unk_token": END}
    for raw, where, eod, said in [
        (json.dumps(tree), given, None, "set tokenizer.eod, one of <unk> <s> </s> <|late|>"),
        (json.dumps(tree), given, "<eos>", "<eos> is none of its added pieces"),
        (json.dumps(tree), given, "the", "the is none of its added pieces"),
        (json.dumps(plain), given, END, "also stands for what it cannot spell"),
        (cut, given, None, "set tokenizer.eod"),
        (cut, given, END, "not a Hugging Face tokenizer.json, or a damaged one"),
        (no_model, given, END, "not a Hugging Face tokenizer.json, or a damaged one"),
        (json.dumps(doubled), given, END, "not a Hugging Face tokenizer.json, or a damaged one"),
        (lone, given, END, "</s> is none of its"),
        ("[1]", given, END, "not a Hugging Face tokenizer.json, or a damaged one"),
        ("[" * 100_000, given, END, "not a Hugging Face tokenizer.json, or a damaged one"),
        ("", tmp_path / "none.json", None, "none.json: no such tokenizer model"),
        ("", given / "in a file", None, "no such tokenizer model"),
        ("", tmp_path / "empty", None, "holds no tokenizer.json or tokenizer.model"),
        ("", model, END, "is a sentencepiece model, which tells its end itself"),
        ("", model, None, "not a sentencepiece model"),
    ]:
        given.write_text(raw)
        with pytest.raises(UserError) as refused:
            load(where, eod)
        assert said in str(refused.value) and "\n" not in str(refused.value)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config.json: damaged: not JSON"):
        load(given)


def test_an_end_wants_a_tokenizer():
    with pytest.raises(ValidationError, match="eod names a piece of a given model"):
        TokenizerConfig(eod=END)


def test_damage_is_no_traceback(kind, folders, tmp_path):
    raw = (folders[kind] / "tokenizer.json").read_bytes()
    whole = read_model(folders[kind]).fingerprint
    rng = random.Random(3)
    for _ in range(40):
        at, kept = rng.randrange(len(raw)), bytearray(raw)
        kept[at] ^= 1 << rng.randrange(8)
        (tmp_path / "tokenizer.json").write_bytes(kept if rng.random() < 0.8 else raw[:at])
        try:
            assert load(tmp_path, END).fingerprint != whole
        except UserError as error:
            assert "\n" not in str(error)

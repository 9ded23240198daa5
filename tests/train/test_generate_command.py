"""`lamella generate`: what it prints, what it reads, and the user's mistakes."""

import io
import json
import os
import random
import shutil
import subprocess
import sys

import pytest
import torch

from lamella.config import change
from lamella.data.store.manifest import read_manifest, write_manifest
from lamella.data.tokenizer import load
from lamella.data.tokenizer.detokenize import Text
from lamella.model.generate import GREEDY, generate
from lamella.model.lm import LanguageModel
from lamella.nn.rows import one_document
from lamella.nn.shard import Whole
from lamella.train.restore import restore
from tests.commands import call
from tests.corpus import tiny_run
from tests.train.untrained import save_untrained

PROMPTS = ["import json\n", "class Ünïcode: 😀\n", "", "def f(x):\n    return "]


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    return tiny_run(corpus, tmp_path_factory.mktemp("runs"), name="mine")


@pytest.fixture(scope="module")
def saved(run):
    return save_untrained(run)


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return load(f"{corpus.path}/tokenizer.model")


@pytest.fixture
def say(run, saved, capfd):
    """Calls the command on the run; returns what it printed, or the objects that it printed with --json."""

    def say(*words):
        assert call("generate", run.folder, *words) == 0
        out, err = capfd.readouterr()
        assert err == ""
        return [json.loads(line) for line in out.splitlines()] if "--json" in words else out

    return say


def pipe(monkeypatch, raw: bytes, terminal=False):
    stdin = io.TextIOWrapper(io.BytesIO(raw))
    stdin.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdin", stdin)


def options(prompts=PROMPTS):
    return [word for prompt in prompts for word in ("--prompt", prompt)]


def test_a_checkpoint_is_restored_exactly(run, saved):
    path, model = saved
    for where in (path, run.folder, path.parent):
        restored = restore(where)
        assert (restored.checkpoint, restored.step, restored.run, restored.notes) == (path, 3, run, ())
        for name, parameter in restored.model.named_parameters():
            assert torch.equal(parameter, model.state_dict()[name])
            assert not parameter.requires_grad


def test_bf16_is_the_training_s_bf16(saved):
    """Some weights are rounded beforehand: the numbers are those of fp32 weights that are rounded at each use."""
    path, model = saved
    low = LanguageModel(model.config, Whole(torch.bfloat16))
    low.load_state_dict(model.state_dict())
    tokens = torch.randint(500, (2, 30), generator=torch.Generator().manual_seed(0))
    restored = restore(path, "bf16").model
    assert torch.equal(restored(tokens, one_document(tokens)), low(tokens, one_document(tokens)))
    assert any(p.dtype == torch.bfloat16 for p in restored.parameters())


def test_greedy_text(say, saved, tokenizer):
    ids = [tokenizer.encode(prompt) for prompt in PROMPTS]
    wanted = [tokenizer.decode(out) for out in generate(saved[1], ids, tokenizer.eod, tokenizer.vocab_size, 20, GREEDY)]
    found = say(*options(), "--temperature", "0", "--max-tokens", "20", "--json")
    assert [(o["index"], o["prompt"], o["text"]) for o in found] == list(zip(range(4), PROMPTS, wanted, strict=True))
    assert {o["ended"] for o in found} <= {"max_tokens", "eod"}
    assert all(o["tokens"] == 20 for o in found if o["ended"] == "max_tokens")
    assert say("--prompt", PROMPTS[0], "--temperature", "0", "--max-tokens", "20") == PROMPTS[0] + wanted[0] + "\n"


def test_the_text_is_a_function_of_the_seed_and_the_row(say):
    words = [*options(), "--max-tokens", "15", "--temperature", "1", "--top-p", "0.95", "--top-k", "300"]
    found = say(*words, "--json")
    assert say(*words, "--batch", "1", "--json") == say(*words, "--batch", "3", "--json") == found
    assert say(*words, "--seed", "1", "--json") != found
    plain = "\n".join(f"==> {o['index'] + 1} <==\n{o['prompt']}{o['text']}\n" for o in found)
    assert say(*words) == plain.encode(errors="replace").decode()


def test_a_stop_text_ends_the_text_before_it(say):
    words = ["--prompt", PROMPTS[0], "--prompt", PROMPTS[3], "--max-tokens", "40", "--json"]
    free = say(*words)
    stop = free[0]["text"][11:14]  # wherever pieces part
    found = say(*words, "--stop", "neither text holds this", "--stop", stop)
    for with_, without in zip(found, free, strict=True):
        stopped = stop in without["text"]
        assert with_["text"] == without["text"].split(stop)[0]
        assert with_["ended"] == ("stop" if stopped else without["ended"])
    assert found[0]["tokens"] < free[0]["tokens"]


def test_prompts_of_a_pipe(say, monkeypatch):
    words = ["--max-tokens", "3", "--json"]
    pipe(monkeypatch, b"one\r\n\ntwo\xc3\xa9\n")
    assert [o["prompt"] for o in say(*words)] == ["one", "", "two\u00e9"]
    pipe(monkeypatch, b"one\n\ntwo\n")
    assert [o["prompt"] for o in say(*words, "--whole")] == ["one\n\ntwo\n"]


def test_capacity_is_left_out_and_told(corpus, tmp_path, capfd):
    run = tiny_run(corpus, tmp_path)
    moe = run.model.parts["moe"] | {"capacity_factor": 0.5}
    run = change(run, model=run.model.model_dump(mode="json") | {"parts": run.model.parts | {"moe": moe}})
    _, model = save_untrained(run)
    tokens = torch.randint(500, (1, 40), generator=torch.Generator().manual_seed(0))
    with_, without = restore(run.folder), restore(run.folder, capacity=False)
    assert torch.equal(with_.model(tokens, one_document(tokens)), model(tokens, one_document(tokens)))
    assert not torch.equal(without.model(tokens, one_document(tokens)), model(tokens, one_document(tokens)))
    assert call("generate", run.folder, "--prompt", "a", "--max-tokens", "2") == 0
    assert capfd.readouterr().err == f"lamella: {without.notes[0]}\n"
    assert "moe: routed without capacity_factor" in without.notes[0]


def test_it_is_found_from_anywhere_with_its_data(corpus, tmp_path, monkeypatch):
    """Relative paths of the configuration are seen from where the run was started."""
    shutil.copytree(corpus.path, tmp_path / "there/prepared")
    monkeypatch.chdir(tmp_path / "there")
    run = tiny_run(change(corpus, path="prepared"), "runs")
    save_untrained(run)
    monkeypatch.chdir("/")
    assert restore(tmp_path / "there/runs/tiny").run.data.path == str(tmp_path / "there/prepared")


def refused(capfd, words, *said):
    capfd.readouterr()
    assert call(*words) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.strip().splitlines()) == 1, err
    assert all(text in err for text in said), err


MISTAKES = [
    (["--temperature", "-0.5"], ["--temperature -0.5", "at least 0"]),
    (["--temperature", "nan"], ["--temperature nan"]),
    (["--top-p", "0"], ["--top-p 0", "above 0"]),
    (["--top-p", "1.5"], ["--top-p 1.5", "at most 1"]),
    (["--top-k", "-1"], ["--top-k -1"]),
    (["--seed", "-1"], ["--seed -1"]),
    (["--max-tokens", "0"], ["--max-tokens 0", "at least 1"]),
    (["--batch", "0"], ["--batch 0"]),
    (["--stop", ""], ["--stop", "at least one character"]),
    (["--whole"], ["--whole"]),
]


@pytest.mark.parametrize(("words", "said"), MISTAKES, ids=lambda v: " ".join(v))
def test_options_out_of_range(words, said, saved, capfd):
    refused(capfd, ["generate", saved[0], "--prompt", "a", *words], *said)


def test_no_prompt(saved, capfd, monkeypatch):
    pipe(monkeypatch, b"", terminal=True)
    refused(capfd, ["generate", saved[0]], "no prompt", "--prompt TEXT")
    pipe(monkeypatch, b"")
    refused(capfd, ["generate", saved[0]], "standard input is empty")
    pipe(monkeypatch, b"text\n\x89PNG\r\n\x1a\n\x00\xff")
    refused(capfd, ["generate", saved[0]], "not UTF-8 text (byte 5)")


def test_no_checkpoint(run, saved, tmp_path, capfd):
    refused(capfd, ["generate", run.folder.parent / "mime", "--prompt", "a"], "no such folder", "did you mean", "mine?")
    refused(capfd, ["generate", tmp_path / "x", "--prompt", "a"], "no such folder", "name a run's folder")
    refused(capfd, ["generate", saved[0] / "run.json", "--prompt", "a"], "run.json", "a file")
    refused(capfd, ["generate", tmp_path, "--prompt", "a"], "no checkpoint there")
    (tmp_path / "checkpoints/step-00000001.tmp").mkdir(parents=True)
    refused(capfd, ["generate", tmp_path, "--prompt", "a"], "no finished checkpoint")
    refused(capfd, ["generate", tmp_path / "checkpoints/step-00000001.tmp", "--prompt", "a"], "unfinished")
    refused(capfd, ["generate", saved[0].with_name("step-00000009"), "--prompt", "a"], "step-00000009: no such")


@pytest.mark.parametrize("file", ["*.distcp", ".metadata", "run.json", "manifest.json"])
def test_a_flipped_byte(file, saved, tmp_path, capfd):
    copy = tmp_path / saved[0].name
    shutil.copytree(saved[0], copy)
    damaged = next(copy.glob(file))
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    refused(capfd, ["generate", copy, "--prompt", "a"], damaged.name, "altered")


def test_the_tokenizer_is_gone_or_another(corpus, tmp_path, capfd):
    home = tmp_path / "prepared"
    shutil.copytree(corpus.path, home)
    run = tiny_run(change(corpus, path=str(home)), tmp_path / "runs")
    save_untrained(run)
    words = ["generate", run.folder, "--prompt", "a", "--max-tokens", "2"]
    model, away = home / "tokenizer.model", tmp_path / "away.model"
    model.rename(away)
    refused(capfd, words, "tokenizer.model: missing", "--tokenizer FILE")
    assert call(*words, "--tokenizer", away) == 0
    assert capfd.readouterr().err == ""
    refused(capfd, [*words, "--tokenizer", tmp_path / "none.model"], "none.model", "no such")
    refused(capfd, [*words, "--tokenizer", home / "text/train.idx"], "train.idx: not the tokenizer of", "step-00000003")
    model.write_bytes(away.read_bytes() + b"\n")
    refused(capfd, words, "not the tokenizer of", "--tokenizer FILE")
    home.rename(tmp_path / "moved")
    refused(capfd, words, "no prepared data there", "--tokenizer FILE")
    refused(capfd, [*words, "--tokenizer", tmp_path / "moved/text/train.idx"], "not a sentencepiece model")
    assert call(*words, "--tokenizer", away) == 0
    assert "taken as given" in capfd.readouterr().err


def test_other_data_in_the_data_s_place(corpus, tmp_path, capfd):
    home = tmp_path / "prepared"
    shutil.copytree(corpus.path, home)
    run = tiny_run(change(corpus, path=str(home)), tmp_path / "runs")
    save_untrained(run)
    manifest = read_manifest(home)
    other = manifest.files["text/train.sums"].model_copy(update={"sha256": "0" * 64})
    write_manifest(home, manifest.model_copy(update={"files": manifest.files | {"text/train.sums": other}}))
    refused(capfd, ["generate", run.folder, "--prompt", "a"], "not the data that", "--tokenizer FILE")


def test_a_mistake_is_told_without_torch_and_a_text_without_deepspeed(saved):
    script = "import sys; from lamella.cli.main import main\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    for words, code, never in (
        (["x", "--prompt", "a"], 2, {"torch"}),
        ([str(saved[0]), "--prompt", "a", "--max-tokens", "2"], 0, {"deepspeed", "megatron", "datasets"}),
    ):
        argv = [sys.executable, "-c", script, "generate", *words]
        done = subprocess.run(argv, capture_output=True, text=True, env=os.environ)
        assert done.returncode == code, done.stderr
        assert not never & set(done.stderr.splitlines()[-1 if code == 0 else 0].split()), words


def test_a_reader_that_has_seen_enough(saved):
    words = ["--prompt", "def f(x):\n" * 1000, "--max-tokens", "100"]  # more than a buffer at once, then slowly more
    argv = [sys.executable, "-m", "lamella", "generate", str(saved[0]), *words]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as done:
        assert done.stdout.read(5) == "def f"
        done.stdout.close()
        assert (done.stderr.read(), done.wait()) == ("", 0)


TEXTS = [
    "plain text, in pieces\n",
    "Grüße, 中文 and 😀😀!",
    "\u2581 \ud800 \u0300e\0",
    "\ufffd\ufffdabc\ufffd",
    "  indented\n\n\n",
]


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_pieces_of_text_are_whole_characters(text, tokenizer):
    coming = Text(tokenizer, tokenizer.encode("é"))
    pieces = [coming.add(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) + coming.end() == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("ids", [270, None], ids=["bytes and half characters", "pieces"])
def test_any_ids_spell_what_they_spell_together(ids, tokenizer):
    draw = random.Random(0)
    for _ in range(300):
        coming, tokens = Text(tokenizer), [draw.randrange(ids or tokenizer.vocab_size) for _ in range(12)]
        text = "".join(coming.add(token) for token in tokens) + coming.end()
        assert text == tokenizer.decode(tokens)


def test_what_may_begin_a_stop_text_is_held_back(tokenizer):
    coming = Text(tokenizer, (), ["abab!", "xyz"])
    said = [coming._up_to_stop(c) for c in "1ababab?xy"]
    assert said == ["1", "", "", "", "", "ab", "", "abab?", "", ""]
    assert coming.end() == "xy"

"""`lamella eval --tasks`: lm-evaluation-harness over a checkpoint, with tasks from local files."""

import json

import pytest
import torch

from lamella.checkpoint import series
from lamella.model.generate import GREEDY, generate
from lamella.nn.rows import one_document
from lamella.train.restore import restore
from tests.commands import call
from tests.corpus import tiny_run
from tests.train.untrained import save_untrained

pytest.importorskip("lm_eval")
from lamella.train.harness import HarnessModel

CHOICES = [
    {"question": "def main(", "choices": ["self):\n", "argv):", ")"], "answer": 0},
    {"question": "import ", "choices": ["json", "asyncio.events", "os, sys"], "answer": 2},
    {"question": "class Loop:\n    def", "choices": [" close(self):", " run"], "answer": 1},
]
TEXTS = ["import json\n", "def f(x):\n    return x\n" * 12]  # the second is longer than a row

TASKS = {
    "choosing": """
task: choosing
dataset_path: json
dataset_kwargs: {data_files: {test: "%(folder)s/choices.jsonl"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "rolling": """
task: rolling
dataset_path: json
dataset_kwargs: {data_files: {test: "%(folder)s/texts.jsonl"}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
    "writing": """
task: writing
dataset_path: json
dataset_kwargs: {data_files: {test: "%(folder)s/written.jsonl"}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["zzz"], max_gen_toks: 5}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def checkpoint(corpus, tmp_path_factory):
    run = tiny_run(corpus, tmp_path_factory.mktemp("harness"))
    save_untrained(run, 3)
    return series.step_folder(run.folder / "checkpoints", 3)


@pytest.fixture(scope="module")
def restored(checkpoint):
    return restore(checkpoint, capacity=False)


def nats(restored, context, continuation):
    """Log-likelihood in nats of ids behind ids, alone in a row; whether each is the likeliest; in fp64."""
    ids = torch.tensor([[restored.tokenizer.eod, *context, *continuation]])
    with torch.inference_mode():
        logits = restored.model(ids[:, :-1], one_document(ids[:, :-1]))[0, len(context) :].double()
    logits = logits[:, : restored.tokenizer.vocab_size]
    target = torch.tensor(continuation)
    return float(logits.log_softmax(-1).gather(1, target[:, None]).sum()), bool((logits.argmax(-1) == target).all())


def pair(restored, context, continuation):
    """As the harness cuts: the text's ids, less those of the context."""
    both, first = (restored.tokenizer.encode(text) for text in (context + continuation, context))
    return both[: len(first)], both[len(first) :]


def write_tasks(folder):
    """The YAML files by name."""
    rows = {
        "choices": CHOICES,
        "texts": [{"text": text} for text in TEXTS],
        "written": [{"question": one["question"], "answer": "?"} for one in CHOICES],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text % {"folder": folder})
    return {name: folder / f"{name}.yaml" for name in TASKS}


def test_likelihoods_are_those_of_a_row_alone(restored):
    pairs = [pair(restored, one["question"], choice) for one in CHOICES for choice in one["choices"]]
    found = HarnessModel(restored, batch=3)._loglikelihood_tokens([(None, *one) for one in pairs])
    for (got, greedy), one in zip(found, pairs, strict=True):
        want, likeliest = nats(restored, *one)
        assert got == pytest.approx(want, rel=1e-5) and greedy == likeliest


def test_of_a_long_context_the_end_counts(restored):
    length = restored.run.train.sequence_length
    context, continuation = list(range(5, 5 + 2 * length)), [7, 8, 9]
    (got, _), = HarnessModel(restored)._loglikelihood_tokens([(None, context, continuation)])
    ids = torch.tensor([[*context, *continuation]])[:, -length - 1 :]
    with torch.inference_mode():
        logits = restored.model(ids[:, :-1], one_document(ids[:, :-1]))[0].double()
    chances = logits[:, : restored.tokenizer.vocab_size].log_softmax(-1)
    assert got == pytest.approx(sum(float(chances[i, ids[0, i]]) for i in (-3, -2, -1)), rel=1e-5)


def test_tasks_of_local_files(checkpoint, restored, tmp_path, capfd):
    files = write_tasks(tmp_path)
    assert call("eval", checkpoint, "--tasks", ",".join(map(str, files.values())), "--json") == 0
    found = json.loads(capfd.readouterr().out.splitlines()[-1])["tasks"]
    right = 0
    for one in CHOICES:
        chances = [nats(restored, *pair(restored, one["question"], choice))[0] for choice in one["choices"]]
        right += chances.index(max(chances)) == one["answer"]
    assert found["choosing"]["acc,none"] == pytest.approx(right / len(CHOICES))
    assert found["writing"]["exact_match,none"] == 0
    total = sum(nats_of_text(restored, text) for text in TEXTS)
    bits = -total / sum(len(text.encode()) for text in TEXTS) / torch.tensor(2.0).log().item()
    assert found["rolling"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)


def nats_of_text(restored, text):
    """In rows that do not overlap; each but the first begins with the token before it."""
    ids, length = restored.tokenizer.encode(text), restored.run.train.sequence_length
    total = nats(restored, [], ids[:length])[0]
    for start in range(length, len(ids), length):
        row = torch.tensor([ids[max(0, min(start + length, len(ids)) - length - 1) : start + length]])
        count = len(ids[start : start + length])
        with torch.inference_mode():
            logits = restored.model(row[:, :-1], one_document(row[:, :-1]))[0].double()
        chances = logits[:, : restored.tokenizer.vocab_size].log_softmax(-1)
        total += sum(float(chances[i, row[0, i]]) for i in range(-count, 0))
    return total


def test_texts_go_on_to_their_stop(restored):
    from types import SimpleNamespace

    prompts = [one["question"] for one in CHOICES]
    ids = [restored.tokenizer.encode(text) for text in prompts]
    eod, size = restored.tokenizer.eod, restored.tokenizer.vocab_size
    wanted = [restored.tokenizer.decode(one) for one in generate(restored.model, ids, eod, size, 8, GREEDY)]
    stop = wanted[0][3:5]
    for stops in ([], [stop]):
        requests = [SimpleNamespace(args=(p, {"until": stops, "max_gen_toks": 8})) for p in prompts]
        got = HarnessModel(restored, batch=2).generate_until(requests)
        assert got == [text.split(stop)[0] if stops else text for text in wanted]


def test_mistakes_are_one_line(checkpoint, tmp_path, capfd):
    (tmp_path / "none.yaml").write_text("dataset_path: json\n")
    files = write_tasks(tmp_path)
    (tmp_path / "choices.jsonl").unlink()
    for words, line in [
        (["--tasks", tmp_path / "missing.yaml"], "cannot be read"),
        (["--tasks", tmp_path / "none.yaml"], "it has no key `task`"),
        (["--tasks", "no_such_task_at_all"], "no_such_task_at_all"),
        (["--tasks", files["choosing"]], "choices.jsonl"),
        (["--tasks", "x", "--text", "y"], "goes without --text"),
        (["--shots", "2"], "--shots 2: goes with --tasks"),
    ]:
        assert call("eval", checkpoint, *words) == 2, words
        err = capfd.readouterr().err
        assert line in err and err.splitlines()[-1].startswith("lamella: ") and "Traceback" not in err, err

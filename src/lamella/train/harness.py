"""Tasks of EleutherAI's lm-evaluation-harness on a restored model: an adapter to its `TemplateLM`, and one run of it.

A request's text comes behind an eod, as a document in training does. Rows are as long as the run's; of what is longer
the end counts, as in the harness' other models. Requests of about a length are computed together.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lamella.errors import UserError
from lamella.model.generate import GREEDY, Generation, Sampling
from lamella.nn.rows import Rows
from lamella.train.restore import Restored

MOST_TOKENS = 256  # that a task may ask for where it does not say


class HarnessModel(TemplateLM):
    """`batch` requests are computed together."""

    def __init__(self, restored: Restored, batch: int = 16):
        super().__init__()
        self.model, self.tokenizer_, self.batch = restored.model, restored.tokenizer, batch
        self.length = restored.run.train.sequence_length
        self._device = self.model.norm.weight.device

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer_.eod

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.tokenizer_.encode(string)

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Of each (any, context, continuation): the continuation's log-likelihood in nats, and whether it is greedy."""
        whole = [([self.eot_token_id, *context], continuation) for _, context, continuation in requests]
        rows = [((context + continuation)[-self.length - 1 :], len(continuation)) for context, continuation in whole]
        found: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
        for start in range(0, len(order), self.batch):
            some = order[start : start + self.batch]
            logits_BTV = self._logits([rows[i][0][:-1] for i in some])
            for logits_TV, i in zip(logits_BTV, some, strict=True):
                ids, count = rows[i]
                count = min(count, len(ids) - 1)
                target_C = torch.tensor(ids[len(ids) - count :], device=self._device)
                chances_CV = logits_TV[len(ids) - 1 - count : len(ids) - 1].float().log_softmax(-1)
                nats = float(chances_CV.gather(1, target_C[:, None]).double().sum())
                found[i] = nats, bool((chances_CV.argmax(-1) == target_C).all())
        return [found[i] for i in range(len(rows))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows of a row that do not overlap."""
        found = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(ids, self.eot_token_id, self.length, context_len=1)
            pairs = [make_disjoint_window(window) for window in windows]
            first, *rest = [(None, context, continuation) for context, continuation in pairs]
            first = (None, [], first[2])  # its context is the eod, which each row here begins with anyway
            found.append(sum(nats for nats, _ in self._loglikelihood_tokens([first, *rest])))
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each text, up to the first of its stop texts, which is left out."""
        found: dict[int, str] = {}
        args = [request.args for request in requests]
        order = sorted(range(len(args)), key=lambda i: -len(args[i][0]))
        for start in range(0, len(order), self.batch):
            some = order[start : start + self.batch]
            found |= dict(zip(some, self._continued([args[i] for i in some]), strict=True))
        return [found[i] for i in range(len(args))]

    def _continued(self, requests: list[tuple[str, dict[str, Any]]]) -> Iterator[str]:
        prompts = [self.tok_encode(text)[-self.length :] for text, _ in requests]
        kinds = [_kind(options) for _, options in requests]
        ids: list[list[int]] = [[] for _ in requests]
        texts = [""] * len(requests)
        sampling = {kind[2] for kind in kinds}
        if len(sampling) > 1:
            raise UserError("requests of one task that sample at different temperatures; set the batch to 1")
        batch = Generation(self.model, prompts, self.eot_token_id, self.tokenizer_.vocab_size, sampling.pop())
        while batch.rows:
            gone = []
            for row, token in batch.step():
                stops, most, _ = kinds[row]
                if token != self.eot_token_id:
                    ids[row].append(token)
                    texts[row] = self.tokenizer_.decode(ids[row])
                cut = min((at for stop in stops if (at := texts[row].find(stop)) >= 0), default=None)
                if cut is not None:
                    texts[row] = texts[row][:cut]
                if token == self.eot_token_id or cut is not None or len(ids[row]) >= most:
                    gone.append(row)
            batch.leave(gone)
        yield from texts

    def _logits(self, rows: list[list[int]]) -> torch.Tensor:
        """[B, T, V]; behind the end of a row is padding."""
        length = max(map(len, rows))
        token_BT = torch.full((len(rows), length), self.eot_token_id, dtype=torch.int32)
        document_BT = torch.full_like(token_BT, -1)
        position_BT = torch.arange(length, dtype=torch.int32).repeat(len(rows), 1)
        for b, ids in enumerate(rows):
            token_BT[b, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
            document_BT[b, : len(ids)] = 0
            position_BT[b, len(ids) :] -= len(ids)
        token_BT, document_BT, position_BT = (t.to(self._device) for t in (token_BT, document_BT, position_BT))
        return self.model(token_BT, Rows(document_BT, position_BT))[..., : self.tokenizer_.vocab_size]


def evaluate(
    restored: Restored, tasks: list[str], examples: int | None = None, shots: int | None = None, batch: int = 16
) -> dict[str, dict[str, Any]]:
    """The harness' results by task. A task is one of its own names, or a file of the user's in its YAML form.

    Raises UserError: no such task, a file that is none, data that are not there.
    """
    names, folders = _tasks(tasks)
    found: Any
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        found = simple_evaluate(
            HarnessModel(restored, batch),
            tasks=[*names],
            num_fewshot=shots,
            limit=examples,
            task_manager=TaskManager(include_path=folders or None),
            bootstrap_iters=0,
            log_samples=False,
        )
    except UserError:
        raise
    except Exception as error:  # a task's file and its data raise whatever they like
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"--tasks {','.join(tasks)}: {why}") from error
    assert found is not None  # on the first process
    return found["results"]


def _tasks(words: list[str]) -> tuple[list[str], list[str | Path]]:
    """Names for the harness, and the folders of the user's files."""
    names: list[str] = []
    folders: list[str | Path] = []
    for word in words:
        file = Path(word)
        if file.suffix not in (".yaml", ".yml"):
            names.append(word)
            continue
        try:
            tree = yaml.load(file.read_text(), Loader=_Loose)
            names.append(tree["task"])
        except OSError as error:
            raise UserError(f"--tasks {word}: cannot be read ({error.strerror})") from None
        except (yaml.YAMLError, KeyError, TypeError):
            raise UserError(f"--tasks {word}: no task of lm-evaluation-harness; it has no key `task`") from None
        folders.append(str(file.parent.absolute()))
    return names, folders


class _Loose(yaml.SafeLoader):
    """The harness' files name functions; here only the name of the task is wanted."""


_Loose.add_multi_constructor("!", lambda loader, suffix, node: None)


def _kind(options: dict[str, Any]) -> tuple[list[str], int, Sampling]:
    """Stop texts, most tokens, and how to draw."""
    until = options.get("until") or []
    stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
    temperature = float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0
    sampling = Sampling(temperature=temperature) if temperature else GREEDY
    return stops, int(options.get("max_gen_toks") or MOST_TOKENS), sampling

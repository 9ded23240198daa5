"""The sources' documents into their folders, with a journal to go on from."""

import time

import numpy as np

from lamella.config import DataConfig, SourceConfig
from lamella.data import sources
from lamella.data.prepare import journal
from lamella.data.prepare.encode import Encoded, Part
from lamella.data.prepare.in_place import Linked
from lamella.data.prepare.journal import Journal, Open, Tally
from lamella.data.prepare.progress import Progress
from lamella.data.prepare.seen import WIDTH, Seen
from lamella.data.prepare.work import Work
from lamella.data.prepare.workers import Workers, tasks
from lamella.data.sources import megatron
from lamella.data.store.manifest import SPLITS, SourceEntry, SplitEntry
from lamella.data.store.tokens import TokenWriter, part, token_dtype
from lamella.data.tokenizer import Tokenizer

EVERY = 5.0  # seconds between journals
TASK = 500_000  # bytes encoded at once by a process


class Writing:
    """`run` writes what the journal does not tell of yet. `documents` and `bytes` are those written so far."""

    def __init__(self, config: DataConfig, work: Work, tokenizer: Tokenizer, progress: Progress, state: Journal):
        self._config, self._work, self._tokenizer, self._progress = config, work, tokenizer, progress
        self.state = state
        self._seen = Seen(work.folder / "seen", state.seen)
        self._drop = config.duplicates == "drop"
        self._saved = time.monotonic()
        known = [entry.splits[split] for entry in state.done.values() for split in SPLITS]
        self._documents = sum(entry.documents for entry in known)
        self._bytes = sum(entry.text_bytes or 0 for entry in known)
        if state.open is not None:
            self._documents += sum(state.open.at(split).documents for split in SPLITS)
            self._bytes += sum(state.open.tally.text_bytes.values())

    def run(self, processes: int | None) -> dict[str, SourceEntry]:
        """Returns the entry of each source, by name."""
        self._progress.phase("encoding", self.state.text_bytes, self._bytes)
        names = sources.names(self._config.sources)
        dtype = token_dtype(self._tokenizer.vocab_size)
        try:
            with Workers(self._work.out, dtype, self._config.heldout, processes) as workers:
                for number, (name, source) in enumerate(zip(names, self._config.sources, strict=True)):
                    if source.format == "megatron":
                        self._link(number, name, source, set(names))
                    elif name not in self.state.done:
                        self._encode(number, name, source, workers, dtype)
        finally:
            self._seen.close()
        return self.state.done

    def _encode(self, number: int, name: str, source: SourceConfig, workers: Workers, dtype: np.dtype) -> None:
        now = self.state.open if self.state.open is not None and self.state.open.name == name else Open(name=name)
        folder = self._work.out / name
        writers = []
        try:
            for split in SPLITS:
                lengths = journal.lengths_file(self._work.folder, name, split)
                for place in (folder, lengths.parent):
                    place.mkdir(parents=True, exist_ok=True)
                writers.append(TokenWriter(folder / split, dtype, lengths, now.at(split)))
            for encoded, position in workers.map(tasks(sources.batches(source, now.position), TASK)):
                tally = self._add(writers, encoded, now.tally)
                now = now.model_copy(update={"position": position, "tally": tally})
                if time.monotonic() - self._saved >= EVERY:
                    written = {s: _pair(w) for s, w in zip(SPLITS, writers, strict=True)}
                    now = now.model_copy(update={"written": written})
                    self._save(open=now)
                self._progress.at(self._documents, self._bytes)
            for writer in writers:
                writer.close()
        finally:
            for writer in writers:
                writer.abandon()
        splits = {
            split: SplitEntry(documents=w.documents, tokens=w.tokens, text_bytes=now.tally.text_bytes[split])
            for split, w in zip(SPLITS, writers, strict=True)
        }
        tally = now.tally
        self._finish(
            name,
            SourceEntry(origin=number, splits=splits, skipped=tally.skipped, duplicates=tally.duplicates, closed=True),
        )

    def _add(self, writers: list[TokenWriter], encoded: Encoded, tally: Tally) -> Tally:
        """A text's copies fall to one split, so the splits can be looked at one by one."""
        sizes, duplicates = {}, tally.duplicates
        for writer, split, some in zip(writers, SPLITS, encoded.parts, strict=True):
            old = self._seen.add(some.digests)
            duplicates += int(old.sum())
            if self._drop and old.any():
                some = _without(some, old)
            writer.extend(some.tokens, some.lengths)
            size = int(some.text_bytes.sum())
            sizes[split] = tally.text_bytes[split] + size
            self._documents += len(some.lengths)
            self._bytes += size
        skipped = {why: count + encoded.skipped[why] for why, count in tally.skipped.items()}
        return Tally(text_bytes=sizes, skipped=skipped, duplicates=duplicates)

    def _link(self, number: int, name: str, source: SourceConfig, taken: set[str]) -> None:
        """Each of a source's data sets is a folder of its own."""
        for place, prefix in enumerate(megatron.prefixes(source)):
            one = sources.free(name, taken) if place else name
            taken.add(one)
            if one not in self.state.done:
                linked = Linked(megatron.look(prefix), self._work.out / one, self._tokenizer, self._config.heldout)

                def told(documents: int, size: int) -> None:
                    self._progress.at(self._documents + documents, self._bytes + size)

                self._finish(one, linked.write(number, self._seen, self._drop, told))

    def _finish(self, name: str, entry: SourceEntry) -> None:
        folder = self._work.out / name
        for split in SPLITS:
            for suffix in ("idx", "sums", "bin"):
                journal.sync(part(folder / split, suffix))
        self._save(open=None, done=self.state.done | {name: entry})

    def _save(self, **changes: object) -> None:
        self.state = self.state.model_copy(update={"seen": self._seen.sync(), **changes})
        journal.save(self._work.folder, self.state)
        self._saved = time.monotonic()


def _pair(writer: TokenWriter) -> tuple[int, int]:
    written = writer.sync()
    return written.bytes, written.documents


def _without(some: Part, old: np.ndarray) -> Part:
    """The documents that are not `old`."""
    itemsize = len(some.tokens) // int(some.lengths.sum())
    ends = np.cumsum(some.lengths, dtype=np.int64) * itemsize
    begins = ends - some.lengths.astype(np.int64) * itemsize
    kept = np.flatnonzero(~old).tolist()
    return Part(
        b"".join(some.tokens[begins[number] : ends[number]] for number in kept),
        some.lengths[kept],
        some.text_bytes[kept],
        b"".join(some.digests[number * WIDTH : (number + 1) * WIDTH] for number in kept),
    )

"""How far it is, for whoever watches."""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """`bytes` of text (or of tokens that are used in place); `rate` in bytes a second, `left` in seconds if known."""

    phase: str
    documents: int
    bytes: int
    total: int | None
    rate: float
    left: float | None

    def __str__(self) -> str:
        if not self.bytes:
            return self.phase
        total = f" of {self.total / 1e6:,.1f}" if self.total else ""
        parts = [f"{self.phase}: {self.documents:,} documents", f"{self.bytes / 1e6:,.1f}{total} MB"]
        if self.rate:
            parts.append(f"{self.rate / 1e6:,.1f} MB/s")
        if self.left is not None:
            minutes, seconds = divmod(round(self.left), 60)
            hours, minutes = divmod(minutes, 60)
            parts.append(f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left")
        return ", ".join(parts)


class Progress:
    """Tells `listener`; adds up the seconds of each phase."""

    def __init__(self, listener: Callable[[Report], None] | None = None):
        self.seconds: dict[str, float] = {}
        self._listener = listener
        self._name, self._total, self._start, self._begin = "", None, time.perf_counter(), 0

    def phase(self, name: str, total: int | None = None, begin: int = 0) -> None:
        """From now on `name`, over `total` bytes, of which `begin` were done before this call."""
        self.end()
        self._name, self._total, self._begin = name, total, begin
        self.at(0, begin)

    def at(self, documents: int, size: int) -> None:
        """`size`: bytes, those of before included."""
        if self._listener is None:
            return
        spent = time.perf_counter() - self._start
        rate = (size - self._begin) / spent if spent > 0.5 else 0.0
        left = max(0, self._total - size) / rate if self._total and rate else None
        self._listener(Report(self._name, documents, size, self._total, rate, left))

    def end(self) -> None:
        """Of the phase."""
        now = time.perf_counter()
        if self._name:
            self.seconds[self._name] = self.seconds.get(self._name, 0) + now - self._start
        self._start, self._name = now, ""

"""Where a step's time goes: seconds by part, on a GPU between events, so that nothing waits for the clock."""

import time

import torch


class Clock:
    """`mark(part)` gives the time since the last mark to a part; `take` returns the sums and starts anew."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple[str, float | torch.cuda.Event]] = [("", self._now())]

    def mark(self, part: str) -> None:
        self.marks.append((part, self._now()))

    def take(self) -> dict[str, float]:
        """Seconds by part since the last `take`."""
        if self.on_gpu:
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for (_, start), (part, stop) in zip(self.marks, self.marks[1:], strict=False):
            found[part] = found.get(part, 0.0) + _seconds(start, stop)
        self.marks = [("", self._now())]
        return found

    def _now(self) -> float | torch.cuda.Event:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(start: float | torch.cuda.Event, stop: float | torch.cuda.Event) -> float:
    if isinstance(start, float) and isinstance(stop, float):
        return stop - start
    assert isinstance(start, torch.cuda.Event) and isinstance(stop, torch.cuda.Event)
    return start.elapsed_time(stop) / 1000

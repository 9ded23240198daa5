"""Text out of ids that come one by one: only whole characters, and nothing of a stop text."""

from collections.abc import Sequence

from lamella.data.tokenizer.base import Tokenizer

CONTEXT = 4  # ids before the new ones, for models whose pieces read otherwise at a text's start
LONGEST = 4  # bytes of a character: as many ids that end in half a one are no character
HALF = "\ufffd"  # what bytes decode to that form no character, perhaps not yet


class Text:
    """What follows a prompt. `stopped`: one of the stop texts has come; what `add` returned ends before it."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stops: Sequence[str] = ()):
        self.stopped = False
        self._tokenizer, self._stops = tokenizer, stops
        self._before, self._new, self._held = list(prompt[-CONTEXT:]), [], ""

    def add(self, token: int) -> str:
        """Takes the next id; returns the text that is certain now."""
        self._new.append(token)
        ready = len(self._new)
        if self._spell(ready).endswith(HALF):
            if ready < LONGEST:
                return ""
            ready = self._parting()
        text = self._spell(ready)
        silent = [] if text else self._before  # pieces without text are no neighbours
        self._before, self._new = silent + self._new[:ready], self._new[ready:]
        return self._up_to_stop(text)

    def end(self) -> str:
        """The rest, when no more ids come."""
        text = self._up_to_stop(self._spell(len(self._new))) + self._held
        self._new, self._held = [], ""
        return text

    def _spell(self, count: int) -> str:
        """The text of the first new ids. Their neighbours alone are decoded with them: a cost without growth."""
        known = self._tokenizer.decode(self._before)
        return self._tokenizer.decode(self._before + self._new[:count])[len(known) :]

    def _parting(self) -> int:
        """How many of the new ids are past mending: what follows them reads the same without them."""
        whole = self._spell(len(self._new))
        apart = (self._spell(n) + self._tokenizer.decode(self._new[n:]) for n in range(1, len(self._new)))
        return next((n for n, text in enumerate(apart, 1) if text == whole), len(self._new))

    def _up_to_stop(self, text: str) -> str:
        """Holds back what may be the beginning of a stop text."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        begun = (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        cut = len(text) - max(begun, default=0)
        self._held = text[cut:]
        return text[:cut]

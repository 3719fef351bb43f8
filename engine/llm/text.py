"""`TextStream`: token ids -> text as it grows, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what a decoder shows for bytes that are no character yet


class TextStream:
    """Decodes token by token; a token may hold part of a character, or the end of one word and a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.text, self.stopped_by = "", None
        self._ids: list[int] = []
        self._begin = self._done = 0  # ids [begin, done) have been turned into text and serve as context
        self._held = max(map(len, self.stops), default=1) - 1
        self._given = 0

    def push(self, token: int) -> str | None:
        """Add a token; the stop string that has appeared, if one has (the text then ends before it)."""
        self._ids.append(token)
        context, longer = self._decode(self._begin, self._done), self._decode(self._begin, len(self._ids))
        if longer.endswith(UNFINISHED) or len(longer) <= len(context):
            return None
        searched = max(0, len(self.text) - self._held)
        self.text += longer[len(context) :]
        self._begin, self._done = self._done, len(self._ids)
        found = [(at, stop) for stop in self.stops if (at := self.text.find(stop, searched)) >= 0]
        if found:
            at, self.stopped_by = min(found)
            self.text = self.text[:at]
        return self.stopped_by

    def take(self, *, final: bool) -> str:
        """Text that was not given out before. Until the end, what may begin a stop string is held back."""
        if final and self.stopped_by is None:
            self.text += self._decode(self._begin, len(self._ids))[len(self._decode(self._begin, self._done)) :]
            self._begin = self._done = len(self._ids)
        end = len(self.text) if final else max(self._given, len(self.text) - self._held)
        text, self._given = self.text[self._given : end], end
        return text

    def _decode(self, start: int, end: int) -> str:
        return str(self.tokenizer.decode(self._ids[start:end], skip_special_tokens=True))

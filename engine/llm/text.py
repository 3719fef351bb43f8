"""`TextStream`: token ids -> text as it grows, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what a decoder shows for bytes that are no character yet


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text without special tokens, and with every space that was drawn: later tokens must not change earlier text."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


class TextStream:
    """Decodes token by token; a token may hold part of a character, or the end of one word and a stop string.

    Of several stop strings the one that begins first ends the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.text, self.stopped_by = "", None
        self._ids: list[int] = []
        self._begin = self._done = 0  # ids [begin, done) have been turned into text and serve as context
        self._longest = max(map(len, self.stops), default=1)
        self._given = 0

    def push(self, token: int) -> str | None:
        """Add a token; the stop string that has appeared, if one has (the text then ends before it)."""
        self._ids.append(token)
        added = self._added()
        whole = added.rstrip(UNFINISHED)  # a stop string counts before the character after it is complete
        searched = max(0, len(self.text) - self._longest + 1)
        if added and whole == added:
            self.text += added
            self._begin, self._done = self._done, len(self._ids)
            whole = ""
        text = self.text + whole
        found = [(at, stop) for stop in self.stops if (at := text.find(stop, searched)) >= 0]
        if found:
            at, self.stopped_by = min(found)
            self.text = text[:at]
        return self.stopped_by

    def take(self, *, final: bool) -> str:
        """Text that was not given out before. Until the end, what may begin a stop string is held back."""
        if final and self.stopped_by is None:
            self.text += self._added()
            self._begin = self._done = len(self._ids)
        end = len(self.text) if final else max(self._given, len(self.text) - self._num_held())
        text, self._given = self.text[self._given : end], end
        return text

    def _num_held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        lengths = range(min(self._longest - 1, len(self.text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(self.text[-n:]) for stop in self.stops)), 0)

    def _added(self) -> str:
        """What the ids after `done` add to the text."""
        context = decode(self.tokenizer, self._ids[self._begin : self._done])
        return decode(self.tokenizer, self._ids[self._begin :])[len(context) :]

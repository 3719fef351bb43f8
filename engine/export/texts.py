"""A file of texts -> token sequences of one length, packed without gaps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import RequestError

CHUNK = 1 << 16  # characters of a plain text that are tokenized at a time
Document = tuple[str, bool]  # text, and whether the tokenizer adds its special tokens: a chat template has its own


def read_sequences(
    file: Path, tokenizer: PreTrainedTokenizerBase | None, *, length: int, count: int
) -> list[list[int]]:
    """Up to `count` sequences of `length` token ids; the last may be shorter. The file is read as far as needed.

    `*.jsonl`: a document a line, `{"text": ...}` or `{"messages": [...]}` (through the chat template); any other file
    is one text. Documents follow one another in a sequence.
    """
    if tokenizer is None:
        raise RequestError("this model folder has no tokenizer: texts to calibrate on cannot be read")
    ids: list[int] = []
    for document, special in _documents(file, tokenizer):
        ids += tokenizer(document, add_special_tokens=special).input_ids
        if len(ids) >= length * count:
            break
    if not ids:
        raise RequestError(f"{file} holds no text to calibrate on")
    ids = ids[: length * count]
    return [ids[start : start + length] for start in range(0, len(ids), length)]


def _documents(file: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[Document]:
    if not file.is_file():
        raise RequestError(f"{file} is no file; give a text file, or a .jsonl with text or messages")
    try:
        with file.open(encoding="utf-8") as lines:
            if file.suffix != ".jsonl":
                while chunk := "".join(lines.readlines(CHUNK)):
                    yield chunk, True
                return
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _document(line, f"{file.name}:{number}", tokenizer)
    except UnicodeDecodeError as error:
        raise RequestError(f"{file} is no UTF-8 text: {error}") from error


def _document(line: str, where: str, tokenizer: PreTrainedTokenizerBase) -> Document:
    try:
        found: Any = json.loads(line)
    except ValueError as error:
        raise RequestError(f"{where} is no valid JSON: {error}") from error
    match found:
        case {"text": str() as text}:
            return text, True
        case {"messages": list() as messages} if tokenizer.chat_template is not None:
            return str(tokenizer.apply_chat_template(messages, tokenize=False)), False
        case {"messages": _}:
            raise RequestError(f"{where} holds messages, but this model's tokenizer has no chat template")
    raise RequestError(f'{where}: expected an object with "text" or "messages"')

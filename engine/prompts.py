"""Prompts in any of the accepted forms -> token ids, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from .errors import RequestError

Chat = Sequence[Mapping[str, Any]]
Prompts = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]] | Chat | Sequence[Chat]


def encode_prompts(
    prompts: Any, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, max_position: int
) -> list[list[int]]:
    """One prompt or a list: text, token ids, or chat messages (dicts with role and content)."""
    encoded = [_encode(prompt, tokenizer) for prompt in _as_list(prompts)]
    if not encoded:
        raise RequestError("an empty batch: give at least one prompt")
    for index, ids in enumerate(encoded):
        _check(index, ids, vocab_size, max_position)
    return encoded


def _as_list(prompts: Any) -> list[Any]:
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        return [prompts]
    if prompts and isinstance(prompts[0], int | Mapping):
        return [prompts]
    return list(prompts)


def _encode(prompt: Any, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    if isinstance(prompt, Sequence) and not isinstance(prompt, str) and all(type(t) is int for t in prompt):
        return list(prompt)
    chat = isinstance(prompt, Sequence) and not isinstance(prompt, str) and all(isinstance(m, Mapping) for m in prompt)
    if not chat and not isinstance(prompt, str):
        raise RequestError(
            f"a prompt is text, a list of token ids or a list of chat messages, got {type(prompt).__name__}"
        )
    if tokenizer is None:
        raise RequestError("this model folder has no tokenizer: give prompts as lists of token ids")
    if isinstance(prompt, str):
        return list(tokenizer(prompt).input_ids)
    if tokenizer.chat_template is None:
        raise RequestError("this model's tokenizer has no chat template: give text or token ids")
    messages: Any = prompt
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(str(text), add_special_tokens=False).input_ids)


def _check(index: int, ids: list[int], vocab_size: int, max_position: int) -> None:
    if not ids:
        raise RequestError(f"prompt {index} is empty: give at least one token")
    if len(ids) >= max_position:
        raise RequestError(
            f"prompt {index} has {len(ids)} tokens, but the model's context is {max_position}: at most "
            f"{max_position - 1} leave room for a new token"
        )
    wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise RequestError(f"prompt {index} holds token id {wrong}, but the vocabulary is 0..{vocab_size - 1}")

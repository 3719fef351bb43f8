"""Model families: one file each. A family is a module with `ARCHITECTURES` and `read_config`."""

from __future__ import annotations

from ....quant import UnsupportedError
from ..decoder_config import Family
from . import (
    deepseek_v3,
    gemma2,
    gemma3,
    glm4_moe,
    gpt_oss,
    llama,
    mistral,
    mixtral,
    olmoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)

FAMILIES: tuple[Family, ...] = (
    deepseek_v3,
    gemma2,
    gemma3,
    glm4_moe,
    gpt_oss,
    llama,
    mistral,
    mixtral,
    olmoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)


def find_family(architectures: list[str]) -> Family:
    """The family of a config.json's `architectures`."""
    for family in FAMILIES:
        if set(architectures) & set(family.ARCHITECTURES):
            return family
    known = ", ".join(name for family in FAMILIES for name in family.ARCHITECTURES)
    raise UnsupportedError(f"architecture {', '.join(architectures) or '(none named)'}", [f"known: {known}"])

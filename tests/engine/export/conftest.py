"""A BF16 fixture with a tokenizer, and texts to calibrate on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def write_tokenizer(folder: Path, size: int = 512) -> None:
    """`w0 w1 ...` are the token ids; a chat is its words after w1."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", pad_token="w0")
    fast.chat_template = "{% for m in messages %}w1 {{ m['content'] }} {% endfor %}"
    fast.save_pretrained(folder)


@pytest.fixture(scope="session")
def bf16_folder(modelopt_folder, tmp_path_factory) -> Callable[[str], Path]:
    """`qwen3` or `qwen3_moe` in BF16, with a tokenizer."""
    root = tmp_path_factory.mktemp("bf16")

    def make(model: str) -> Path:
        folder = root / model
        if not folder.exists():
            shutil.copytree(modelopt_folder(model, "bf16"), folder)
            write_tokenizer(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def calibration_ids() -> list[int]:
    """400 token ids, other ones than the expected logits are over."""
    return torch.randint(3, 512, (400,), generator=torch.Generator().manual_seed(7)).tolist()


@pytest.fixture(scope="session")
def texts(tmp_path_factory, calibration_ids) -> Path:
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    words = [f"w{token}" for token in calibration_ids]
    file.write_text("\n".join(" ".join(words[i : i + 10]) for i in range(0, len(words), 10)))
    return file

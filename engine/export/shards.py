"""Tensors -> safetensors files of bounded size, with an index where there are several."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

STEM, DIFFUSERS_STEM = "model", "diffusion_pytorch_model"


class ShardWriter:
    """Collects tensors and writes a file whenever the next one would pass `max_bytes`; holds one file's at most.

    `stem`: what the files are called, as transformers ("model") or diffusers does.
    """

    def __init__(self, folder: Path, max_bytes: int, stem: str = STEM) -> None:
        self.folder, self.max_bytes, self.stem = folder, max_bytes, stem
        self.pending: dict[str, Tensor] = {}
        self.pending_bytes = self.total_bytes = 0
        self.files: list[list[str]] = []  # the names of each file's tensors

    def add(self, name: str, value: Tensor) -> None:
        """Take one tensor; the value is copied where it is a part of a larger one."""
        if self.pending and self.pending_bytes + value.nbytes > self.max_bytes:
            self._flush()
        whole = value.untyped_storage().nbytes() == value.nbytes and value.is_contiguous()
        self.pending[name] = value if whole else value.clone().contiguous()
        self.pending_bytes += value.nbytes
        self.total_bytes += value.nbytes

    def close(self) -> int:
        """Write what is left, name the files; returns their number."""
        self._flush()
        count = len(self.files)
        names = [f"{self.stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        if count == 1:
            names = [f"{self.stem}.safetensors"]
        for number, name in enumerate(names):
            self._part(number).rename(self.folder / name)
        if count > 1:
            listed = {tensor: file for file, tensors in zip(names, self.files, strict=True) for tensor in tensors}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(listed.items()))}
            (self.folder / f"{self.stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        return count

    def _flush(self) -> None:
        if self.pending:
            part = self._part(len(self.files))
            save_file(self.pending, part, metadata={"format": "pt"})
            part.chmod(0o644)  # safetensors hides its files from other readers
            self.files.append(list(self.pending))
            self.pending, self.pending_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number}.safetensors"

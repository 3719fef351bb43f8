"""ModelOpt's tiny exports, the BF16 weights they were made from, and what an engine over them serves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rollmill.engine import DiffusionEngine, EngineConfig

DIT = Path(__file__).parents[3] / "data" / "dit"
WEIGHTS = "diffusion_pytorch_model.safetensors"
Weights = dict[str, Tensor]


@pytest.fixture(params=["flux1", "wan"])
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["fp8", "nvfp4"])
def quant(request: pytest.FixtureRequest) -> str:
    return request.param


def folder_of(model: str, form: str = "bf16") -> Path:
    return DIT / f"{model}-{form}" / "transformer"


@pytest.fixture
def dit() -> Callable[..., Path]:
    """`dit("flux1", "fp8")`: a folder of a transformer; BF16 by default."""
    return folder_of


@pytest.fixture
def weights_of() -> Callable[..., Weights]:
    """Its tensors."""
    return lambda model, form="bf16": load_file(folder_of(model, form) / WEIGHTS)


@pytest.fixture
def other_weights(weights_of: Callable[..., Weights]) -> Callable[..., Weights]:
    """The BF16 weights after a step of training: every tensor differs, in its own dtype."""

    def make(model: str, seed: int = 5) -> Weights:
        generator = torch.Generator().manual_seed(seed)
        weights = weights_of(model)
        return {
            name: (
                w.float()
                + 0.1 * w.float().std().nan_to_num(1.0).clamp(min=0.01) * torch.randn(w.shape, generator=generator)
            ).to(w.dtype)
            for name, w in weights.items()
        }

    return make


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Write weights as a transformer folder with the config of `model`."""

    def write(model: str, weights: Weights, name: str = "saved") -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        shutil.copy(folder_of(model) / "config.json", folder)
        save_file({key: value.contiguous() for key, value in weights.items()}, folder / WEIGHTS, {"format": "pt"})
        return folder

    return write


@pytest.fixture
def open_engine() -> Iterator[Callable[..., DiffusionEngine]]:
    """`open_engine(folder, quant="fp8")`; closed at the end."""
    opened: list[DiffusionEngine] = []

    def make(folder: Path, **settings: Any) -> DiffusionEngine:
        opened.append(DiffusionEngine(folder, EngineConfig(device="cpu", **settings)))
        return opened[-1]

    yield make
    for engine in opened:
        engine.close()


@pytest.fixture
def stored() -> Callable[[DiffusionEngine], dict[str, Tensor]]:
    """What an engine over `linear_kernel="reference"` serves, whose packed tensors are the stored ones, by the names
    and in the shapes of the file."""

    def read(engine: DiffusionEngine) -> dict[str, Tensor]:
        assert engine.config.linear_kernel == "reference"
        found: dict[str, Tensor] = {}
        for slot in engine._policy.plan.addressed:
            if slot.scheme.name == "bf16":
                continue
            for shard, module in enumerate(slot.modules[0]):
                for key, value in slot.tensors.items():
                    if key.startswith(f"{shard}."):
                        name = f"{module.partition('.')[2]}.{key.partition('.')[2]}"
                        found[name] = (
                            value.reshape(())
                            if key.endswith(("_scale_2", "input_scale")) or value.numel() == 1
                            else value
                        )
        return found

    return read


def packed_bytes(engine: DiffusionEngine) -> dict[str, bytes]:
    """Every served byte by slot and tensor; of clones, since torch does not free what numpy has seen."""
    return {
        f"{slot.name}/{next(iter(slot.matrices))}/{key}": t.clone()
        .contiguous()
        .view(-1)
        .view(torch.uint8)
        .numpy()
        .tobytes()
        for slot in engine._policy.plan.slots
        for key, t in [*slot.tensors.items(), *slot.scales.items()]
    }


@pytest.fixture
def snapshot() -> Callable[[DiffusionEngine], dict[str, bytes]]:
    return packed_bytes


@pytest.fixture
def addresses() -> Callable[[DiffusionEngine], list[int]]:
    """Of everything that kernels and modules read."""

    def read(engine: DiffusionEngine) -> list[int]:
        slots = [
            t.data_ptr() for slot in engine._policy.plan.slots for t in [*slot.tensors.values(), *slot.scales.values()]
        ]
        modules = [t.data_ptr() for one in engine.transformers.values() for t in one.module.parameters()]
        return slots + modules

    return read


def inputs_of(model: str) -> dict[str, Tensor]:
    io = load_file(folder_of(model).parent / "io.safetensors")
    return {name.removeprefix("in."): value for name, value in io.items() if name.startswith("in.")}


@pytest.fixture
def forward() -> Callable[..., Tensor]:
    """One forward of an engine's transformer over the fixture's inputs, in the engine's dtype."""

    def run(
        engine: DiffusionEngine, model: str, component: str = "transformer", precision: str = "quantized"
    ) -> Tensor:
        transformer = engine.transformers[component]
        inputs = {
            name: value.to(transformer.dtype) if value.is_floating_point() and name != "timestep" else value
            for name, value in inputs_of(model).items()
        }
        with torch.no_grad(), transformer.switch.at(precision):
            return transformer.module(**inputs, return_dict=False)[0]

    return run


@pytest.fixture
def unchanged(snapshot: Any, forward: Any) -> Callable[..., Callable[[], None]]:
    """Checks that an engine serves what it served when this was made: bytes, digest, version and outputs."""

    def watch(engine: DiffusionEngine, model: str) -> Callable[[], None]:
        before = snapshot(engine), engine.digest(), engine.weight_version
        output = forward(engine, model)

        def check() -> None:
            assert (snapshot(engine), engine.digest(), engine.weight_version) == before
            assert torch.equal(forward(engine, model), output)
            assert engine._policy.open_version is None

        return check

    return watch


@pytest.fixture
def two_transformers(tmp_path: Path, weights_of: Any, other_weights: Any, save: Any) -> Path:
    """A folder as Wan 2.2's: a transformer for high noise and another one for low noise, no other component."""
    folder = tmp_path / "pipeline"
    save("wan", weights_of("wan"), "pipeline/transformer")
    save("wan", other_weights("wan", seed=9), "pipeline/transformer_2")
    kinds = {name: ["diffusers", "WanTransformer3DModel"] for name in ("transformer", "transformer_2")}
    index = {"_class_name": "WanPipeline", "_diffusers_version": "0.42.1", "boundary_ratio": 0.9, **kinds}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder

"""`rollmill inspect --kernels`: which kernel serves what on which GPU, and why no other."""

from __future__ import annotations

import json

import pytest
import torch

from rollmill.engine import EngineConfig
from rollmill.engine.cli import main
from rollmill.engine.kernel_table import kernel_table
from rollmill.moe import MOE_RUNNERS
from rollmill.quant import LINEAR_KERNELS, Capability
from rollmill.quant.flashinfer_api.library import FlashInfer

NEW = FlashInfer("0.7.2", True, True, True, True, True)
OLD = FlashInfer("0.6.11", False, False, False, False, False)


def on(sm, flashinfer=None):
    return Capability(torch.device("meta"), sm, ("triton",), flashinfer)


def taken(rows):
    """(scheme, activations, kind) -> the kernel that serves."""
    return {(row.scheme, row.activation, len(row.shape)): row.kernel for row in rows if row.verdict == "taken"}


@pytest.mark.parametrize(
    ("capability", "static", "per_token", "experts"),
    [
        (on(100, NEW), "flashinfer_trtllm", "flashinfer_cute_dsl", "flashinfer_trtllm_routed"),
        (on(103, OLD), "flashinfer_trtllm", "exact", "flashinfer_trtllm_routed"),
        (on(120, NEW), "flashinfer_auto", "exact", "reference"),
        (on(100), "exact", "exact", "reference"),
    ],
    ids=["b200", "b300_older_library", "consumer", "no_library"],
)
def test_usual_shapes(capability, static, per_token, experts):
    rows = kernel_table(None, EngineConfig(), capability)
    found = taken(rows)
    assert found["nvfp4", "static", 2] == static
    assert found["nvfp4", "per_token", 2] == per_token
    assert found["nvfp4", "per_token", 3] == experts
    linears = [row for row in rows if (row.scheme, row.activation, len(row.shape)) == ("nvfp4", "static", 2)]
    assert [row.kernel for row in linears] == [kernel.name for kernel in LINEAR_KERNELS]
    assert all(row.verdict for row in rows)


def test_every_scheme_is_served_once_everywhere():
    for sm in (89, 90, 100, 103, 110, 120):
        rows = kernel_table(None, EngineConfig(), on(sm, NEW))
        for kind in {(row.scheme, row.activation, row.shape) for row in rows}:
            alike = [row for row in rows if (row.scheme, row.activation, row.shape) == kind]
            assert sum(row.verdict == "taken" for row in alike) == 1, (sm, kind)


def test_a_linear_kernel_by_name_computes_the_experts_too():
    found = taken(kernel_table(None, EngineConfig(linear_kernel="exact"), on(90)))
    assert found["fp8", "per_token", 2] == "exact"
    assert found["fp8", "per_token", 3] == "reference"
    both = EngineConfig(linear_kernel="exact", moe_runner="triton")
    assert taken(kernel_table(None, both, on(90)))["fp8", "per_token", 3] == "triton"


def test_a_models_layers(modelopt_folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    folder = str(modelopt_folder("qwen3_moe", "nvfp4"))
    assert main(["inspect", folder, "--kernels", "--sm", "100", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    shapes = {tuple(row["shape"]): row["layers"] for row in rows}
    assert shapes == {(256, 128): 2, (128, 128): 2, (8, 128, 96): 2}
    experts = [row["kernel"] for row in rows if len(row["shape"]) == 3]
    assert experts == [runner.name for runner in MOE_RUNNERS]
    assert main(["inspect", folder, "--kernels", "--sm", "100"]) == 0
    printed = capsys.readouterr().out
    assert "[8, 128, 96]" in printed
    assert "sm100, BF16 arithmetic" in printed


def test_a_diffusion_models_layers(capsys):
    from pathlib import Path

    folder = Path(__file__).parents[2] / "data" / "dit" / "wan-nvfp4" / "transformer"
    assert main(["inspect", str(folder), "--kernels", "--sm", "90", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["scheme"] for row in rows} == {"nvfp4"}
    assert {row["activation"] for row in rows} == {"static"}


def test_what_a_bf16_model_would_be(modelopt_folder, capsys):
    arguments = ["--kernels", "--sm", "90", "--quant", "fp8", "--activation", "per_token", "--json"]
    assert main(["inspect", str(modelopt_folder("qwen3", "bf16")), *arguments]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["kernel"] for row in rows if row["verdict"] == "taken"} == {"triton_fp8"}


def test_nothing_to_inspect(capsys):
    assert main(["inspect"]) == 2
    assert "--kernels" in capsys.readouterr().err

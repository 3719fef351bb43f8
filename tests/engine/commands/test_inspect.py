"""`rollmill inspect`: a table for people, everything as JSON."""

from __future__ import annotations

import json

import pytest

from rollmill.engine.cli import main


@pytest.mark.parametrize("export", ["bf16", "fp8", "nvfp4_kvfp8"])
def test_modules_that_differ_in_numbers_share_a_row(export, modelopt_folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["inspect", str(modelopt_folder("qwen3_moe", export))]) == 0
    printed = capsys.readouterr().out
    (row,) = [line for line in printed.splitlines() if "mlp.experts.0-7.down_proj" in line]
    cells = [cell.strip() for cell in row.split("│")[1:-1]]
    assert cells[:3] == ["model.layers.0-1.mlp.experts.0-7.down_proj", "16", export.removesuffix("_kvfp8")]
    layout = {"bf16": "BF16 [128, 96]", "fp8": "F8_E4M3 [128, 96]", "nvfp4_kvfp8": "U8 [128, 48]"}[export]
    assert cells[3] == f"weight {layout}"
    assert ("kept: lm_head, model.embed_tokens, model.layers.0-1.mlp.gate" in printed) == (export != "bf16")
    assert ("KV cache fp8" in printed) == export.endswith("kvfp8")


def test_json_holds_every_module(modelopt_folder, capsys):
    assert main(["inspect", str(modelopt_folder("qwen3", "nvfp4")), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    modules = {module["name"]: module for module in found["modules"]}
    down = modules["model.layers.1.mlp.down_proj"]
    assert down["scheme"] == "nvfp4"
    assert down["tensors"]["weight_scale"] == {"dtype": "F8_E4M3", "shape": [128, 16], "bytes": 2048}
    assert down["bytes"] == 128 * 128 + 2048 + 4 + 4
    assert found["totals"]["nvfp4"]["modules"] == found["totals"]["nvfp4"]["static"] == 14
    assert found["bytes"] == sum(total["bytes"] for total in found["totals"].values())


def test_no_model_is_one_paragraph(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err

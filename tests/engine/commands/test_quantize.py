"""`rollmill quantize`: what it prints, and how it fails."""

from __future__ import annotations

import json
import shutil

import pytest

from rollmill.engine.cli import main


@pytest.fixture
def bf16(modelopt_folder):
    return str(modelopt_folder("qwen3_moe", "bf16"))


def test_says_that_no_scale_was_written(bf16, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["quantize", bf16, "--quant", "nvfp4", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "no input_scale was written" in printed
    assert "56 modules; 4 kept in BF16" in printed


def test_help_says_so_too(capsys):
    with pytest.raises(SystemExit):
        main(["quantize", "--help"])
    assert "without, no input_scale is written" in " ".join(capsys.readouterr().out.split())


def test_calibrated_as_json(bf16, tmp_path, capsys):
    """The model's own tokens as a tokenizer gives them: see tests/engine/export for the scales themselves."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    shutil.copytree(bf16, tmp_path / "in")
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(512)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(tmp_path / "in")
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": f"w{i} w{i + 1} w{i + 2}"}) for i in range(40)))
    command = ["quantize", str(tmp_path / "in"), "--quant", "fp8", "--keep", "lm_head", "--keep", "*.o_proj"]
    sizes = ["--tokens-per-sequence", "16", "--sequences", "5"]
    out = ["--calibrate", str(texts), *sizes, "--out", str(tmp_path / "out"), "--json"]
    assert main([*command, *out]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["activation"], report["calibration_sequences"], report["calibration_tokens"]) == ("static", 5, 80)
    assert "model.layers.0.self_attn.o_proj" in report["kept"]
    assert report["modules"] == 54


def test_patterns_that_match_nothing_are_named(bf16, tmp_path, capsys):
    command = ["quantize", bf16, "--quant", "fp8", "--keep", "*.nothing", "--out", str(tmp_path / "out"), "--json"]
    assert main(command) == 0
    assert any("*.nothing" in warning for warning in json.loads(capsys.readouterr().out)["warnings"])


def test_errors_are_one_paragraph(bf16, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main(["quantize", bf16, "--quant", "fp8", "--out", str(tmp_path / "full")]) == 2
    error = capsys.readouterr().err
    assert "not empty" in error
    assert "Traceback" not in error

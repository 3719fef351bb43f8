"""`rollmill bench`: rates and where the time goes."""

from __future__ import annotations

import json

import pytest

from rollmill.engine.cli import main


def test_bench_prints_rates_and_shares(hf_model, save, capsys):
    folder = save(hf_model("qwen3_moe"))
    sizes = ["--prompts", "3", "--prompt-tokens", "5", "--new-tokens", "4", "--repeats", "1"]
    assert main(["bench", str(folder), "--quant", "fp8", *sizes, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["decode_tokens_per_second"] > 0
    assert found["decode_step_ms"] == pytest.approx(3e3 / found["decode_tokens_per_second"], rel=1e-6)
    assert 0 < sum(found["operations"].values()) <= 1 + 1e-9
    assert main(["bench", str(folder), *sizes]) == 0
    assert "share of the time" in capsys.readouterr().out

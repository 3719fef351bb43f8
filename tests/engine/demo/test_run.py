"""The whole demo on a tiny model: a history, a page that stands alone, and KL that means what it says."""

from __future__ import annotations

import io
import re

import msgspec
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from rollmill.engine import ConfigError, Engine, EngineConfig
from rollmill.engine.demo.config import DemoConfig
from rollmill.engine.demo.divergence import token_kl
from rollmill.engine.demo.run import run_demo
from rollmill.engine.demo.static_scales import calibrate, write_static_folder
from rollmill.engine.demo.trainer import GrpoTrainer, TrainerConfig
from rollmill.engine.report import History


@pytest.mark.parametrize("quant", ["nvfp4", "fp8"])
def test_demo_writes_a_history_and_a_report(quant, tiny_folder, tmp_path):
    config = DemoConfig(quant=quant, steps=2, prompts=2, samples=4, max_new_tokens=6, trainer=TrainerConfig(layers=1))
    output = io.StringIO()
    history = run_demo(tiny_folder, config, out=tmp_path, console=Console(file=output, width=300))
    assert [step.version for step in history.steps][1:] == ["1"]
    assert all(step.kl > 0 and step.kl_static is not None for step in history.steps)
    assert msgspec.json.decode((tmp_path / "history.json").read_bytes(), type=History) == history
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 5
    assert not re.search(r"(src|href)=|@import|url\(|\$[a-z]", page)
    assert "report.html" in output.getvalue()


@pytest.mark.parametrize("shard_size", ["50GB", "200KB"])
def test_static_scales_reach_the_engine(shard_size, tiny_folder, tmp_path):
    trainer = GrpoTrainer(tiny_folder, TrainerConfig(layers=1))
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny_folder).save_pretrained(sharded, max_shard_size=shard_size)
    amax = calibrate(trainer.model, [list(range(40)), [5, 6, 7]])
    write_static_folder(sharded, tmp_path / "static", amax, "nvfp4", trainer.num_experts)
    with Engine(tmp_path / "static", EngineConfig(quant="nvfp4", activation="static")) as engine:
        assert engine.info()["activation"] == ["static"]
        assert engine.load_report.warnings == ()
        theirs = engine.logits([list(range(40))])[0]
    mine = trainer.logits(list(range(40)))
    assert token_kl(mine, theirs).mean() < 0.1


def test_kl_of_equal_distributions_is_zero():
    logits = torch.randn(3, 7)
    assert token_kl(logits, logits + 2).abs().max() < 1e-6
    assert token_kl(logits, logits.flip(1)).min() > 0


def test_a_group_of_one_is_refused():
    with pytest.raises(ConfigError, match="samples >= 2"):
        DemoConfig(samples=1)

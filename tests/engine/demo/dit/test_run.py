"""The whole demo after a few iterations of training: a history, and a page that shows what it says."""

from __future__ import annotations

import base64
import io
import re

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from rollmill.engine import ConfigError
from rollmill.engine.cli import main
from rollmill.engine.demo.dit import run as dit_run
from rollmill.engine.demo.dit.config import DitDemoConfig
from rollmill.engine.demo.dit.judge import Judge
from rollmill.engine.report.dit import DitHistory

HEADINGS = (
    "Reward",
    "Log-probs of rollouts and trainer, by training step",
    "Log-probs by denoising step",
    "Rewards, quantized against BF16",
    "Swaps",
    "Time by step",
    "Set-up",
    "Steps",
    "BF16, and quantized from the same noise",
    "Denoising, step by step",
    "Images, sorted by reward",
)


@pytest.fixture(scope="module", params=["nvfp4", "fp8"])
def done(request, digits_cache, digits_folder, small, tmp_path_factory):
    """(history, folder of the report, what was printed)."""
    out, output = tmp_path_factory.mktemp(request.param), io.StringIO()
    config = msgspec.structs.replace(small, quant=request.param)
    history = dit_run.run_dit_demo(config, out=out, cache=digits_cache, console=Console(file=output, width=300))
    return history, out, output.getvalue()


def test_history_tells_every_step(done):
    history, out, printed = done
    assert [step.version for step in history.steps] == ["initial", "1"]
    assert all(len(step.logprob_gap) == 3 and min(step.logprob_gap) > 0 for step in history.steps)
    assert history.steps[0].kl == 0 < history.steps[1].kl
    assert msgspec.json.decode((out / "history.json").read_bytes(), type=DitHistory) == history
    assert f"Report: {out / 'report.html'}" in printed
    assert "step 1  version 1" in printed


def test_before_and_after_share_the_noise_and_differ(done):
    history, _, _ = done
    assert [one.digit for one in history.before] == [one.digit for one in history.after]
    assert len(history.after) == 20
    assert any(old.pixels != new.pixels for old, new in zip(history.before, history.after, strict=True))


def test_comparison_holds_every_format_and_the_demos_own_images(done):
    history, _, _ = done
    formats = {one.name: one for one in history.comparison.formats}
    assert list(formats) == ["FP8", "NVFP4"]
    assert formats[history.quant.upper()].pictures == history.after
    assert all(len(one.psnr) == 20 and min(one.logprob_gap) > 0 for one in formats.values())
    assert np.median(formats["FP8"].psnr) > np.median(formats["NVFP4"].psnr) > 15


def test_page_stands_alone_and_has_every_part(done):
    _, out, _ = done
    page = (out / "report.html").read_text()
    assert re.findall(r"<h2>(.*?)</h2>", page) == list(HEADINGS)
    assert page.count("<svg") == 6
    assert not re.search(r"href=|@import|url\(|\$[a-z]|src=\"(?!data:)", page)


def test_rewards_are_what_the_pictures_say(done):
    _, out, _ = done
    page = (out / "report.html").read_text()
    shown = re.findall(r'base64,([^"]+)" alt="(\d): rank (\d), reward ([\d.]+)"', page)
    assert len(shown) == 40  # before and after
    ink = torch.tensor(np.stack([read_ink(data) for data, *_ in shown])).float()
    digits = torch.tensor([int(digit) for _, digit, _, _ in shown])
    rewards = Judge().rewards(ink, digits)
    printed = torch.tensor([float(reward) for *_, reward in shown])
    torch.testing.assert_close(rewards, printed, atol=6e-4, rtol=0)
    ranked = printed.view(20, 2)  # two of every digit, the better one first
    assert (ranked[:, 0] >= ranked[:, 1]).all()
    assert [int(rank) for _, _, rank, _ in shown] == [1, 2] * 20


def read_ink(data: str) -> np.ndarray:
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (image.mode, image.size) == ("L", (8, 8))
    return 1 - np.asarray(image) / 255


def test_strips_mark_their_windows(done):
    history, out, _ = done
    assert [strip.window for strip in history.strips] == [(0, 3), (0, 3), (0, 2), (0, 2)]
    assert history.strips[2].precisions == ["bf16", "bf16", history.quant]
    assert (out / "report.html").read_text().count('<td class="drawn">') == 3 + 3 + 2 + 2


def test_threads_are_given_back(digits_cache, digits_folder, small, tmp_path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        config = msgspec.structs.replace(small, steps=1, compared=1)
        dit_run.run_dit_demo(config, out=tmp_path, cache=digits_cache, console=Console(file=io.StringIO()))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_command_line_reaches_the_demo(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(dit_run, "run_dit_demo", lambda config, **places: asked.append((config, places["out"])))
    command = ["demo", "dit", "--steps", "3", "--seed", "5", "--quant", "fp8", "--out", str(tmp_path)]
    assert main(command) == 0
    assert main(["demo", "dit", "--out", str(tmp_path)]) == 0
    assert asked == [(DitDemoConfig(steps=3, seed=5, quant="fp8"), tmp_path), (DitDemoConfig(), tmp_path)]


def test_a_model_of_ones_own_is_refused(capsys, tmp_path):
    assert main(["demo", "dit", "--model", str(tmp_path)]) == 2
    assert "--model is for `demo llm`" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"samples": 1}, {"prompts": 11}, {"denoising_steps": 1}])
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        DitDemoConfig(**wrong)

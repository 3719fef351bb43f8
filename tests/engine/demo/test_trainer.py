"""Log-probs are the model's, updates go uphill, and what is sent is exactly what the trainer computes with."""

from __future__ import annotations

import pytest
import torch

from rollmill.engine.demo.groups import token_advantages
from rollmill.engine.demo.trainer import GrpoTrainer, TrainerConfig
from rollmill.engine.errors import ModelError


@pytest.fixture
def trainer(tiny_folder):
    return GrpoTrainer(tiny_folder, TrainerConfig(layers=1, lr=3e-3))


def test_padding_and_the_shared_prefix_change_nothing(trainer, groups):
    expected = []
    for group in groups:
        for ids in group.completions:
            rows = trainer.logits(group.prompt + ids)[len(group.prompt) - 1 : -1].log_softmax(-1)
            expected.append(rows.gather(1, torch.tensor(ids)[:, None])[:, 0])
    torch.testing.assert_close(trainer.completion_logprobs(groups).detach(), torch.cat(expected), atol=1e-5, rtol=0)


def test_a_step_makes_rewarded_tokens_likelier(trainer, groups):
    better = torch.cat([token_advantages(group) for group in groups]) > 0
    before = trainer.step(groups).logprobs
    with torch.no_grad():
        change = trainer.completion_logprobs(groups) - before
    assert change[better].mean() > 0 > change[~better].mean()


def test_equal_rewards_teach_nothing(trainer, groups):
    same = [type(g)(g.prompt, g.completions, g.logprobs, [0.5, 0.5]) for g in groups]
    before = dict(trainer.weights())
    trainer.step(same)
    assert all(torch.equal(before[name], weight) for name, weight in trainer.weights())


def test_sent_weights_are_exact_and_only_the_last_layer_moves(trainer, groups):
    before = dict(trainer.weights())
    trainer.step(groups)
    after = dict(trainer.weights())
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved == {name for name in after if name.startswith("model.layers.2.") and ("_proj" in name)}
    held = dict(trainer.model.named_parameters())
    assert all(weight.dtype == torch.bfloat16 and torch.equal(weight.float(), held[n]) for n, weight in after.items())


def test_ratios_are_truncated(trainer, groups):
    far = [type(g)(g.prompt, g.completions, [lp - 20 for lp in g.logprobs], g.rewards) for g in groups]
    metrics = trainer.step(far)
    assert metrics.truncated == 1.0
    assert metrics.grad_norm < 100


def test_other_architectures_are_refused(modelopt_folder):
    with pytest.raises(ModelError, match="Qwen3"):
        GrpoTrainer(modelopt_folder("qwen3", "bf16"), TrainerConfig())

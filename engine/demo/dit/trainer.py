"""The demo's trainer: Flow-GRPO on diffusers' own model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from .trajectories import Trajectories, step_logprobs, step_mean


class FlowGrpoConfig(msgspec.Struct, frozen=True):
    """One optimizer step."""

    lr: float = 1e-4
    clip: float = 1e-2  # of the ratio of log-probs that are means over a latent's elements
    kl: float = 0.01
    max_advantage: float = 5.0
    max_grad_norm: float = 1.0


class StepMetrics(msgspec.Struct, frozen=True):
    """What one optimizer step saw."""

    kl: float  # to the model before training: mean squared distance of means, in units of 2 std^2
    grad_norm: float
    logprobs: Tensor  # of the rollouts' trajectories under the trainer's weights before the step, f32 [samples, steps]


class FlowGrpoTrainer:
    """A FLUX transformer with fp32 masters; its weights are always exact BF16 values, its arithmetic is float32.

    The policy that is trained is the policy that is sent. The ratio is taken to log-probs of the trainer's own, never
    to those of the quantized rollouts: their difference would pass for a change of policy.
    """

    def __init__(self, folder: Path, config: FlowGrpoConfig) -> None:
        self.config = config
        self.model, self.reference = load_flux(folder), load_flux(folder).requires_grad_(False)
        self.parameters = [parameter for _, parameter in self.model.named_parameters()]
        self.masters = [parameter.detach().clone() for parameter in self.parameters]
        self.optimizer = torch.optim.AdamW(self.masters, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter, by its name in this process, in BF16 (an exact cast)."""
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach().to(torch.bfloat16)

    def describe(self) -> str:
        """What is trained, in words."""
        return f"all of {sum(master.numel() for master in self.masters) / 1e6:.1f} M parameters"

    def step(self, found: Trajectories, rewards: Tensor, old: Tensor | None = None) -> StepMetrics:
        """One optimizer step over all steps of all trajectories; `rewards` float32 [samples].

        `old`: log-probs [samples, steps] that the ratio is taken to, for trajectories that are used again; None: this
        model's own, so that the ratio of fresh rollouts is 1 and nothing is clipped.
        """
        advantages = group_advantages(rewards, found.group).clamp(-self.config.max_advantage, self.config.max_advantage)
        steps = range(len(found.steps))
        parts = [
            self._backward(found, step, advantages, None if old is None else old[:, step], 1 / len(steps))
            for step in steps
        ]
        return StepMetrics(
            kl=sum(kl for _, kl in parts) / len(parts),
            grad_norm=self._apply_gradients(),
            logprobs=torch.stack([logprobs for logprobs, _ in parts], 1),
        )

    def _backward(
        self, found: Trajectories, step: int, advantages: Tensor, old: Tensor | None, share: float
    ) -> tuple[Tensor, float]:
        """Adds the gradient of one denoising step; returns its log-probs [samples] and its KL."""
        with torch.no_grad():
            reference = step_mean(self.reference, found, step)
        mean = step_mean(self.model, found, step)
        logprobs = step_logprobs(found, step, mean)
        ratio = (logprobs - (logprobs.detach() if old is None else old)).exp()
        gain = clipped_gain(ratio, advantages, self.config.clip).mean()
        kl = step_kl(mean, reference, found.steps[step].std).mean()
        ((self.config.kl * kl - gain) * share).backward()
        return logprobs.detach(), kl.item()

    def _apply_gradients(self) -> float:
        """Clip, step the masters, round them into the model; returns the gradient's norm before the clip."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            master.grad, parameter.grad = parameter.grad, None
        self.optimizer.step()
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            parameter.data.copy_(master.to(torch.bfloat16))
        return norm.item()


def load_flux(folder: Path) -> Any:
    """diffusers' own model in float32, from a folder of BF16 weights."""
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    return FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32).eval()


def group_advantages(rewards: Tensor, group: int) -> Tensor:
    """(reward - group mean) / group deviation, float32 [samples]; 0 in a group of equals."""
    groups = rewards.unflatten(0, (-1, group))
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, correction=0, keepdim=True) + 1e-4)).flatten()


def clipped_gain(ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """PPO's min(ratio A, clip(ratio) A), all [samples]."""
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def step_kl(mean: Tensor, reference: Tensor, std: float) -> Tensor:
    """KL of two normals with one std, as a mean over elements: (mean - reference)^2 / 2 std^2, float32 [samples]."""
    return (mean - reference).square().flatten(1).mean(1) / (2 * std**2)

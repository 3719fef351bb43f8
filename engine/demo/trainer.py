"""A small GRPO trainer in plain torch: what stands on the other side of `engine.update_weights` in the demo."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import Cache

from ..errors import ModelError
from .groups import Group, pad, token_advantages

TRAINED = re.compile(r"model\.layers\.(\d+)\.(self_attn\.[qkvo]_proj|mlp\.experts)\.")


class TrainerConfig(msgspec.Struct, frozen=True):
    """Sizes of one optimizer step."""

    layers: int = 4  # the last so many layers are trained; the rest stays frozen and costs no backward
    lr: float = 3e-4
    max_ratio: float = 3.0  # truncated importance sampling: min(p_trainer / p_rollout, max_ratio)
    max_grad_norm: float = 1.0
    temperature: float = 1.0  # the rollouts' own
    device: str = "auto"  # CUDA where there is one


class StepMetrics(msgspec.Struct, frozen=True):
    """What one optimizer step saw."""

    loss: float
    grad_norm: float
    mean_ratio: float  # of p_trainer / p_rollout over the sampled tokens, before truncation
    truncated: float  # share of tokens whose ratio was above max_ratio
    logprobs: torch.Tensor  # the trainer's, completion after completion, f32 [tokens]


class GrpoTrainer:
    """A causal LM with fp32 masters for its last layers; its weights are always exact BF16 values.

    On a CPU the arithmetic runs in float32 (about three times faster there than bfloat16), on weights rounded to BF16:
    the policy that is trained is the policy that is sent.
    """

    def __init__(self, folder: Path, config: TrainerConfig) -> None:
        check_mixtral(folder)
        self.config = config
        self.device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.model = model.to(self.device).eval()
        first = self.model.config.num_hidden_layers - config.layers
        self.trained: list[torch.nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            found = TRAINED.match(name)
            parameter.requires_grad_(bool(found) and int(found[1]) >= first)
            self.trained += [parameter] if parameter.requires_grad else []
        self.masters = [parameter.detach().float().clone() for parameter in self.trained]
        self.optimizer = torch.optim.AdamW(self.masters, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter, by its name in this process, in BF16 (an exact cast)."""
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach().to(torch.bfloat16)

    @property
    def num_layers(self) -> int:
        return self.model.config.num_hidden_layers

    @property
    def num_experts(self) -> int:
        return self.model.config.num_local_experts

    def describe(self) -> str:
        """What is trained, in words."""
        millions = sum(master.numel() for master in self.masters) / 1e6
        return f"attention and experts of the last {self.config.layers} of {self.num_layers} layers ({millions:.0f} M)"

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """Logits of one sequence before any temperature, f32 [len(token_ids), vocab]."""
        ids = torch.tensor([token_ids], device=self.device)
        return self.model(ids, use_cache=False).logits[0].float().cpu()

    def step(self, groups: list[Group]) -> StepMetrics:
        """One optimizer step over all groups: token-mean policy gradient on group-normalised advantages."""
        rollout = torch.cat([logprobs for group in groups for logprobs in group.logprobs])  # f32 [tokens]
        advantages = torch.cat([token_advantages(group) for group in groups])  # f32 [tokens]
        mine = self.completion_logprobs(groups)
        ratio = (mine.detach().cpu() - rollout).exp()
        weight = ratio.clamp(max=self.config.max_ratio) * advantages
        loss = -(weight.to(mine.device) * mine).mean()
        loss.backward()
        return StepMetrics(
            loss=loss.item(),
            grad_norm=self.apply_gradients(),
            mean_ratio=ratio.mean().item(),
            truncated=(ratio > self.config.max_ratio).float().mean().item(),
            logprobs=mine.detach().cpu(),
        )

    def completion_logprobs(self, groups: list[Group]) -> torch.Tensor:
        """Log-probs of all completion tokens, completion after completion, f32 [sum of lengths].

        A prompt runs once for its whole group. Its last token runs with the completions, whose first token it predicts.
        """
        device = self.device
        prompts, prompt_mask = pad([group.prompt[:-1] for group in groups], left=True)
        completions = [(group.prompt[-1:], ids) for group in groups for ids in group.completions]
        tokens, mask = pad([last + ids for last, ids in completions], left=False)
        copies = len(groups[0].completions)
        _, cache = self.forward(prompts, prompt_mask)
        cache.batch_repeat_interleave(copies)
        seen = torch.cat([prompt_mask.repeat_interleave(copies, 0), mask[:, :-1]], dim=1)
        hidden, _ = self.forward(tokens[:, :-1], seen, cache)
        real = mask[:, 1:].bool()  # [sequences, longest completion]
        targets = tokens[:, 1:][real].to(device)
        # the temperature divides the small hidden states, not the [tokens, vocab] logits: lm_head is linear
        logits = self.model.lm_head(hidden[real.to(device)] / self.config.temperature)
        return -cross_entropy(logits.float(), targets, reduction="none")

    def forward(
        self, tokens: torch.Tensor, seen: torch.Tensor, cache: Cache | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """Hidden states [batch, new, hidden] of `tokens` [batch, new]; `seen` [batch, cached + new] is 0 at padding."""
        positions = (seen.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        device = self.device
        out = self.model.model(
            tokens.to(device),
            attention_mask=seen.to(device),
            position_ids=positions.to(device),
            past_key_values=cache,
            use_cache=True,
        )
        return out.last_hidden_state, out.past_key_values

    def apply_gradients(self) -> float:
        """Clip, step the masters, round them into the model; returns the gradient's norm before the clip."""
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.config.max_grad_norm)
        for master, parameter in zip(self.masters, self.trained, strict=True):
            assert parameter.grad is not None  # experts are fused: one without a token has zeros in a common gradient
            master.grad, parameter.grad = parameter.grad.float(), None
        self.optimizer.step()
        for master, parameter in zip(self.masters, self.trained, strict=True):
            parameter.data.copy_(master.to(torch.bfloat16))
            master.grad = None
        return norm.item()


def check_mixtral(folder: Path) -> None:
    """`ModelError` unless the folder holds a Mixtral, whose parameter names this trainer knows."""
    found = AutoConfig.from_pretrained(folder).architectures or []
    if "MixtralForCausalLM" not in found:
        raise ModelError(f"the demo trains MixtralForCausalLM, {folder} holds {', '.join(found) or 'no model'}")

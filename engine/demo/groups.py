"""What GRPO compares: the samples of one prompt, their advantages, and batches of them."""

import msgspec
import torch


class Group(msgspec.Struct, frozen=True):
    """One prompt's samples: what GRPO compares with each other."""

    prompt: list[int]
    completions: list[list[int]]
    logprobs: list[torch.Tensor]  # of the sampled tokens under the rollout policy, f32 [len(completion)] each
    rewards: list[float]


def token_advantages(group: Group) -> torch.Tensor:
    """(reward - group mean) / group deviation, repeated for each token of its completion, f32 [sum of lengths]."""
    rewards = torch.tensor(group.rewards)
    advantages = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-4)
    return torch.cat([a.expand(len(ids)) for a, ids in zip(advantages, group.completions, strict=True)])


def pad(rows: list[list[int]], *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and a mask of the real ones, both i64 [len(rows), longest]."""
    longest = max(len(row) for row in rows)
    tokens, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        span = slice(longest - len(row), None) if left else slice(len(row))
        tokens[i, span], mask[i, span] = torch.tensor(row), 1
    return tokens, mask

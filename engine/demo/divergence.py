"""How far the rollout policy is from the trainer's, measured exactly on a few sequences."""

import torch
from torch import Tensor

from ..llm.engine import LanguageEngine

Sequences = list[tuple[list[int], int]]  # (prompt + completion, length of the prompt)


def mean_kl(trainer_logits: list[Tensor], engine: LanguageEngine, sequences: Sequences) -> float:
    """Mean KL(trainer || rollout) in nats over the completion tokens, from full logits f32 [len, vocab] each."""
    engine_logits = engine.logits([ids for ids, _ in sequences])
    tokens = [
        token_kl(mine[start - 1 : -1], theirs[start - 1 : -1].cpu())
        for mine, theirs, (_, start) in zip(trainer_logits, engine_logits, sequences, strict=True)
    ]
    return torch.cat(tokens).mean().item()


def token_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) of each row: f32 [tokens, vocab] twice -> f32 [tokens]."""
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)

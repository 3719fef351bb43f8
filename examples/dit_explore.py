"""Explore in FP8, train on BF16: rank a pool of cheap samples, compute the extremes again from the same noise."""

import tempfile
from typing import Any

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

from rollmill.engine import DiffusionEngine, DiffusionParams, Embeds, EngineConfig

CONFIG: dict[str, Any] = {"attention_head_dim": 16, "num_attention_heads": 2, "num_layers": 2, "in_channels": 4}
CONFIG |= {"out_channels": 4, "caption_projection_dim": 32, "joint_attention_dim": 32, "pooled_projection_dim": 32}
policy = SD3Transformer2DModel(**CONFIG).bfloat16()  # or SD3.5 itself
prompts = [Embeds(torch.randn(8, 32), torch.randn(32)) for _ in range(2)]


def reward(samples):
    return [float(sample.latent(sample.params.steps).mean()) for sample in samples]  # or a judge of sample.image


with tempfile.TemporaryDirectory() as folder:
    policy.save_pretrained(folder)
    with DiffusionEngine(folder, EngineConfig(quant="fp8", dual="bf16")) as engine:
        params = DiffusionParams(steps=6, height=32, width=32, want=("latents:final",))
        for found in engine.explore(prompts, reward=reward, pool=16, keep=(2, 2), params=params):
            exact = ", ".join(f"{value:+.3f}" for value in reward(found.samples))
            ranked = ", ".join(f"{found.rewards[i]:+.3f}" for i in (*found.best, *found.worst))
            print(f"2 best and 2 worst of 16: in FP8 {ranked}; in BF16 {exact}")

"""One step of Flow-GRPO: roll out from NVFP4 with a BF16 window, recompute log-probs, train, swap."""

import tempfile
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

from rollmill.engine import DiffusionEngine, DiffusionParams, Embeds, EngineConfig, FlowSDE

CONFIG: dict[str, Any] = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6)}
CONFIG |= {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "guidance_embeds": True}
CONFIG |= {"joint_attention_dim": 32, "pooled_projection_dim": 32}
trainer = FluxTransformer2DModel(**CONFIG).bfloat16()  # or FLUX.1 itself
optimizer = torch.optim.SGD(trainer.parameters(), lr=1e-2)
prompt = Embeds(torch.randn(8, 32), torch.randn(32))  # or text, where the folder is a whole pipeline
params = DiffusionParams(
    steps=6, n=8, height=32, width=32, solver=FlowSDE(noise_level=0.7, window=(1, 3)),
    precision={"window": "bf16", "rest": "nvfp4"}, want=("latents:window", "latents:final", "logprobs"),
)  # fmt: skip

with tempfile.TemporaryDirectory() as folder:
    trainer.save_pretrained(folder)
    with DiffusionEngine(folder, EngineConfig(quant="nvfp4", dual="bf16")) as engine:
        samples = engine.generate(prompt, params)
        rewards = torch.stack([sample.latent(6).mean() for sample in samples])
        advantages = (rewards - rewards.mean()) / rewards.std()
        for sample, advantage in zip(samples, advantages, strict=True):
            assert sample.logprobs is not None  # they were wanted
            for i, old in zip(sample.window, sample.logprobs, strict=True):
                velocity = trainer(**engine.step_inputs([sample], i), return_dict=False)[0][0]
                ratio = torch.exp(sample.step_logprob(i, velocity) - old)
                (-advantage * ratio / len(samples)).backward()
        optimizer.step()
        report = engine.update_weights(trainer.named_parameters(), version="1")
        print(f"mean reward {rewards.mean():.3f}, served: version {report.version}")

"""A trainer and an NVFP4 engine in one process: roll out, train a step, swap."""

import torch
from transformers import AutoModelForCausalLM

from rollmill.engine import Engine, EngineConfig, SamplingParams

FOLDER = "tests/data/llm/qwen3_moe/bf16"  # any Llama, Mixtral, Qwen3 or Qwen3-MoE folder in BF16

trainer = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.bfloat16)
optimizer = torch.optim.SGD(trainer.parameters(), lr=1e-2)

with Engine(FOLDER, EngineConfig(quant="nvfp4")) as engine:
    for step in range(3):
        (out,) = engine.generate([[1, 2, 3]], SamplingParams(max_new_tokens=16, seed=step))
        ids = torch.tensor([out.prompt_token_ids + out.token_ids])
        trainer(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        report = engine.update_weights(trainer.named_parameters(), version=str(step + 1))
        print(f"version {report.version}: {report.layers} layers in {sum(report.seconds.values()):.3f} s")

"""Log-probs of a GPU's rollouts against the exact CPU engine and transformers: mid-size models, random weights.

    python benchmarks/gpu_agreement.py [--quant bf16 fp8 fp8_channel nvfp4_w4a16 nvfp4] [--model moe dense]

The engine draws tokens on the GPU (BF16, CUDA graphs, paged attention) and returns their log-probs. The same tokens are
scored by the CPU engine in float32, which computes a format's own definition exactly (the tests hold it to transformers
with quantized weights and inputs), and by transformers in BF16 with the weights as the trainer has them: that distance
is what a trainer sees, quantization included. A row is the mean |difference| from the CPU engine in nats a token. Its
limit is the bound that we state: where activations stay in BF16, 1.25 times what BF16 costs transformers beside its own
float32; where they are quantized, what the format costs beside the trainer, as a sum rounded otherwise moves a code by
a whole step. Random routers have near ties, so single tokens may take another expert: see the maxima.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from record import Result, make_result, save
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from rollmill.engine import Engine, EngineConfig, SamplingParams

SHAPE: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "initializer_range": 0.04,
    "tie_word_embeddings": False,
}
MODELS = {
    "dense": Qwen3Config(**SHAPE),
    "moe": Qwen3MoeConfig(**SHAPE, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=512),
}
QUANTS = ("bf16", "fp8", "fp8_channel", "nvfp4_w4a16", "nvfp4")
BF16_ACTIVATIONS, ROOM = ("bf16", "nvfp4_w4a16"), 1.25
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 96, 64


def transformers_scores(model: Any, sequences: Sequence[list[int]]) -> list[Tensor]:
    """Log-probs of every token after the first, by transformers on the GPU."""
    scores = []
    for ids in sequences:
        tokens = torch.tensor([ids], device="cuda")
        with torch.no_grad():
            logprobs = model(tokens).logits[0, :-1].float().log_softmax(-1)
        scores.append(logprobs.gather(-1, tokens[0, 1:, None])[:, 0].cpu())
    return scores


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """|difference| of all drawn tokens, which are the last of each sequence."""
    return torch.cat([(mine - other[-len(mine) :]).abs() for mine, other in zip(ours, theirs, strict=True)])


def spread(values: Tensor) -> str:
    return f"mean {values.mean():.1e}, median {values.median():.1e}, max {values.max():.1e}"


def compare(name: str, folder: Path, quant: Any, model: Any) -> list[Result]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = SHAPE["vocab_size"]
    prompts = torch.randint(vocabulary, (PROMPTS, PROMPT_TOKENS), generator=generator).tolist()
    params = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True, seed=1)
    engine: Any = Engine(folder, EngineConfig(quant=quant, device="cuda", kv_cache_tokens=4096))
    with engine:
        outs = engine.generate(prompts, params)
        digest = engine.digest()
    sequences = [prompt + list(out.token_ids) for prompt, out in zip(prompts, outs, strict=True)]
    ours = [torch.tensor(out.logprobs) for out in outs]
    cpu: Any = Engine(folder, EngineConfig(quant=quant, device="cpu", dtype="float32"))
    with cpu:
        assert cpu.digest() == digest
        exact = difference(ours, cpu.score(sequences))
    theirs = transformers_scores(model, sequences)
    trainer = difference(ours, theirs)
    bound = float(trainer.mean())
    note = f"{len(exact)} tokens; beside the CPU engine {spread(exact)}; beside transformers in BF16 {spread(trainer)}"
    if quant in BF16_ACTIVATIONS:
        drawn = [scores[-NEW_TOKENS:] for scores in theirs]
        rounding = difference(drawn, transformers_scores(copy.deepcopy(model).float(), sequences))
        bound = ROOM * float(rounding.mean())
        note += f"; transformers in BF16 beside float32 {spread(rounding)}"
    row = make_result(f"agreement_{name}_{quant}", float(exact.mean()), "nats/token", limit=bound, note=note)
    print(f"{row.name}: {note}; bound {bound:.1e}", flush=True)
    return [row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quant", nargs="+", default=list(QUANTS), choices=QUANTS)
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=list(MODELS))
    arguments = parser.parse_args()
    results = []
    for name in arguments.model:
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder, torch.device("cuda"):
            model = AutoModelForCausalLM.from_config(MODELS[name], dtype=torch.bfloat16).eval()
            model.save_pretrained(folder)
            with torch.device("cpu"):
                for quant in arguments.quant:
                    results += compare(name, Path(folder), quant, model)
    save("gpu_agreement", results)


if __name__ == "__main__":
    main()

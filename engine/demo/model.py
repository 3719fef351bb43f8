"""A real mixture of experts for the demo: SmolLM2-135M upcycled to Mixtral, made once and kept in a cache folder."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from .cached_folder import make_once
from .smollm2 import GGUF_SHA256, fetch_gguf, load_dense

ROUTER_STD = 0.05


def build_model(
    cache: Path,
    log: Callable[[str], None],
    *,
    experts: int = 4,
    top_k: int = 2,
    noise: float = 0.03,
    seed: int = 0,
) -> Path:
    """Folder of the upcycled model (bf16 safetensors, tokenizer, chat template); built at the first call only.

    `noise` is relative to each weight's standard deviation. Every expert is the dense FFN plus noise of its own, and
    Mixtral renormalises its router's weights to 1, so the model speaks as the dense one does while its experts differ.
    """
    recipe = {"experts": experts, "top_k": top_k, "noise": noise, "seed": seed, "gguf_sha256": GGUF_SHA256}
    folder = cache / f"smollm2-moe-{experts}x-top{top_k}-noise{noise:g}-seed{seed}"

    def write(building: Path) -> None:
        dense, tokenizer = load_dense(fetch_gguf(cache, log))
        log(f"upcycling to {experts} experts, top {top_k}")
        model = upcycle(dense, experts=experts, top_k=top_k, noise=noise, seed=seed)
        model.bfloat16().save_pretrained(building)
        tokenizer.save_pretrained(building)

    if make_once(folder, recipe, write):
        log(f"saved {folder}")
    return folder


@torch.no_grad()
def upcycle(dense: LlamaForCausalLM, *, experts: int, top_k: int, noise: float, seed: int) -> MixtralForCausalLM:
    """A Mixtral whose attention, norms and embeddings are `dense`'s and whose experts are noisy copies of its FFN."""
    generator = torch.Generator().manual_seed(seed)
    model = MixtralForCausalLM(mixtral_config(dense.config, experts, top_k)).eval()
    source = dense.state_dict()
    left = model.load_state_dict({name: source[name] for name in source if ".mlp." not in name}, strict=False)
    assert not left.unexpected_keys
    assert all(".mlp." in name for name in left.missing_keys)
    target = dict(model.named_parameters())
    for layer in range(dense.config.num_hidden_layers):
        mlp = f"model.layers.{layer}.mlp"
        gate_up = torch.cat(
            [source[f"{mlp}.{name}_proj.weight"] for name in ("gate", "up")]
        )  # [2 * intermediate, hidden]
        for e in range(experts):
            target[f"{mlp}.experts.gate_up_proj"][e] = with_noise(gate_up, noise, generator)
            target[f"{mlp}.experts.down_proj"][e] = with_noise(source[f"{mlp}.down_proj.weight"], noise, generator)
        router = target[f"{mlp}.gate.weight"]  # [experts, hidden]
        router.copy_(torch.randn(router.shape, generator=generator) * ROUTER_STD)
    return model


def with_noise(weight: torch.Tensor, noise: float, generator: torch.Generator) -> torch.Tensor:
    """`weight` plus Gaussian noise of `noise` times its own standard deviation."""
    return weight + noise * weight.std() * torch.randn(weight.shape, generator=generator)


def mixtral_config(dense: LlamaConfig, experts: int, top_k: int) -> MixtralConfig:
    """The config of a Mixtral with the dense model's sizes."""
    same = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "hidden_act max_position_embeddings rms_norm_eps rope_parameters bos_token_id eos_token_id pad_token_id"
    )
    return MixtralConfig(
        **{name: getattr(dense, name) for name in same.split()},
        tie_word_embeddings=True,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
    )

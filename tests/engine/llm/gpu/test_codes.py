"""Norms and SwiGLU hand FP8 codes to linears: to the same bits as if every linear quantized its own input."""

from __future__ import annotations

import pytest
import torch

from rollmill.engine import Engine, EngineConfig
from rollmill.engine.llm.decoder import Decoder
from rollmill.engine.llm.kv_cache import KVCache
from rollmill.engine.llm.paged_attention import PagedAttention, Span
from rollmill.quant import AmaxMeter

pytest.importorskip("triton", reason="triton is not installed")

from rollmill.engine.llm.gpu import norms, silu  # noqa: E402 (after the conftest's set-up)

TOKENS = 9
MAKERS = {"rms_norm_quantize_fp8": norms, "add_rms_norm_quantize_fp8": norms, "silu_and_mul_quantize_fp8": silu}


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch):
    """Model -> final hidden states, and names of what made codes; by the fused kernels, also on a CPU."""
    monkeypatch.setattr("rollmill.engine.llm.layers.fused.has_kernels", lambda x: True)
    monkeypatch.setattr("rollmill.moe.routing.has_kernels", lambda x: True)
    ran: set[str] = set()
    for name, module in MAKERS.items():
        kernel = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, kernel=kernel, name=name, **kw: (ran.add(name), kernel(*args, **kw))[1]
        )

    def call(model: Decoder) -> tuple[torch.Tensor, set[str]]:
        ran.clear()
        cache = KVCache(model.attention_specs, model.routing, 4, model.dtype, model.device)
        cache.clear(range(4))
        ids = torch.randint(0, 100, (TOKENS,), generator=torch.Generator().manual_seed(0)).to(model.device)
        positions = torch.arange(TOKENS, device=model.device)
        return model.hidden(ids, positions, PagedAttention(cache, [Span([1], 0, TOKENS)])), set(ran)

    return call


def open_fp8(folder, activation: str | None = None, keep: tuple[str, ...] = ()) -> Engine:
    config = EngineConfig(quant="fp8_channel", linear_kernel="torch_fp8", activation=activation, keep=list(keep))
    return Engine(folder, config)


@pytest.mark.parametrize("family", ["qwen3", "qwen2_moe", "gemma2", "deepseek_v3"])
def test_codes_from_norms_change_no_bit(family: str, hf_model, save, hidden):
    with open_fp8(save(hf_model(family))) as engine:
        with_codes, ran = hidden(engine.model)
        linears = [slot for slot in engine.model.slots if slot.scheme.name == "fp8" and slot.shape.units is None]
        assert linears
        for slot in linears:
            slot.meter = AmaxMeter(engine.model.device)
        with_values, ran_watched = hidden(engine.model)
    made = set(MAKERS) if family != "gemma2" else set(MAKERS) - {"silu_and_mul_quantize_fp8"}  # its MLP has a GELU
    assert ran == made
    assert ran_watched == set()
    assert torch.equal(with_codes, with_values)
    assert all(slot.meter.amax > 0 for slot in linears if not slot.name.startswith("lm_head"))


def test_what_is_kept_in_bf16_reads_values(hf_model, save, hidden):
    with open_fp8(save(hf_model("qwen3")), keep=("*.self_attn.*", "*.down_proj")) as engine:
        _, ran = hidden(engine.model)
    assert ran == {"add_rms_norm_quantize_fp8"}


def test_activations_of_one_scale_are_quantized_by_the_linear(hf_model, save, hidden):
    with open_fp8(save(hf_model("qwen3")), activation="per_tensor") as engine:
        assert hidden(engine.model)[1] == set()

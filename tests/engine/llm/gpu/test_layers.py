"""Whole decoders on the fused kernels beside their own torch layers, on a GPU or in the interpreter."""

from __future__ import annotations

import pytest
import torch

from rollmill.engine import Engine, EngineConfig
from rollmill.engine.llm.attention import AttentionSpec
from rollmill.engine.llm.decoder import Decoder
from rollmill.engine.llm.kv_cache import KVCache
from rollmill.engine.llm.layers.rope import rotary
from rollmill.engine.llm.page_pool import PAGE_SIZE
from rollmill.engine.llm.paged_attention import PagedAttention, Span

pytest.importorskip("triton", reason="triton is not installed")

from rollmill.engine.llm.gpu import norms, qkv, silu  # noqa: E402 (after the conftest's set-up)
from rollmill.moe.gpu import routing  # noqa: E402

LENGTHS = 25, 15
IDS = torch.randint(0, 100, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
UNFUSED_ATTENTION = {"deepseek_v3", "deepseek_v3-without-q-latent", "olmoe"}  # latents; norms over whole rows


def spans() -> list[Span]:
    first, second = (-(-length // PAGE_SIZE) for length in LENGTHS)
    return [Span(range(1, 1 + first), 0, LENGTHS[0]), Span(range(1 + first, 1 + first + second), 0, LENGTHS[1])]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    """(model, fused or not) -> final hidden states, what the cache holds, and names of the fused kernels that ran.

    Both route by the kernel: where router logits tie, which BF16 logits do, torch may choose another expert.
    """

    def call(model: Decoder, *, fused: bool) -> tuple[torch.Tensor, torch.Tensor, set[str]]:
        ran: set[str] = set()
        for module, name in [
            (norms, "rms_norm"),
            (norms, "add_rms_norm"),
            (qkv, "norm_rope_write"),
            (silu, "silu_and_mul"),
            (routing, "route_softmax"),
        ]:
            kernel = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *args, kernel=kernel, name=name: (ran.add(name), kernel(*args))[1])
        monkeypatch.setattr("rollmill.engine.llm.layers.fused.has_kernels", lambda x: fused)
        monkeypatch.setattr("rollmill.moe.routing.has_kernels", lambda x: True)
        cache = KVCache(model.attention_specs, model.routing, 8, model.dtype, model.device)
        cache.clear(range(8))
        positions = torch.cat([torch.arange(length) for length in LENGTHS])
        attend = PagedAttention(cache, spans())
        hidden = model.hidden(IDS.to(model.device), positions.to(model.device), attend)
        assert bool(hidden.isfinite().all())
        kept = torch.cat([cache.keys.flatten(), cache.values.flatten()])
        monkeypatch.undo()
        return hidden.float(), kept.float(), ran

    return call


def test_every_family_is_as_near_to_float32(family: str, hf_model, save, run):
    """Twice the error of torch's layers would be a wrong kernel; the same error is another order of summation."""
    model = hf_model(family)
    folder = save(model)
    with torch.no_grad():
        exact = torch.cat([model(part[None]).logits[0] for part in IDS.split(LENGTHS)])
    errors = []
    with Engine(folder) as engine:
        for fused in (False, True):
            hidden, _, ran = run(engine.model, fused=fused)
            found = engine.model.logits(hidden.to(engine.model.dtype)).cpu()
            errors.append(float((found - exact).abs().mean()))
            assert {"rms_norm", "add_rms_norm"} <= ran if fused else ran <= {"route_softmax"}
            assert ("norm_rope_write" in ran) == (fused and family not in UNFUSED_ATTENTION)
    print(f"{family}: torch {errors[0]:.2e}, fused {errors[1]:.2e}")
    assert errors[1] < 1.5 * errors[0]


@pytest.mark.parametrize("export", ["bf16", "fp8_kvfp8"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_hidden_states_and_cache_are_within_a_bf16_step(name: str, export: str, modelopt_folder, run):
    with Engine(modelopt_folder(name, export)) as engine:
        plain, fused = run(engine.model, fused=False), run(engine.model, fused=True)
    for expected, found in zip(plain[:2], fused[:2], strict=True):
        assert float((expected - found).norm() / expected.norm()) < 2**-8
    last = {"route_softmax"} if name == "qwen3_moe" else {"silu_and_mul"}
    assert fused[2] == {"rms_norm", "add_rms_norm", "norm_rope_write"} | last


class CodesAttend(PagedAttention):
    """Reads a cache of FP8 codes as numbers, without their scales."""

    def read(self, spec: AttentionSpec, q: torch.Tensor, sinks: torch.Tensor | None = None) -> torch.Tensor:
        kept = self.cache.keys, self.cache.values
        self.cache.keys, self.cache.values = (codes.to(q.dtype) for codes in kept)
        try:
            return super().read(spec, q, sinks)
        finally:
            self.cache.keys, self.cache.values = kept


@pytest.mark.parametrize("export", ["bf16", "fp8_kvfp8"], ids=["scales of 1", "scales of a checkpoint"])
def test_a_cache_of_fp8_codes(export: str, modelopt_folder, monkeypatch: pytest.MonkeyPatch):
    """Attention over codes is near to attention over the numbers that they stand for, out of half the memory."""
    monkeypatch.setattr("rollmill.engine.llm.layers.fused.has_kernels", lambda x: True)
    with Engine(modelopt_folder("qwen3", export), EngineConfig(kv_cache_dtype="fp8")) as engine:
        model, found = engine.model, []
        assert model.rounds_kv
        assert model.unwritable_as_codes() is None
        attention = model.layers[0].attention
        attention.out = lambda x: x.float()
        x = torch.randn(sum(LENGTHS), model.config.hidden_size, generator=torch.Generator().manual_seed(1)).bfloat16()
        positions = torch.cat([torch.arange(length) for length in LENGTHS])
        turn = rotary(model.inv_freqs[0], 1.0, positions, torch.bfloat16)
        for dtype, attend in ((torch.bfloat16, PagedAttention), (torch.float8_e4m3fn, CodesAttend)):
            cache = KVCache(model.attention_specs, model.routing, 8, dtype, model.device)
            cache.clear(range(8))
            found.append((attention(x.to(model.device), turn, attend(cache, spans())), cache))
    (expected, numbers), (out, codes) = found
    assert float((expected - out).norm() / expected.norm()) < 2**-7
    assert codes.holds_codes
    assert codes.keys.nbytes * 2 == numbers.keys.nbytes
    scales = [float(scale) for scale in attention.kv_scales]
    assert (scales == [1, 1]) == (export == "bf16")
    for kept, exact, scale in zip((codes.keys, codes.values), (numbers.keys, numbers.values), scales, strict=True):
        torch.testing.assert_close(kept[0].float() * scale, exact[0].float(), rtol=2**-8, atol=0)
    codes.copy(1, 3)
    assert torch.equal(codes.keys[:, 48:64].view(torch.uint8), codes.keys[:, 16:32].view(torch.uint8))

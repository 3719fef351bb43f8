"""Calibrated scales against transformers' own activations; how texts become sequences."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rollmill.engine import Engine, EngineConfig, RequestError, quantize_checkpoint
from rollmill.engine.export.texts import read_sequences

CODE_MAX = {"fp8": 448, "nvfp4": 2688}


@torch.no_grad()
def inputs_of(folder, sequences):
    """Module -> max |input| in transformers' float32 model; fused experts: their own input, and that of down."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    amax = {}

    def note(name, x):
        amax[name] = max(amax.get(name, 0.0), x.abs().max().item())

    def experts(name, module, hidden, ids):
        note(f"{name}.gate_up", hidden)
        for e in range(len(module.down_proj)):
            gate, up = (hidden[(ids == e).any(-1)] @ module.gate_up_proj[e].T).chunk(2, -1)
            if len(gate):
                note(f"{name}.down", torch.nn.functional.silu(gate) * up)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, x, name=name: note(name, x[0]))
        elif name.endswith("mlp.experts"):
            module.register_forward_pre_hook(lambda m, x, name=name: experts(name, m, x[0], x[1]))
    for ids in sequences:
        model(torch.tensor([ids]))
    return amax


def reference_name(module):
    """Where `inputs_of` has what enters a checkpoint's module."""
    if ".experts." not in module:
        return module
    head, _, tail = module.partition(".experts.")
    return f"{head}.experts." + ("down" if tail.endswith("down_proj") else "gate_up")


@pytest.mark.parametrize("quant", ["fp8", "nvfp4"])
@pytest.mark.parametrize("model", ["qwen3", "qwen3_moe"])
def test_scales_are_the_largest_inputs(model, quant, bf16_folder, texts, calibration_ids, tmp_path):
    """To within BF16's rounding on the way: 2 %."""
    quantize_checkpoint(bf16_folder(model), tmp_path / "out", quant, texts=texts, tokens_per_sequence=100, sequences=3)
    sequences = [calibration_ids[start : start + 100] for start in (0, 100, 200)]
    expected = inputs_of(bf16_folder(model), sequences)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    scales = {n.removesuffix(".input_scale"): t.item() for n, t in tensors.items() if n.endswith(".input_scale")}
    assert len(scales) == {"qwen3": 14, "qwen3_moe": 56}[model]
    for module, scale in scales.items():
        assert scale * CODE_MAX[quant] == pytest.approx(expected[reference_name(module)], rel=0.02), module


def test_a_quantized_head_is_calibrated_too(bf16_folder, texts, calibration_ids, tmp_path):
    """`keep` replaces the default, which is lm_head."""
    source, out = bf16_folder("qwen3_moe"), tmp_path / "out"
    report = quantize_checkpoint(source, out, "fp8", keep=["*.o_proj"], texts=texts, tokens_per_sequence=400)
    assert "lm_head" not in report.kept
    tensors = load_file(out / "model.safetensors")
    expected = inputs_of(source, [calibration_ids])["lm_head"]
    assert tensors["lm_head.input_scale"].item() * 448 == pytest.approx(expected, rel=0.02)
    assert "model.layers.0.self_attn.o_proj.input_scale" not in tensors
    with Engine(out) as engine, Engine(source, EngineConfig(quant="fp8", keep=["*.o_proj"])) as other:
        heads = [next(s for s in e.model.slots if s.name == "lm_head") for e in (engine, other)]
        assert heads[0].scheme.activation == "static"
        assert torch.equal(heads[0].tensors["weight"], heads[1].tensors["weight"])


@pytest.mark.parametrize("quant", ["fp8", "nvfp4"])
def test_scales_are_shared_as_modelopt_shares_them(quant, bf16_folder, texts, tmp_path):
    quantize_checkpoint(bf16_folder("qwen3_moe"), tmp_path / "out", quant, texts=texts)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for layer in ("model.layers.0", "model.layers.1"):
        for group in (
            [f"{layer}.self_attn.{p}_proj" for p in "qkv"],
            [f"{layer}.mlp.experts.{e}.{p}_proj" for e in range(8) for p in ("gate", "up")],
            [f"{layer}.mlp.experts.{e}.down_proj" for e in range(8)],
        ):
            assert len({tensors[f"{module}.input_scale"].item() for module in group}) == 1
    with Engine(tmp_path / "out") as engine:
        assert engine.info()["activation"] == ["static"]


def test_a_bf16_swap_keeps_calibrated_scales(bf16_folder, texts, bf16_weights, tmp_path):
    quantize_checkpoint(bf16_folder("qwen3_moe"), tmp_path / "out", "nvfp4", texts=texts)
    with Engine(tmp_path / "out") as engine:
        digest = engine.digest()
        assert engine.update_weights(bf16_weights("qwen3_moe")).digest == digest


@pytest.fixture
def tokenizer(bf16_folder):
    return AutoTokenizer.from_pretrained(bf16_folder("qwen3"))


def test_texts_are_packed(tokenizer, texts, calibration_ids):
    assert read_sequences(texts, tokenizer, length=64, count=3) == [
        calibration_ids[start : start + 64] for start in (0, 64, 128)
    ]
    packed = read_sequences(texts, tokenizer, length=150, count=9)
    assert [len(ids) for ids in packed] == [150, 150, 100]
    assert sum(packed, []) == calibration_ids


def test_jsonl_takes_texts_and_chats(tokenizer, tmp_path):
    file = tmp_path / "texts.jsonl"
    lines = [{"text": "w5 w6"}, {"messages": [{"role": "user", "content": "w7"}]}, {"text": "w8"}]
    file.write_text("\n\n".join(map(json.dumps, lines)))
    assert read_sequences(file, tokenizer, length=3, count=9) == [[5, 6, 1], [7, 8]]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "w1"}\n{"txt": "w2"}', "a.jsonl:2"),
        ("a.jsonl", b'{"text": "w1"\n', "a.jsonl:1"),
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"\xff\xfe\xfa", "UTF-8"),
    ],
)
def test_texts_that_cannot_be_read(name, content, words, tokenizer, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=words):
        read_sequences(tmp_path / name, tokenizer, length=8, count=8)


def test_no_such_file(tokenizer, tmp_path):
    with pytest.raises(RequestError, match="is no file"):
        read_sequences(tmp_path / "none.txt", tokenizer, length=8, count=8)

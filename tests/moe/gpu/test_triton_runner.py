"""The Triton runner against float64, on a GPU or in the interpreter."""

from __future__ import annotations

import pytest
import torch

from rollmill.moe import MoeConfig, RoutedExperts
from rollmill.moe.runners.reference import expert_shapes
from rollmill.moe.runners.triton import FP8_TILES, NVFP4_TILES, GroupedNVFP4, TritonRunner
from rollmill.quant import FP8, NVFP4, AmaxMeter, Capability, FP8Rows, UnsupportedError, WeightShape, numerics

pytest.importorskip("triton", reason="triton is not installed")

from rollmill.moe.gpu import blocks  # noqa: E402 (after the conftest's set-up)
from rollmill.moe.gpu.blocks import make_blocks  # noqa: E402
from rollmill.moe.gpu.pack import pack_nvfp4  # noqa: E402
from rollmill.quant.gpu.quantize import quantize_fp8  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HOPPER = Capability(DEVICE, 90, ("triton",))
CONFIG = MoeConfig(num_experts=4, top_k=2, hidden_size=512, intermediate_size=256)
SCHEMES = {
    "fp8": FP8(),
    "fp8_channel": FP8(per_channel=True),
    "nvfp4_w4a16": NVFP4(activation="none"),
    "nvfp4": NVFP4(),
    "fp8_static": FP8(activation="static"),
    "nvfp4_static": NVFP4(activation="static"),
}
INPUT_SCALES = {"fp8": 3 / 448, "nvfp4": 3 / 2688}  # some activations lie beyond


class Layer:
    """Random experts, their packed tensors, and their dequantized weights in float64."""

    def __init__(self, scheme: FP8 | NVFP4, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.runner = TritonRunner(CONFIG, scheme, HOPPER, torch.bfloat16)
        self.scheme, self.packed, self.weights = scheme, [], []
        self.input_scales: list[torch.Tensor] = []  # of w13 and w2, one an expert
        self.inner = torch.empty(0)
        self.runner.watch_w2 = self._keep
        for shape, kernel in zip(expert_shapes(CONFIG), (self.runner.w13, self.runner.w2), strict=True):
            weight = (torch.randn(shape.matrix, generator=generator) * 0.05).bfloat16()
            stored = scheme.quantize(weight, shape)
            self.input_scales.append(INPUT_SCALES[scheme.name] * torch.tensor([1.0, 0.5, 2.0, 1.0]))
            if scheme.activation == "static":
                stored["input_scale"] = self.input_scales[-1][:, None].repeat(1, len(shape.rows))
            self.weights.append(scheme.dequantize(stored, shape).double())
            matrices = {key: stored[key] for key in scheme.matrices(shape)}
            scales = {key: stored[key] for key in scheme.scales(shape)}
            packed = kernel.prepare(matrices) | kernel.derive(scales)
            assert {k: (tuple(v.shape), v.dtype) for k, v in packed.items()} == {
                k: (spec.shape, spec.dtype) for k, spec in kernel.packed().items()
            }
            self.packed.append({key: value.to(DEVICE) for key, value in packed.items()})

    def __call__(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.runner.apply(x.to(DEVICE), ids.to(DEVICE), weights.to(DEVICE), *self.packed).cpu()

    def _keep(self, inner: torch.Tensor) -> None:
        self.inner = inner.cpu()  # [tokens * top_k, intermediate_size]

    def expected(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What enters the down projections, and the layer's result given what did enter them, in float64.

        BF16 where a chain of BF16 linears would round.
        """
        inner, out = self.inner.double().zero_(), torch.zeros(len(x), CONFIG.hidden_size, dtype=torch.float64)
        for token, choice in ((t, c) for t in range(len(x)) for c in range(CONFIG.top_k)):
            w13, w2 = (w[ids[token, choice]] for w in self.weights)
            pair = token * CONFIG.top_k + choice
            scales = [scale[ids[token, choice]] for scale in self.input_scales]
            gate, up = rounded(w13 @ self.seen(x[token], scales[0])).chunk(2)
            inner[pair] = rounded(torch.nn.functional.silu(gate)) * up
            out[token] += weights[token, choice].double() * rounded(w2 @ self.seen(self.inner[pair], scales[1]))
        return inner, out

    def seen(self, x: torch.Tensor, static: torch.Tensor) -> torch.Tensor:
        """What a product sees of BF16 x: codes times scales, or x itself."""
        if self.scheme.activation == "none":
            return x.double()
        if isinstance(self.scheme, NVFP4):
            encode = numerics.nvfp4_encode(x.abs().amax().float())
            encode = 1 / static if self.scheme.activation == "static" else encode
            values, block_scale = numerics.quantize_nvfp4_activation(x[None], encode)
            return (values * block_scale[..., None]).flatten().double() / encode.double()
        scale = static if self.scheme.activation == "static" else x.abs().amax().float() / 448
        return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale.double()


def assert_right(layer: Layer, *asked: torch.Tensor) -> None:
    """Both products, one by one, within BF16: it keeps 8 bits, and half a step is 2e-3."""
    out = layer(*asked).double()
    inner, expected = layer.expected(*asked)
    assert float((layer.inner.double() - inner).norm() / inner.norm()) < 4e-3
    assert float((out - expected).norm() / expected.norm()) < 4e-3


def rounded(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().double()


def tokens(count: int, seed: int = 1, experts: tuple[int, ...] = (0, 1, 2, 3)) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, CONFIG.hidden_size, generator=generator).bfloat16()
    chosen = torch.stack([torch.randperm(len(experts), generator=generator)[: CONFIG.top_k] for _ in range(count)])
    return x, torch.tensor(experts)[chosen], torch.rand(count, CONFIG.top_k, generator=generator)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("count", [1, 7])
def test_a_layer_equals_float64(name: str, count: int):
    layer, asked = Layer(SCHEMES[name]), tokens(count)
    assert_right(layer, *asked)


@pytest.mark.parametrize("name", ["fp8_channel", "nvfp4_w4a16", "nvfp4", "nvfp4_static"])
def test_experts_without_tokens_and_poisoned_outputs(name: str):
    layer, asked = Layer(SCHEMES[name]), tokens(5, experts=(1, 3))
    assert_right(layer, *asked)


@pytest.mark.parametrize("name", ["fp8_channel", "nvfp4_w4a16", "nvfp4", "fp8_static"])
def test_a_token_is_bit_equal_in_any_company(name: str):
    layer = Layer(SCHEMES[name])
    x, ids, weights = tokens(7)
    whole = layer(x, ids, weights)
    assert torch.equal(layer(x[3:4], ids[3:4], weights[3:4])[0], whole[3])
    mixed = torch.tensor([5, 3, 0])
    assert torch.equal(layer(x[mixed], ids[mixed], weights[mixed])[1], whole[3])


def test_no_tokens():
    x, ids, weights = tokens(1)
    assert Layer(SCHEMES["fp8"])(x[:0], ids[:0], weights[:0]).shape == (0, CONFIG.hidden_size)


def test_a_block_scale_of_zero_makes_zeros():
    shape = expert_shapes(CONFIG)[1]
    scheme = SCHEMES["nvfp4_w4a16"]
    stored = dict(scheme.quantize(torch.randn(shape.matrix).bfloat16(), shape))
    scales = stored["weight_scale"].view(torch.uint8)
    scales[0, 0, 0] = 0
    packed = TritonRunner(CONFIG, scheme, HOPPER, torch.bfloat16).w2.prepare(
        {key: stored[key] for key in scheme.matrices(shape)}
    )
    first_halves = packed["weight"][0, 0, :16]  # k 0 to 15 are first codes: bits 7 and 2..0
    assert int((first_halves & 0b10000111).sum()) == 0


@pytest.mark.parametrize("name", ["fp8_static", "nvfp4_static"])
def test_unequal_input_scales_of_gate_and_up_are_refused(name: str):
    kernel = TritonRunner(CONFIG, SCHEMES[name], HOPPER, torch.bfloat16).w13
    stored = SCHEMES[name].quantize(torch.ones(kernel.shape.matrix).bfloat16(), kernel.shape)
    scales = {key: stored[key] for key in SCHEMES[name].scales(kernel.shape) if key in stored}
    with pytest.raises(UnsupportedError, match="gate and up have unequal input scales") as error:
        kernel.derive(scales | {"input_scale": torch.tensor([[1.0, 1.0], [1.0, 2.0], [1.0, 1.0], [1.0, 1.0]])})
    assert any("reference" in reason for reason in error.value.reasons)


@pytest.mark.parametrize("launches", ["one launch", "two launches"])
@pytest.mark.parametrize("tokens", [1, 37, 500])
@pytest.mark.parametrize("block", [16, 32])
def test_blocks_hold_every_pair_once_with_its_expert(
    block: int, tokens: int, launches: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(blocks, "MOST_PAIRS", 1 << 12 if launches == "one launch" else 0)
    ids = torch.randint(0, 6, (tokens, 3), generator=torch.Generator().manual_seed(2))
    pairs, experts = (t.cpu() for t in make_blocks(ids.to(DEVICE), 8, block))
    flat = ids.flatten()
    assert bool((pairs <= flat.numel()).all())
    assert sorted(pairs[pairs < flat.numel()].tolist()) == list(range(flat.numel()))
    for expert, rows in zip(experts.tolist(), pairs.view(-1, block), strict=True):
        real = rows[rows < flat.numel()]
        assert expert >= 0 or not len(real)
        assert all(flat[pair] == expert for pair in real.tolist())


@pytest.mark.parametrize("tiles", [FP8_TILES, NVFP4_TILES], ids=["fp8", "nvfp4"])
def test_both_products_use_the_same_blocks(tiles: dict):
    assert [(most, tile[1]) for most, tile in tiles["w13"]] == [(most, tile[1]) for most, tile in tiles["w2"]]


def test_what_it_cannot_compute_is_said():
    def reason(config: MoeConfig = CONFIG, scheme=SCHEMES["fp8"], sm: int | None = 90, dtype=torch.bfloat16) -> str:
        return TritonRunner.unsupported(config, scheme, Capability(DEVICE, sm, ("triton",)), dtype) or "none"

    assert reason() == "none"
    assert "sm90" in reason(sm=80)
    assert "cpu" in reason(sm=None)
    assert "float32" in reason(dtype=torch.float32)
    assert reason(scheme=FP8(activation="static")) == "none"
    assert "per_tensor" in reason(scheme=FP8(activation="per_tensor"))
    assert reason(scheme=NVFP4()) == "none"
    assert "none" in reason(scheme=FP8(activation="none"))
    assert "multiples of 256" in reason(MoeConfig(num_experts=4, top_k=2, hidden_size=512, intermediate_size=192))
    assert "biases" in reason(MoeConfig(num_experts=4, top_k=2, hidden_size=512, intermediate_size=256, bias=True))
    bare = Capability(DEVICE, 90, ())
    assert TritonRunner.unsupported(CONFIG, FP8(), bare, torch.bfloat16) == "triton is not installed"


@pytest.mark.parametrize("shape", [(512, 256), (1, 6, 128), (3, 5, 384)], ids=str)
def test_a_stack_is_packed_in_one_launch(shape: tuple[int, ...]):
    """Byte for byte as plain torch packs it: every scale, zero and the smallest ones too."""
    *lead, rows, cols = shape
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (*lead, rows, cols // 2), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 127, (*lead, rows, cols // 16), dtype=torch.uint8, generator=generator)
    scales.view(-1)[:127] = torch.arange(127, dtype=torch.uint8)[: scales.numel()]
    weight = WeightShape((rows,), cols, units=lead[0] if lead else None)
    scales = scales.view(torch.float8_e4m3fn)
    expected = GroupedNVFP4(SCHEMES["nvfp4_w4a16"], weight).prepare({"weight": codes, "weight_scale": scales})
    packed, block_scale = (t.cpu() for t in pack_nvfp4(codes.to(DEVICE), scales.to(DEVICE)))
    assert torch.equal(packed, expected["weight"])
    assert torch.equal(block_scale, expected["block_scale"])


def test_codes_in_place_of_values_change_no_bit():
    layer = Layer(SCHEMES["fp8_channel"])
    x, ids, weights = (part.to(DEVICE) for part in tokens(5))
    assert layer.runner.takes_codes
    rows = FP8Rows(*quantize_fp8(x))
    assert torch.equal(layer.runner.apply_codes(rows, ids, weights, *layer.packed).cpu(), layer(x, ids, weights))


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_w4a16", "fp8_static"])
def test_codes_are_for_fp8_per_token(name: str):
    assert not Layer(SCHEMES[name]).runner.takes_codes


@pytest.fixture
def routed() -> tuple[RoutedExperts, torch.Tensor, torch.Tensor]:
    """A layer of FP8 experts, tokens for it, and their logits."""
    names = ("gate", "up", "down")
    experts = RoutedExperts("e", names, CONFIG, SCHEMES["fp8_channel"], capability=HOPPER, dtype=torch.bfloat16)
    for slot, packed in zip(experts.slots, Layer(SCHEMES["fp8_channel"]).packed, strict=True):
        for key, tensor in packed.items():
            slot.tensors[key].copy_(tensor)
    x = tokens(5)[0].to(DEVICE)
    return experts, x, torch.randn(5, CONFIG.num_experts, device=DEVICE)


def test_a_layer_takes_codes_or_values(routed):
    experts, x, logits = routed
    rows = FP8Rows(*quantize_fp8(x), x)
    assert experts.takes_codes
    for given, expected in zip(experts.dispatch(rows, logits), experts.dispatch(x, logits), strict=True):
        assert torch.equal(given, expected)


def test_a_meter_is_shown_the_values(routed):
    experts, x, logits = routed
    experts.w13.meter = meter = AmaxMeter(DEVICE)
    assert not experts.takes_codes
    experts.dispatch(FP8Rows(*quantize_fp8(x), x), logits)
    assert meter.amax == x.abs().max()

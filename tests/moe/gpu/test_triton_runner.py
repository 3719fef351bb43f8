"""The Triton runner against float64, on a GPU or in the interpreter."""

from __future__ import annotations

import pytest
import torch
from msgspec import structs

from rollmill.moe import MoeConfig, RoutedExperts, summed
from rollmill.moe.runners.reference import expert_shapes
from rollmill.moe.runners.triton import TritonRunner
from rollmill.moe.runners.triton_tiles import BF16_TILES, FP8_TILES, NVFP4_TILES, Tile
from rollmill.quant import BF16, FP8, NVFP4, AmaxMeter, Capability, FP8Rows, Plain, UnsupportedError, numerics

pytest.importorskip("triton", reason="triton is not installed")

from rollmill.moe.gpu import blocks  # noqa: E402 (after the conftest's set-up)
from rollmill.moe.gpu.blocks import make_blocks, make_placed_blocks  # noqa: E402
from rollmill.quant.gpu.nvfp4_words import in_word_order  # noqa: E402
from rollmill.quant.gpu.quantize import quantize_fp8  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HOPPER = Capability(DEVICE, 90, ("triton",))
CONFIG = MoeConfig(num_experts=4, top_k=2, hidden_size=512, intermediate_size=256)
SCHEMES = {
    "bf16": BF16,
    "fp8": FP8(),
    "fp8_channel": FP8(per_channel=True),
    "nvfp4_w4a16": NVFP4(activation="none"),
    "nvfp4": NVFP4(),
    "fp8_static": FP8(activation="static"),
    "nvfp4_static": NVFP4(activation="static"),
}
INPUT_SCALES = {"bf16": 1.0, "fp8": 3 / 448, "nvfp4": 3 / 2688}  # some activations lie beyond


def one_tile(tile: Tile) -> dict:
    """A table of tiles that has no other."""
    return dict.fromkeys(("w13", "w2"), ((float("inf"), tile),))


class Layer:
    """Random experts, their packed tensors, and their dequantized weights in float64."""

    def __init__(self, scheme: Plain | FP8 | NVFP4, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.runner = TritonRunner(CONFIG, scheme, HOPPER, torch.bfloat16)
        if DEVICE.type == "cpu" and isinstance(scheme, NVFP4):  # the interpreter takes its time for every program
            self.runner.tiles = one_tile(Tile(256, 16, 128, 1, 2))
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


OTHER_TILES = {  # than those that few tokens take
    "scales in words": Tile(32, 8, 128, 2, 2),
    "many tokens": Tile(128, 16, 128, 4, 2),
}


@pytest.mark.parametrize(
    ("name", "tile"), [("nvfp4_w4a16", "scales in words"), ("nvfp4_w4a16", "many tokens"), ("nvfp4", "many tokens")]
)
def test_other_tiles_equal_float64(name: str, tile: str):
    layer = Layer(SCHEMES[name])
    layer.runner.tiles = one_tile(OTHER_TILES[tile])
    assert_right(layer, *tokens(1 if tile == "scales in words" else 5))


@pytest.mark.parametrize("name", ["bf16", "fp8_channel", "nvfp4_w4a16"])
def test_pairs_that_are_not_sorted_give_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch):
    """Two tokens of 4 experts are sorted, those of 16 are not."""
    layer, asked = Layer(SCHEMES[name]), tokens(2)
    in_order = layer(*asked)
    monkeypatch.setattr(layer.runner, "config", structs.replace(CONFIG, num_experts=16))
    monkeypatch.setattr(blocks, "make_blocks", lambda *_: pytest.fail("it sorted"))
    assert torch.equal(layer(*asked), in_order)


@pytest.mark.gpu
@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize("name", ["bf16", "fp8_channel", "nvfp4_w4a16"])
def test_every_tile_of_the_tables_equals_float64(name: str, place: int):
    if DEVICE.type == "cpu":
        pytest.skip("torch sees no GPU")
    layer = Layer(SCHEMES[name])
    layer.runner.tiles = {
        key: ((float("inf"), table[place % len(table)][1]),) for key, table in layer.runner.tiles.items()
    }
    assert_right(layer, *tokens(40))


def test_columns_go_where_the_large_matrix_instruction_wants_them():
    """Columns that lie at 16 q + 8 d + 4 c + 2 h + b go to 32 d + 16 h + 8 c + 2 q + b."""
    x = (torch.arange(3 * 128) % 251).view(3, 128).bfloat16()  # whole numbers that BF16 has
    found = in_word_order(x.to(DEVICE)).cpu()
    expected = x.view(3, 2, 4, 2, 2, 2, 2).permute(0, 1, 3, 5, 4, 2, 6).reshape(3, 128)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["bf16", "fp8_channel", "nvfp4_w4a16", "nvfp4", "nvfp4_static"])
def test_experts_without_tokens_and_poisoned_outputs(name: str):
    layer, asked = Layer(SCHEMES[name]), tokens(5, experts=(1, 3))
    assert_right(layer, *asked)


@pytest.mark.parametrize("name", ["bf16", "fp8_channel", "nvfp4_w4a16", "nvfp4", "fp8_static"])
def test_a_token_is_bit_equal_in_any_company(name: str):
    layer = Layer(SCHEMES[name])
    x, ids, weights = tokens(7)
    whole = layer(x, ids, weights)
    assert torch.equal(layer(x[3:4], ids[3:4], weights[3:4])[0], whole[3])
    mixed = torch.tensor([5, 3, 0])
    assert torch.equal(layer(x[mixed], ids[mixed], weights[mixed])[1], whole[3])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bf16", "fp8_channel", "nvfp4_w4a16", "nvfp4"])
def test_a_token_is_bit_equal_among_any_number(name: str):
    """All tiles of the tables: 2 choices among 4 experts are half as many pairs an expert as there are tokens."""
    if DEVICE.type == "cpu":
        pytest.skip("torch sees no GPU")
    layer = Layer(SCHEMES[name])
    x, ids, weights = tokens(900)
    whole = layer(x, ids, weights)
    for count in (1, 7, 20, 40, 64, 180, 360):
        assert torch.equal(layer(x[:count], ids[:count], weights[:count]), whole[:count]), count


def test_no_tokens():
    x, ids, weights = tokens(1)
    assert Layer(SCHEMES["fp8"])(x[:0], ids[:0], weights[:0]).shape == (0, CONFIG.hidden_size)


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


def test_places_say_where_every_pair_lies():
    ids = torch.randint(0, 6, (37, 3), generator=torch.Generator().manual_seed(2))
    pairs, experts, places, used = (t.cpu() for t in make_placed_blocks(ids.to(DEVICE), 8, 16))
    assert torch.equal(pairs[places.long()], torch.arange(ids.numel(), dtype=torch.int32))
    assert bool((experts[: used.item()] >= 0).all())
    assert bool((experts[used.item() :] < 0).all())


@pytest.mark.parametrize("count", [1, 300])
def test_many_tokens_have_the_bits_of_few(count: int):
    """Blocks that are not full, experts without tokens."""
    layer = Layer(SCHEMES["fp8_channel"])
    x, ids, weights = (part.to(DEVICE) for part in tokens(count, experts=(0, 2, 3)))
    rows = FP8Rows(*quantize_fp8(x))
    in_pairs = layer.runner.choices(rows, ids, weights, *layer.packed)
    layer.runner.many_from = 0
    in_blocks = layer.runner.choices(rows, ids, weights, *layer.packed)
    assert in_pairs.places is None
    assert in_blocks.places is not None
    assert torch.equal(in_blocks.values[in_blocks.places.long().flatten()], in_pairs.values)
    assert torch.equal(in_blocks.sum(), in_pairs.sum())


def test_the_two_products_may_have_blocks_of_unequal_size():
    layer, asked = Layer(SCHEMES["bf16"]), tokens(5)
    same = layer(*asked)
    layer.runner.tiles = layer.runner.tiles | {"w2": ((float("inf"), Tile(128, 32, 128, 4, 2)),)}
    assert torch.equal(layer(*asked), same)


def test_a_tile_fits_rows_and_columns_that_it_does_not_divide():
    assert Tile(256, 16, 256, 8, 2).fitting(768, 2048) == Tile(256, 16, 256, 8, 2)
    assert Tile(256, 16, 256, 8, 2).fitting(1408, 960) == Tile(128, 16, 64, 8, 2)


@pytest.mark.parametrize("table", [BF16_TILES, FP8_TILES, NVFP4_TILES], ids=["bf16", "fp8", "nvfp4"])
def test_the_last_tile_is_for_any_number_of_tokens(table: dict):
    for tiles in table.values():
        mosts = [most for most, _ in tiles]
        assert mosts == sorted(mosts)
        assert mosts[-1] == float("inf")


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
    assert reason(scheme=BF16) == reason(scheme=BF16, sm=100) == "none"
    assert "sm90, sm100" in reason(scheme=BF16, sm=120)
    assert "multiples of 128" in reason(
        MoeConfig(num_experts=4, top_k=2, hidden_size=512, intermediate_size=192), scheme=NVFP4()
    )
    assert "multiples of 64" in reason(MoeConfig(num_experts=4, top_k=2, hidden_size=512, intermediate_size=160))
    assert "biases" in reason(MoeConfig(num_experts=4, top_k=2, hidden_size=512, intermediate_size=256, bias=True))
    bare = Capability(DEVICE, 90, ())
    assert TritonRunner.unsupported(CONFIG, FP8(), bare, torch.bfloat16) == "triton is not installed"


def test_codes_in_place_of_values_change_no_bit():
    layer = Layer(SCHEMES["fp8_channel"])
    x, ids, weights = (part.to(DEVICE) for part in tokens(5))
    assert layer.runner.takes_codes
    rows = FP8Rows(*quantize_fp8(x))
    assert torch.equal(layer.runner.choices(rows, ids, weights, *layer.packed).sum().cpu(), layer(x, ids, weights))


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
    (given, ids), (expected, expected_ids) = experts.dispatch(rows, logits), experts.dispatch(x, logits)
    assert torch.equal(summed(given), summed(expected))
    assert torch.equal(ids, expected_ids)


def test_a_meter_is_shown_the_values(routed):
    experts, x, logits = routed
    experts.w13.meter = meter = AmaxMeter(DEVICE)
    assert not experts.takes_codes
    experts.dispatch(FP8Rows(*quantize_fp8(x), x), logits)
    assert meter.amax == x.abs().max()

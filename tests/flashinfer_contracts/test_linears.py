"""NVFP4 linears on every backend: an independent reader of the packed bytes, and outputs beside the reference's."""

from __future__ import annotations

import pytest
import torch
from kernel_models.decoding import decode_nvfp4, unshuffle_rows

from rollmill.quant import FP4_BACKENDS, FP8, NVFP4, UnsupportedError, WeightShape, layout, select_kernel
from rollmill.quant.flashinfer_api.activation import quantize_nvfp4
from rollmill.quant.kernels import flashinfer_fp4
from rollmill.quant.kernels.reference import ReferenceKernel
from rollmill.quant.numerics import nvfp4_products

SHAPES = {
    "aligned": WeightShape((256,), 128),
    "padded": WeightShape((72,), 80),
    "fused": WeightShape((64, 32, 32), 256),
    "one_group": WeightShape((8,), 16),
}
STATIC, PER_TOKEN = NVFP4("static"), NVFP4("per_token")
BF16_ULP = 2.0**-7  # of a value's size: one unit in its last place, at the most


@pytest.fixture
def kernel(blackwell):
    def make(backend: str, scheme=STATIC, shape=SHAPES["aligned"]):
        name = "flashinfer_" + backend.replace("-", "_")
        return select_kernel(scheme, shape, blackwell, torch.bfloat16, name)(scheme, shape, torch.bfloat16, blackwell)

    return make


def pack(kernel, stored):
    """Checked against what `packed` promises; the input is left as it was."""
    before = {name: value.clone() for name, value in stored.items()}
    packed = kernel.prepare(stored) | kernel.derive(stored)
    specs = kernel.packed()
    assert {name: (tuple(t.shape), t.dtype) for name, t in packed.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in specs.items()
    }
    assert all(torch.equal(stored[name].view(torch.uint8), before[name].view(torch.uint8)) for name in stored)
    return packed


def read_back(kernel, packed):
    """code x block scale of the packed weight, padding included, rows in their logical order."""
    codes = packed["weight"]
    values = decode_nvfp4(codes, packed["block_scale"][: -(-len(codes) // 128) * 128], "128x4")
    return unshuffle_rows(values) if kernel.backend == "trtllm" else values


def assert_close_to_reference(kernel, stored, x, packed=None, bias=None):
    """One rounding to BF16 away from float32 arithmetic on the stored values."""
    packed = packed or pack(kernel, stored)
    out = kernel.apply(x, packed, bias)
    assert out.dtype == torch.bfloat16
    expected = ReferenceKernel(kernel.scheme, kernel.shape, torch.float32, kernel.capability).apply(x, stored, bias)
    assert out.shape == expected.shape
    bound = BF16_ULP / 2 * expected.abs() + 2e-5 * expected.abs().amax(-1, keepdim=True)
    if bias is not None:
        bound = bound + BF16_ULP * (expected - bias).abs()  # the product rounds before the bias comes
    assert bool(((out.float() - expected).abs() <= bound).all())


def inputs(rows, cols, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=generator).bfloat16()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("backend", FP4_BACKENDS)
def test_packed_bytes_hold_the_stored_values(backend, shape, kernel, stored_weight):
    made, stored = kernel(backend, STATIC, shape), stored_weight(STATIC, shape)
    values = read_back(made, pack(made, stored))
    rows, cols = shape.matrix
    expected = nvfp4_products(stored["weight"], stored["weight_scale"], torch.float32)
    assert torch.equal(values[:rows, :cols], expected)
    assert not values[rows:].any()
    assert not values[:, cols:].any()


@pytest.mark.parametrize("tokens", [1, 5, 130])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("backend", FP4_BACKENDS)
def test_static_output(backend, shape, tokens, kernel, stored_weight):
    assert_close_to_reference(kernel(backend, STATIC, shape), stored_weight(STATIC, shape), inputs(tokens, shape.cols))


@pytest.mark.parametrize("tokens", [1, 5, 130])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("backend", ["cute-dsl", "auto"])
def test_per_token_output(backend, shape, tokens, blackwell, kernel, stored_weight):
    if not blackwell.flashinfer.row_alpha:
        with pytest.raises(UnsupportedError, match="one alpha for all tokens"):
            kernel(backend, PER_TOKEN, shape)
        return
    x = inputs(tokens, shape.cols) * torch.logspace(-3, 3, tokens)[:, None].bfloat16()  # tokens of all sizes
    x[tokens // 2] = 0
    assert_close_to_reference(kernel(backend, PER_TOKEN, shape), stored_weight(PER_TOKEN, shape), x)


@pytest.mark.parametrize("backend", FP4_BACKENDS)
def test_bias_and_no_tokens(backend, kernel, stored_weight):
    made, stored = kernel(backend), stored_weight(STATIC, SHAPES["aligned"])
    assert_close_to_reference(made, stored, inputs(3, 128), bias=torch.linspace(-1, 1, 256).bfloat16())
    assert made.apply(inputs(0, 128), pack(made, stored)).shape == (0, 256)


def test_what_the_library_was_told(kernel, stored_weight, model_library):
    made, stored = kernel("trtllm"), stored_weight(STATIC, SHAPES["aligned"])
    packed = pack(made, stored)
    made.apply(inputs(4, 128), packed)
    quantized = [bound.arguments for name, bound in model_library.calls if name == "nvfp4_quantize"][-1]
    assert quantized["a_global_sf"] is packed["encode"]
    assert torch.equal(packed["encode"], stored["input_scale"].reciprocal())
    product = [bound.arguments for name, bound in model_library.calls if name == "mm_fp4"][-1]
    assert product["backend"] == "trtllm"
    assert product["alpha"] is packed["alpha"]
    assert torch.equal(packed["alpha"], stored["weight_scale_2"] * stored["input_scale"])
    assert product["b"].data_ptr() == packed["weight"].data_ptr()
    assert product["b_descale"].data_ptr() == packed["block_scale"].data_ptr()


@pytest.mark.parametrize("name", ["weight_scale_2", "input_scale"])
@pytest.mark.parametrize("backend", FP4_BACKENDS)
def test_shards_with_unequal_scales_are_refused_with_a_way_out(backend, name, kernel, stored_weight):
    made, stored = kernel(backend, STATIC, SHAPES["fused"]), stored_weight(STATIC, SHAPES["fused"])
    stored[name] = stored[name] * torch.tensor([1.0, 1.0, 1.5])
    with pytest.raises(UnsupportedError, match=f"one {name}") as error:
        made.derive(stored)
    assert "exact" in str(error.value)


@pytest.mark.parametrize("backend", ["trtllm", "cutlass", "cudnn"])
def test_a_backend_by_name_that_cannot_scale_tokens_is_refused(backend, kernel):
    with pytest.raises(UnsupportedError, match="one alpha for all tokens"):
        kernel(backend, PER_TOKEN)


def test_auto_takes_by_activation(blackwell):
    def taken(scheme, capability=blackwell):
        return select_kernel(scheme, SHAPES["aligned"], capability, torch.bfloat16).name

    assert taken(STATIC) == "flashinfer_trtllm"
    assert taken(PER_TOKEN) == ("flashinfer_cute_dsl" if blackwell.flashinfer.row_alpha else "exact")
    assert taken(NVFP4("none")) == "exact"
    assert taken(FP8()) == "torch_fp8"
    consumer = blackwell.__class__(blackwell.device, 120, blackwell.libraries, blackwell.flashinfer)
    assert taken(STATIC, consumer) == "flashinfer_auto"
    assert taken(PER_TOKEN, consumer) == "exact"
    without = blackwell.__class__(blackwell.device, 100, ("triton",))
    assert taken(STATIC, without) == "exact"


@pytest.mark.parametrize(
    ("scheme", "dtype", "sm", "words"),
    [
        (FP8("static"), torch.bfloat16, 100, "NVFP4 only"),
        (NVFP4("none"), torch.bfloat16, 100, "'none'"),
        (STATIC, torch.float32, 100, "BF16"),
        (STATIC, torch.bfloat16, 90, "this is sm90"),
    ],
    ids=["fp8", "w4a16", "float32", "hopper"],
)
@pytest.mark.parametrize("backend", FP4_BACKENDS)
def test_reasons(backend, scheme, dtype, sm, words, blackwell):
    capability = blackwell.__class__(blackwell.device, sm, blackwell.libraries, blackwell.flashinfer)
    assert words in FP4_BACKENDS[backend].unsupported(scheme, SHAPES["aligned"], dtype, capability)


# each of these mutations must be seen

MUTATIONS = {
    "swapped nibbles": (layout, "pad_to", lambda real: lambda x, **pads: _swapped(real(x, **pads))),
    "linear scales": (layout, "swizzle_scales", lambda real: lambda scales: layout.pad_to(scales, rows=128, cols=4)),
    "8x4 scales": (layout, "swizzle_scales", lambda real: lambda scales: real(layout.pad_to(scales, rows=128), 8)),
    "shuffle off by one": (layout, "shuffle_rows_index", lambda real: lambda *a, **k: real(*a, **k).roll(1)),
    "no shuffle": (layout, "shuffle_rows_index", lambda real: lambda rows, **_: torch.arange(rows)),
    "no padding": (layout, "pad_to", lambda real: lambda x, **pads: x),
    "alpha without input_scale": (
        flashinfer_fp4.FlashInferFP4,
        "derive",
        lambda real: lambda self, scales: real(self, scales) | {"alpha": scales["weight_scale_2"][:1].clone()},
    ),
}


def _swapped(x):
    return layout.swap_nibbles(x) if x.dtype == torch.uint8 else x


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_seen(mutation, kernel, stored_weight, monkeypatch):
    shape = WeightShape((192,), 208)  # rows and columns that need padding
    made, stored = kernel("trtllm", STATIC, shape), stored_weight(STATIC, shape)
    assert_close_to_reference(made, stored, inputs(4, 208))
    where, name, mutate = MUTATIONS[mutation]
    monkeypatch.setattr(where, name, mutate(getattr(where, name)))
    with pytest.raises((AssertionError, ValueError, RuntimeError, IndexError)):
        assert_close_to_reference(made, stored, inputs(4, 208))


@pytest.mark.parametrize("sm", [None, 89, 90])
def test_the_quantizer_is_refused_below_blackwell(sm, blackwell):
    """Its kernels are empty there, and leave memory as it was without an error."""
    capability = blackwell.__class__(blackwell.device, sm, blackwell.libraries, blackwell.flashinfer)
    for encode in (None, torch.ones(1)):
        with pytest.raises(UnsupportedError, match="what lay in memory"):
            quantize_nvfp4(inputs(2, 32), encode, "linear", capability)

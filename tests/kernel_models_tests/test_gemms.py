"""mm_fp4 and bmm_fp8 through FlashInfer's functions, against plain products of decoded values."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_models.library import ModelLibrary
from torch import Tensor

flashinfer = pytest.importorskip("flashinfer", reason="flashinfer is not installed")

Quantize = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
PER_ROW_ALPHA = "per-token" in (inspect.getdoc(flashinfer.mm_fp4) or "")


@pytest.fixture
def operands(nvfp4: Quantize) -> Callable[..., tuple[dict[str, Any], Tensor]]:
    """`operands(backend, m, n, k)`: arguments as the backend wants them, and the expected product before alpha."""

    def make(backend: str, m: int = 9, n: int = 256, k: int = 192) -> tuple[dict[str, Any], Tensor]:
        a, a_scale, x = nvfp4(torch.randn(m, k))
        b, b_scale, w = nvfp4(torch.randn(n, k))
        if backend == "trtllm":
            b = flashinfer.shuffle_matrix_a(b, 128)
            b_scale = flashinfer.shuffle_matrix_sf_a(b_scale, 128).view(n, -1)
        else:
            b_scale = flashinfer.block_scale_interleave(b_scale).view(-(-n // 128) * 128, -1)
        a_scale = flashinfer.block_scale_interleave(a_scale).view(128, -1)
        call = {"a": a, "b": b.T, "a_descale": a_scale, "b_descale": b_scale.T, "alpha": torch.tensor([0.25])}
        return {**call, "backend": backend}, x.double() @ w.double().T

    return make


@pytest.mark.parametrize("backend", ["cutlass", "cudnn", "cute-dsl", "trtllm", "auto"])
def test_the_product(model_library: ModelLibrary, operands: Callable[..., Any], backend: str) -> None:
    call, product = operands(backend)
    out = flashinfer.mm_fp4(**call)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), product * 0.25, rtol=2**-8, atol=1e-3)
    assert out.float().std() > 0.1
    name, bound = model_library.calls[-1]
    assert name == "mm_fp4"
    assert bound.arguments["backend"] == backend


@pytest.mark.parametrize(
    ("backend", "wrong", "reason"),
    [
        ("cutlass", {"b": lambda t: t.contiguous()}, "column-major"),
        ("cutlass", {"alpha": lambda t: None}, "alpha is required"),
        ("trtllm", {"out_dtype": lambda _: torch.float16}, "bfloat16"),
        ("cute-dsl", {"a_descale": lambda t: t[:9].contiguous()}, "128x4 scale buffer"),
        ("cutlass", {"b_descale": lambda t: t.contiguous()}, "b_descale"),
        ("cutlass", {"a": lambda t: t.view(torch.int8)}, "packed into uint8"),
        ("cutlass", {"use_8x4_sf_layout": lambda _: True}, "8x4"),
        ("cute-dsl", {"alpha": lambda t: t.double()}, "alpha"),
    ],
)
def test_broken_contracts_are_refused(
    model_library: ModelLibrary, operands: Callable[..., Any], backend: str, wrong: dict[str, Any], reason: str
) -> None:
    call, _ = operands(backend)
    for name, change in wrong.items():
        call[name] = change(call.get(name))
    with pytest.raises(ValueError, match=reason):
        flashinfer.mm_fp4(**call)


@pytest.mark.parametrize(("backend", "n", "k"), [("cutlass", 144, 192), ("cute-dsl", 132, 192), ("cutlass", 256, 176)])
def test_sizes_a_backend_cannot_do(
    model_library: ModelLibrary, operands: Callable[..., Any], backend: str, n: int, k: int
) -> None:
    call, _ = operands(backend, n=n, k=k)
    with pytest.raises(ValueError, match=r"multiple of|N % 8"):
        flashinfer.mm_fp4(**call)


def test_a_float_for_alpha_is_refused(model_library: ModelLibrary, operands: Callable[..., Any]) -> None:
    call, _ = operands("cutlass")
    with pytest.raises(TypeError, match="alpha"):
        flashinfer.mm_fp4(**{**call, "alpha": 0.25})


@pytest.mark.parametrize("backend", ["cute-dsl", "auto"])
def test_an_alpha_for_each_row(model_library: ModelLibrary, operands: Callable[..., Any], backend: str) -> None:
    call, product = operands(backend)
    call["alpha"] = torch.rand(9) + 0.5
    if not PER_ROW_ALPHA:
        with pytest.raises(ValueError, match="alpha must be a scalar"):
            flashinfer.mm_fp4(**call)
        return
    out = flashinfer.mm_fp4(**call)
    torch.testing.assert_close(out.double(), product * call["alpha"][:, None], rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("backend", ["cutlass", "cudnn", "trtllm"])
def test_an_alpha_for_each_row_elsewhere(
    model_library: ModelLibrary, operands: Callable[..., Any], backend: str
) -> None:
    call, _ = operands(backend)
    with pytest.raises(ValueError, match="alpha"):
        flashinfer.mm_fp4(**{**call, "alpha": torch.rand(9)})


def test_8x4_activations_for_trtllm(model_library: ModelLibrary, operands: Callable[..., Any]) -> None:
    call, _ = operands("trtllm")
    x = torch.randn(9, 192).bfloat16()
    results = []
    for layout, rows_of_8 in ((flashinfer.SfLayout.layout_8x4, True), (flashinfer.SfLayout.layout_128x4, False)):
        call["a"], call["a_descale"] = flashinfer.nvfp4_quantize(x, torch.ones(1), sfLayout=layout)
        results.append(flashinfer.mm_fp4(**call, use_8x4_sf_layout=rows_of_8))
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize("mutation", ["nibbles", "linear scales", "no shuffle", "shuffle off by one"])
def test_a_wrong_layout_changes_the_result(model_library: ModelLibrary, nvfp4: Quantize, mutation: str) -> None:
    """Shapes that hide it: N a multiple of 128, K / 16 of 4, so that all layouts have as many bytes."""
    a, a_linear, _ = nvfp4(torch.randn(128, 256))
    w, w_linear, _ = nvfp4(torch.randn(128, 256))
    rows = decoding_rows(0)
    call = {
        "a": a,
        "b": w[rows].T,
        "a_descale": flashinfer.block_scale_interleave(a_linear).view(128, 16),
        "b_descale": flashinfer.block_scale_interleave(w_linear[rows].contiguous()).view(128, 16).T,
        "alpha": torch.ones(1),
        "backend": "trtllm",
    }
    right = flashinfer.mm_fp4(**call).float()
    if mutation == "nibbles":
        call["b"] = ((w[rows] >> 4) | (w[rows] << 4)).T
    elif mutation == "linear scales":
        call["a_descale"] = a_linear
    elif mutation == "no shuffle":
        call["b"] = w.T
    else:
        call["b"] = w[decoding_rows(1)].T
    wrong = flashinfer.mm_fp4(**call).float()
    assert (wrong - right).norm() / right.norm() > 0.05


def decoding_rows(off: int) -> Tensor:
    from flashinfer.utils import get_shuffle_matrix_a_row_indices

    return get_shuffle_matrix_a_row_indices(torch.zeros(128, 8), 128).roll(off)


def test_bmm_fp8(model_library: ModelLibrary) -> None:
    a = torch.randn(2, 5, 32).to(torch.float8_e4m3fn)
    b = torch.randn(2, 48, 32).to(torch.float8_e4m3fn).transpose(1, 2)
    scales = torch.tensor([0.5]), torch.tensor([0.25])
    out = flashinfer.bmm_fp8(a, b, *scales, torch.bfloat16)
    expected = a.double() @ b.double() / 8
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-4)
    with pytest.raises(ValueError, match="column-major"):
        flashinfer.bmm_fp8(a, b.contiguous(), *scales, torch.bfloat16)
    with pytest.raises(TypeError, match="A_scale"):
        flashinfer.bmm_fp8(a, b, 0.5, scales[1], torch.bfloat16)


def test_signatures_are_the_library_s(model_library: ModelLibrary, operands: Callable[..., Any]) -> None:
    call, _ = operands("cutlass")
    assert inspect.signature(flashinfer.mm_fp4) == inspect.signature(flashinfer.mm_fp4.real)
    with pytest.raises(TypeError, match="unexpected keyword"):
        flashinfer.mm_fp4(**call, output=None)
    assert not model_library.calls or model_library.calls[-1][0] != "mm_fp4"


@pytest.mark.parametrize("kind", ["nan", "wrong"])
@pytest.mark.parametrize("backend", ["cutlass", "cute-dsl", "trtllm"])
def test_faults_strike_one_tactic(
    model_library: ModelLibrary, operands: Callable[..., Any], backend: str, kind: Any
) -> None:
    call, _ = operands(backend, n=128, k=64)
    right = flashinfer.mm_fp4(**call)
    model_library.milliseconds[("fp4_gemm", 1)] = 0.5
    with flashinfer.autotune(True):
        assert torch.equal(flashinfer.mm_fp4(**call), right)
    assert {tactic for _, tactic, _ in model_library.profiled} >= {0, 1, 2}
    model_library.faults.add("fp4_gemm", kind, tactic=1, when=lambda num_tokens: num_tokens == 9)
    wrong = flashinfer.mm_fp4(**call)
    assert model_library.faults.hits == 1
    assert (wrong != right).sum() == 1
    model_library.faults.clear()
    assert torch.equal(flashinfer.mm_fp4(**call), right)


def test_a_fault_raises(model_library: ModelLibrary, operands: Callable[..., Any]) -> None:
    call, _ = operands("cutlass")
    model_library.faults.add("fp4_gemm", "raise")
    with pytest.raises(RuntimeError, match="tactic -1"):
        flashinfer.mm_fp4(**call)

"""Dense GEMMs below `flashinfer.mm_fp4` and `flashinfer.bmm_fp8`: what each backend may be handed, and the product.

Contracts: fp4_gemm_cutlass.cu, trtllm_gemm_runner.cu, `_cute_dsl_gemm_fp4_runner` and `CudnnFp4GemmRunner` in
gemm/gemm_base.py (0.7.2), and the docstring of `mm_fp4`. Not in the wheels, hence from its callers only: the K multiple
of the trtllm kernels (a block of four scales, 64) and cudnn's N and K multiples (taken as CUTLASS's 32).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .decoding import GROUP, Layout, decode_nvfp4, unshuffle_rows

TILE_K = 256
MULTIPLES = {  # backend -> (of N, of K)
    "cutlass": (32, 32),
    "cudnn": (32, 32),
    "cute-dsl": (8, 32),
    "trtllm": (128, 64),
}


def require(condition: object, message: str) -> None:
    if not condition:
        raise ValueError(message)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """[m, k] x [n, k] float32 -> a @ b.T in float32, tile after tile along k, as a GEMM's main loop adds."""
    total = torch.zeros(a.shape[0], b.shape[0])
    for start in range(0, a.shape[1], TILE_K):
        total += a[:, start : start + TILE_K] @ b[:, start : start + TILE_K].T
    return total


def fp4_weight(w: Tensor, scales: Tensor, backend: str) -> Tensor:
    """The backend's packed weight -> [n, k] float32 without its global scale."""
    if backend != "trtllm":
        return decode_nvfp4(w, scales, "128x4")
    shuffled = decode_nvfp4(w, scales, "128x4")  # codes and scales went through the same row shuffle
    return unshuffle_rows(shuffled)


def check_fp4_operands(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, alpha: Tensor | None, out: Tensor, backend: str
) -> None:
    """Raise ValueError where a kernel of `backend` would refuse or read other bytes than meant."""
    m, n, k = a.shape[0], b.shape[1], 2 * a.shape[1]
    of_n, of_k = MULTIPLES[backend]
    require(n % of_n == 0, f"{backend}: N must be a multiple of {of_n}, not {n}")
    require(k % of_k == 0, f"{backend}: K must be a multiple of {of_k}, not {k}")
    require(a.is_contiguous(), f"{backend}: a [m, k / 2] must be contiguous")
    require(b.T.is_contiguous(), f"{backend}: b must be the column-major view W[n, k / 2].T of a contiguous W")
    require(a_scale.is_contiguous(), f"{backend}: a_descale must be contiguous")
    require(b_scale.T.is_contiguous(), f"{backend}: b_descale must be the transposed view of a contiguous buffer")
    require(out.shape == (m, n) and out.is_contiguous(), f"{backend}: out must be a contiguous [{m}, {n}]")
    require(k // GROUP * GROUP == k, f"{backend}: K must be a multiple of {GROUP}")
    if alpha is None:
        require(backend != "cutlass", "cutlass: alpha is required")
    else:
        require(alpha.is_contiguous(), f"{backend}: alpha must be contiguous")


def mm_fp4(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    alpha: Tensor | None,
    out: Tensor,
    backend: str,
    a_layout: Layout = "128x4",
) -> None:
    """Write alpha * (a @ b) to `out`, rounded once; `alpha` has one element, or one for each row (cute-dsl)."""
    check_fp4_operands(a, b, a_scale, b_scale, alpha, out, backend)
    left = decode_nvfp4(a, a_scale, a_layout)
    product = matmul(left, fp4_weight(b.T, b_scale.T, backend))
    if alpha is not None:
        product = product * (alpha.reshape(-1, 1) if alpha.numel() > 1 else alpha.reshape(()))
    out.copy_(product)


def bmm_fp8(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, out: Tensor) -> None:
    """Write (a @ b) * a_scale * b_scale; a [b, m, k] row-major, b [b, k, n] column-major, E4M3; scales one float32."""
    require(a.dtype == torch.float8_e4m3fn == b.dtype, f"bmm_fp8: E4M3 operands expected, not {a.dtype} and {b.dtype}")
    require(a.ndim == b.ndim == 3, "bmm_fp8: A is [b, m, k] and B is [b, k, n]")
    require(a.shape[0] == b.shape[0] and a.shape[2] == b.shape[1], f"bmm_fp8: {tuple(a.shape)} x {tuple(b.shape)}")
    require(a.is_contiguous(), "bmm_fp8: A must be row-major")
    require(b.transpose(-2, -1).is_contiguous(), "bmm_fp8: B must be column-major")
    require(a.shape[2] % 16 == 0 and b.shape[2] % 16 == 0, "bmm_fp8: K and N must be multiples of 16")
    for name, scale in (("A_scale", a_scale), ("B_scale", b_scale)):
        require(scale.dtype == torch.float32 and scale.numel() == 1, f"bmm_fp8: {name} is one float32 element")
    scale = a_scale.reshape(()) * b_scale.reshape(())
    for batch in range(a.shape[0]):
        product = matmul(a[batch].float(), b[batch].T.float())
        out[batch].copy_(product * scale)

"""An independent reference of the formats: bit fields, sorted tables, written-out recipes, products in float64.

Formulas: OCP E4M3 and E2M1; ModelOpt's `nvfp4_tensor.py` and `fp8_tensor.py` for weights; the exact recipe of
FlashInfer's `quantization.cuh` for activations. Nothing here calls the code under test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from rollmill.quant import FP8, NVFP4, Scheme

FLOAT_MAX = torch.finfo(torch.float32).max
E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def e4m3_value(byte: int) -> float:
    """Sign, four exponent bits (bias 7), three mantissa bits; 0x7F and 0xFF are NaN, there is no infinity."""
    sign, exponent, mantissa = -1.0 if byte & 0x80 else 1.0, (byte >> 3) & 15, byte & 7
    if byte & 0x7F == 0x7F:
        return float("nan")
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


class Reference:
    """Every recipe as the documents write it; bytes are uint8, values float64, recipes float32."""

    e2m1_table = torch.tensor([*E2M1_MAGNITUDES, *(-v for v in E2M1_MAGNITUDES)], dtype=torch.float64)
    e4m3_table = torch.tensor([e4m3_value(byte) for byte in range(256)], dtype=torch.float64)

    def e2m1(self, x: Tensor) -> Tensor:
        """Codes: round to nearest, ties to the even code, saturating; the sign bit is the input's."""
        a = x.abs()
        ups = [a > 0.25, a >= 0.75, a > 1.25, a >= 1.75, a > 2.5, a >= 3.5, a > 5]
        return torch.stack(ups).sum(0) | (torch.signbit(x).long() << 3)

    def e4m3(self, x: Tensor) -> Tensor:
        """Bytes: the nearest of the 127 magnitudes, ties to the even byte, saturating at 448."""
        table, a = self.e4m3_table[:127], x.double().abs().clamp(max=448)
        above = torch.searchsorted(table, a)
        below = (above - 1).clamp(min=0)
        down, up = a - table[below], table[above] - a
        tie = torch.where(below % 2 == 0, below, above)
        nearest = torch.where(down < up, below, torch.where(up < down, above, tie))
        return (nearest | (torch.signbit(x).long() << 7)).to(torch.uint8)

    def e4m3_values(self, codes: Tensor) -> Tensor:
        return self.e4m3_table[codes.view(torch.uint8).long()]

    def pack(self, codes: Tensor) -> Tensor:
        """Low nibble = even k."""
        return (codes[..., 0::2] | (codes[..., 1::2] << 4)).to(torch.uint8)

    def e2m1_values(self, packed: Tensor) -> Tensor:
        pairs = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
        return self.e2m1_table[pairs.long()]

    def fp8_weight(self, weight: Tensor, scale: Tensor, *, bf16_quotient: bool) -> Tensor:
        """weight [N, K], float32 scale [N] -> bytes."""
        quotient = (weight.double() / scale.double()[:, None]).float()
        return self.e4m3(quotient.bfloat16() if bf16_quotient else quotient)

    def nvfp4_weight(self, weight: Tensor, scale_2: Tensor) -> tuple[Tensor, Tensor]:
        """ModelOpt: weight [N, K], float32 scale_2 [N] -> packed codes [N, K / 2], block scale bytes [N, K / 16]."""
        blocks = weight.float().reshape(weight.shape[0], -1, 16)
        scale = blocks.abs().amax(-1) / (6 * scale_2[:, None])
        scale = torch.where(scale == 0, 1.0, scale).clamp(2.0**-9, 448)
        scale_bytes = self.e4m3(scale)
        quotient = blocks / (self.e4m3_values(scale_bytes).float() * scale_2[:, None])[..., None]
        codes = (self.e2m1(quotient) & 7) | ((quotient < 0).long() << 3)  # ModelOpt's sign is x < 0
        return self.pack(codes.flatten(1)), scale_bytes

    def token_encode(self, amax: Tensor) -> Tensor:
        """FlashInfer's exact per-token encode scale: min(2688 / amax, FLT_MAX); FLT_MAX for zero."""
        quotient = (2688 / amax.double()).float()  # one rounding; torch would take 2688 * (1 / amax) in float32
        return torch.where(amax == 0, FLOAT_MAX, quotient.clamp(max=FLOAT_MAX))

    def nvfp4_activation(self, x: Tensor, encode: Tensor) -> tuple[Tensor, Tensor]:
        """FlashInfer's exact recipe: x [M, K], encode [M, 1] or scalar -> codes [M, K], scale bytes [M, K / 16]."""
        blocks = x.float().reshape(x.shape[0], -1, 16)
        amax = blocks.abs().amax(-1)
        sixth = torch.tensor(1 / 6, dtype=torch.float32)
        scale = torch.where(amax != 0, amax * (encode * sixth), 0.0)
        scale_bytes = self.e4m3(scale)
        out = 1 / (self.e4m3_values(scale_bytes).float() * (1 / encode))
        out = torch.where(amax != 0, out.clamp(max=FLOAT_MAX), 0.0)
        return self.e2m1(blocks * out[..., None]).flatten(1), scale_bytes

    def activation(self, x: Tensor, scheme: Scheme, input_scale: Tensor | None) -> Tensor:
        """x [M, K] as the GEMM of this scheme sees it, float64."""
        if scheme.activation == "none":
            return x.double()
        amax = x.float().abs().amax(-1, keepdim=True)
        if scheme.activation == "per_tensor":
            amax = amax.amax()
        if isinstance(scheme, NVFP4):
            encode = self.token_encode(amax) if input_scale is None else 1 / input_scale
            codes, scale_bytes = self.nvfp4_activation(x, encode)
            scale = encode.double().reciprocal() if input_scale is None else input_scale.double()
            blocks = self.e2m1_table[codes].unflatten(-1, (-1, 16)) * self.e4m3_values(scale_bytes)[..., None]
            return blocks.flatten(1) * scale
        scale = torch.where(amax > 0, amax / 448, 1.0) if input_scale is None else input_scale
        return self.e4m3_values(self.e4m3(x.float() / scale)) * scale.double()

    def weight(self, stored: Mapping[str, Tensor], rows: Sequence[int], scheme: Scheme) -> Tensor:
        """One stored unit -> float64 [N, K]."""
        if isinstance(scheme, NVFP4):
            blocks = self.e2m1_values(stored["weight"]).unflatten(-1, (-1, 16))
            values = (blocks * self.e4m3_values(stored["weight_scale"])[..., None]).flatten(1)
            return values * self.spread(stored["weight_scale_2"], rows).double()[:, None]
        per_row = isinstance(scheme, FP8) and scheme.per_channel
        scale = stored["weight_scale"] if per_row else self.spread(stored["weight_scale"], rows)
        return self.e4m3_values(stored["weight"]) * scale.double()[:, None]

    def spread(self, per_shard: Tensor, rows: Sequence[int]) -> Tensor:
        """One value a shard -> one a row."""
        return torch.cat([per_shard[shard].expand(count) for shard, count in enumerate(rows)])

    def linear(
        self, x: Tensor, stored: Mapping[str, Tensor], rows: Sequence[int], scheme: Scheme
    ) -> tuple[Tensor, Tensor]:
        """Fake-quantized x W^T in float64, and the sum of |x| |w| that bounds what float32 sums may lose."""
        outs, masses = [], []
        for shard, part in enumerate(self.weight(stored, rows, scheme).split(list(rows))):
            scale = stored["input_scale"][shard] if scheme.activation == "static" else None
            values = self.activation(x, scheme, scale)
            outs.append(values @ part.T)
            masses.append(values.abs() @ part.abs().T)
        return torch.cat(outs, dim=-1), torch.cat(masses, dim=-1)


@pytest.fixture(scope="session")
def ref() -> Reference:
    return Reference()


@pytest.fixture(scope="session")
def all_bf16() -> Tensor:
    """Every finite BF16 number, both signs, both zeros."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return patterns[patterns.isfinite()]


@pytest.fixture(scope="session")
def same_bytes() -> Callable[[Tensor, Tensor], bool]:
    """Equal dtype, shape and bits (so that -0.0 is not 0.0)."""

    def check(a: Tensor, b: Tensor) -> bool:
        same_kind = a.dtype == b.dtype and a.shape == b.shape
        return same_kind and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))

    return check


@pytest.fixture(scope="session")
def random_stored() -> Callable[..., dict[str, Tensor]]:
    """Stored tensors drawn code by code, so that every code and scale occurs; unequal scales a shard."""

    def make(scheme: Scheme, rows: Sequence[int], cols: int, *, units: int | None = None, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        lead = () if units is None else (units,)

        def integers(high: int, *shape: int) -> Tensor:
            return torch.randint(high, (*lead, *shape), generator=generator, dtype=torch.int32).to(torch.uint8)

        def scales(count: int) -> Tensor:
            return torch.rand(*lead, count, generator=generator) * 0.01 + 0.001

        num_rows = sum(rows)
        if isinstance(scheme, NVFP4):
            block_scale = integers(127, num_rows, cols // 16).view(torch.float8_e4m3fn)
            stored = {"weight": integers(256, num_rows, cols // 2), "weight_scale": block_scale}
            stored["weight_scale_2"] = scales(len(rows))
        else:
            magnitude, sign = integers(127, num_rows, cols), integers(2, num_rows, cols)
            stored = {"weight": (magnitude | (sign << 7)).view(torch.float8_e4m3fn)}
            per_row = isinstance(scheme, FP8) and scheme.per_channel
            stored["weight_scale"] = scales(num_rows if per_row else len(rows))
        if scheme.activation == "static":
            stored["input_scale"] = scales(1).expand(*lead, len(rows)).contiguous()
        return stored

    return make


@pytest.fixture(scope="session")
def tokens() -> Callable[..., Tensor]:
    """Activations [6, cols] with what breaks recipes: outliers, a zero row, a tiny row, a large row, zero blocks."""

    def make(cols: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
        x = torch.randn(6, cols, generator=torch.Generator().manual_seed(seed))
        x[:, 3] *= 30
        x[1] = 0
        x[2] *= 1e-6
        x[3] *= 1e4
        x[4, 16:48] = 0
        return x.to(dtype)

    return make

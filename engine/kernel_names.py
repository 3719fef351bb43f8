"""`KernelNames`: which kernels and runners were asked for by name, in the config or by a toggle."""

from __future__ import annotations

from msgspec import Struct

from ..quant import FP4_BACKENDS, NVFP4, Scheme
from .config import EngineConfig
from .env import Toggles


class KernelNames(Struct, frozen=True):
    """`nvfp4`: for linears in NVFP4 only, before `linear`. `batch_invariant`: of kernels that are, or none."""

    linear: str = "auto"
    moe: str = "auto"
    nvfp4: str | None = None
    batch_invariant: bool = False

    def of_linear(self, scheme: Scheme) -> str:
        """What a linear of this scheme asks for."""
        quantizes = isinstance(scheme, NVFP4) and scheme.activation != "none"
        return self.nvfp4 if self.nvfp4 is not None and quantizes else self.linear


def read_kernel_names(config: EngineConfig, toggles: Toggles) -> KernelNames:
    """Toggles override the config."""
    backend = toggles.fp4_gemm_backend
    return KernelNames(
        linear=toggles.linear_kernel or config.linear_kernel,
        moe=toggles.moe_runner or config.moe_runner,
        nvfp4=None if backend is None else FP4_BACKENDS[backend].name,
        batch_invariant=config.batch_invariant,
    )

"""Put the models under the installed FlashInfer: its Python runs, its CUDA does not."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from .calls import RecordedFunction
from .faults import Faults
from .launchers import NativeMoe
from .runners import NativeQuantization, fp4_runner, fp8_runner, native_cutlass, native_trtllm

FUNCTIONS = {  # module -> the functions that are recorded, where this version has them
    "flashinfer.gemm.gemm_base": ["mm_fp4", "bmm_fp8"],
    "flashinfer.quantization.fp4_quantization": [
        "nvfp4_quantize",
        "fp4_quantize",
        "block_scale_interleave",
        "shuffle_matrix_sf_a",
    ],
    "flashinfer.fused_moe.core": [
        "trtllm_fp4_block_scale_moe",
        "trtllm_fp4_block_scale_routed_moe",
        "trtllm_fp8_per_tensor_scale_moe",
        "trtllm_fp8_per_tensor_scale_routed_moe",
        "trtllm_fp8_per_channel_scale_moe",
        "trtllm_fp8_per_channel_scale_routed_moe",
    ],
}
MOVES_TO_CUDA = ("nvfp4_quantize",)  # calls `.cuda()` on what it is given
CUDNN = SimpleNamespace(backend_version=lambda: 91500)


class ModelLibrary:
    """FlashInfer on a device of compute capability `sm`, in software.

    Attributes: `calls`, a list of (name, BoundArguments) in order; `faults`; `gemm_tactics`, `moe_tactics`, the tactics
    that runners offer (change them in place); `profiled`, what the autotuner measured, as (op, tactic,
    number of tokens); `milliseconds`, settable: (op, tactic) -> the time it is told, 1.0 where unset (a MoE tactic as a
    tuple).
    """

    def __init__(self, sm: int = 100) -> None:
        self.sm = sm
        self.calls: list[tuple[str, inspect.BoundArguments]] = []
        self.faults = Faults()
        self.gemm_tactics: list[Any] = [0, 1, 2]
        self.moe_tactics: list[list[int]] = [[8, 0], [8, 1], [16, 0]]
        self.profiled: list[tuple[str, Any, int]] = []
        self.milliseconds: dict[tuple[str, Any], float] = {}

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Patch the real module until the end of the test; other patches of the test may follow."""
        gemm, quantization, moe = (importlib.import_module(name) for name in FUNCTIONS)
        self.patch_device(monkeypatch)
        self.patch_autotuner(monkeypatch)
        self.patch_quantization(monkeypatch, quantization)
        self.patch_gemms(monkeypatch, gemm)
        self.patch_moe(monkeypatch, moe)
        self.record(monkeypatch)

    def patch_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What the library asks a device or the CUDA toolkit."""
        from packaging.version import Version

        answers = {
            "get_compute_capability": lambda device: divmod(self.sm, 10),
            "device_support_pdl": lambda device: self.sm >= 90,
            "get_cuda_version": lambda: Version("13.0"),
        }
        for module in library_modules():
            for name, answer in answers.items():
                if name in vars(module):
                    monkeypatch.setattr(module, name, answer)

    def patch_autotuner(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A fresh autotuner; under `autotune(True)` it runs each tactic once and is told a time."""
        from flashinfer.autotuner import AutoTuner

        monkeypatch.setattr(AutoTuner, "_instance", None)
        real_choose = AutoTuner.choose_one

        def choose_one(tuner: Any, custom_op: str, *args: Any, **kwargs: Any) -> Any:
            tuner.model_op = custom_op
            return real_choose(tuner, custom_op, *args, **kwargs)

        def profile(tuner: Any, runner: Any, inputs: list[Any], tactic: Any, *args: Any, **kwargs: Any) -> float:
            kwargs.pop("input_tensor_batches", None)
            runner(inputs, tactic=tactic, **kwargs)
            self.profiled.append((tuner.model_op, tactic, len(inputs[0])))
            key = tuple(tactic) if isinstance(tactic, list) else tactic
            return self.milliseconds.get((tuner.model_op, key), 1.0)

        monkeypatch.setattr(AutoTuner, "choose_one", choose_one)
        monkeypatch.setattr(AutoTuner, "_profile_single_kernel", profile)
        monkeypatch.setattr(AutoTuner, "_get_l2_cache_size_in_bytes", lambda *_, **__: 1)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def patch_quantization(self, monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
        native = NativeQuantization(self.sm)
        for name in vars(module).copy():
            if name.startswith("gen_fp4_quantization_sm"):
                monkeypatch.setattr(module, name, lambda: JitSpec(native))
        load = functools.cache(module.get_fp4_quantization_module.__wrapped__)
        for owner in library_modules():
            if (
                vars(owner).get("get_fp4_quantization_module") is module.get_fp4_quantization_module
                and owner is not module
            ):
                monkeypatch.setattr(owner, "get_fp4_quantization_module", load)
        monkeypatch.setattr(module, "get_fp4_quantization_module", load)

    def patch_gemms(self, monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
        from flashinfer.autotuner import TunableRunner

        tactics, faults = self.gemm_tactics, self.faults
        cutlass = module._create_cutlass_fp4_gemm_module(native_cutlass(tactics, faults), "model", "model")
        patch = functools.partial(monkeypatch.setattr, module)
        patch("get_cutlass_fp4_gemm_module", lambda major, minor: cutlass)
        patch("gen_trtllm_gen_gemm_module", lambda *_, **__: JitSpec(native_trtllm(tactics, faults)))
        patch("setup_cubin_loader", lambda path: None)
        patch("get_trtllm_gemm_module", self.trtllm_gemm_module(module))
        patch("_cute_dsl_gemm_fp4_runner", lambda *_: fp4_runner(TunableRunner, "cute-dsl", tactics, faults))
        patch("_cudnn_gemm_fp4_runner", lambda *_: fp4_runner(TunableRunner, "cudnn", tactics, faults))
        for name in ("_check_cute_dsl_availability", "_check_cute_dsl_arch", "_check_cudnn_fp4_availability"):
            monkeypatch.setattr(module, name, lambda *_: None, raising=False)
        patch("DEFAULT_WORKSPACE_SIZE", 1024)  # the autotuner fills a copy of it for each profile
        patch("CUDNN_AVAILABLE", True)
        monkeypatch.setattr(module, "cudnn", CUDNN, raising=False)
        fp8 = SimpleNamespace(
            cublas_fp8_gemm_runner=lambda: fp8_runner(TunableRunner, tactics, faults),
            cutlass_fp8_gemm_runner=lambda: fp8_runner(TunableRunner, tactics, faults),
        )
        patch("get_gemm_module", lambda: fp8)
        patch("get_gemm_sm100_module_cutlass_fp8", lambda: fp8)
        patch("get_gemm_sm120_module_cutlass_fp8", lambda: fp8)
        patch("_cudnn_gemm_fp8_runner", fp8.cublas_fp8_gemm_runner)

    def trtllm_gemm_module(self, module: Any) -> Any:
        """0.7.2 caches by the kind of GPU, 0.6.11 once: neither cache is to outlive the test."""
        if hasattr(module, "_get_trtllm_gemm_module_impl"):
            return functools.cache(lambda: module._get_trtllm_gemm_module_impl.__wrapped__(False))
        return functools.cache(module.get_trtllm_gemm_module.__wrapped__)

    def patch_moe(self, monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
        from flashinfer import tllm_enums

        method_names = {int(member): member.name for member in tllm_enums.RoutingMethodType}
        native = NativeMoe(self.moe_tactics, self.faults, method_names)
        monkeypatch.setattr(module, "gen_trtllm_gen_fused_moe_sm100_module", lambda *_, **__: JitSpec(native))
        monkeypatch.setattr(module, "setup_cubin_loader", lambda path: None)
        if hasattr(module, "_get_trtllm_moe_sm100_module_impl"):
            load = functools.cache(lambda: module._get_trtllm_moe_sm100_module_impl.__wrapped__(False))
        else:
            load = functools.cache(module.get_trtllm_moe_sm100_module.__wrapped__)
        monkeypatch.setattr(module, "get_trtllm_moe_sm100_module", self.on_blackwell(load))

    def on_blackwell(self, load: Any) -> Any:
        def get() -> Any:
            if self.sm // 10 not in (10, 12):
                raise ValueError(f"the fused MoE requires sm10x or sm12x, not sm{self.sm}")
            return load()

        return get

    def record(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every name in the library that holds one of FUNCTIONS holds its recorded form."""
        from flashinfer import tllm_enums

        for module_name, names in FUNCTIONS.items():
            module = importlib.import_module(module_name)
            for name in names:
                real = getattr(module, name, None)
                if real is None:
                    continue
                recorded = RecordedFunction(real, self.calls, tllm_enums)
                if name in MOVES_TO_CUDA:
                    recorded.around = cuda_is_here
                for owner in library_modules():
                    for alias in [a for a, held in vars(owner).items() if held is real]:
                        monkeypatch.setattr(owner, alias, recorded)


class JitSpec:
    """A compiled module that needs no compiler."""

    def __init__(self, native: Any) -> None:
        self.native = native

    def build_and_load(self) -> Any:
        return self.native

    def get_library_path(self) -> str:
        return "model"

    def get_library_paths(self) -> list[str]:
        return []


def library_modules() -> list[Any]:
    names = [name for name in sys.modules if name == "flashinfer" or name.startswith("flashinfer.")]
    return [sys.modules[name] for name in names if sys.modules[name] is not None]


@contextlib.contextmanager
def cuda_is_here() -> Iterator[None]:
    """`Tensor.cuda()` returns the tensor itself, for the length of one library call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "cuda", lambda self, *_, **__: self)
        yield

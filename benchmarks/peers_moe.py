"""SGLang's and vLLM's fused MoE, where they can be imported, on the weights and tokens of `gpu_moe.py --peers`.

Neither needs to be installed with all that it depends on: what a peer imports and does not call here is replaced by
empty modules. Their Triton kernels have no tiles for this shape on this GPU, so their default is timed and the best of
`CANDIDATES`, handed over by their own `override_config`. Marlin chooses its tiles itself.

    python benchmarks/peers_moe.py sglang|vllm PART PARTS    compiles a part of the candidates, for a cache on disk
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from msgspec import Struct
from torch import Tensor

NEVER_EMPTY = (  # what the peers look for in order to choose a path, or really use
    *("sglang", "vllm", "sgl_kernel", "torch", "triton", "transformers", "numpy", "rollmill", "amdsmi", "libtpu"),
    *("tpu_inference", "intel_extension_for_pytorch", "triton_kernels", "aiter", "deep_gemm", "flashinfer"),
    *("flashinfer_cubin", "deep_ep", "mori", "nixl_ep", "flash_attn", "pplx_kernels", "runai_model_streamer"),
    *("petit_kernel", "torchada", "quark", "pandas", "mooncake", "nixl", "tilelang", "cutlass", "quack"),
)
Call = Callable[[Tensor, Tensor, Tensor], Tensor]  # x, ids int32, weights float32
Tile = dict[str, int]
PROCESSES = 12


class Peer(Struct):
    """One peer's layer: `tune` puts a tile in force, None its default; without it there is nothing to tune."""

    name: str
    call: Call
    tune: Callable[[Tile | None], AbstractContextManager[Any]] | None = None


class EmptyClass(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __or__(cls, other: Any) -> Any:
        return cls

    __ror__ = __getitem__ = __or__

    def __bool__(cls) -> bool:
        return False


class Anything(metaclass=EmptyClass):
    """A class to inherit from, a decorator that changes nothing, a function without a result."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return args[0] if cls is Anything and len(args) == 1 and callable(args[0]) else object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return getattr(Anything, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) else self


class EmptyModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return getattr(Anything, name)


class EmptyModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The last finder: for absent packages that a peer's own module asks for."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        parent = fullname.rpartition(".")[0]
        if fullname.partition(".")[0] in NEVER_EMPTY:
            return None
        if not isinstance(sys.modules.get(parent), EmptyModule) and _asker() not in ("sglang", "vllm", "sgl_kernel"):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = EmptyModule(spec.name)
        vars(module).update(__path__=[], __version__="0")
        return module

    def exec_module(self, module: ModuleType) -> None: ...


def _asker() -> str:
    """The package whose code imports something right now."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("importlib"):
        frame = frame.f_back
    return frame.f_globals.get("__name__", "").partition(".")[0]


def _candidates(large: bool) -> Iterator[Tile]:
    """Tiles as both peers name them: for few tokens an expert, or for many."""
    if large:
        tiles = itertools.product((64, 128), (128, 256), (128,), (1, 16), (4, 8), (3, 4))
    else:
        tiles = itertools.product((16, 32), (64, 128), (128, 256), (1,), (4,), (3, 4))
    for m, n, k, group, warps, stages in tiles:
        if (m + n) * k * stages <= 220 * 1024 and 1024 <= m * n // warps * 4 <= 32 * 1024 and m * n <= 4096 * warps:
            tile = {"BLOCK_SIZE_M": m, "BLOCK_SIZE_N": n, "BLOCK_SIZE_K": k, "GROUP_SIZE_M": group}
            yield {**tile, "num_warps": warps, "num_stages": stages}


CANDIDATES = {large: list(_candidates(large)) for large in (False, True)}


def sglang_fp8(stored: Sequence[dict[str, Tensor]]) -> Peer:
    """Stored FP8 with a scale a row: `fused_experts_impl`, activations per token."""
    server = EmptyModule("sglang.srt.server_args")
    asked = SimpleNamespace(enable_deterministic_inference=False, enable_fused_moe_sum_all_reduce=False)
    vars(server)["get_global_server_args"] = lambda: asked  # all that its kernels ask for
    sys.modules[server.__name__] = server
    kernels = importlib.import_module("sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe")
    tuning = importlib.import_module("sglang.srt.layers.moe.moe_runner.triton_utils")
    # its own one compiles at run time
    vars(kernels)["silu_and_mul"] = importlib.import_module("sgl_kernel").silu_and_mul
    arguments = _fp8_arguments(stored)

    def call(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return kernels.fused_experts_impl(
            x, arguments["w1"], arguments["w2"], weights, ids, use_fp8_w8a8=True, per_channel_quant=True,
            w1_scale=arguments["w1_scale"], w2_scale=arguments["w2_scale"], filter_expert=False,
        )  # fmt: skip

    name = f"SGLang {importlib.import_module('sglang.version').__version__} Triton"
    return Peer(name, call, lambda tile: nullcontext() if tile is None else tuning.override_config(tile))


def vllm_fp8(stored: Sequence[dict[str, Tensor]]) -> Peer:
    """The same for vLLM."""
    kernels = importlib.import_module("vllm.model_executor.layers.fused_moe.fused_moe")
    tuning = importlib.import_module("vllm.model_executor.layers.fused_moe")
    arguments = _fp8_arguments(stored)

    def call(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return kernels.fused_experts_impl(
            x, arguments["w1"], arguments["w2"], weights, ids, inplace=False, use_fp8_w8a8=True,
            per_channel_quant=True, w1_scale=arguments["w1_scale"], w2_scale=arguments["w2_scale"],
        )  # fmt: skip

    def tune(tile: Tile | None) -> AbstractContextManager[Any]:
        return nullcontext() if tile is None else tuning.override_config({**tile, "SPLIT_K": 1})

    return Peer(f"vLLM {importlib.import_module('vllm.version').__version__} Triton", call, tune)


def vllm_nvfp4(stored: Sequence[dict[str, Tensor]]) -> Peer:
    """Stored NVFP4, activations in BF16: Marlin."""
    marlin = importlib.import_module("vllm.model_executor.layers.fused_moe.experts.marlin_moe")
    prepare = importlib.import_module("vllm.model_executor.layers.quantization.utils.marlin_utils_fp4")
    quant_type = importlib.import_module("vllm.scalar_type").scalar_types.float4_e2m1f.id
    w13, w2 = stored
    experts, hidden, half = w2["weight"].shape
    layer = SimpleNamespace(num_experts=experts, hidden_size=hidden, intermediate_size_per_partition=2 * half)
    layer.params_dtype = torch.bfloat16
    weights13 = (w13["weight"], w13["weight_scale"], w13["weight_scale_2"][:, 0].contiguous())
    weights2 = (w2["weight"], w2["weight_scale"], w2["weight_scale_2"][:, 0].contiguous())
    made = prepare.prepare_nvfp4_moe_layer_for_marlin(layer, *weights13, *weights2, is_act_and_mul=True)
    q13, s13, g13, q2, s2, g2 = made

    def call(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return marlin.fused_marlin_moe(
            x, q13, q2, None, None, s13, s2, weights, ids, quant_type_id=quant_type, global_num_experts=experts,
            global_scale1=g13, global_scale2=g2, workspace=layer.workspace,
        )  # fmt: skip

    return Peer(f"vLLM {importlib.import_module('vllm.version').__version__} Marlin", call)


def _fp8_arguments(stored: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    (w1, s1), (w2, s2) = ((s["weight"], s["weight_scale"][..., None].contiguous()) for s in stored)
    return {"w1": w1, "w1_scale": s1, "w2": w2, "w2_scale": s2}


# vLLM first: what SGLang's imports leave behind keeps vLLM's from working
PEERS = {"fp8": (vllm_fp8, sglang_fp8), "nvfp4": (vllm_nvfp4,)}


def find_peers(scheme: str, stored: Sequence[dict[str, Tensor]]) -> list[Peer]:
    """The peers that can be imported; why others cannot is printed."""
    if not any(isinstance(finder, EmptyModules) for finder in sys.meta_path):
        sys.meta_path.append(EmptyModules())
    found = []
    for make in PEERS[scheme]:
        try:
            found.append(make(stored))
        except (ImportError, OSError, AttributeError, RuntimeError, TypeError) as error:
            print(f"no {make.__name__}: {error!r:.300}", flush=True)
    return found


def compile_candidates() -> None:
    """Fill Triton's cache from several processes, each with a part of the candidates; one that fails is no loss."""
    for name in ("sglang", "vllm"):
        commands = [[sys.executable, __file__, name, str(part), str(PROCESSES)] for part in range(PROCESSES)]
        running = [
            subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for command in commands
        ]
        print(f"{name}: tiles compiled, exit codes", [process.wait() for process in running], flush=True)


def _compile_part(name: str, part: int, parts: int) -> None:
    from gpu_moe import SCHEMES, Layer, asked

    make = {"sglang": sglang_fp8, "vllm": vllm_fp8}[name]
    sys.meta_path.append(EmptyModules())
    peer = make(Layer(SCHEMES["fp8"]).stored)
    assert peer.tune is not None
    for large, tokens in ((False, 32), (True, 2048)):
        x, ids, weights = asked(tokens)
        for tile in CANDIDATES[large][part::parts]:
            try:
                with peer.tune(tile):
                    peer.call(x, ids.int(), weights)
            except Exception as error:  # a tile that does not fit
                print(tile, error)


if __name__ == "__main__":
    _compile_part(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

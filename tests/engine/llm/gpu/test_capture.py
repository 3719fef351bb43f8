"""A CUDA graph can hold a decoding step: nothing in it waits for the GPU to tell a value or a size.

How this is checked: on a CPU every torch operation passes a guard, which refuses those that torch itself marks as
reading data (`item`, `bool`, `equal`) or as sized by it (`nonzero`, boolean masks), and copies of Python data to a
tensor, which on a GPU wait. The choices that code makes for a GPU are forced, and kernels run in the interpreter. On a
GPU the same calls are captured and replayed with new inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rollmill.engine.llm.layers.rope import rotary
from rollmill.moe import MoeConfig, route
from rollmill.moe.runners.reference import expert_shapes
from rollmill.moe.runners.triton import TritonRunner
from rollmill.quant import BF16, FP8, NVFP4, Capability, QuantLinear, Scheme, WeightShape

pytest.importorskip("triton", reason="triton is not installed")

from rollmill.engine.llm.gpu.norms import add_rms_norm, add_rms_norm_quantize_fp8  # noqa: E402
from rollmill.engine.llm.gpu.qkv import norm_rope_write  # noqa: E402
from rollmill.engine.llm.gpu.silu import silu_and_mul_quantize_fp8  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HOPPER = Capability(DEVICE, 90, ("triton",))
CONFIG = MoeConfig(num_experts=4, top_k=2, hidden_size=256, intermediate_size=256)
TOKENS, HIDDEN, ROWS = 3, 256, (64, 32, 32)
Step = Callable[[torch.Tensor], torch.Tensor]  # BF16 [TOKENS, HIDDEN] -> what is compared


class SizesAndValues(TorchDispatchMode):
    """Refuses operations that torch marks as waiting for data."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            raise AssertionError(f"{func} waits for the GPU")
        return func(*args, **(kwargs or {}))


class PythonData(TorchFunctionMode):
    """Refuses calls that turn Python data into a tensor, or back."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.tensor, torch.as_tensor, torch.Tensor.tolist):
            raise AssertionError(f"{func} waits for the GPU")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting() -> Iterator[None]:
    """On a GPU torch itself looks out, too."""
    with SizesAndValues(), PythonData():
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            if DEVICE.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "read",
    [
        bool,
        float,
        lambda x: torch.equal(x, x),
        torch.nonzero,
        lambda x: x[x > 0],
        torch.Tensor.tolist,
        lambda x: torch.tensor([1.0]),
    ],
    ids=["bool", "float", "equal", "nonzero", "boolean mask", "to Python data", "from Python data"],
)
def test_the_guard_refuses(read: Callable[[torch.Tensor], object]):
    x = torch.ones(())
    with no_waiting(), pytest.raises(AssertionError, match="waits for the GPU"):
        read(x)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * scale).bfloat16()


def linear(scheme: FP8 | NVFP4, kernel: str) -> Step:
    layer = QuantLinear(["q", "k", "v"], ROWS, HIDDEN, scheme, capability=HOPPER, dtype=torch.bfloat16, kernel=kernel)
    shape = WeightShape(ROWS, HIDDEN)
    stored = scheme.quantize(random(*shape.matrix, scale=0.05), shape)
    if scheme.activation == "static":
        stored["input_scale"] = torch.full((len(ROWS),), 0.01)
    scales = {name: stored[name] for name in scheme.scales(shape)}
    packed = layer.kernel.prepare({name: stored[name] for name in scheme.matrices(shape)})
    layer.slot.commit(packed | layer.kernel.derive(scales), scales, {"weight": 1})
    return layer


def experts(scheme: Scheme) -> Step:
    runner, packed = TritonRunner(CONFIG, scheme, HOPPER, torch.bfloat16), []
    for shape, kernel in zip(expert_shapes(CONFIG), (runner.w13, runner.w2), strict=True):
        stored = scheme.quantize(random(*shape.matrix, scale=0.05), shape)
        made = kernel.prepare({name: stored[name] for name in scheme.matrices(shape)})
        made |= kernel.derive({name: stored[name] for name in scheme.scales(shape)})
        packed.append({name: value.to(DEVICE) for name, value in made.items()})
    router = random(CONFIG.num_experts, HIDDEN).to(DEVICE)
    return lambda x: runner.apply(x, *route(x @ router.t(), CONFIG), *packed)


def embedding() -> Step:
    table = random(16, HIDDEN).to(DEVICE)
    return lambda x: F.embedding(x[:, 0].abs().long().clamp(max=15), table)


def fused() -> Step:
    """Everything between the linears of a layer."""
    weight, head, inv_freq = random(HIDDEN).to(DEVICE), random(32).to(DEVICE), torch.ones(16, device=DEVICE)
    slots, cache = torch.arange(TOKENS, device=DEVICE), torch.zeros(2, 8, 2, 32, dtype=torch.bfloat16, device=DEVICE)

    def step(x: torch.Tensor) -> torch.Tensor:
        turn = rotary(inv_freq, 1.0, slots, torch.bfloat16)
        q = norm_rope_write(x, (head, head), 1e-6, "rms", turn, slots, *cache, 4).flatten(1)
        total, out = add_rms_norm(x, x, weight, 1e-6, "rms")
        _, _, codes, scale = add_rms_norm_quantize_fp8(total, out, weight, 1e-6, "rms")
        gated, gated_scale = silu_and_mul_quantize_fp8(out)
        parts = [q, *cache.sum(1).flatten(1)[None].expand(TOKENS, -1, -1).unbind(1), codes, scale[:, None], gated]
        return torch.cat([part.float() for part in [*parts, gated_scale[:, None]]], dim=-1)

    return step


STEPS: dict[str, Callable[[], Step]] = {
    "torch_fp8 per token": lambda: linear(FP8(), "torch_fp8"),
    "torch_fp8 per tensor": lambda: linear(FP8(activation="per_tensor"), "torch_fp8"),
    "torch_fp8 static": lambda: linear(FP8(activation="static"), "torch_fp8"),
    "triton_fp8 per token": lambda: linear(FP8(), "triton_fp8"),
    "triton_fp8 static": lambda: linear(FP8(activation="static"), "triton_fp8"),
    "exact fp8 per token": lambda: linear(FP8(), "exact"),
    "exact fp8 static": lambda: linear(FP8(activation="static"), "exact"),
    "exact nvfp4 per token": lambda: linear(NVFP4(), "exact"),
    "exact nvfp4 static": lambda: linear(NVFP4(activation="static"), "exact"),
    "exact nvfp4 per tensor": lambda: linear(NVFP4(activation="per_tensor"), "exact"),
    "exact nvfp4 w4a16": lambda: linear(NVFP4(activation="none"), "exact"),
    "experts bf16": lambda: experts(BF16),
    "experts fp8": lambda: experts(FP8()),
    "experts nvfp4_w4a16": lambda: experts(NVFP4(activation="none")),
    "experts nvfp4 per token": lambda: experts(NVFP4()),
    "triton_nvfp4 w4a16": lambda: linear(NVFP4(activation="none"), "triton_nvfp4"),
    "triton_nvfp4 per token": lambda: linear(NVFP4(), "triton_nvfp4"),
    "triton_nvfp4 static": lambda: linear(NVFP4(activation="static"), "triton_nvfp4"),
    "embedding": embedding,
    "fused": fused,
}
steps = pytest.mark.parametrize("make", STEPS.values(), ids=STEPS.keys())


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    """The branches that code takes for a GPU, but for the assembly of NVFP4 experts, which no interpreter reads."""
    if DEVICE.type == "cuda":
        return
    for module in ("rollmill.quant.kernels.activation", "rollmill.moe.routing"):
        monkeypatch.setattr(f"{module}.has_kernels", lambda x: True)


@pytest.mark.usefixtures("as_on_a_gpu")
@steps
def test_no_step_waits_for_the_gpu(make: Callable[[], Step]):
    step, x = make(), random(TOKENS, HIDDEN).to(DEVICE)
    expected = step(x)
    with no_waiting():
        found = step(x)
    assert torch.equal(found, expected)


@pytest.mark.gpu
@steps
def test_a_captured_step_replays_with_new_inputs(make: Callable[[], Step]):
    if DEVICE.type == "cpu":
        pytest.skip("torch sees no GPU")
    step, x, new = make(), random(TOKENS, HIDDEN).to(DEVICE), random(TOKENS, HIDDEN, seed=5, scale=3.0).to(DEVICE)
    expected = step(new).clone()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(x)
    x.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, expected)

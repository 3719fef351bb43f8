"""Repairs of Triton's interpreter, so that kernels compute on a CPU what they compute on a GPU.

Its float casts (3.6.0) truncate or round ties up; they go through torch here. Its products of BF16 tiles multiply the
bits; they are widened to float32. Its fused multiply-add rounds twice; here the product is exact. NumPy 2.4 refuses
int() of an array with one element, which its loops rely on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

BITS = {8: (np.uint8, torch.uint8), 16: (np.uint16, torch.int16), 32: (np.uint32, torch.int32)}
FLOATS = {
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
}


def repair_interpreter() -> None:
    """Patch the interpreter of the installed Triton, before a kernel runs; a second call changes nothing."""
    from triton.runtime import interpreter as found

    interpreter: Any = found
    if hasattr(interpreter, "_rollmill_repaired"):
        return
    interpreter._rollmill_repaired = True

    original_cast = interpreter._convert_float
    original_dot = interpreter.InterpreterBuilder.create_dot
    original_lang = interpreter._patch_lang_tensor

    def cast(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source.name not in FLOATS or target.name not in FLOATS:
            return original_cast(data, source, target, rounding)
        values = _as_torch(data, source.primitive_bitwidth).view(FLOATS[source.name])
        if target.name == "fp8e4nv":
            values = values.float().clamp(-448, 448)
        numpy_type, torch_type = BITS[target.primitive_bitwidth]
        return values.to(FLOATS[target.name]).view(torch_type).numpy().view(numpy_type).reshape(data.shape)

    def dot(self: Any, a: Any, b: Any, c: Any, *rest: Any) -> Any:
        if "bf16" not in (a.dtype.scalar.name, b.dtype.scalar.name):
            return original_dot(self, a, b, c, *rest)
        wide = [_as_torch(x.data, 16).view(torch.bfloat16).float().numpy().reshape(x.data.shape) for x in (a, b)]
        return interpreter.TensorHandle(np.matmul(*wide, dtype=np.float32) + c.data, c.dtype.scalar)

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        exact = x.data.astype(np.float64) * y.data + z.data  # the product of two float32 is exact in float64
        return interpreter.TensorHandle(exact.astype(x.data.dtype), x.dtype.scalar)

    def patch_tensor(tensor: Any, scope: Any) -> None:
        original_lang(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))

    interpreter._convert_float = cast
    interpreter.InterpreterBuilder.create_dot = dot
    interpreter.InterpreterBuilder.create_fma = fma
    interpreter._patch_lang_tensor = patch_tensor


def _as_torch(data: Any, bits: int) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(data).view(BITS[bits][0]).astype(BITS[bits][0])).view(BITS[bits][1])

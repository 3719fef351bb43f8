"""What a call to FlashInfer is asked before the library sees it, and the record of it.

Our own rules on top of the library's: enum members where it has an enum (0.7.2 renumbered them), tensors where a kernel
reads one (a Python float would be frozen into a CUDA graph), declared scale layouts.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from enum import IntEnum
from typing import Any

from torch import Tensor

ENUM_ARGUMENTS = {
    "routing_method_type": "RoutingMethodType",
    "activation_type": "ActivationType",
    "sfLayout": "SfLayout",
    "hidden_states_scale_layout": "SfLayout",
}


class RecordedFunction:
    """A library function behind these rules: its signature, its attributes, `calls` filled with (name, BoundArguments).

    Calls that the library makes to itself pass untouched.
    """

    def __init__(self, real: Any, calls: list[tuple[str, inspect.BoundArguments]], enums: Any) -> None:
        self.real, self.calls, self.enums = real, calls, enums
        self.__name__, self.__doc__ = real.__name__, real.__doc__
        self.__signature__ = inspect.signature(real)
        self.__wrapped__ = real
        self.around: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if RecordedFunction.inside:
            return self.real(*args, **kwargs)
        bound = self.__signature__.bind(*args, **kwargs)
        check_enums(bound, self.enums)
        check_tensors(bound, self.__signature__)
        check_declared_layout(bound, self.__signature__)
        self.calls.append((self.__name__, bound))
        RecordedFunction.inside = True
        try:
            with self.around():
                return self.real(*args, **kwargs)
        finally:
            RecordedFunction.inside = False

    inside = False


def check_enums(bound: inspect.BoundArguments, enums: Any) -> None:
    for name, value in bound.arguments.items():
        if name not in ENUM_ARGUMENTS or value is None:
            continue
        enum: type[IntEnum] = getattr(enums, ENUM_ARGUMENTS[name])
        if not isinstance(value, enum):
            raise TypeError(
                f"{name}={value!r}: pass a member of {enum.__name__}, whose numbers change between versions"
            )


def check_tensors(bound: inspect.BoundArguments, signature: inspect.Signature) -> None:
    for name, value in bound.arguments.items():
        annotation = str(signature.parameters[name].annotation)
        if "Tensor" in annotation and isinstance(value, bool | int | float):
            raise TypeError(f"{name}={value!r}: a kernel reads a tensor there")


def check_declared_layout(bound: inspect.BoundArguments, signature: inspect.Signature) -> None:
    name = "hidden_states_scale_layout"
    if name not in signature.parameters or not isinstance(bound.arguments.get("hidden_states_scale"), Tensor):
        return
    if bound.arguments.get(name) is None:
        raise ValueError(f"{name} must be declared: to omit it is deprecated, and 128x4 would be read as linear")

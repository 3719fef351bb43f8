"""`Transformer`: a diffusers model whose linears are kernels and whose other tensors are slots."""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...quant import (
    Capability,
    ConfigError,
    ModelError,
    Plain,
    Scheme,
    SiblingLinears,
    UnsupportedError,
    WeightShape,
    WeightSlot,
)
from ...quant.linear import plain_slot
from ..kernel_names import KernelNames
from ..schemes import SchemeResolver
from .groups import is_linear, sibling_linears
from .linears import Linears
from .slot_linear import Apply, PrecisionSwitch, SlotLinear

if TYPE_CHECKING:
    from .gpu.forward import FusedForward

__all__ = ["PrecisionSwitch", "Transformer", "transformer_class"]


class Transformer:
    """One diffusers transformer over slots. `name` is its component of the pipeline: it begins all slot names.

    `module` is the diffusers model itself, to be called as diffusers calls it; `twins`: the BF16 copies of `dual`.
    """

    def __init__(
        self,
        name: str,
        config: Mapping[str, Any],
        resolver: SchemeResolver,
        switch: PrecisionSwitch,
        *,
        capability: Capability,
        dtype: torch.dtype,
        names: KernelNames | None = None,
        dual: bool = False,
        fp8_attention: bool = False,
    ) -> None:
        self.name, self.config, self.resolver, self.switch = name, dict(config), resolver, switch
        self.capability, self.dtype, self.names, self.dual = capability, dtype, names or KernelNames(), dual
        self.slots: list[WeightSlot] = []
        self.linears: dict[tuple[str, ...], Linears] = {}  # by their names in the model
        self.twins: dict[WeightSlot, WeightSlot] = {}
        self.module = empty_model(config)
        wide = getattr(self.module, "_keep_in_fp32_modules", None) or ()
        self._wide = frozenset([wide] if isinstance(wide, str) else wide)
        self._fused: FusedForward | None = None
        self._refused: dict[str, str] = {}  # module -> why it cannot be quantized
        self._quants: set[str] = set()  # formats of the quantized layers
        self._no_weight_only: str | None = None  # why one of them cannot
        for group, fused in list(sibling_linears(self.module)):
            for members in self._alike(group):
                self._replace(members, fused if len(members) == len(group) else None)
        self._bind_rest()
        self._check_refused()
        if fp8_attention:
            self._use_fp8_attention()
        for module in self.module.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                _compute_sample_by_sample(module)

    def _use_fp8_attention(self) -> None:
        from .gpu.fp8_processor import use_fp8_attention

        use_fp8_attention(self.module, self.capability, self.switch, quantized=bool(self._quants))

    def unquantized_modules(self) -> list[str]:
        """Linears and convolutions that are served as they are, by the names that the model gives them."""
        convolutions = nn.Conv1d | nn.Conv2d | nn.Conv3d
        return [
            path
            for path, module in self.module.named_modules()
            if (isinstance(module, SlotLinear) and not module.quantized) or isinstance(module, convolutions | nn.Linear)
        ]

    def resolve_precision(self, name: str) -> str:
        """The name that all linears know for precision `name`; `ConfigError` if one cannot compute in it.

        The name of a format stands for "quantized" only where every quantized layer is stored in it.
        """
        known = {"quantized": "quantized"}
        if len(self._quants) < 2:
            known[next(iter(self._quants), "bf16")] = "quantized"
        if self._quants and self._no_weight_only is None:
            known["weight_only"] = "weight_only"
        if self._quants and self.dual:
            known["bf16"] = "bf16"
        if name in known:
            return known[name]
        possible = [f"of {self.name}; possible: {', '.join(known)}"]
        if self._no_weight_only is not None:
            possible.append(f"not weight_only: {self._no_weight_only}")
        if "bf16" not in known:
            possible.append("for 'bf16' open the engine with EngineConfig(dual='bf16')")
        raise ConfigError(f"precision {name!r} is not to be had {'; '.join(possible)}")

    def compute_within(self, turn: Callable[[], AbstractContextManager[None]]) -> None:
        """Let every forward of the module happen within `turn()`."""
        module, inner = weakref.ref(self.module), type(self.module).forward  # no cycle: it would hold the weights
        signature, this = inspect.signature(self.module.forward), weakref.ref(self)

        def forward(*args: Any, **kwargs: Any) -> Any:
            with turn():
                transformer, given = this(), signature.bind(*args, **kwargs).arguments
                output = None if transformer is None else transformer._fused_output(given)
                return inner(module(), *args, **kwargs) if output is None else output

        forward.__doc__, forward.__signature__ = inner.__doc__, inspect.signature(self.module.forward)  # pyright: ignore[reportFunctionMemberAccess]
        self.module.forward = forward

    def fuse(self, *, graphs: bool) -> None:
        """Compute forwards in few launches where that can be (see `gpu/forward.py`); as CUDA graphs if `graphs`."""
        from .gpu.forward import FusedForward

        self._fused = FusedForward(self.module, self.linears, [*self.slots, *self.twins.values()], graphs=graphs)

    def forget_graphs(self) -> None:
        """Give the memory of CUDA graphs back; the next forwards capture anew."""
        if self._fused is not None:
            self._fused.forget_graphs()

    def unfused(self) -> str | None:
        """Why forwards in "quantized" go layer by layer, or None if they do not."""
        return "fused kernels are for BF16 on a GPU" if self._fused is None else self._fused.reason("quantized")

    def _fused_output(self, inputs: Mapping[str, Any]) -> Any:
        """What a forward of the module returns for these arguments; None where layer after layer must compute it."""
        velocity = None if self._fused is None else self._fused(self.switch.now, inputs)
        if velocity is None or not inputs.get("return_dict", True):
            return None if velocity is None else (velocity,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=velocity)

    @property
    def width(self) -> int:
        """Of the widest linear's input."""
        return max(module.in_features for module in self.module.modules() if isinstance(module, SlotLinear))

    def _alike(self, group: Sequence[str]) -> list[Sequence[str]]:
        """The group whole, or one by one where its members are stored unequally."""
        quants = {self.resolver.plan.quant_of([module]) for module in group}
        return [group] if len(quants) == 1 else [[module] for module in group]

    def _dtype_of(self, name: str) -> torch.dtype:
        """What a parameter is served in: some models keep some modules in float32."""
        return torch.float32 if self._is_wide(name) else self.dtype

    def _is_wide(self, name: str) -> bool:
        return not self._wide.isdisjoint(name.split("."))

    def _plain(self, name: str, tensor: str = "weight") -> Plain:
        return Plain(dtype=torch.float32 if self._is_wide(name) else torch.bfloat16, tensor=tensor)

    def _replace(self, modules: Sequence[str], fused: str | None) -> None:
        linears: list[Any] = [self.module.get_submodule(module) for module in modules]
        scheme = self.resolver.scheme(modules)
        quantized = not isinstance(scheme, Plain)
        if not quantized:
            scheme = self._plain(modules[0])
        try:
            scheme.matrices(WeightShape((1,), linears[0].in_features))
        except UnsupportedError as error:  # told of all such modules together
            self._refused |= dict.fromkeys(modules, str(error).splitlines()[0])
            return
        served = self._siblings(modules, linears, scheme, fused)
        self.slots.append(served.slot)
        if quantized:
            self._quants.add(self.resolver.plan.quant_of(modules))
            self._no_weight_only = self._no_weight_only or served.no_weight_only
        twin = None
        if self.dual and quantized:
            twin = self._siblings(modules, linears, self._plain(modules[0]), fused, suffix="@bf16")
            self.twins[served.slot] = twin.slot
        biases = self._biases(modules, linears, fused)
        self.linears[tuple(modules)] = Linears(served, twin, biases)
        for shard, (module, linear) in enumerate(zip(modules, linears, strict=True)):
            dtype = self._dtype_of(module)
            replaced = SlotLinear(
                module,
                linear,
                _ways(served, twin, shard),
                self.switch,
                biases[shard],
                dtype=dtype,
                device=self.capability.device,
                read=None if quantized else _reader(served.packed(shard)["weight"], dtype),
                per_sample=scheme.activation == "per_tensor",
            )
            self.module.set_submodule(module, replaced)

    def _biases(self, modules: Sequence[str], linears: Sequence[Any], fused: str | None) -> list[Tensor | None]:
        """Served biases; in one slot where all siblings have one, so that a trainer may send them joined."""
        if fused is None or any(linear.bias is None for linear in linears):
            pairs = zip(modules, linears, strict=True)
            return [None if one.bias is None else self._slot_tensor(f"{name}.bias", one.bias) for name, one in pairs]
        rows = [linear.out_features for linear in linears]
        tensor = self._add_plain([f"{module}.bias" for module in modules], rows, fused=fused)
        return list(tensor.split(rows))

    def _siblings(
        self, modules: Sequence[str], linears: Sequence[Any], scheme: Scheme, fused: str | None, suffix: str = ""
    ) -> SiblingLinears:
        parent, _, first = modules[0].rpartition(".")
        leaves = "+".join([first, *(module.rpartition(".")[2] for module in modules[1:])])
        try:
            return SiblingLinears(
                self._full(f"{parent}.{leaves}" if parent else leaves) + suffix,
                [self._full(module) for module in modules],
                [linear.out_features for linear in linears],
                linears[0].in_features,
                scheme,
                capability=self.capability,
                dtype=self._dtype_of(modules[0]),
                kernel=self.names.of_linear(scheme),
                fused=[] if fused is None else [self._full(fused)],
            )
        except UnsupportedError as error:  # of the kernel
            raise UnsupportedError(f"{modules[0]}: {str(error).splitlines()[0]}", error.reasons) from error

    def _bind_rest(self) -> None:
        """Every other parameter and persistent buffer becomes a view of a slot; its module never notices."""
        for path, module in list(self.module.named_modules()):
            if isinstance(module, SlotLinear):
                continue
            if isinstance(module, nn.Linear) and not is_linear(module):
                self._check_bf16(path, module)
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                tensor = self._slot_tensor(f"{path}.{leaf}" if path else leaf, parameter)
                setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
            for leaf, buffer in list(module.named_buffers(recurse=False)):
                name = f"{path}.{leaf}" if path else leaf
                stored = leaf not in module._non_persistent_buffers_set
                setattr(module, leaf, self._slot_tensor(name, buffer) if stored else buffer.to(self.capability.device))

    def _check_bf16(self, path: str, module: nn.Linear) -> None:
        """A linear that does more than multiply (or whose parent reads its weight) is served as it is, in BF16."""
        if not isinstance(self.resolver.scheme([path]), Plain):
            self._refused[path] = f"a {type(module).__name__} is more than a linear layer, and is not replaced"

    def _slot_tensor(self, name: str, like: Tensor) -> Tensor:
        """A new slot's served tensor, in the shape of `like`."""
        if not like.is_floating_point():
            raise UnsupportedError(f"{name} is stored in {like.dtype}", ["only floating-point tensors can be swapped"])
        rows, *trailing = like.shape or (1,)
        return self._add_plain([name], [rows], trailing=trailing).view(like.shape)

    def _add_plain(
        self, names: Sequence[str], rows: Sequence[int], *, trailing: Sequence[int] = (), fused: str | None = None
    ) -> Tensor:
        """The served tensor of a new slot that is not quantized, over the tensors `names`."""
        leaf, dtype = names[0].rpartition(".")[2], self._dtype_of(names[0])
        slot = plain_slot(
            [self._full(name).rpartition(".")[0] for name in names],
            rows,
            None,
            self._plain(names[0], leaf),
            self.capability,
            dtype,
            fused=[] if fused is None else [self._full(fused)],
            trailing=trailing,
        )
        self.slots.append(slot)
        return slot.tensors[leaf]

    def _check_refused(self) -> None:
        """One error for all linears that the scheme cannot hold, and what to write to keep them."""
        if not self._refused:
            return
        reasons: dict[str, list[str]] = {}
        for module, why in self._refused.items():
            reasons.setdefault(why, []).append(module)
        listed = [
            f"{', '.join(names[:4])}{f' and {len(names) - 4} more' * (len(names) > 4)}: {why}"
            for why, names in reasons.items()
        ]
        patterns = [re.sub(r"(?<=\.)\d+(?=\.)", "*", module) for module in self._refused]
        keep = list(dict.fromkeys([*self.resolver.plan.keep, *patterns]))
        raise UnsupportedError(
            f"{len(self._refused)} modules of {self.config.get('_class_name')} cannot be quantized as asked",
            [*listed, f"keep them in BF16: EngineConfig(keep={keep})"],
        )

    def _full(self, name: str) -> str:
        return f"{self.name}.{name}"


def _ways(served: SiblingLinears, twin: SiblingLinears | None, shard: int) -> dict[str, Apply]:
    """Precision -> how to compute one sibling."""
    apply = _bound(served.apply, shard)
    if isinstance(served.scheme, Plain):
        return dict.fromkeys(("quantized", "weight_only", "bf16"), apply)
    ways: dict[str, Apply] = {"quantized": apply}
    if served.no_weight_only is None:
        ways["weight_only"] = _bound(served.apply_weight_only, shard)
    if twin is not None:
        ways["bf16"] = _bound(twin.apply, shard)
    return ways


def _compute_sample_by_sample(conv: nn.Module) -> None:
    """Libraries choose a convolution's order of sums by the whole batch: on a CPU no sample notices its company so."""
    forward = conv.forward
    conv.forward = lambda x: torch.cat([forward(sample[None]) for sample in x])


def _bound(apply: Callable[[int, Tensor, Tensor | None], Tensor], shard: int) -> Apply:
    return lambda x, bias: apply(shard, x, bias)


def _reader(weight: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: weight.to(dtype)


def transformer_class(name: str) -> Any:
    """A transformer class of diffusers."""
    import diffusers

    found = getattr(diffusers, name, None)
    if found is None or not isinstance(found, type) or not issubclass(found, nn.Module):
        raise ModelError(f"diffusers {diffusers.__version__} has no model {name!r}")
    return found


def empty_model(config: Mapping[str, Any]) -> Any:
    """The model with parameters on the meta device and buffers in place (tables that are computed, not stored)."""
    from accelerate import init_empty_weights

    kind = transformer_class(str(config.get("_class_name")))
    with init_empty_weights(include_buffers=False):
        model = kind.from_config({key: value for key, value in config.items() if key != "quantization_config"})
    return model.eval().requires_grad_(False)

"""`Transformer`: a diffusers model whose linears are kernels and whose other tensors are slots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...quant import BF16, Capability, ModelError, Plain, Scheme, SiblingLinears, UnsupportedError, WeightSlot
from ...quant.linear import plain_slot
from ..schemes import SchemeResolver
from .groups import sibling_linears

Apply = Callable[[Tensor, Tensor | None], Tensor]  # x [num_tokens, in_features], bias


class PrecisionSwitch:
    """The precision that all linears of an engine compute in right now."""

    def __init__(self) -> None:
        self.now = "quantized"

    @contextmanager
    def at(self, precision: str) -> Any:
        before, self.now = self.now, precision
        try:
            yield
        finally:
            self.now = before


class SlotLinear(nn.Module):
    """Takes the place of a `nn.Linear`: x [..., in_features] -> [..., out_features] through the kernel of its slot.

    `ways`: precision -> how; a precision that is not among them is computed as "quantized". `per_sample`: a scale is
    taken over the first dimension's items one by one, so that no sample sees its neighbours.
    """

    def __init__(
        self,
        linear: nn.Linear,
        ways: Mapping[str, Apply],
        switch: PrecisionSwitch,
        bias: Tensor | None,
        dtype: torch.dtype,
        *,
        per_sample: bool,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.ways, self.switch, self.per_sample, self.dtype = dict(ways), switch, per_sample, dtype
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """Dtype, shape and device of the weight, without its values: what models look at."""
        return torch.empty((), dtype=self.dtype).expand(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        apply = self.ways.get(self.switch.now) or self.ways["quantized"]
        if self.per_sample and x.ndim > 1:
            outs = [apply(sample.reshape(-1, self.in_features), self.bias) for sample in x]
            return torch.stack(outs).view(*x.shape[:-1], self.out_features)
        return apply(x.reshape(-1, self.in_features), self.bias).view(*x.shape[:-1], self.out_features)


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
        linear_kernel: str = "auto",
        dual: bool = False,
    ) -> None:
        self.name, self.config, self.resolver, self.switch = name, dict(config), resolver, switch
        self.capability, self.dtype, self.linear_kernel, self.dual = capability, dtype, linear_kernel, dual
        self.slots: list[WeightSlot] = []
        self.twins: dict[WeightSlot, WeightSlot] = {}
        self.module = _empty_model(config)
        self._wide = tuple(getattr(self.module, "_keep_in_fp32_modules", None) or ())
        for group, fused in list(sibling_linears(self.module)):
            for members in self._alike(group):
                self._replace(members, fused if len(members) == len(group) else None)
        self._bind_rest()
        for module in self.module.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                _compute_sample_by_sample(module)

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
        return torch.float32 if set(name.split(".")) & set(self._wide) else self.dtype

    def _plain(self, name: str, tensor: str = "weight") -> Plain:
        wide = self.dtype != torch.float32 and self._dtype_of(name) == torch.float32
        return Plain(dtype=torch.float32 if wide else torch.bfloat16, tensor=tensor)

    def _replace(self, modules: Sequence[str], fused: str | None) -> None:
        linears = [self.module.get_submodule(module) for module in modules]
        scheme = self.resolver.scheme(modules)
        if isinstance(scheme, Plain):
            scheme = self._plain(modules[0])
        quantized = self._siblings(modules, linears, scheme, fused)
        self.slots.append(quantized.slot)
        twin = None
        if self.dual and not isinstance(scheme, Plain):
            twin = self._siblings(modules, linears, BF16, fused, suffix="@bf16")
            self.twins[quantized.slot] = twin.slot
        for shard, (module, linear) in enumerate(zip(modules, linears, strict=True)):
            assert isinstance(linear, nn.Linear)
            bias = None if linear.bias is None else self._slot_tensor(f"{module}.bias", linear.bias)
            ways: dict[str, Apply] = {"quantized": _bound(quantized.apply, shard)}
            if not isinstance(scheme, Plain):
                ways["weight_only"] = _bound(quantized.apply_weight_only, shard)
            if twin is not None:
                ways["bf16"] = _bound(twin.apply, shard)
            per_sample = scheme.activation == "per_tensor"
            replaced = SlotLinear(linear, ways, self.switch, bias, self._dtype_of(module), per_sample=per_sample)
            self.module.set_submodule(module, replaced)

    def _siblings(
        self, modules: Sequence[str], linears: Sequence[Any], scheme: Scheme, fused: str | None, suffix: str = ""
    ) -> SiblingLinears:
        parent, _, first = modules[0].rpartition(".")
        leaves = "+".join([first, *(module.rpartition(".")[2] for module in modules[1:])])
        return SiblingLinears(
            self._full(f"{parent}.{leaves}" if parent else leaves) + suffix,
            [self._full(module) for module in modules],
            [linear.out_features for linear in linears],
            linears[0].in_features,
            scheme,
            capability=self.capability,
            dtype=self._dtype_of(modules[0]),
            kernel=self.linear_kernel,
            fused=[] if fused is None else [self._full(fused)],
        )

    def _bind_rest(self) -> None:
        """Every other parameter and persistent buffer becomes a view of a slot; its module never notices."""
        for path, module in list(self.module.named_modules()):
            if isinstance(module, SlotLinear):
                continue
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                tensor = self._slot_tensor(f"{path}.{leaf}" if path else leaf, parameter)
                setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
            for leaf, buffer in list(module.named_buffers(recurse=False)):
                name = f"{path}.{leaf}" if path else leaf
                stored = leaf not in module._non_persistent_buffers_set
                setattr(module, leaf, self._slot_tensor(name, buffer) if stored else buffer.to(self.capability.device))

    def _slot_tensor(self, name: str, like: Tensor) -> Tensor:
        """A new slot's served tensor, in the shape of `like`."""
        if not like.is_floating_point():
            raise UnsupportedError(f"{name} is stored in {like.dtype}", ["only floating-point tensors can be swapped"])
        module, _, leaf = self._full(name).rpartition(".")
        rows, *trailing = like.shape or (1,)
        dtype = self._dtype_of(name)
        slot = plain_slot([module], [rows], None, self._plain(name, leaf), self.capability, dtype, trailing=trailing)
        self.slots.append(slot)
        return slot.tensors[leaf].view(like.shape)

    def _full(self, name: str) -> str:
        return f"{self.name}.{name}"


def _compute_sample_by_sample(conv: nn.Module) -> None:
    """Libraries choose a convolution's order of sums by the whole batch: no sample is to notice its company."""
    forward = conv.forward
    conv.forward = lambda x: torch.cat([forward(sample[None]) for sample in x])


def _bound(apply: Callable[[int, Tensor, Tensor | None], Tensor], shard: int) -> Apply:
    return lambda x, bias: apply(shard, x, bias)


def transformer_class(name: str) -> Any:
    """A transformer class of diffusers."""
    import diffusers

    found = getattr(diffusers, name, None)
    if found is None or not isinstance(found, type) or not issubclass(found, nn.Module):
        raise ModelError(f"diffusers {diffusers.__version__} has no model {name!r}")
    return found


def _empty_model(config: Mapping[str, Any]) -> Any:
    """The model with parameters on the meta device and buffers in place (tables that are computed, not stored)."""
    from accelerate import init_empty_weights

    kind = transformer_class(str(config.get("_class_name")))
    with init_empty_weights(include_buffers=False):
        model = kind.from_config({key: value for key, value in config.items() if key != "quantization_config"})
    return model.eval().requires_grad_(False)

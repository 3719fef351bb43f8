"""Which linears of a model are quantized together: those that read the same input, as ModelOpt unifies them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

# ModelOpt's export gives one amax to these (NVFP4); a diffusers model that was fused calls them by the name behind.
SELF_ATTENTION = {("to_q", "to_k", "to_v"): "to_qkv", ("add_q_proj", "add_k_proj", "add_v_proj"): "to_added_qkv"}
CROSS_ATTENTION = {("to_k", "to_v"): "to_kv"}  # the query reads another input


def sibling_linears(model: nn.Module) -> Iterator[tuple[Sequence[str], str | None]]:
    """(names of linears, the name of their fused form) for every linear of `model`, in its order; most stand alone."""
    for parent, module in model.named_modules():
        linears = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
        for name in list(linears):
            group, fused = _group_of(name, module, linears)
            if group and name == group[0]:
                yield [_join(parent, sibling) for sibling in group], None if fused is None else _join(parent, fused)


def _group_of(name: str, parent: nn.Module, linears: dict[str, nn.Linear]) -> tuple[tuple[str, ...], str | None]:
    crossed = bool(getattr(parent, "is_cross_attention", False))
    for group, fused in (CROSS_ATTENTION if crossed else SELF_ATTENTION).items():
        if name in group and linears.keys() >= set(group):
            widths = {linears[sibling].in_features for sibling in group}
            return (group, fused) if len(widths) == 1 else ((name,), None)
    return (name,), None


def _join(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name

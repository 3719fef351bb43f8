"""Which linears of a model are quantized together: those that read the same input, as ModelOpt unifies them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

# ModelOpt's export gives one amax to these (NVFP4); a diffusers model that was fused calls them by the name behind.
SELF_ATTENTION = {("to_q", "to_k", "to_v"): "to_qkv"}
CROSS_ATTENTION = {("to_k", "to_v"): "to_kv"}  # the query reads another input
CROSSED = re.compile("attn2$|cross|_to_")
ADDED = {
    ("add_q_proj", "add_k_proj", "add_v_proj"): "to_added_qkv",
    ("add_k_proj", "add_v_proj"): "to_added_kv",  # of images in a cross-attention: no query of their own
}


def sibling_linears(model: nn.Module) -> Iterator[tuple[Sequence[str], str | None]]:
    """(names of linears, the name of their fused form) for every linear of `model`, in its order; most stand alone."""
    for parent, module in model.named_modules():
        linears = {name: child for name, child in module.named_children() if is_linear(child)}
        for name in list(linears):
            group, fused = _group_of(name, parent, module, linears)
            if group and name == group[0]:
                yield [_join(parent, sibling) for sibling in group], None if fused is None else _join(parent, fused)


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes x W^T + b and nothing else, and its parent lets it: not the output of a
    `nn.MultiheadAttention`, whose weight torch reads itself."""
    attends = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and not attends


def _group_of(
    name: str, path: str, parent: nn.Module, linears: Mapping[str, Any]
) -> tuple[tuple[str, ...], str | None]:
    attention = CROSS_ATTENTION if _is_crossed(path, parent) else SELF_ATTENTION
    for group, fused in (*attention.items(), *ADDED.items()):
        if name in group and linears.keys() >= set(group):
            widths = {linears[sibling].in_features for sibling in group}
            return (group, fused) if len(widths) == 1 else ((name,), None)
    return (name,), None


def _is_crossed(path: str, attention: nn.Module) -> bool:
    """Whether the query reads another input than key and value: most classes of diffusers say so, some by name only
    (LTX: `attn2`, `audio_to_video_attn`)."""
    crossed = getattr(attention, "is_cross_attention", None)
    return bool(CROSSED.search(path.rpartition(".")[2])) if crossed is None else bool(crossed)


def _join(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name

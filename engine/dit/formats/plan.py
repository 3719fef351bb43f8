"""Which module of a diffusers model is stored how: the tensors tell, a config adds what it keeps unquantized."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from ....quant import ModelError, QuantName, QuantPlan, matches_any
from .layers import FileLayer


def make_plan(stored: Mapping[str, FileLayer], matrices: Iterable[str], said: QuantPlan | None) -> QuantPlan | None:
    """The plan of a file, None if every module is computed in BF16.

    `stored`: diffusers module -> the layer that holds it; `matrices`: modules whose weight is in a float format;
    `said`: ModelOpt's config. A module that the config keeps is computed in BF16, however it is stored; one that is
    stored in BF16 stays so, whatever the config says.
    """
    if said is not None and not stored and _names_quantization(said):
        raise ModelError(
            f"the config says {said.quant}, but every weight is stored in a float format; give the quantized file, or "
            "take quantization_config out and quantize at load: EngineConfig(quant=...)"
        )
    quants: dict[str, QuantName] = {module: _computed(module, layer, said) for module, layer in stored.items()}
    counts: Counter[QuantName] = Counter(quant for quant in quants.values() if quant != "bf16")
    if not counts:
        return None
    most = counts.most_common(1)[0][0]
    patterns = () if said is None else said.keep
    plain = [module for module, quant in quants.items() if quant == "bf16"]
    keep = [module for module in (*plain, *matrices) if not matches_any(module, patterns)]
    others: dict[str, QuantName] = {module: quant for module, quant in quants.items() if quant not in ("bf16", most)}
    return QuantPlan(most, (*patterns, *sorted(keep)), others)


def _names_quantization(said: QuantPlan) -> bool:
    return said.quant != "bf16" or bool(said.layers)


def _computed(module: str, layer: FileLayer, said: QuantPlan | None) -> QuantName:
    if said is not None and matches_any(module, said.keep):
        return "bf16"
    if layer.full_precision:  # products with unquantized activations; FP8 widens to BF16 for them
        return "nvfp4_w4a16" if layer.is_nvfp4 else "bf16"
    if layer.is_nvfp4 and said is not None and said.quant_of([module]) == "nvfp4_w4a16":
        return "nvfp4_w4a16"
    return layer.quant

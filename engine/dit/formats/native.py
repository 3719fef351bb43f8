"""Black Forest Labs' own key names (also Comfy's) -> diffusers' modules."""

from __future__ import annotations

import re
from collections.abc import Collection

from msgspec import Struct

from ....quant import ModelError, UnsupportedError
from .layout import Names

COMFY_PREFIX = "model.diffusion_model."
COMFY_OTHERS = ("first_stage_model.", "vae.", "text_encoders.", "cond_stage_model.", "conditioner.")

EMBEDDER = {"in_layer": "linear_1", "out_layer": "linear_2"}
STREAMS = {  # of a double block: image and text stream
    "img": {"qkv": ("to_q", "to_k", "to_v"), "proj": "to_out.0", "norm": "norm_", "ff": "ff", "mod": "norm1"},
    "txt": {
        "qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
        "proj": "to_add_out",
        "norm": "norm_added_",
        "ff": "ff_context",
        "mod": "norm1_context",
    },
}


class Placement(Struct, frozen=True):
    """Where the rows of a file's module go: to `modules` one after the other; `swapped`: second half first."""

    modules: tuple[str, ...]
    swapped: bool = False


def find_names(names: Collection[str]) -> tuple[Names, str]:
    """Whose names these are, and the prefix that they begin with."""
    prefix = COMFY_PREFIX if any(name.startswith(COMFY_PREFIX) for name in names) else ""
    inner = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    if not any(name.startswith(("double_blocks.", "single_blocks.")) for name in inner):
        return "diffusers", prefix
    return ("flux2" if any(name.startswith("double_stream_modulation_") for name in inner) else "flux1"), prefix


def place_module(module: str, names: Names) -> Placement:
    """Diffusers' name or names of a module; an unknown name stays as it is."""
    if names == "diffusers":
        return Placement((module,))
    top, _, rest = module.partition(".")
    if top == "double_blocks":
        number, _, part = rest.partition(".")
        return _below(f"transformer_blocks.{number}", _double(part, names), module)
    if top == "single_blocks":
        number, _, part = rest.partition(".")
        return _below(f"single_transformer_blocks.{number}", _single(part, names), module)
    if module == "final_layer.adaLN_modulation.1":  # (shift, scale) here, (scale, shift) in diffusers
        return Placement(("norm_out.linear",), swapped=True)
    return Placement((_top(top, rest, names) or module,))


def _below(block: str, parts: tuple[str, ...] | None, module: str) -> Placement:
    return Placement((module,) if parts is None else tuple(f"{block}.{part}" for part in parts))


def _top(top: str, rest: str, names: Names) -> str | None:
    embed = {"flux1": "time_text_embed", "flux2": "time_guidance_embed"}[names]
    embedders = {"time_in": "timestep_embedder", "guidance_in": "guidance_embedder"}
    if names == "flux1":
        embedders["vector_in"] = "text_embedder"
    if top in embedders and rest in EMBEDDER:
        return f"{embed}.{embedders[top]}.{EMBEDDER[rest]}"
    if (
        names == "flux2"
        and rest == "lin"
        and re.fullmatch("(double_stream_modulation_(img|txt)|single_stream_modulation)", top)
    ):
        return f"{top}.linear"
    return {"img_in.": "x_embedder", "txt_in.": "context_embedder", "final_layer.linear": "proj_out"}.get(
        f"{top}.{rest}"
    )


def _double(part: str, names: Names) -> tuple[str, ...] | None:
    found = re.fullmatch(r"(img|txt)_(attn|mlp|mod)\.(\w+|norm\.(?:query|key)_norm)", part)
    if found is None:
        return None
    stream, (kind, leaf) = STREAMS[found[1]], found.group(2, 3)
    if kind == "attn" and leaf == "qkv":
        return tuple(f"attn.{shard}" for shard in stream["qkv"])
    if kind == "attn" and leaf == "proj":
        return (f"attn.{stream['proj']}",)
    if kind == "attn" and leaf.startswith("norm."):
        return (f"attn.{stream['norm']}{leaf[5]}",)
    if kind == "mlp" and leaf in ("0", "2"):
        inner = {"flux1": {"0": "net.0.proj", "2": "net.2"}, "flux2": {"0": "linear_in", "2": "linear_out"}}[names]
        return (f"{stream['ff']}.{inner[leaf]}",)
    return (f"{stream['mod']}.linear",) if (kind, leaf, names) == ("mod", "lin", "flux1") else None


def _single(part: str, names: Names) -> tuple[str, ...] | None:
    known: dict[str, tuple[str, ...]] = {"norm.query_norm": ("attn.norm_q",), "norm.key_norm": ("attn.norm_k",)}
    if names == "flux1":
        known |= {
            "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
            "linear2": ("proj_out",),
            "modulation.lin": ("norm.linear",),
        }
    else:
        known |= {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)}
    return known.get(part)


def leaf_of(leaf: str, names: Names) -> str:
    """The RMS norms' weights are called `scale`."""
    return "weight" if leaf == "scale" and names != "diffusers" else leaf


def check_others(names: Collection[str], prefix: str) -> None:
    """Beside prefixed names only those of other components may stand: they come from the base model."""
    odd = sorted(name for name in names if not name.startswith((prefix, *COMFY_OTHERS)))
    if prefix and odd:
        raise ModelError(f"names with and without {prefix} in one file: {', '.join(odd[:6])}")


def unknown_names(names: Collection[str]) -> UnsupportedError:
    """For a file without a config whose names are not known either."""
    return UnsupportedError(
        "no config.json lies beside the weights, and their names are not Black Forest Labs': "
        f"{', '.join(sorted(names)[:3])}, ...",
        [
            "known without a config: FLUX.1 and FLUX.2 in Black Forest Labs' names",
            "say which model this is: EngineConfig(base=...), the folder or hub id of the BF16 pipeline or transformer",
        ],
    )

"""A second reader of diffusion checkpoints: diffusers' model, the file's tensors, hooks that fake-quantize activations.

It shares nothing with the engine but the matrix product: every `nn.Linear` multiplies by `rollmill.quant.matmul`, so
that the order of sums is not what is compared. NVFP4 comes in two roundings that differ in the last bit of float32,
and so, now and then, in a code: "modelopt" as ModelOpt 0.47 fake-quantizes, "flashinfer" as the kernels do that the
engine follows.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from rollmill.quant import matmul

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
MIDDLES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
TIES_UP = torch.tensor([False, True, False, True, False, True, False])  # to the even code
Rounding = Literal["modelopt", "flashinfer"]
SIDES = ("weight_scale", "weight_scale_2", "input_scale")


def stored_target(io: Mapping[str, Tensor]) -> Tensor:
    """The output that came with the fixture."""
    return next(io[key] for key in ("out.exported_fp32", "out.fakequant_fp32", "out.fp32") if key in io)


def inputs_of(io: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("in."): value for name, value in io.items() if name.startswith("in.")}


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def read_folder(folder: Path, rounding: Rounding = "modelopt") -> Any:
    """The float32 model of a diffusers or ModelOpt folder, static fake quantization at its linears."""
    (file,) = folder.glob("*.safetensors")
    config = json.loads((folder / "config.json").read_text())
    with safe_open(file, "pt") as handle:
        swizzled = "_quantization_metadata" in (handle.metadata() or {})
    tensors = load_file(file)
    model = empty(config)
    weights: dict[str, Tensor] = {}
    scales: dict[str, tuple[str, Tensor]] = {}
    for name, value in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf in SIDES:
            continue
        side = {key: tensors[f"{module}.{key}"] for key in SIDES if f"{module}.{key}" in tensors}
        if leaf == "weight" and value.dtype == torch.float8_e4m3fn:
            weights[name], scales[module] = value.float() * side["weight_scale"], ("fp8", side["input_scale"])
        elif leaf == "weight" and value.dtype == torch.uint8:
            shape, scale = model.get_submodule(module).weight.shape, side["weight_scale"]
            blocks = linear_scales(scale, shape[0], shape[1] // 16) if swizzled else scale[: shape[0]].float()
            weights[name] = dequantize_nvfp4(value, blocks, side["weight_scale_2"], shape, rounding)
            scales[module] = "nvfp4", side["input_scale"]
        else:
            weights[name] = value.float()
    return loaded(model, weights, scales, rounding)


def empty(config: Mapping[str, Any]) -> Any:
    kind = getattr(diffusers, config["_class_name"])
    return (
        kind.from_config({key: value for key, value in config.items() if key != "quantization_config"}).float().eval()
    )


def loaded(
    model: Any,
    weights: Mapping[str, Tensor],
    scales: Mapping[str, tuple[str, Tensor]],
    rounding: Rounding = "modelopt",
) -> Any:
    """`scales`: module -> the format and static scale of its input."""
    model.load_state_dict(dict(weights), strict=True)
    fake = {"fp8": fake_fp8, "nvfp4": fake_nvfp4 if rounding == "modelopt" else fake_nvfp4_flashinfer}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            quant, scale = scales.get(name, (None, None))
            module.forward = types.MethodType(_product(None if quant is None else fake[quant], scale), module)
    return model


def _product(fake: Callable[[Tensor, Tensor], Tensor] | None, scale: Tensor | None) -> Callable[[Any, Tensor], Tensor]:
    def forward(linear: nn.Linear, x: Tensor) -> Tensor:
        rows = x.reshape(-1, linear.in_features)
        if fake is not None and scale is not None:
            rows = fake(rows, scale)
        return matmul(rows, linear.weight, linear.bias).view(*x.shape[:-1], linear.out_features)

    return forward


def dequantize_nvfp4(
    codes: Tensor, blocks: Tensor, scale_2: Tensor, shape: Sequence[int], rounding: Rounding = "modelopt"
) -> Tensor:
    """uint8 [rows (padded), cols / 2], low nibble = even column, scales [rows, cols / 16] -> float32 [rows, cols].

    code x (block scale x scale_2), or (code x block scale) x scale_2, which rounds once.
    """
    rows, cols = shape
    codes = codes[:rows]
    signed = torch.cat([E2M1, -E2M1])
    values = torch.stack([signed[(codes & 15).long()], signed[(codes >> 4).long()]], -1).reshape(rows, cols)
    spread = blocks.float().repeat_interleave(16, 1)
    return values * (spread * scale_2) if rounding == "modelopt" else values * spread * scale_2


def linear_scales(scales: Tensor, rows: int, cols: int) -> Tensor:
    """float32 [rows, cols]; byte of (m, k): ((m / 128) KT + k / 4) 512 + (m % 32) 16 + (m % 128 / 32) 4 + k % 4."""
    m, k = torch.arange(rows)[:, None], torch.arange(cols)[None]
    tile = (m // 128) * (-(-cols // 4)) + k // 4
    return scales.reshape(-1).float()[tile * 512 + (m % 32) * 16 + (m % 128 // 32) * 4 + k % 4]


def fake_fp8(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def fake_nvfp4(x: Tensor, scale: Tensor) -> Tensor:
    """ModelOpt's: a block's scale is e4m3(its largest value / (6 scale)) x scale, or 1 where that is tiny."""
    blocks = x.reshape(len(x), -1, 16)
    largest = blocks.abs().amax(-1, keepdim=True)
    block_scale = (largest / (6 * scale)).clamp(max=448).to(torch.float8_e4m3fn).float() * scale
    block_scale = torch.where(block_scale < 1e-5, 1.0, block_scale)
    return (round_e2m1(blocks / block_scale) * block_scale).reshape(x.shape)


def fake_nvfp4_flashinfer(x: Tensor, scale: Tensor) -> Tensor:
    """FlashInfer's exact recipe: products with reciprocals in place of quotients."""
    blocks, encode = x.reshape(len(x), -1, 16), 1 / scale
    largest = blocks.abs().amax(-1, keepdim=True)
    block_scale = (largest * (encode * torch.tensor(1 / 6))).clamp(max=448).to(torch.float8_e4m3fn).float()
    factor = torch.where(largest == 0, 0.0, (1 / (block_scale * (1 / encode))).clamp(max=torch.finfo().max))
    return (round_e2m1(blocks * factor) * block_scale * (1 / encode)).reshape(x.shape)


def round_e2m1(x: Tensor) -> Tensor:
    above = (x.abs()[..., None] > MIDDLES) | (x.abs()[..., None] == MIDDLES) & TIES_UP
    return E2M1[above.sum(-1)] * torch.where(x < 0, -1.0, 1.0)

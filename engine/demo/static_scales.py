"""Static activation scales for a trainer's Mixtral: calibrated once, written as a checkpoint stores them."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

SCALES_FILE = "input_scales.safetensors"
CODE_MAX = {"nvfp4": 2688.0, "fp8": 448.0}  # amax / CODE_MAX is the stored decode scale
Amax = dict[str, float]  # module name in the trainer's process -> max |input|; experts: `.w1` and `.w2` behind it


def calibrate(model: PreTrainedModel, sequences: list[list[int]]) -> Amax:
    """Largest input of every quantized linear over `sequences`, each run alone: padding would be calibrated on too."""
    amax: Amax = defaultdict(float)
    with watch(model, amax), torch.inference_mode():
        for ids in sequences:
            model(torch.tensor([ids], device=model.device), use_cache=False, logits_to_keep=1)
    return dict(amax)


@contextmanager
def watch(model: nn.Module, amax: Amax) -> Iterator[None]:
    """Hooks that raise `amax` to every input seen, while the context is open."""

    def note(name: str, value: Tensor) -> None:
        amax[name] = max(amax[name], value.abs().max().item())

    handles = []
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "k_proj", "v_proj", "o_proj")):
            handles.append(module.register_forward_pre_hook(linear_hook(name, note)))
        elif name.endswith(".mlp.experts"):
            handles.append(module.register_forward_pre_hook(experts_hook(name, note)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


Note = Callable[[str, Tensor], None]
Hook = Callable[[Any, tuple[Any, ...]], None]


def linear_hook(name: str, note: Note) -> Hook:
    return lambda module, inputs: note(name, inputs[0])


def experts_hook(name: str, note: Note) -> Hook:
    """Fused experts show their input only; what enters the down projection is computed once more here."""

    def hook(module: Any, inputs: tuple[Any, ...]) -> None:
        hidden, top_k_index = inputs[:2]  # [tokens, hidden_size], [tokens, top_k]
        note(f"{name}.w1", hidden)
        for e in top_k_index.unique().tolist():
            routed = hidden[(top_k_index == e).any(-1)]
            gate, up = nn.functional.linear(routed, module.gate_up_proj[e]).chunk(2, dim=-1)
            note(f"{name}.w2", module.act_fn(gate) * up)

    return hook


def write_static_folder(source: Path, target: Path, amax: Amax, quant: Literal["nvfp4", "fp8"], experts: int) -> None:
    """A checkpoint folder at `target`: links to `source`'s BF16 files plus one file of `input_scale` tensors.

    An index in `source` is copied with the scales added: where there is one, only the files that it lists are read.
    """
    target.mkdir(parents=True)
    for file in source.iterdir():
        (target / file.name).symlink_to(file.resolve())
    scales = {
        f"{module}.input_scale": torch.tensor(value / CODE_MAX[quant])
        for name, value in amax.items()
        for module in checkpoint_modules(name, experts)
    }
    save_file(scales, target / SCALES_FILE)
    index = target / "model.safetensors.index.json"
    if index.exists():
        listed = json.loads(index.read_text())
        listed["weight_map"] |= dict.fromkeys(scales, SCALES_FILE)
        index.unlink()  # the link, not the file behind it
        index.write_text(json.dumps(listed))


def checkpoint_modules(name: str, experts: int) -> list[str]:
    """Names in a Mixtral checkpoint that share the input of `name`: every expert of a layer, w1 with w3."""
    if ".mlp.experts." not in name:
        return [name]
    stem, kind = name.replace(".mlp.experts", ".block_sparse_moe.experts").rsplit(".", 1)
    kinds = ("w1", "w3") if kind == "w1" else ("w2",)
    return [f"{stem}.{e}.{kind}" for e in range(experts) for kind in kinds]

"""Kernels compiled ahead of time, without a GPU, and what they need. Scripts that do so run in a process of their own
(`run`), where Triton's interpreter is off."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

PACKS = "E4M3.F32.PACK_AB_MERGE_C"  # two float32 to codes, and a third operand's half above them
Kernel = tuple[Any, dict[str, str], dict[str, Any], int]  # with its signature, constants and warps


def run(script: Path, *arguments: object) -> Any:
    """What it prints, as JSON."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(Path(__file__).parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def compile_for(sm: int, kernel: Kernel, sixteens: Collection[str] = ()) -> Any:
    """`sixteens`: arguments that are multiples of 16, as launches find by themselves; or of the kind "i32:16"."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, signature, constants, warps = kernel
    whole = signature | dict.fromkeys(constants, "constexpr")
    kinds = [kind + ":16" * (kind.startswith("*") or name in sixteens) for name, kind in whole.items()]
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds) if kind.endswith(":16")}
    whole = {name: kind.removesuffix(":16") for name, kind in whole.items()}
    source = ASTSource(function, signature=whole, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": warps})
    if "e4m3x2" in compiled.asm["ptx"] and sm != 103:  # which the disassembler that comes with Triton does not know
        check_packing(compiled)
    return compiled


def check_packing(compiled: Any) -> None:
    """A word of FP8 codes is merged with zeros or with two other codes.

    Where two codes of one conversion go into both halves of a word (PTX: `shr.u16`, then `mov.b32`), the assembler has
    been seen to shift the upper one out of a register that nobody wrote. Branches are not followed: an alarm says where
    to look.
    """
    writers: dict[str, str] = {}  # register -> the last instruction that wrote it
    for line in disassembled(compiled, "cuobjdump", "-sass").splitlines():
        found = re.search(r"\*/\s+(?:@!?\w+ )?(\S+)\s+(R\d+), (.*?);", line)
        if found is None:
            continue
        name, target, operands = found.groups()
        merged = re.findall(r"\bR(?:\d+|Z)\b", operands)[-1:]
        sound = merged == ["RZ"] or all(PACKS in writers.get(register, "") for register in merged)
        assert PACKS not in name or sound, f"{compiled.metadata.name}, look at {line.strip()}"
        writers[target] = name


def needs(compiled: Any) -> dict[str, int]:
    """Bytes of shared memory; registers, and bytes of stack and local memory, of a thread."""
    found = re.findall(r"(REG|STACK|LOCAL):(\d+)", disassembled(compiled, "cuobjdump", "-res-usage"))
    return {"shared": compiled.metadata.shared, **{name: int(value) for name, value in found}}


def disassembled(compiled: Any, tool: str, option: str) -> str:
    """What one of the tools that come with Triton says."""
    import triton

    binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(compiled.asm["cubin"])
        return subprocess.run([str(binary), option, cubin.name], capture_output=True, text=True, check=True).stdout

"""Early launches (programmatic dependent launch): a kernel is set up while the one before it still runs.

A kernel says `await_inputs` before it reads or writes anything; before that it may `fetch`. There it waits until all
kernels before it have ended and their results are visible; then it allows the next one to be set up. Hopper and later.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles)

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

FETCH = tl.constexpr("prefetch.global.L2 [$1]; mov.u32 $0, 0;")


@triton.jit
def await_inputs(EARLY: tl.constexpr):
    """First of all in a kernel that is launched with `early`'s options."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def fetch(ptr):
    """Bring the lines of 128 bytes at these addresses to the L2: nothing is read, what is written later is seen."""
    tl.inline_asm_elementwise(FETCH, "=r,l", [ptr.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


def early(x: Tensor) -> dict[str, bool]:
    """Options of a launch on the device of x."""
    can = _launches_early(x.device)
    return {"EARLY": can, "launch_pdl": can}


@cache
def _launches_early(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)

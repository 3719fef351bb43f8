"""Kernels on a CPU run in Triton's interpreter, repaired."""

from __future__ import annotations

import os

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
    from rollmill.quant.gpu.interpreter import repair_interpreter

    repair_interpreter()
    np.seterr(divide="ignore", invalid="ignore", over="ignore")  # kernels divide by zero and select

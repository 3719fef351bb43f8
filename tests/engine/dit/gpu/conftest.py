"""Kernels on a CPU run in Triton's interpreter, repaired."""

from __future__ import annotations

import numpy as np
import torch

if not torch.cuda.is_available():
    from rollmill.quant.gpu.interpreter import repair_interpreter

    repair_interpreter()
    np.seterr(divide="ignore", invalid="ignore", over="ignore")  # kernels divide by zero and select

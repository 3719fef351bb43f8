"""What is stored, what a kernel wants, and the way between."""

from .device import Capability, describe_device, find_capability
from .errors import ConfigError, ModelError, RollmillError, UnsupportedError
from .fp8_rows import FP8Rows, Reads, values_of
from .kernel import LINEAR_KERNELS, LinearKernel, judge_kernels, select_kernel
from .kernels.flashinfer_fp4 import FP4_BACKENDS
from .kernels.gemm import Matmul, matmul, select_matmul
from .linear import QuantLinear, plain_slot
from .meter import ActivationMeter, AmaxMeter, ClippingMeter, clipping_shares, reset_clipping
from .modelopt import QuantPlan, matches_any, read_quant_plan
from .scheme import (
    BF16,
    FP8,
    NVFP4,
    Activation,
    Plain,
    QuantName,
    Scheme,
    TensorSpec,
    WeightShape,
    make_scheme,
)
from .siblings import SiblingLinears
from .slot import JoinedLayout, WeightSlot

__all__ = [
    "BF16",
    "FP4_BACKENDS",
    "FP8",
    "LINEAR_KERNELS",
    "NVFP4",
    "Activation",
    "ActivationMeter",
    "AmaxMeter",
    "Capability",
    "ClippingMeter",
    "ConfigError",
    "FP8Rows",
    "JoinedLayout",
    "LinearKernel",
    "Matmul",
    "ModelError",
    "Plain",
    "QuantLinear",
    "QuantName",
    "QuantPlan",
    "Reads",
    "RollmillError",
    "Scheme",
    "SiblingLinears",
    "TensorSpec",
    "UnsupportedError",
    "WeightShape",
    "WeightSlot",
    "clipping_shares",
    "describe_device",
    "find_capability",
    "judge_kernels",
    "make_scheme",
    "matches_any",
    "matmul",
    "plain_slot",
    "read_quant_plan",
    "reset_clipping",
    "select_kernel",
    "select_matmul",
    "values_of",
]

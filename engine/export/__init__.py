"""From a BF16 checkpoint to one in ModelOpt's layout, with calibrated activation scales if there is data for them."""

from .checkpoint import quantize_checkpoint
from .diffusion import quantize_diffusion
from .layout import QuantFormat
from .report import ExportReport

__all__ = ["ExportReport", "QuantFormat", "quantize_checkpoint", "quantize_diffusion"]

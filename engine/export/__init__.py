"""From a BF16 checkpoint to one in ModelOpt's layout, with calibrated activation scales if texts are given."""

from .checkpoint import ExportReport, quantize_checkpoint
from .layout import QuantFormat

__all__ = ["QuantFormat", "ExportReport", "quantize_checkpoint"]

"""From a BF16 checkpoint to one in ModelOpt's layout, with calibrated activation scales if texts are given."""

from .checkpoint import ExportReport, quantize_checkpoint

__all__ = ["ExportReport", "quantize_checkpoint"]

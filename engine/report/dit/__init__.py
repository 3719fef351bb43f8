"""The report of the demo of diffusion transformers."""

from .history import Comparison, DitHistory, DitStepRecord, FormatResult, Picture, Strip
from .html import write_dit_report

__all__ = ["Comparison", "DitHistory", "DitStepRecord", "FormatResult", "Picture", "Strip", "write_dit_report"]

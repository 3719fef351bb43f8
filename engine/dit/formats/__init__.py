"""What files of diffusion transformers look like, made canonical at the border."""

from .check import LayoutCheck, Reading, check_layout
from .files import WeightFiles
from .layout import FileLayout, say
from .stored_transformer import (
    FileSummary,
    StoredTransformer,
    config_beside,
    find_config,
    open_transformer,
    summarize,
)

__all__ = [
    "FileLayout",
    "FileSummary",
    "LayoutCheck",
    "Reading",
    "StoredTransformer",
    "WeightFiles",
    "check_layout",
    "config_beside",
    "find_config",
    "open_transformer",
    "say",
    "summarize",
]

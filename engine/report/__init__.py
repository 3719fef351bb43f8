"""Pictures and tables that a person looks at."""

from .history import Completion, History, StepRecord, WeightError
from .html import write_report

__all__ = ["Completion", "History", "StepRecord", "WeightError", "write_report"]

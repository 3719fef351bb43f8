"""Routed experts: config, routing, runners."""

from .activation import gated_activation
from .config import MoeConfig
from .experts import RoutedExperts
from .routing import route, sigmoid
from .runner import MOE_RUNNERS, MoeRunner, select_runner

__all__ = [
    "MOE_RUNNERS",
    "MoeConfig",
    "MoeRunner",
    "RoutedExperts",
    "gated_activation",
    "route",
    "select_runner",
    "sigmoid",
]

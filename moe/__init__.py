"""Routed experts: config, routing, runners."""

from .activation import gated_activation
from .choices import Choices, summed
from .config import MoeConfig
from .experts import RoutedExperts
from .routing import route, router_logits, sigmoid
from .runner import MOE_RUNNERS, MoeRunner, judge_runners, select_runner

__all__ = [
    "MOE_RUNNERS",
    "Choices",
    "MoeConfig",
    "MoeRunner",
    "RoutedExperts",
    "gated_activation",
    "judge_runners",
    "route",
    "router_logits",
    "select_runner",
    "sigmoid",
    "summed",
]

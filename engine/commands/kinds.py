"""Options that only language models, or only diffusion transformers take."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ...quant import ConfigError


def refuse_options(arguments: argparse.Namespace, names: Sequence[str], kind: str) -> None:
    """Raise `ConfigError` for options that were given and mean nothing for what the model is; unset ones are None."""
    values = {name: getattr(arguments, name) for name in names}
    given = [
        f"--{name.replace('_', '-')}" for name, value in values.items() if value is not None and value is not False
    ]
    if given:
        raise ConfigError(f"{arguments.model} is a {kind}: it takes no {', '.join(given)}")


def without_none(**values: Any) -> dict[str, Any]:
    """The settings that were given; the others keep their defaults."""
    return {name: value for name, value in values.items() if value is not None}

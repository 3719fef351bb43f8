"""A folder that appears once its last byte is written."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...quant import ConfigError


def check_empty(out: Path) -> None:
    """Raise `ConfigError` if there is something at `out`."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already and is not empty; choose another folder or remove it")


@contextmanager
def building(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name at a clean end, and vanishes otherwise."""
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=out.absolute().parent, prefix=f".{out.name}.building-"))
    try:
        yield building
        building.chmod(0o755)  # mkdtemp's 0o700 would hide the folder from other readers
        if out.exists():
            out.rmdir()  # empty, as was checked
        building.rename(out)
    finally:
        shutil.rmtree(building, ignore_errors=True)

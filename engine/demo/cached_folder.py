"""A folder that is made once by a recipe and kept: never half there, never another recipe's."""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

MARKER = "rollmill_complete.json"

Recipe = Mapping[str, object]  # of JSON values


def make_once(folder: Path, recipe: Recipe, write: Callable[[Path], None]) -> bool:
    """Have `write` fill `folder`, unless it was filled by this recipe before; says whether it was made now."""
    if is_complete(folder, recipe):
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    # a folder of its own until the last byte is there: a killed or a second builder never shows a half-made one
    building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.building-"))
    try:
        write(building)
        sizes = {file.name: file.stat().st_size for file in building.iterdir()}
        (building / MARKER).write_text(json.dumps({"recipe": recipe, "sizes": sizes}))
        _publish(building, folder, recipe)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return True


def is_complete(folder: Path, recipe: Recipe) -> bool:
    """Whether `folder` was written to its end by this recipe and its files still have their sizes."""
    marker = folder / MARKER
    if not marker.exists():
        return False
    written = json.loads(marker.read_text())
    if written.get("recipe") != recipe:
        return False
    files = {folder / name: size for name, size in written["sizes"].items()}
    return all(file.exists() and file.stat().st_size == size for file, size in files.items())


def _publish(building: Path, folder: Path, recipe: Recipe) -> None:
    """Give the finished folder its name, in place of a torn one; a complete one that came first is kept."""
    if is_complete(folder, recipe):
        return
    if folder.exists():
        shutil.rmtree(folder)
    building.chmod(0o755)  # mkdtemp's 0o700 would hide the cache from its other readers
    building.rename(folder)

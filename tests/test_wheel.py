"""setuptools drops a forgotten subpackage or data file without a word; this test says it."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("engine", "moe", "quant", "weight_sync")


def copy_sources(destination: Path) -> Path:
    """Copies what a build reads, so that building leaves nothing behind in the tree."""
    destination.mkdir()
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, destination)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, destination / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    return destination


def build_wheel(sources: Path, out: Path) -> Path:
    """Builds the source archive, and the wheel from that archive, without a network."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(sources)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


def test_wheel_holds_every_file_of_the_folders_and_nothing_else(tmp_path: Path):
    sources = copy_sources(tmp_path / "sources")
    expected = {
        f"rollmill/{file.relative_to(sources).as_posix()}"
        for folder in FOLDERS
        for file in (sources / folder).rglob("*")
        if file.is_file()
    }
    with zipfile.ZipFile(build_wheel(sources, tmp_path / "out")) as wheel:
        shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    forgotten, foreign = sorted(expected - shipped), sorted(shipped - expected)
    assert not forgotten, f"no __init__.py, or a suffix missing in package-data: {forgotten}"
    assert not foreign, f"in the wheel but not in the folders: {foreign}"

"""Every example and the README's own code run as printed, from the repository's root."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(*command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path):
    assert len(path.read_text().splitlines()) < 40
    assert run(sys.executable, path).strip()


def test_the_readmes_example():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(code.strip().splitlines()) <= 12
    assert "committed" in run(sys.executable, "-c", code)


def test_the_readme_is_short_and_its_commands_exist():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 150
    commands = set(re.findall(r"rollmill (\w+)", text)) - {"is", "serves", "holds", "quantizes"}
    listed = run(sys.executable, "-m", "rollmill.engine.cli", "--help")
    for command in re.findall(r"^    rollmill (\w+)", text, flags=re.MULTILINE):
        assert command in listed, commands

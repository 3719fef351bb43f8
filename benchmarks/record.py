"""Benchmark results as files, and RESULTS.md from them: `python benchmarks/record.py` rewrites the table."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

HERE = Path(__file__).parent
RESULTS = HERE / "results"


class Result(msgspec.Struct, frozen=True):
    """One figure. `limit`: what physics or a rule allows; `peer`: what another system does, in the same unit.

    `ratio` is value / peer, or value / limit where there is no peer.
    """

    name: str
    value: float
    unit: str
    limit: float | None
    peer: float | None
    peer_name: str | None
    ratio: float | None
    commit: str
    command: str
    note: str = ""


def device_name() -> str:
    """`cpu-x86_64-2cores`, or the GPU's name."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    return f"cpu-{platform.machine()}-{torch.get_num_threads()}threads"


def make_result(
    name: str,
    value: float,
    unit: str,
    *,
    limit: float | None = None,
    peer: float | None = None,
    peer_name: str | None = None,
    note: str = "",
) -> Result:
    against = peer if peer is not None else limit
    ratio = None if not against else value / against
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return Result(name, value, unit, limit, peer, peer_name, ratio, COMMIT, command, note)


def save(file: str, results: Sequence[Result]) -> Path:
    """Write `results/<device>/<file>.json` and renew RESULTS.md."""
    path = RESULTS / device_name() / f"{file}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(list(results)), indent=2) + b"\n")
    write_table()
    return path


def write_table() -> None:
    lines = [
        "# Results",
        "",
        "Written by `python benchmarks/record.py` from `benchmarks/results/`. Figures are medians of one run on a",
        "shared machine; `ratio` is figure / peer, or figure / limit where there is no peer. A dash: there is none.",
    ]
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        lines += [
            "",
            f"## {folder.name}",
            "",
            "| name | figure | limit | peer | ratio | note |",
            "|---|---|---|---|---|---|",
        ]
        for file in sorted(folder.glob("*.json")):
            lines += [_row(result) for result in msgspec.json.decode(file.read_bytes(), type=list[Result])]
    (HERE / "RESULTS.md").write_text("\n".join(lines) + "\n")


def _row(result: Result) -> str:
    peer = "-" if result.peer is None else f"{result.peer:.4g} ({result.peer_name})"
    limit = "-" if result.limit is None else f"{result.limit:.4g}"
    ratio = "-" if result.ratio is None else f"{result.ratio:.2f}"
    return f"| {result.name} | {result.value:.4g} {result.unit} | {limit} | {peer} | {ratio} | {result.note} |"


def find_commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=HERE
    )
    return done.stdout.strip() or "unknown"


COMMIT = find_commit()  # of the code that runs, whatever is committed meanwhile

if __name__ == "__main__":
    write_table()

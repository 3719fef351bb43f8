"""Tiles of the Triton runner's products, by how many tokens an expert has."""

from __future__ import annotations

from typing import NamedTuple

from ...quant.kernels.nvfp4_packing import DEPTH


class Tile(NamedTuple):
    """Rows of a weight and tokens of a program, its depth along K, warps, and steps that are loaded ahead."""

    rows: int
    tokens: int
    depth: int
    warps: int
    stages: int

    def fitting(self, rows: int, cols: int) -> Tile:
        """As many rows and such a depth as divide a weight's; they are multiples of 64."""
        tile = self
        while rows % tile.rows:
            tile = tile._replace(rows=tile.rows // 2)
        while cols % tile.depth:
            tile = tile._replace(depth=tile.depth // 2)
        return tile

    @property
    def takes_large_instruction(self) -> bool:
        """Whether its products are `wgmma`: of four warps together, which have 64 rows."""
        return self.warps >= 4

    def options(self) -> dict[str, int]:
        """For a launch."""
        return {"ROWS": self.rows, "TOKENS": self.tokens, "STAGES": self.stages, "num_warps": self.warps}


# Average pairs an expert, at the most -> tile. Measured on an H100 at Qwen3-30B-A3B's shape: benchmarks/NOTES.md.
# A token's result has the same bits with all tiles of a scheme: both matrix instructions sum BF16 alike, 16 along K
# after 16. They do not sum FP8 alike: its tiles all take the large one, which needs 64 rows and four warps.
Tiles = tuple[tuple[float, Tile], ...]
MANY_FROM = 192  # average pairs an expert; above, FP8 codes go block by block (`moe/gpu/fp8_many.py`)
MULTIPLE = 256  # of the hidden size, for that; of the intermediate size half of it
BF16_TILES: dict[str, Tiles] = {
    "w13": (
        (12, Tile(64, 16, 128, 4, 3)),
        (24, Tile(128, 32, 128, 8, 3)),
        (96, Tile(128, 64, 64, 8, 4)),
        (float("inf"), Tile(128, 128, 64, 8, 4)),
    ),
    "w2": (
        (12, Tile(128, 16, 128, 4, 3)),
        (24, Tile(128, 32, 128, 4, 2)),
        (96, Tile(256, 64, 64, 8, 4)),
        (float("inf"), Tile(256, 128, 64, 8, 4)),
    ),
}
FP8_TILES: dict[str, Tiles] = {
    "w13": (
        (0.5, Tile(64, 16, 256, 4, 4)),
        (24, Tile(64, 16, 256, 4, 3)),
        (48, Tile(128, 32, 128, 8, 3)),
        (192, Tile(128, 64, 128, 8, 4)),
        (float("inf"), Tile(128, 128, 128, 8, 4)),
    ),
    "w2": (
        (0.5, Tile(128, 16, 128, 4, 6)),
        (12, Tile(128, 16, 256, 8, 2)),
        (24, Tile(256, 16, 128, 8, 3)),
        (48, Tile(256, 32, 128, 8, 3)),
        (192, Tile(256, 64, 128, 8, 4)),
        (float("inf"), Tile(256, 128, 128, 8, 4)),
    ),
}
NVFP4_TILES: dict[str, Tiles] = {
    "w13": (
        (0.5, Tile(32, 8, DEPTH, 2, 3)),
        (3, Tile(32, 8, DEPTH, 1, 3)),
        (24, Tile(64, 16, DEPTH, 2, 3)),
        (96, Tile(128, 32, DEPTH, 4, 3)),
        (160, Tile(128, 64, DEPTH, 4, 3)),
        (float("inf"), Tile(128, 128, DEPTH, 8, 3)),
    ),
    "w2": (
        (0.5, Tile(32, 8, DEPTH, 2, 3)),
        (3, Tile(64, 8, DEPTH, 2, 3)),
        (24, Tile(64, 16, DEPTH, 2, 3)),
        (96, Tile(128, 32, DEPTH, 4, 3)),
        (400, Tile(128, 64, DEPTH, 4, 3)),
        (float("inf"), Tile(128, 128, DEPTH, 4, 2)),
    ),
}

"""Joined tensors fall apart into the same shards, however they are declared to lie."""

from __future__ import annotations

import pytest
import torch

from rollmill.quant import JoinedLayout, WeightShape

SHAPE = WeightShape((3, 3), 4)
GATE, UP = torch.arange(12.0).view(3, 4), torch.arange(12.0, 24.0).view(3, 4)
LAYOUTS = {
    "shard_after_shard": (JoinedLayout(), torch.cat([GATE, UP])),
    "interleaved": (JoinedLayout(interleaved=True), torch.stack([GATE, UP], dim=1).flatten(0, 1)),
    "transposed": (JoinedLayout(transposed=True), torch.cat([GATE, UP]).T),
    "both": (JoinedLayout(transposed=True, interleaved=True), torch.stack([GATE, UP], dim=1).flatten(0, 1).T),
}


@pytest.mark.parametrize(("layout", "joined"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_matrices(layout, joined):
    rows = layout.rows_first(joined)
    assert rows.shape == (6, 4)
    for shard, expected in enumerate((GATE, UP)):
        assert torch.equal(layout.shard(rows, SHAPE, shard), expected)
        assert layout.shard(rows, SHAPE, shard).data_ptr() >= joined.data_ptr()  # a view


@pytest.mark.parametrize("interleaved", [False, True])
def test_vectors_have_no_columns_to_transpose(interleaved):
    layout, shape = JoinedLayout(transposed=True, interleaved=interleaved), WeightShape((3, 3))
    joined = torch.tensor([0, 10, 1, 11, 2, 12] if interleaved else [0, 1, 2, 10, 11, 12])
    assert [layout.shard(layout.rows_first(joined), shape, shard).tolist() for shard in (0, 1)] == [
        [0, 1, 2],
        [10, 11, 12],
    ]

"""Scale orders and row shuffles against their byte-index formulas, index by index."""

import pytest
import torch

from rollmill.quant import layout


def offset_128x4(m: int, k: int, num_cols: int) -> int:
    tiles = -(-num_cols // 4)
    return ((m // 128) * tiles + k // 4) * 512 + (m % 32) * 16 + ((m % 128) // 32) * 4 + k % 4


def offset_8x4(m: int, k: int, num_cols: int) -> int:
    tiles = -(-num_cols // 4)
    return ((m // 8) * tiles + k // 4) * 32 + (m % 8) * 4 + k % 4


OFFSETS = {128: offset_128x4, 8: offset_8x4}
SHAPES = [(1, 1), (8, 4), (7, 5), (33, 9), (128, 4), (128, 8), (129, 3), (300, 10)]


def swizzle_by_loop(scales: torch.Tensor, tile: int) -> torch.Tensor:
    rows, cols = scales.shape
    padded = torch.zeros(-(-rows // tile) * tile, -(-cols // 4) * 4, dtype=scales.dtype)
    flat = padded.view(-1)
    for m in range(rows):
        for k in range(cols):
            flat[OFFSETS[tile](m, k, cols)] = scales[m, k]
    return padded


@pytest.fixture
def scales():
    """Bytes 1 ... 255, so that a zero is padding."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randint(1, 256, shape, generator=generator).to(torch.uint8)


@pytest.mark.parametrize("tile", [128, 8], ids=["128x4", "8x4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_swizzle_follows_the_byte_formula_and_pads_with_zeros(scales, shape, tile):
    linear = scales(*shape)
    swizzled = layout.swizzle_scales(linear, tile)
    assert torch.equal(swizzled, swizzle_by_loop(linear, tile))
    assert int((swizzled != 0).sum()) == linear.numel()


@pytest.mark.parametrize("tile", [128, 8], ids=["128x4", "8x4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unswizzle_is_the_inverse(scales, shape, tile):
    linear = scales(*shape)
    assert torch.equal(layout.unswizzle_scales(layout.swizzle_scales(linear, tile), *shape, tile_rows=tile), linear)
    assert torch.equal(layout.unswizzle_scales(swizzle_by_loop(linear, tile), *shape, tile_rows=tile), linear)


@pytest.mark.parametrize("tile", [128, 8], ids=["128x4", "8x4"])
def test_each_unit_of_a_batch_is_padded_alone(scales, tile):
    linear = scales(2, 3, 40, 5)
    swizzled = layout.swizzle_scales(linear, tile)
    for batch in range(2):
        for unit in range(3):
            assert torch.equal(swizzled[batch, unit], swizzle_by_loop(linear[batch, unit], tile))
    assert torch.equal(layout.unswizzle_scales(swizzled, 40, 5, tile), linear)


def test_scales_keep_their_float8_dtype_and_bits(scales):
    linear = scales(130, 6)
    swizzled = layout.swizzle_scales(linear.view(torch.float8_e4m3fn))
    assert swizzled.dtype == torch.float8_e4m3fn
    assert torch.equal(swizzled.view(torch.uint8), swizzle_by_loop(linear, 128))
    back = layout.unswizzle_scales(swizzled, 130, 6)
    assert torch.equal(back.view(torch.uint8), linear)


def test_a_full_tile_is_permuted_though_it_keeps_its_size(scales):
    linear = scales(128, 4)
    swizzled = layout.swizzle_scales(linear)
    assert swizzled.shape == linear.shape
    assert not torch.equal(swizzled, linear)


@pytest.mark.parametrize(
    ("swizzled", "asked", "tile"),
    [((127, 4), (100, 4), 128), ((128, 6), (100, 6), 128), ((128, 4), (129, 4), 128), ((128, 4), (128, 5), 128)]
    + [((12, 4), (12, 4), 8)],
    ids=["rows_not_padded", "cols_not_padded", "too_few_rows", "too_few_cols", "8x4_rows_not_padded"],
)
def test_unswizzle_refuses_what_cannot_be_that_layout(swizzled, asked, tile):
    with pytest.raises(ValueError, match=rf"{tile}x4 layout of \[{asked[0]}, {asked[1]}\]"):
        layout.unswizzle_scales(torch.zeros(swizzled, dtype=torch.uint8), *asked, tile_rows=tile)


# rows


@pytest.mark.parametrize("rows", [32, 64, 128, 768])
@pytest.mark.parametrize(("epilogue_tile", "block"), [(128, 32), (256, 32), (64, 16), (16, 16)])
def test_shuffle_rows_index_has_its_closed_form(rows, epilogue_tile, block):
    step = block // 8
    expected = [(r // block) * block + (r % 8) * step + (r % block) // 8 for r in range(rows)]
    index = layout.shuffle_rows_index(rows, epilogue_tile)
    assert index.tolist() == expected
    assert sorted(expected) == list(range(rows))


def test_shuffle_rows_index_starts_as_drawn():
    assert layout.shuffle_rows_index(64)[:11].tolist() == [0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9]
    assert layout.shuffle_rows_index(64, 64)[:11].tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5]
    assert layout.shuffle_rows_index(64)[32] == 32


def test_gated_reorder_interleaves_the_halves():
    rows = torch.arange(12)
    reordered = rows[layout.gated_reorder_index(12)]
    assert reordered[0::2].tolist() == list(range(6))
    assert reordered[1::2].tolist() == list(range(6, 12))


@pytest.mark.parametrize("rows", [64, 192, 1536])
def test_the_chained_w13_index_has_its_closed_form(rows):
    chained = layout.gated_reorder_index(rows)[layout.shuffle_rows_index(rows)]
    for r, source in enumerate(chained.tolist()):
        q = (r // 32) * 32 + (r % 8) * 4 + (r % 32) // 8
        assert source == q // 2 + (q % 2) * (rows // 2)


def test_gathering_in_two_steps_equals_gathering_by_the_chained_index(scales):
    weight = scales(64, 8)
    reorder, shuffle = layout.gated_reorder_index(64), layout.shuffle_rows_index(64)
    two_steps = layout.gather_rows(layout.gather_rows(weight, reorder), shuffle)
    assert torch.equal(two_steps, layout.gather_rows(weight, reorder[shuffle]))


def test_an_inverted_index_undoes_its_permutation():
    index = layout.gated_reorder_index(96)[layout.shuffle_rows_index(96)]
    inverse = layout.invert_index(index)
    assert index[inverse].tolist() == list(range(96))
    assert inverse[index].tolist() == list(range(96))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn, torch.bfloat16, torch.float32], ids=str)
def test_gather_rows_permutes_the_rows_of_every_unit(dtype, scales):
    x = scales(3, 32, 6)
    x = x.view(dtype) if dtype.itemsize == 1 else x.to(dtype)
    index = layout.shuffle_rows_index(32)
    gathered = layout.gather_rows(x, index)
    assert gathered.dtype == dtype
    for unit in range(3):
        for row, source in enumerate(index.tolist()):
            assert torch.equal(gathered[unit, row].view(torch.uint8), x[unit, source].view(torch.uint8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layout.shuffle_rows_index(48), "blocks of 32 rows, got 48"),
        (lambda: layout.shuffle_rows_index(24, 64), "blocks of 16 rows, got 24"),
        (lambda: layout.gated_reorder_index(7), "even number of rows, got 7"),
    ],
    ids=["shuffle_32", "shuffle_16", "gated"],
)
def test_row_orders_refuse_sizes_they_do_not_cover(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# bytes


def test_swap_nibbles_of_every_byte_is_its_own_inverse():
    codes = torch.arange(256, dtype=torch.uint8)
    swapped = layout.swap_nibbles(codes)
    assert swapped.dtype == torch.uint8
    assert swapped.tolist() == [(byte % 16) * 16 + byte // 16 for byte in range(256)]
    assert torch.equal(layout.swap_nibbles(swapped), codes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn, torch.bfloat16, torch.float32], ids=str)
def test_pad_to_appends_zeros_and_keeps_the_dtype(dtype, scales):
    x = scales(2, 5, 7)
    x = x.view(dtype) if dtype.itemsize == 1 else x.to(dtype)
    padded = layout.pad_to(x, rows=4, cols=16)
    assert (padded.dtype, padded.shape) == (dtype, (2, 8, 16))
    assert torch.equal(padded[:, :5, :7].contiguous().view(torch.uint8), x.view(torch.uint8))
    assert not padded[:, 5:].contiguous().view(torch.uint8).any()
    assert not padded[:, :, 7:].contiguous().view(torch.uint8).any()


def test_pad_to_leaves_aligned_sizes_alone(scales):
    x = scales(8, 16)
    assert torch.equal(layout.pad_to(x, rows=8, cols=16), x)

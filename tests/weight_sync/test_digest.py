"""Digests: sensitive to every bit and place, blind to how tensors came; a trainer can compute them."""

from __future__ import annotations

import pytest
import torch

from rollmill.quant import NVFP4, make_scheme
from rollmill.weight_sync.digest import combine_units, tensor_digest


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 16383, 16384, 16385, 40000])
def test_every_flipped_bit_shows(size):
    data = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    base = tensor_digest(data)
    seen = {base}
    for place in {0, size // 2, size - 1} if size else ():
        changed = data.clone()
        changed[place] ^= 1
        seen.add(tensor_digest(changed))
    assert len(seen) == 1 + len({0, size // 2, size - 1} if size else ())


def test_places_count():
    words = torch.arange(4096, dtype=torch.int64)
    assert tensor_digest(words) != tensor_digest(words.flip(0))
    assert tensor_digest(torch.zeros(8)) != tensor_digest(torch.zeros(9))


def test_the_documented_sum():
    """An independent computation in Python's integers."""
    mask = (1 << 64) - 1

    def mix(index):
        x = index * 0x9E3779B97F4A7C15 & mask
        signed = x - (1 << 64) if x >> 63 else x
        x = (x ^ (signed >> 30)) & mask
        x = x * 0xBF58476D1CE4E5B9 & mask
        signed = x - (1 << 64) if x >> 63 else x
        return ((x ^ (signed >> 27)) & mask) | 1

    words = torch.randint(-(2**62), 2**62, (5000,), generator=torch.Generator().manual_seed(0))
    total = words.nbytes * 0x9E3779B97F4A7C15
    for row, start in enumerate(range(0, 5000, 2048), start=1):
        inner = sum(w * mix(i) for i, w in enumerate(words[start : start + 2048].tolist(), start=1))
        total += inner * mix(row)
    assert tensor_digest(words) == total & mask


def test_views_and_alignment_do_not_matter():
    flat = torch.randint(0, 256, (40001,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert tensor_digest(flat[1:]) == tensor_digest(flat[1:].clone())
    matrix = flat[:40000].view(200, 200)
    assert tensor_digest(matrix.t()) == tensor_digest(matrix.t().contiguous())


def test_units_combine_by_place():
    digests = torch.randint(-(2**62), 2**62, (12,), generator=torch.Generator().manual_seed(2))
    mask, pieces = (1 << 64) - 1, [range(1), range(3, 7), range(3), range(1), range(40, 43)]
    values, expected = iter(digests.tolist()), []
    for units in pieces:
        terms = [next(values) * ((unit * 0x9E3779B97F4A7C15 & mask) | 1) for unit in units]
        expected.append(sum(terms) & mask)
    assert combine_units(digests, pieces) == expected
    assert expected[0] == digests.tolist()[0] & mask
    assert combine_units(digests[:2].flip(0), [range(2)]) != combine_units(digests[:2], [range(2)])


@pytest.mark.parametrize("scheme", [NVFP4(), make_scheme("fp8")], ids=lambda s: s.name)
def test_a_trainer_computes_the_engines_digest(scheme, cold_load, weights_a, weights_b, joined, snapshot):
    """T8: the served stored values against what the trainer's BF16 weights quantize to."""
    policy = cold_load(scheme, weights_a)
    served = snapshot(policy)
    promised = policy.digest_of(joined(weights_b))
    assert snapshot(policy) == served
    assert promised != policy.digest()
    assert policy.update(weights_b, "1").digest == promised
    slot = next(slot for slot in policy.plan.slots if slot.name == "odd_proj")
    stored = scheme.quantize(weights_b["odd_proj.weight"], slot.shape)
    assert {name: tensor_digest(value) for name, value in stored.items()} == slot.digests

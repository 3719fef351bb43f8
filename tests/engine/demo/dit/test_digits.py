"""The data, its split, and the rules of the reward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits as load_all
from sklearn.svm import SVC

from rollmill.engine.demo.dit.digits import load_digits, to_ink, to_signal
from rollmill.engine.demo.dit.judge import Judge
from rollmill.engine.demo.dit.model import pack, unpack
from rollmill.engine.dit.families.family import Size
from rollmill.engine.dit.families.flux import Flux


def test_every_image_is_in_one_part_of_the_split():
    everything, parts = load_all(), load_digits()
    ink = torch.cat([part.ink for part in parts]).flatten(1).numpy()
    labels = torch.cat([part.labels for part in parts]).numpy()
    rows = np.column_stack([ink, labels])
    expected = np.column_stack([everything.data / 16, everything.target])
    np.testing.assert_array_equal(sorted(map(tuple, rows)), sorted(map(tuple, expected)))


def test_both_parts_hold_every_digit_alike():
    train, held_out = load_digits()
    assert (len(train.labels), len(held_out.labels)) == (1437, 360)
    shares = [part.labels.bincount().float() / len(part.labels) for part in (train, held_out)]
    torch.testing.assert_close(shares[0], shares[1], atol=0.004, rtol=0)


def test_ink_and_signal_are_inverse_to_a_level_of_256():
    ink = load_digits()[1].ink
    assert (ink.min(), ink.max()) == (0, 1)
    assert (to_ink(to_signal(ink)) - ink).abs().max() <= 0.5 / 255 + 1e-6
    assert to_ink(torch.tensor([-3.0, 3.0])).tolist() == [0, 1]


def test_tokens_are_those_of_the_engine():
    images = torch.randn(3, 8, 8)
    flux = Flux({"in_channels": 4, "joint_attention_dim": 16, "pooled_projection_dim": 8}, 8)
    assert torch.equal(pack(images), flux.pack(images[:, None]))
    assert torch.equal(unpack(pack(images)), images)
    assert torch.equal(flux.unpack(pack(images), Size(64, 64))[:, 0], images)


def test_judges_read_what_they_have_not_seen():
    train, held_out = load_digits()
    assert Judge("train").right(held_out.ink, held_out.labels).float().mean() > 0.98
    assert Judge("held_out").right(train.ink, train.labels).float().mean() > 0.97


def test_reward_is_the_ink_of_a_right_digit():
    train, held_out = load_digits()
    images, asked = held_out.ink[:60], held_out.labels[:60].clone()
    asked[::3] = (asked[::3] + 1) % 10  # asked for another digit
    machine = SVC(C=10.0, gamma="scale").fit(train.ink.flatten(1).double().numpy(), train.labels.numpy())
    expected = [
        float(np.mean(image)) if machine.predict(image.reshape(1, -1))[0] == digit else 0.0
        for image, digit in zip(images.double().numpy(), asked.tolist(), strict=True)
    ]
    rewards = Judge().rewards(images, asked)
    np.testing.assert_allclose(rewards, expected, atol=1e-6)
    assert 0 < (rewards > 0).sum() <= 40


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_a_bolder_digit_earns_more_and_a_black_square_nothing(split):
    held_out = load_digits()[1]
    judge, labels = Judge(split), held_out.labels
    bold = (held_out.ink * 1.3).clamp(max=1)
    both = judge.right(held_out.ink, labels) & judge.right(bold, labels)
    assert both.float().mean() > 0.9
    assert (judge.rewards(bold, labels) > judge.rewards(held_out.ink, labels))[both].all()
    black = torch.ones(10, 8, 8)
    assert (judge.rewards(black, torch.arange(10)) > 0).sum() <= 1

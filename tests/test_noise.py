"""The noise and the label of image i."""

import hashlib
import itertools
import math

import numpy as np
import pytest
import torch

from dataset.noise import noise_and_labels

SHAPE = (4, 8, 8)


def test_the_start_of_an_image_depends_on_seed_and_index_only():
    z1, y = noise_and_labels([3, 4, 5], SHAPE, seed=10, num_classes=7, labels="random")
    z2, y2 = noise_and_labels([5], SHAPE, seed=10, num_classes=7, labels="random")
    assert torch.equal(z1[2], z2[0]) and y[2] == y2[0]
    balanced, y = noise_and_labels([3, 4, 5], SHAPE, seed=10, num_classes=4)
    assert torch.equal(balanced, z1) and y.tolist() == [3, 0, 1]
    assert z1.shape == (3, *SHAPE) and z1.dtype == torch.float32 and y.dtype == torch.int64


def test_the_noise_is_the_same_on_every_machine_and_in_every_version():
    """The bytes of published seeds stay. A label is the hash modulo the classes."""
    words = np.frombuffer(hashlib.sha256(b"7 123 noise").digest(), "<u4")
    expected = np.random.RandomState(words).standard_normal(SHAPE)
    z1, y = noise_and_labels([123], SHAPE, seed=7, num_classes=1000, labels="random")
    assert np.array_equal(z1[0].numpy(), expected.astype(np.float32))
    known = [0.0742964819, 0.8961713314, -0.0156908184, 0.4693634808]
    assert z1.flatten()[:4].tolist() == pytest.approx(known, rel=1e-6) and y.tolist() == [503]


def test_three_seeds_are_independent_in_noise_and_random_labels():
    """3 seeds x 1,000 images x 256 numbers. Image i of one seed was image i + 1 of the one before.

    False alarm: 4e-8 for the 15 moments and correlations of whole seeds, six standard errors each;
    2e-7 for the largest of 4.5 million correlations of two images. Of labels 3e-6 for chi-squared
    with 9 degrees of freedom beyond 45 in one of three, 1e-7 for two seeds' agreement, six standard
    errors from a tenth.
    """
    starts = [noise_and_labels(range(1000), SHAPE, seed=seed, num_classes=10, labels="random")
              for seed in range(3)]
    starts = [(noise.flatten(1).double(), y) for noise, y in starts]
    error = 1 / math.sqrt(256_000)
    for noise, y in starts:
        assert noise.mean().abs() < 6 * error
        assert (noise.var() - 1).abs() < 6 * math.sqrt(2) * error
        assert (noise[1:] * noise[:-1]).mean().abs() < 6.01 * error
        assert ((torch.bincount(y, minlength=10) - 100) ** 2 / 100).sum() < 45
    for (one, y), (two, other) in itertools.combinations(starts, 2):
        assert (one * two).mean().abs() < 6 * error
        assert (one[1:] * two[:-1]).mean().abs() < 6.01 * error
        for agree in (y == other, y[1:] == other[:-1]):
            assert abs(agree.double().mean() - 0.1) < 6 * math.sqrt(0.09 / 999)
    images = torch.cat([noise for noise, _ in starts])
    assert torch.corrcoef(images).fill_diagonal_(0).abs().max() < 0.45

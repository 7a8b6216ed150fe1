"""Statistics in any batches, and the Inception Score of them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refused

from engine.distributed import World
from metrics.distances import inception_score
from metrics.extractors import Features
from metrics.inception import CLASSES, POOL, SPATIAL
from metrics.statistics import Moments, Statistics

ALONE = World(0, 1, torch.device("cpu"), "fp32")


def test_moments_of_batches_are_those_of_the_whole():
    rows = np.random.default_rng(8).standard_normal((50, 6)) * [1, 2, 3, 4, 5, 0] + 1e6
    moments = Moments(6, "cpu")
    for part in np.split(rows, [1, 8, 30]):
        moments.add(torch.from_numpy(part))
    mean, covariance = moments.numpy()
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-14)
    np.testing.assert_allclose(covariance, np.cov(rows, rowvar=False), rtol=1e-10, atol=1e-10)


class FakeExtractor:
    """Image i has its first pixel's value as class; features are pixels."""

    protocol, world = "adm", ALONE

    def dimension(self, image_size):
        return POOL

    def __call__(self, images):
        logits = 200 * F.one_hot(images[:, 0, 0, 0].long(), CLASSES).double()
        pool = torch.zeros(len(images), POOL)
        pool[:, :12] = images.flatten(1) / 255
        return Features(pool, torch.zeros(len(images), SPATIAL), logits)


def measure(images, order=None):
    statistics = Statistics(FakeExtractor(), len(images), (2, 2), scores=True, points=True)
    for first in order or range(0, len(images), 2):
        statistics.add(images[first:first + 2], first)
    return statistics


def test_inception_score_splits_in_the_given_order_however_batches_come(monkeypatch):
    monkeypatch.setattr("metrics.statistics.SPLIT", 3)
    classes = torch.tensor([0, 1, 2, 4, 4, 4, 9, 8], dtype=torch.uint8)  # splits of 3, 1, 2 classes
    images = classes[:, None, None, None].expand(-1, 3, 2, 2)
    in_order, shuffled = measure(images), measure(images, order=[4, 0, 6, 2])
    for statistics in (in_order, shuffled):
        assert inception_score(statistics.scores) == pytest.approx((3 + 1 + 2) / 3, rel=1e-9)
    assert torch.equal(in_order.points, shuffled.points)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["pool", "logits"])
def test_features_that_are_not_finite_are_refused(part, value, monkeypatch):
    """Their distance was reported as 0."""
    extract = FakeExtractor.__call__

    def spoiled(self, images):
        features = extract(self, images)
        getattr(features, part)[-1, 0] = value
        return features

    statistics = measure(torch.zeros(6, 3, 2, 2, dtype=torch.uint8))
    statistics.merge()
    monkeypatch.setattr(FakeExtractor, "__call__", spoiled)
    statistics = measure(torch.zeros(6, 3, 2, 2, dtype=torch.uint8))
    with refused("features of --protocol adm must be finite", "weights"):
        statistics.merge()


def test_fewer_than_two_images_are_refused():
    with refused("2 images or more", "got 1"):
        Statistics(FakeExtractor(), 1, (2, 2))

"""Distances against closed forms, a search and pytorch-fid."""

import numpy as np
import pytest
import torch
from pytorch_fid.fid_score import calculate_frechet_distance

from metrics.distances import frechet_distance, precision, recall


def gaussian(dim, rank, seed):
    """A mean (dim,) and a covariance (dim, dim) of that rank."""
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((dim, rank))
    return rng.standard_normal(dim), root @ root.T


@pytest.mark.parametrize("by_product", [False, True])
def test_equal_covariances_give_the_squared_distance_of_the_means(by_product):
    mean, covariance = gaussian(40, 60, seed=0)
    shift = np.linspace(-1, 2, 40)
    pairs = (mean, covariance), (mean + shift, covariance)
    distance = frechet_distance(*pairs, by_product=by_product)
    assert distance == pytest.approx(shift @ shift, rel=1e-9)


@pytest.mark.parametrize("rank", [0, 3, 40])
def test_a_set_has_no_distance_from_itself(rank):
    pair = gaussian(40, rank, seed=1)
    assert 0 <= frechet_distance(pair, pair) <= 1e-12 * (1 + np.trace(pair[1]))


@pytest.mark.parametrize("zeros", [0, 30, 39])
def test_commuting_covariances_give_the_closed_form_however_singular(zeros):
    """sum (sqrt a - sqrt b)^2 for eigenvalues a, b on common axes; a has zeros where b has none."""
    rng = np.random.default_rng(2)
    axes, _ = np.linalg.qr(rng.standard_normal((40, 40)))
    a, b = rng.uniform(0.1, 3, (2, 40))
    a[:zeros], b[-1] = 0, 0
    pairs = [(np.zeros(40), axes * values @ axes.T) for values in (a, b)]
    expected = np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert frechet_distance(*pairs) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("dim, ranks, by_product, tolerance", [
    (128, (400, 300), False, 1e-8), (128, (400, 300), True, 1e-8), (256, (9, 11), True, 2e-8)])
def test_covariances_give_pytorch_fids_number(dim, ranks, by_product, tolerance):
    """It takes roots of rounding errors where they are singular, which is part of its number."""
    pairs = [gaussian(dim, rank, seed=rank) for rank in ranks]
    expected = calculate_frechet_distance(*pairs[0], *pairs[1])
    distance = frechet_distance(*pairs, by_product=by_product)
    assert distance == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("held", [1, 50, 2**25])
def test_precision_and_recall_are_those_of_a_search_in_any_chunks(held, monkeypatch):
    monkeypatch.setattr("metrics.distances.DISTANCES", held)
    generator = torch.Generator().manual_seed(7)
    samples = 100 + torch.randn(23, 4, generator=generator)  # far off, where digits are few
    reference = 100.5 + torch.randn(17, 4, generator=generator)

    def share(points, others):
        far = torch.cdist(others.double(), others.double()).sort().values[:, 3]
        near = torch.cdist(points.double(), others.double())
        return (near <= far).any(1).double().mean().item()

    expected = share(samples, reference), share(reference, samples)
    assert (precision(samples, reference), recall(samples, reference)) == pytest.approx(expected)
    assert 0 < expected[0] < 1

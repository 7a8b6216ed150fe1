"""Frechet distance, Inception Score, precision and recall, of statistics and features."""

import numpy as np
import torch
from scipy.linalg import lapack, svdvals

from metrics.inception import CLASSES

NEIGHBOURS = 3  # k of precision and recall
DISTANCES = 2**25  # computed at a time: 128 MiB of float32


def frechet_distance(first, second, *, by_product=False):
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two pairs: mean (D,), covariance (D, D).

    With S = R R^T, the trace of the root is the sum of the singular values of R1^T R2: without the
    root of a rounding error where covariances are singular (fewer samples than dimensions).
    by_product takes the eigenvalues of S1 S2, as published code does in effect: the same for
    regular covariances, some 1e-6 of the result too small for singular ones.
    """
    (m1, s1), (m2, s2) = first, second
    if by_product:
        root = np.sqrt(np.linalg.eigvals(s1 @ s2).astype(np.complex128)).real.sum()
    else:
        root = svdvals(_factor(s1).T @ _factor(s2)).sum()
    return max(0.0, float((m1 - m2) @ (m1 - m2) + np.trace(s1) + np.trace(s2) - 2 * root))


def _factor(covariance):
    """R (D, rank) with R R^T = covariance (D, D): Cholesky's factor, with pivots."""
    packed, pivots, rank, _ = lapack.dpstrf(covariance, lower=1)
    factor = np.empty((len(packed), rank))
    factor[pivots - 1] = np.tril(packed)[:, :rank]
    return factor


def inception_score(scores):
    """The mean over S splits of exp(mean KL(p | q)); q is the mean of p in a split. scores:
    Statistics.scores, (S, CLASSES + 2)."""
    p, p_log_p, count = scores.split([CLASSES, 1, 1], dim=1)
    q = p / count
    return float((p_log_p / count - torch.xlogy(q, q).sum(1, keepdim=True)).exp().mean())


def precision(samples, reference, k=NEIGHBOURS):
    """The share of samples (N, D) within the reference (M, D), in any of the balls about its points
    that reach to their k-th neighbours (arXiv 1904.06991).

    Distances are float32; ADM's evaluator takes float16, which gave about .01 more in trials.
    """
    return _share_within(samples, reference, k, reference.mean(0))


def recall(samples, reference, k=NEIGHBOURS):
    """The share of the reference (M, D) that lies within the samples (N, D), as in precision."""
    return _share_within(reference, samples, k, reference.mean(0))


def _share_within(points, others, k, centre):
    points, others = points - centre, others - centre  # distances then lose fewer digits
    # The k-th neighbour's squared distance; the 0-th neighbour is the point itself
    radii = torch.cat([d.topk(k + 1, largest=False).values[:, -1]  # far faster than kthvalue
                       for d in _squared_distances(others, others)])
    within = [(d <= radii).any(1) for d in _squared_distances(points, others)]
    return float(torch.cat(within).double().mean())


def _squared_distances(points, others):
    """Yields (n, len(others)), for as many points at a time as DISTANCES allows."""
    squares = others.square().sum(1)
    for part in points.split(max(1, DISTANCES // len(others))):
        inner = part @ others.T
        yield inner.mul_(-2).add_(squares).add_(part.square().sum(1, keepdim=True)).clamp_(min=0)

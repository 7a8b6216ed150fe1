"""Frechet distance, Inception Score, precision and recall, of statistics and features."""

import numpy as np
import torch
from scipy.linalg import lapack, svdvals

from metrics.inception import CLASSES

NEIGHBOURS = 3  # k of precision and recall
DISTANCES = 2**25  # held at a time: 128 MiB of float32


def frechet_distance(first, second, *, by_product=False):
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two pairs: mean (D,), covariance (D, D).

    With S = R R^T, the trace of the root is the sum of the singular values of R1^T R2: no root of
    a rounding error is taken where covariances are singular, of fewer samples than dimensions.
    by_product takes it from the eigenvalues of S1 S2, as published code does in effect: the same
    for regular covariances, some 1e-6 of the result too small for singular ones.
    """
    (m1, s1), (m2, s2) = first, second
    if by_product:
        root = np.sqrt(np.linalg.eigvals(s1 @ s2).astype(np.complex128)).real.sum()
    else:
        root = svdvals(_factor(s1).T @ _factor(s2)).sum()
    return max(0.0, float((m1 - m2) @ (m1 - m2) + np.trace(s1) + np.trace(s2) - 2 * root))


def _factor(covariance):
    """R (D, rank) with R R^T = covariance: Cholesky's, with pivots, as far as the rank goes."""
    packed, pivots, rank, _ = lapack.dpstrf(covariance, lower=1)
    factor = np.empty((len(packed), rank))
    factor[pivots - 1] = np.tril(packed)[:, :rank]
    return factor


def inception_score(scores):
    """Mean over splits of exp of the mean KL(p | q), q a split's mean p, of Statistics.scores."""
    p, p_log_p, count = scores.split([CLASSES, 1, 1], dim=1)
    q = p / count
    return float((p_log_p / count - torch.xlogy(q, q).sum(1, keepdim=True)).exp().mean())


def precision_recall(samples, reference, k=NEIGHBOURS):
    """The share of samples (N, D) within the reference (M, D), and of the reference within them.

    Within a set is what lies in the ball about one of its points that reaches to its k-th
    neighbour (arXiv 1904.06991). Distances are float32; ADM's evaluator takes
    float16, which gave about .01 more in trials.
    """
    centre = reference.mean(0)  # about which the distances lose fewer digits
    samples, reference = samples - centre, reference - centre
    shares = []
    for points, others in ((samples, reference), (reference, samples)):
        # The k-th neighbour's squared distance; the 0-th neighbour is the point itself.
        radii = torch.cat([d.topk(k + 1, largest=False).values[:, -1]  # far faster than kthvalue
                           for d in _squared_distances(others, others)])
        within = [(d <= radii).any(1) for d in _squared_distances(points, others)]
        shares.append(float(torch.cat(within).double().mean()))
    return tuple(shares)


def _squared_distances(points, others):
    """Yields (n, len(others)), of as many points at a time as DISTANCES allows."""
    squares = others.square().sum(1)
    for part in points.split(max(1, DISTANCES // len(others))):
        inner = part @ others.T
        yield inner.mul_(-2).add_(squares).add_(part.square().sum(1, keepdim=True)).clamp_(min=0)

"""Evaluation: statistics of images, and the published distances between two sets of them.

Three protocols, without which no figure should be quoted:

    pytorch-fid   FID as pytorch-fid 0.3.0 computes it: images in [0, 1], bilinear resize with
                  half-pixel centres to 299, 2x - 1
    adm           FID, sFID, Inception Score, precision and recall as the evaluator of ADM
                  (openai/guided-diffusion) does: TensorFlow 1's resize to 299, (x - 128) / 128
    pixels        Frechet distance of the pixels themselves, in [-1, 1], of tiny images

    extractor = Extractor(protocol, world)
    reference = Reference.load(path, protocol, image_size, option="--ref")
    statistics = Statistics(extractor, count, image_size, **reference.wants)
    statistics.add(images, first)                      # for every batch of this process
    result = evaluate(statistics, reference)           # a dict on rank 0, None elsewhere

Images are uint8 (B, 3, H, W) and numbered from 0. All that is kept is a sum over images, of which
each process adds its own: results do not depend on who measures which image.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import lapack, svdvals

from features import CLASSES, POOL, SPATIAL, NpzImages, dimension, reading
from runtime import UserError, regular

PROTOCOLS = ("pytorch-fid", "adm", "pixels")
METRICS = {"fid": "FID", "sfid": "sFID", "inception_score": "Inception Score",
           "precision": "Precision", "recall": "Recall"}
SPLIT = 5000  # images per split of the Inception Score
NEIGHBOURS = 3  # k of precision and recall
PUBLISHED = 50000  # samples behind a published FID
ROUNDING = 1e-5  # of a reference's covariance; float32 rounds by some 1e-7 and its sums by 1e-6
DISTANCES = 2**25  # held at a time: 128 MiB of float32


# ---- statistics ----------------------------------------------------------------------------


class Moments:
    """Count, mean (D,) and covariance (D, D), in float64, of rows that come in batches.

    Kept is the scatter about the running mean; sums of squares would cancel.
    """

    def __init__(self, dim, device):
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def add(self, rows):
        """Take in rows (B, D)."""
        rows, before = rows.double(), self.count
        mean = rows.mean(0)
        centred, shift = rows - mean, mean - self.mean
        self.count += len(rows)
        self.mean += shift * (len(rows) / self.count)
        self.scatter.addmm_(centred.T, centred)
        self.scatter.addr_(shift, shift, alpha=before * len(rows) / self.count)

    def merge(self, world):
        """Make these the moments of all processes' rows together."""
        count = int(world.total(torch.tensor(self.count, device=self.mean.device)))
        mean = world.total(self.mean * (self.count / count))
        shift = self.mean - mean
        world.total(self.scatter.addr_(shift, shift, alpha=self.count))
        self.count, self.mean = count, mean

    def numpy(self):
        """mean (D,) and unbiased covariance (D, D)."""
        return self.mean.cpu().numpy(), (self.scatter / (self.count - 1)).cpu().numpy()


class Statistics:
    """All that the metrics need to know of count images of image_size (H, W), in one pass.

    spatial, scores, points: for sFID, the Inception Score, precision and recall; a reference's
    ``wants`` says which. Memory is constant but for the points, 8 KiB an image.
    """

    def __init__(self, extractor, count, image_size, *, spatial=False, scores=False, points=False):
        if count < 2:
            raise UserError(f"a Frechet distance must have 2 images or more, got {count}; add some")
        device = extractor.world.device
        self.extractor, self.count, self.merged = extractor, count, False
        self.pool = Moments(dimension(extractor.protocol, image_size), device)
        self.spatial = Moments(SPATIAL, device) if spatial else None
        self.points = torch.zeros(count, POOL, device=device) if points else None
        splits = (count - 1) // SPLIT + 1  # a row each: sums of p, of p log p, and of 1
        self.scores = (torch.zeros(splits, CLASSES + 2, dtype=torch.float64, device=device)
                       if scores else None)

    def add(self, images, first):
        """Take in uint8 images (B, 3, H, W): number first, first + 1, ... of the whole."""
        features = self.extractor(images)
        self.pool.add(features.pool)
        if self.spatial is not None:
            self.spatial.add(features.spatial)
        if self.points is not None:
            self.points[first:first + len(images)] = features.pool
        if self.scores is not None:
            log_p = features.logits.log_softmax(1)
            p = log_p.exp()
            sums = torch.cat([p, (p * log_p).sum(1, keepdim=True), torch.ones_like(p[:, :1])], 1)
            numbers = torch.arange(first, first + len(images), device=p.device)
            self.scores.index_add_(0, numbers // SPLIT, sums)

    def merge(self):
        """Join the parts of all processes, on each of them; later calls do nothing."""
        if self.merged:
            return
        self.merged, world = True, self.extractor.world
        for moments in filter(None, (self.pool, self.spatial)):
            moments.merge(world)
        for table in (self.scores, self.points):  # zero where another process has the images
            if table is not None:
                world.total(table)
        assert self.pool.count == self.count, f"{self.pool.count} images came, not {self.count}"


# ---- distances -----------------------------------------------------------------------------


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


# ---- the reference -------------------------------------------------------------------------


@dataclass
class Reference:
    """What samples are compared with: an .npz in ADM's layout, or images measured here."""

    name: str
    pool: tuple  # mean (D,), covariance (D, D)
    scores: bool  # whether samples get an Inception Score, which needs no reference
    spatial: tuple | None = None  # the same for sFID
    images: NpzImages | None = None  # arr_0, for precision and recall, or
    points: torch.Tensor | None = None  # its features (M, POOL), once they were needed
    count: int | None = None  # images behind the statistics, if known
    made_with: str | None = None  # protocol behind them, if known

    @classmethod
    def load(cls, path, protocol, image_size, *, option):
        """Open an .npz with mu and sigma; for adm also mu_s, sigma_s, arr_0, as far as present.

        A cheap check: no network is run. Raises UserError naming option.
        """
        with reading(option, path), np.load(regular(path), allow_pickle=False) as file:
            keys = {"mu", "sigma", "mu_s", "sigma_s", "num_images", "protocol"}
            stored = {key: file[key] for key in keys.intersection(file.files)}
            if not {"mu", "sigma"} <= stored.keys():
                raise UserError(f"{option} must have the keys mu and sigma, got {path} with "
                                f"{', '.join(file.files)}; make one by evaluate_fid.py --make-ref")
            adm, dim = protocol == "adm", dimension(protocol, image_size)
            reference = cls(str(path), _pair(stored, "mu", "sigma", dim, option, path), scores=adm)
            if adm and {"mu_s", "sigma_s"} <= stored.keys():
                reference.spatial = _pair(stored, "mu_s", "sigma_s", SPATIAL, option, path)
            if adm and "arr_0" in file.files:
                reference.images = NpzImages(path, option=option)
            if "num_images" in stored:
                reference.count = int(stored["num_images"])
            if "protocol" in stored:
                reference.made_with = str(stored["protocol"])
            return reference

    @classmethod
    def of(cls, statistics, name):
        """Statistics measured here as a reference. All processes take part."""
        statistics.merge()
        spatial = statistics.spatial and statistics.spatial.numpy()
        protocol = statistics.extractor.protocol
        return cls(name, statistics.pool.numpy(), protocol == "adm", spatial,
                   points=statistics.points, count=statistics.count, made_with=protocol)

    @property
    def wants(self):
        """What Statistics must gather of the samples."""
        points = self.images if self.points is None else self.points
        return {"spatial": self.spatial is not None, "scores": self.scores,
                "points": points is not None and len(points) > NEIGHBOURS}

    def find_points(self, extractor, batch_size=64):
        """The features of arr_0, once. All processes take part."""
        if self.points is None:
            world, count = extractor.world, len(self.images)
            self.points = torch.zeros(count, POOL, device=world.device)
            with world.progress(count, desc="reference", unit="image") as bar:
                for first, images in self.images.batches(batch_size, world):
                    self.points[first:first + len(images)] = extractor(images).pool
                    bar.update(min(len(images) * world.size, count - bar.n))
            world.total(self.points)
        return self.points


def _pair(stored, mean, covariance, dim, option, path):
    """The float64 arrays mean (D,) and covariance (D, D), checked."""
    pair = stored[mean].astype(np.float64), stored[covariance].astype(np.float64)
    shapes = [array.shape for array in pair]
    if shapes != [(dim,), (dim, dim)] or not all(np.isfinite(array).all() for array in pair):
        raise UserError(f"{option} must have {mean} ({dim},) and {covariance} ({dim}, {dim}), "
                        f"finite, for this protocol and image size, got {shapes[0]} and "
                        f"{shapes[1]} in {path}; name a reference made for them")
    if not _is_covariance(pair[1]):
        raise UserError(f"{option} must have a symmetric {covariance} without negative "
                        f"eigenvalues, as a covariance is, got another in {path}; the file is "
                        f"damaged or no reference: get it again")
    return pair


def _is_covariance(matrix):
    """Whether a matrix is symmetric and positive semidefinite, to ROUNDING of its trace.

    Cholesky's factor exists only then, and takes a quarter of the eigenvalues' time.
    """
    slack = ROUNDING * np.trace(matrix) + np.finfo(np.float64).tiny  # tiny: for a matrix of zeros
    try:
        np.linalg.cholesky(matrix + slack * np.eye(len(matrix)))
    except np.linalg.LinAlgError:
        return False
    return bool((abs(matrix - matrix.T) <= slack).all())


def evaluate(statistics, reference):
    """The metrics on rank 0, a dict of plain numbers; None elsewhere. All processes take part."""
    extractor = statistics.extractor
    statistics.merge()
    points = None if statistics.points is None else reference.find_points(extractor)
    if not extractor.world.main:
        return None
    result = {"protocol": extractor.protocol, "num_samples": statistics.count}
    result["fid"] = frechet_distance(  # pytorch-fid's own number, to its rounding, if so asked
        statistics.pool.numpy(), reference.pool, by_product=extractor.protocol == "pytorch-fid")
    if reference.spatial is not None:
        result["sfid"] = frechet_distance(statistics.spatial.numpy(), reference.spatial)
    if reference.scores:
        result["inception_score"] = inception_score(statistics.scores)
    if points is not None and statistics.count > NEIGHBOURS:
        with extractor.world.full_precision():
            result["precision"], result["recall"] = precision_recall(statistics.points, points)
    return result


def names(protocol):
    """What people read for each metric; a distance without Inception is not called FID."""
    return METRICS | ({"fid": "Frechet distance of pixels"} if protocol == "pixels" else {})


def notes(reference, protocol, count):
    """What a reader of the result must know, a line each: metrics left out, weak comparisons."""
    lines = []
    if reference.scores and reference.spatial is None:
        lines.append(f"sfid is left out: {reference.name} lacks mu_s and sigma_s")
    if reference.scores and (count <= NEIGHBOURS or not reference.wants["points"]):
        lines.append(f"precision and recall are left out: they take arr_0 in {reference.name}, and "
                     f"more than {NEIGHBOURS} images on either side")
    if reference.made_with not in (None, protocol):
        lines.append(f"warning: {reference.name} was made with --protocol {reference.made_with}, "
                     f"not {protocol}; the difference is part of the result")
    suggested = min(PUBLISHED, reference.count or PUBLISHED)
    if count < suggested:
        lines.append(f"warning: {count} samples where the reference suggests {suggested}: fewer "
                     f"raise the Frechet distance, by a share that goes as 1 / count; compare the "
                     f"result with others of {count} samples only")
    return lines

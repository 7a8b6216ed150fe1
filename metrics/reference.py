"""Reference statistics, and the comparison of samples with them.

    extractor = Extractor(protocol, world)
    reference = Reference.load(path, protocol, image_size, option="--ref")
    statistics = Statistics(extractor, count, image_size, **reference.wants)
    statistics.add(images, first)                      # for every batch of this process
    result = evaluate(statistics, reference)           # a dict on rank 0, None elsewhere

Images are uint8 (B, 3, H, W), numbered from 0. Results do not depend on which process measures
which image.
"""

from dataclasses import dataclass

import numpy as np
import torch

from dataset.images import NpzImages, reading_npz, verify_npz
from engine.files import regular_file
from engine.options import UserError
from metrics.distances import NEIGHBOURS, frechet_distance, inception_score, precision_recall
from metrics.inception import POOL, SPATIAL, Extractor, dimension
from metrics.statistics import Statistics

METRICS = {"fid": "FID", "sfid": "sFID", "inception_score": "Inception Score",
           "precision": "Precision", "recall": "Recall"}
PUBLISHED = 50000  # samples behind a published FID
ROUNDING = 1e-5  # of a reference's covariance; float32 rounds by some 1e-7 and its sums by 1e-6


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
        with reading_npz(option, path), np.load(regular_file(path), allow_pickle=False) as file:
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


def metric_names(protocol):
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


class Evaluation:
    """A reference and what extracts features: opened once, then asked for metrics.

    Opening checks the reference before it looks for Inception's weights. Raises UserError.
    """

    def __init__(self, path, protocol, config, world, *, option="--fid-ref"):
        self.image_size = (config["image_size"], config["image_size"])
        self.reference = Reference.load(path, protocol, self.image_size, option=option)
        verify_npz(option, path, world)
        self.extractor = Extractor(protocol, world)

    def statistics(self, count):
        """Empty fid.Statistics for so many images."""
        return Statistics(self.extractor, count, self.image_size, **self.reference.wants)

    def metrics(self, statistics):
        """The metrics, a dict, on rank 0; None elsewhere. All processes take part."""
        return evaluate(statistics, self.reference)

    def measure(self, generator, count, batch_size):
        """The metrics of a generator's first count images."""
        statistics = self.statistics(count)
        with generator.world.progress(count, desc="evaluating", unit="image") as bar:
            for rows in generator.batches(count, batch_size):
                statistics.add(generator.images(rows), rows.start)
                bar.update(min(len(rows) * generator.world.size, count - bar.n))
        return self.metrics(statistics)

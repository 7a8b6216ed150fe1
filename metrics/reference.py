"""Reference statistics, and the comparison of samples with them. A new metric is a function in
metrics/distances.py and a line in METRICS."""

from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from engine.errors import BadValue, naming
from metrics.distances import NEIGHBOURS, frechet_distance, inception_score, precision, recall
from metrics.image_sets import NpzImages, reading_npz, verify_npz
from metrics.inception import SPATIAL, Extractor, dimension
from metrics.statistics import Statistics

PUBLISHED = 50000  # samples behind a published FID


class Metric(NamedTuple):
    title: str  # for a person
    needs: str  # the attribute of Statistics: "pool", "spatial", "scores" or "points"
    value: Callable  # (Statistics, Reference) -> float


METRICS = {  # by their keys in the result
    "fid": Metric("FID", "pool", lambda samples, reference: frechet_distance(
        samples.pool.numpy(), reference.pool,
        by_product=samples.extractor.protocol == "pytorch-fid")),  # its number to rounding
    "sfid": Metric("sFID", "spatial", lambda samples, reference: frechet_distance(
        samples.spatial.numpy(), reference.spatial)),
    "inception_score": Metric("Inception Score", "scores", lambda samples, reference:
                              inception_score(samples.scores)),
    "precision": Metric("Precision", "points", lambda samples, reference:
                        precision(samples.points, reference.points)),
    "recall": Metric("Recall", "points", lambda samples, reference:
                     recall(samples.points, reference.points)),
}


@dataclass
class Reference:
    """What samples are compared with: an .npz in ADM's layout, or images measured here."""

    name: str
    pool: tuple  # mean (D,), covariance (D, D)
    scores: bool  # whether samples get an Inception Score, which needs no reference
    spatial: tuple | None = None  # the same for sFID
    images: NpzImages | None = None  # arr_0, for precision and recall
    points: torch.Tensor | None = None  # features (M, POOL), of arr_0 after evaluate
    count: int | None = None  # images behind the statistics, if known
    made_with: str | None = None  # protocol behind them, if known
    image_size: tuple | None = None  # (H, W) of the images behind them, if known

    @classmethod
    def load(cls, path, protocol, image_size, world):
        """Open an .npz with mu and sigma; for adm also mu_s, sigma_s and arr_0, if present. No
        network runs. Raises BadValue, also for damaged bytes."""
        verify_npz(path, world)
        with reading_npz(path), np.load(path, allow_pickle=False) as file:
            if not {"mu", "sigma"} <= set(file.files):
                raise BadValue(f"must have the keys mu and sigma, got {path} with "
                               f"{', '.join(file.files)}; make one by evaluate_fid.py --make-ref")
            pool = _pair(file, "mu", "sigma", dimension(protocol, image_size), path)
            reference = cls(str(path), pool, scores=protocol == "adm")
            if reference.scores and {"mu_s", "sigma_s"} <= set(file.files):
                reference.spatial = _pair(file, "mu_s", "sigma_s", SPATIAL, path)
            with nullcontext() if reference.scores else suppress(BadValue):
                if "arr_0" in file.files:
                    images = NpzImages(path)
                    reference.images = images if reference.scores else None
                    reference.image_size = images.image_size
            if "num_images" in file.files:
                reference.count = int(file["num_images"])
            if "protocol" in file.files:
                reference.made_with = " ".join(str(file["protocol"]).split())[:40]
            return reference

    @classmethod
    def of(cls, statistics, name):
        """Statistics measured here, as a reference. Every rank must call it."""
        statistics.merge()
        spatial = statistics.spatial and statistics.spatial.numpy()
        protocol = statistics.extractor.protocol
        return cls(name, statistics.pool.numpy(), protocol == "adm", spatial,
                   points=statistics.points, count=statistics.count, made_with=protocol,
                   image_size=statistics.image_size)

    @property
    def wants(self):
        """The options of Statistics for samples: what the metrics need that it has data for."""
        points = self.images if self.points is None else self.points
        return {"spatial": self.spatial is not None, "scores": self.scores,
                "points": points is not None and len(points) > NEIGHBOURS}


def _pair(file, mean, covariance, dim, path):
    """The float64 arrays mean (D,) and covariance (D, D), checked."""
    pair = file[mean], file[covariance]
    if any(array.dtype.kind not in "fiu" for array in pair):
        raise BadValue(f"must have real numbers {mean} and {covariance}, got {pair[0].dtype} and "
                       f"{pair[1].dtype} in {path}; name another")
    pair = tuple(array.astype(np.float64) for array in pair)
    shapes = [array.shape for array in pair]
    if (shapes != [(dim,), (dim, dim)] or not all((abs(array) < 1e100).all() for array in pair)
            or np.diagonal(pair[1]).min() < 0):
        raise BadValue(f"must have {mean} ({dim},) and {covariance} ({dim}, {dim}), finite, for "
                       f"this protocol and image size, got {shapes[0]} and {shapes[1]} in {path}; "
                       f"name another")
    return pair


def evaluate(statistics, reference):
    """The metrics on rank 0, a dict of plain numbers; None elsewhere. Every rank must call it."""
    statistics.merge()
    extractor = statistics.extractor
    if statistics.points is not None and reference.points is None:
        arr_0 = Statistics(extractor, len(reference.images), reference.images.image_size,
                           points=True)
        with naming("the reference"):
            arr_0.add_all(reference.images.batches, 64, "reference").merge()
        reference.points = arr_0.points
    if not extractor.world.main:
        return None
    result = {"protocol": extractor.protocol, "num_samples": statistics.count}
    with extractor.world.full_precision():
        return result | {key: metric.value(statistics, reference)
                         for key, metric in METRICS.items()
                         if getattr(statistics, metric.needs) is not None}


def metric_names(protocol):
    """The names of the metrics by key; a distance without Inception is not called FID."""
    names = {key: metric.title for key, metric in METRICS.items()}
    return names | ({"fid": "Frechet distance of pixels"} if protocol == "pixels" else {})


def notes(reference, protocol, count, image_size):
    """Lines to print beside the metrics of count images of image_size (H, W): what is left out, and
    warnings."""
    lines = []
    wants = reference.wants | {"pool": True}
    missing = [key for key, metric in METRICS.items() if not wants[metric.needs]]
    if protocol == "adm" and missing:
        lines.append(f"left out: {', '.join(missing)}; of a reference sfid needs mu_s and sigma_s, "
                     f"precision and recall arr_0 of more than {NEIGHBOURS} images")
    if reference.made_with not in (None, protocol):
        lines.append(f"warning: {reference.name} was made with --protocol {reference.made_with}, "
                     f"not {protocol}; the difference is part of the result")
    elif reference.made_with is None and protocol == "pytorch-fid":
        lines.append(f"note: {reference.name} does not record its protocol; ADM's public files are "
                     f"of TensorFlow's resize, for which take --protocol adm")
    if reference.image_size not in (None, image_size):
        sizes = [f"{h} x {w}" for h, w in (reference.image_size, image_size)]
        lines.append(f"warning: {reference.name} is of images of {sizes[0]} pixels, the samples "
                     f"have {sizes[1]}; the difference is part of the result")
    suggested = min(PUBLISHED, reference.count or PUBLISHED)
    if count < suggested:
        whose = "the reference" if suggested == reference.count else "published results"
        lines.append(f"warning: {count} samples against {suggested} of {whose}: fewer raise the "
                     f"Frechet distance; compare only with results of {count} samples")
    return lines


class Evaluation:
    """A reference file, checked, and a feature extractor, for any number of evaluations. Raises
    UserError."""

    def __init__(self, path, protocol, config, world):
        self.image_size = (config["image_size"], config["image_size"])
        with naming("--fid-ref"):
            self.reference = Reference.load(path, protocol, self.image_size, world)
        self.extractor = Extractor(protocol, world)

    def statistics(self, count):
        """Empty Statistics for count images."""
        return Statistics(self.extractor, count, self.image_size, **self.reference.wants)

    def measure(self, sampler, count, batch_size):
        """The metrics of an ImageSampler's first count images, as evaluate returns them."""
        statistics = self.statistics(count)
        statistics.add_all(partial(map, sampler.images), batch_size, "evaluating")
        return evaluate(statistics, self.reference)

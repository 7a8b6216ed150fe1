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
from metrics.extractors import distance_names, extractor_of
from metrics.image_sets import NpzImages, reading_npz, verify_npz
from metrics.inception import SPATIAL
from metrics.pickles import read_pickle
from metrics.statistics import Statistics

PUBLISHED = 50000  # samples behind a published FID
NEEDS = {"spatial": "mu_s and sigma_s", "points": f"arr_0 of more than {NEIGHBOURS} images"}


class Metric(NamedTuple):
    title: str  # for a person
    needs: str  # the attribute of Statistics: "pool", "spatial", "scores" or "points"
    value: Callable  # (Statistics, Reference) -> float


METRICS = {  # by their keys in the result, beside the Frechet distance, whose key the protocol has
    "sfid": Metric("sFID", "spatial", lambda samples, reference: frechet_distance(
        samples.spatial.numpy(), reference.spatial)),
    "inception_score": Metric("Inception Score", "scores", lambda samples, reference:
                              inception_score(samples.scores)),
    "precision": Metric("Precision", "points", lambda samples, reference:
                        precision(samples.points, reference.points)),
    "recall": Metric("Recall", "points", lambda samples, reference:
                     recall(samples.points, reference.points)),
}


def metrics_of(extractor):
    """The metrics of a protocol by their keys in the result."""
    distance = Metric(extractor.title, "pool", lambda samples, reference: frechet_distance(
        samples.pool.numpy(), reference.pool, by_product=extractor.by_product))
    return {key: metric for key, metric in {extractor.key: distance, **METRICS}.items()
            if metric.needs in extractor.gives}


def metric_names(protocol):
    """The names of all metrics by key, of the Frechet distances with that of this protocol."""
    return distance_names(protocol) | {key: metric.title for key, metric in METRICS.items()}


@dataclass
class Reference:
    """What samples are compared with: an .npz in ADM's layout, or images measured here."""

    name: str
    pool: tuple  # mean (D,), covariance (D, D)
    gives: tuple  # of the extractor
    spatial: tuple | None = None  # the same for sFID
    images: NpzImages | None = None  # arr_0, for precision and recall
    points: torch.Tensor | None = None  # features (M, D), of arr_0 after evaluate
    count: int | None = None  # images behind the statistics, if known
    made_with: str | None = None  # protocol behind them, if known
    image_size: tuple | None = None  # (H, W) of the images behind them, if known

    @classmethod
    def load(cls, path, extractor, image_size, world):
        """Open an .npz with mu and sigma, and mu_s, sigma_s and arr_0 if the protocol takes them;
        or a .pkl of EDM2. No network runs. Raises BadValue, also for damaged bytes."""
        dim = extractor.dimension(image_size)
        if path.suffix.lower() == ".pkl":
            return cls._load_edm2(path, extractor, dim)
        verify_npz(path, world)
        with reading_npz(path), np.load(path, allow_pickle=False) as file:
            if not {"mu", "sigma"} <= set(file.files):
                raise BadValue(f"must have the keys mu and sigma, got {path} with "
                               f"{', '.join(file.files)}; make one by evaluate_fid.py --make-ref")
            made_with = (" ".join(str(file["protocol"]).split())[:100]
                         if "protocol" in file.files else None)
            source = f"{path} of --protocol {made_with}" if made_with else path
            pool = _pair(file, "mu", "sigma", dim, source, extractor)
            reference = cls(str(path), pool, extractor.gives, made_with=made_with)
            if "spatial" in extractor.gives and {"mu_s", "sigma_s"} <= set(file.files):
                reference.spatial = _pair(file, "mu_s", "sigma_s", SPATIAL, path, extractor)
            takes_images = "points" in extractor.gives
            with nullcontext() if takes_images else suppress(BadValue):
                if "arr_0" in file.files:
                    images = NpzImages(path)
                    reference.images = images if takes_images else None
                    reference.image_size = images.image_size
            if "num_images" in file.files:
                reference.count = int(file["num_images"])
            return reference

    @classmethod
    def _load_edm2(cls, path, extractor, dim):
        """The reference of a pickle of EDM2 (NVlabs/edm2, calculate_metrics.py), {"fid" or
        "fd_dinov2": {"mu", "sigma"}, perhaps "num_images"}."""
        key = extractor.key
        whole, mean, covariance, count = read_pickle(path, (), (key, "mu"), (key, "sigma"),
                                                     ("num_images",))
        pair = {"mu": mean, "sigma": covariance}
        if not all(isinstance(array, np.ndarray) for array in pair.values()):
            found = ", ".join(map(str, whole)) if isinstance(whole, dict) else type(whole).__name__
            raise BadValue(f"must have mu and sigma of {key} for --protocol {extractor.protocol}, "
                           f"got {path} with {found:.100}; name another file or protocol")
        return cls(str(path), _pair(pair, "mu", "sigma", dim, path, extractor), extractor.gives,
                   count=count if type(count) is int and 0 < count < 2**63 else None)

    @classmethod
    def of(cls, statistics, name):
        """Statistics measured here, as a reference. Every rank must call it."""
        statistics.merge()
        spatial, extractor = statistics.spatial and statistics.spatial.numpy(), statistics.extractor
        return cls(name, statistics.pool.numpy(), extractor.gives, spatial,
                   points=statistics.points, count=statistics.count,
                   made_with=extractor.protocol, image_size=statistics.image_size)

    @property
    def wants(self):
        """The options of Statistics for samples: what the metrics need that it has data for."""
        points = self.images if self.points is None else self.points
        return {"spatial": self.spatial is not None, "scores": "scores" in self.gives,
                "points": points is not None and len(points) > NEIGHBOURS}


def _pair(file, mean, covariance, dim, source, extractor):
    """The float64 arrays mean (D,) and covariance (D, D), checked."""
    pair = file[mean], file[covariance]
    if any(array.dtype.kind not in "fiu" for array in pair):
        raise BadValue(f"must have real numbers {mean} and {covariance}, got {pair[0].dtype} and "
                       f"{pair[1].dtype} in {source}; name another")
    shapes = [array.shape for array in pair]
    if shapes == [(dim,), (dim, dim)]:
        pair = _, s = tuple(array.astype(np.float64) for array in pair)
        if (all((abs(array) < 1e100).all() for array in pair) and np.diagonal(s).min() >= 0
                and np.allclose(s, s.T)):
            return pair
    raise BadValue(f"must have {mean} ({dim},) and {covariance} ({dim}, {dim}), finite and "
                   f"symmetric, for --protocol {extractor.protocol} and this image size, got "
                   f"{shapes[0]} and {shapes[1]} in {source}; name another")


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
                         for key, metric in metrics_of(extractor).items()
                         if getattr(statistics, metric.needs) is not None}


def notes(reference, protocol, count, image_size):
    """Lines to print beside the metrics of count images of image_size (H, W): what is left out, and
    warnings."""
    lines = []
    missing = {key: NEEDS[metric.needs] for key, metric in METRICS.items()
               if metric.needs in reference.gives and not reference.wants[metric.needs]}
    if missing:
        lines.append(f"left out: {', '.join(missing)}; the reference lacks "
                     f"{' and '.join(dict.fromkeys(missing.values()))}")
    if reference.made_with not in (None, protocol):
        lines.append(f"warning: {reference.name} was made with --protocol {reference.made_with}, "
                     f"not {protocol}; the difference is part of the result")
    elif reference.made_with is None and protocol == "pytorch-fid":
        lines.append(f"note: {reference.name} does not record its protocol; the public files of "
                     f"ADM and EDM2 are of TensorFlow's resize, for which take --protocol adm")
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
            self.extractor = extractor_of(protocol)
            self.reference = Reference.load(path, self.extractor, self.image_size, world)
        self.extractor.load(world)

    def statistics(self, count):
        """Empty Statistics for count images."""
        return Statistics(self.extractor, count, self.image_size, **self.reference.wants)

    def measure(self, sampler, count, batch_size):
        """The metrics of an ImageSampler's first count images, as evaluate returns them."""
        statistics = self.statistics(count)
        statistics.add_all(partial(map, sampler.images), batch_size, "evaluating")
        return evaluate(statistics, self.reference)

"""Sums over images, from which metrics are computed; each rank adds its own images."""

import torch

from engine.errors import UserError
from metrics.distances import NEIGHBOURS
from metrics.inception import CLASSES, SPATIAL

SPLIT = 5000  # images per split of the Inception Score


def rank_batches(count, size, world):
    """This rank's share of the rows 0 .. count - 1, a list of ranges of size. Ranks take whole
    batches in turn: no batch depends on their number."""
    return [range(first, min(first + size, count))
            for first in range(0, count, size)[world.rank::world.size]]


class Moments:
    """Count, mean (D,) and covariance (D, D), in float64, of rows that come in batches, from the
    scatter about the running mean; sums of squares would cancel."""

    def __init__(self, dim, device):
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def add(self, rows):
        """Add rows (B, D)."""
        rows, before = rows.double(), self.count
        mean = rows.mean(0)
        centred, shift = rows - mean, mean - self.mean
        self.count += len(rows)
        self.mean += shift * (len(rows) / self.count)
        self.scatter.addmm_(centred.T, centred)
        self.scatter.addr_(shift, shift, alpha=before * len(rows) / self.count)

    def merge(self, world):
        """Make these the moments of the rows of all ranks."""
        count = int(world.total(torch.tensor(self.count, device=self.mean.device)))
        mean = world.total(self.mean * (self.count / count))
        shift = self.mean - mean
        world.total(self.scatter.addr_(shift, shift, alpha=self.count))
        self.count, self.mean = count, mean

    def numpy(self):
        """mean (D,) and unbiased covariance (D, D)."""
        return self.mean.cpu().numpy(), (self.scatter / (self.count - 1)).cpu().numpy()


class Statistics:
    """What the metrics need of count images of image_size (H, W), gathered in one pass.

    spatial, scores, points: gather for sFID, the Inception Score, precision and recall, as
    Reference.wants says; else they are None. Points take 4 D bytes an image. Raises UserError.
    """

    def __init__(self, extractor, count, image_size, *, spatial=False, scores=False, points=False):
        if count < 2:
            raise UserError(f"a Frechet distance must have 2 images or more, got {count}; add some")
        device = extractor.world.device
        self.extractor, self.count, self.image_size = extractor, count, tuple(image_size)
        self.pool = Moments(dim := extractor.dimension(image_size), device)
        self.spatial = Moments(SPATIAL, device) if spatial else None
        self.points = (torch.zeros(count, dim, device=device)
                       if points and count > NEIGHBOURS else None)
        splits = (count - 1) // SPLIT + 1  # a row each: sums of p, of p log p, and of 1
        self.scores = (torch.zeros(splits, CLASSES + 2, dtype=torch.float64, device=device)
                       if scores else None)

    def add(self, images, first):
        """Add uint8 images (B, 3, H, W), which have the numbers first, first + 1, ..."""
        features = self.extractor(images)
        self.pool.add(features.pool)
        if self.spatial:
            self.spatial.add(features.spatial)
        if self.points is not None:
            self.points[first:first + len(images)] = features.pool
        if self.scores is not None:
            log_p = features.logits.log_softmax(1)
            p = log_p.exp()
            sums = torch.cat([p, (p * log_p).sum(1, keepdim=True), torch.ones_like(p[:, :1])], 1)
            numbers = torch.arange(first, first + len(images), device=p.device)
            self.scores.index_add_(0, numbers // SPLIT, sums)

    def add_all(self, batches, size, title):
        """Add this rank's images, in batches of size, with a progress bar; returns self. batches: a
        function that yields images, uint8 (B, 3, H, W), for a list of ranges."""
        world = self.extractor.world
        parts = rank_batches(self.count, size, world)
        with world.progress(self.count, desc=title, unit="image") as bar:
            for rows, images in zip(parts, batches(parts)):
                self.add(images, rows.start)
                bar.update(min(len(images) * world.size, bar.total - bar.n))
        return self

    def merge(self):
        """Join the parts of all ranks, on each of them, once. Raises UserError where a feature is
        NaN or infinite, as of damaged weights: a distance of them would be no number, or 0."""
        world = self.extractor.world
        self.pool.merge(world)
        if self.spatial:
            self.spatial.merge(world)
        for table in (self.scores, self.points):  # zero where another process has the images
            if table is not None:
                world.total(table)
        assert self.pool.count == self.count, f"{self.pool.count} images came, not {self.count}"
        if not all(table.isfinite().all() for table in (self.pool.scatter, self.scores)
                   if table is not None):
            raise UserError(f"features of --protocol {self.extractor.protocol} must be finite, got "
                            f"NaN or infinity; get the weights of its network again")

"""Images from a network: image i of a seed, batch by batch, as a picture or measured by fid.py."""

import hashlib

import numpy as np
import torch

import data
import fid
import runtime
from features import Extractor, verify
from meanflow import sample

NOISE = "sha256(seed, i)"  # the rule of starts, of which samples.json tells


def starts(indices, shape, *, seed, num_classes, labels="balanced"):
    """Noise z1 (B, C, H, W) and labels y (B,) of the images with these indices, on the CPU.

    Both are functions of a hash of (seed, index), so an image depends neither on the batch it is
    in nor on the number of processes, and no two seeds share one. labels: "balanced" is index
    modulo num_classes, "random" is uniform; the noise is the same for either.
    """
    z1, y = [], []
    for i in indices:
        z1.append(torch.from_numpy(_generator(seed, i).standard_normal(shape)).float())
        y.append(i if labels == "balanced" else int.from_bytes(_digest(seed, i, "label"), "little"))
    return torch.stack(z1), torch.tensor([number % num_classes for number in y])


def _generator(seed, i):
    """The generator of an image's noise, seeded with all 256 bits of a hash.

    PyTorch's CPU generator keeps 32 bits of a seed: of 100,000 images two would share theirs.
    NumPy guarantees that this one's numbers never change.
    """
    return np.random.RandomState(np.frombuffer(_digest(seed, i, "noise"), "<u4"))


def _digest(seed, i, purpose):
    return hashlib.sha256(f"{seed} {i} {purpose}".encode()).digest()


class Generator:
    """Image i of a network, for any i, by ``images(rows)``.

    net: (z, r, t, y) -> u; space: what decodes; config: the run's, for shapes, classes and sizes;
    labels: as in starts; steps: as in meanflow.sample.
    """

    def __init__(self, net, space, config, world, *, seed=0, labels="balanced", steps=1):
        self.net, self.space, self.config, self.world = net, space, config, world
        self.seed, self.labels, self.steps = seed, labels, steps

    @torch.no_grad()
    def images(self, rows):
        """uint8 (B, 3, H, W), on the world's device, of the images with these numbers."""
        z1, y = starts(rows, self.config["latent_shape"], seed=self.seed, labels=self.labels,
                       num_classes=self.config["num_classes"])
        with runtime.one_thread():
            with self.world.autocast():
                x = sample(self.net, z1.to(self.world.device), y.to(self.world.device),
                           steps=self.steps)
            return self.space.decode(x)

    def batches(self, count, batch_size):
        """This process's batches of the images 0 .. count - 1, as ranges: whole ones, dealt out in
        turn, so that their content does not depend on the number of processes."""
        firsts = range(0, count, batch_size)[self.world.rank::self.world.size]
        return [range(first, min(first + batch_size, count)) for first in firsts]

    def picture(self, path):
        """Eight rows of images, in as many columns as there are classes, but ten at most."""
        columns = min(self.config["num_classes"], 10)
        data.save_grid(path, self.images(range(8 * columns)), columns)


class Evaluation:
    """A reference and what extracts features: opened once, then asked for metrics.

    Opening checks the reference before it looks for Inception's weights. Raises UserError.
    """

    def __init__(self, path, protocol, config, world, *, option="--fid-ref"):
        self.image_size = (config["image_size"], config["image_size"])
        self.reference = fid.Reference.load(path, protocol, self.image_size, option=option)
        verify(option, path, world)
        self.extractor = Extractor(protocol, world)

    def statistics(self, count):
        """Empty fid.Statistics for so many images."""
        return fid.Statistics(self.extractor, count, self.image_size, **self.reference.wants)

    def metrics(self, statistics):
        """The metrics, a dict, on rank 0; None elsewhere. All processes take part."""
        return fid.evaluate(statistics, self.reference)

    def measure(self, generator, count, batch_size):
        """The metrics of a generator's first count images."""
        statistics = self.statistics(count)
        with generator.world.progress(count, desc="evaluating", unit="image") as bar:
            for rows in generator.batches(count, batch_size):
                statistics.add(generator.images(rows), rows.start)
                bar.update(min(len(rows) * generator.world.size, count - bar.n))
        return self.metrics(statistics)

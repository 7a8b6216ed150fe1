"""Noise and labels of image i: functions of a seed and of i alone."""

import hashlib

import numpy as np
import torch


def noise_and_labels(indices, shape, *, seed, num_classes, labels="balanced"):
    """Noise z1 (B, C, H, W) and labels y (B,) int64 of the images with these indices, on the CPU.

    Both depend on a hash of (seed, index) alone: not on the batch or the number of ranks, and no
    two seeds share an image. labels: "balanced", the index modulo num_classes, or "random".
    """
    y = [i if labels == "balanced" else int.from_bytes(_digest(seed, i, "label"), "little")
         for i in indices]
    return (noise_of(indices, shape, seed, "noise"),
            torch.tensor([number % num_classes for number in y]))


def noise_of(indices, shape, seed, purpose):
    """Standard normal (B, *shape) for the images with these indices, by a hash of all of these."""
    noise = []
    for i in indices:
        # PyTorch's CPU generator keeps 32 bits of a seed: two of 100,000 images would share theirs.
        # NumPy guarantees that the numbers of this generator never change
        generator = np.random.RandomState(np.frombuffer(_digest(seed, i, purpose), "<u4"))
        noise.append(torch.from_numpy(generator.standard_normal(shape)).float())
    return torch.stack(noise)


def _digest(seed, i, purpose):
    return hashlib.sha256(f"{seed} {i} {purpose}".encode()).digest()

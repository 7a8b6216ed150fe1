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
    return noise_of(indices, shape, seed), torch.tensor([number % num_classes for number in y])


def noise_of(indices, shape, seed, step=0):
    """Standard normal (B, *shape), float32, for the images with these indices: z1, or what a method
    adds before step 1, 2, ..., by a hash of (seed, index, step)."""
    noise, purpose = [], f"noise {step}" if step else "noise"
    for i in indices:
        # PyTorch's CPU generator keeps 32 bits of a seed: two of 100,000 images would share theirs.
        # NumPy guarantees that the numbers of this generator never change
        generator = np.random.RandomState(np.frombuffer(_digest(seed, i, purpose), "<u4"))
        noise.append(torch.from_numpy(generator.standard_normal(shape)).float())
    return torch.stack(noise)


def _digest(seed, i, purpose):
    return hashlib.sha256(f"{seed} {i} {purpose}".encode()).digest()

"""Resizes of images for networks, each as the program of a published figure does it."""

import numpy as np
import torch

BITS = 22  # after the point, of Pillow's weights


def resize_like_tensorflow(images, size=299):
    """Bilinear resize, as TensorFlow 1 does it: float (B, 3, H, W) -> (B, 3, size, size). Output
    pixel i lies at i * H / size of the input, without half-pixel centres or smoothing."""
    def blend(x, dim):
        step = torch.tensor(x.shape[dim] / size, dtype=torch.float32, device=x.device)
        place = torch.arange(size, device=x.device) * step
        low = place.long()
        high = (low + 1).clamp(max=x.shape[dim] - 1)
        share = (place - low).view(-1, *[1] * (3 - dim))
        low, high = x.index_select(dim, low), x.index_select(dim, high)
        return low + (high - low) * share

    return blend(blend(images, 3), 2)


def resize_like_pillow(images, size, kernel):
    """The bytes of Pillow's Image.resize: uint8 (B, 3, H, W) -> whole numbers (B, 3, *size) in
    float32. kernel: "bilinear" or "bicubic", which are wider where they shrink (antialias).

    Each row is resized, then each column, both rounded to a byte, with weights of BITS bits: sums
    that are exact in float64, on any device. (Of images that are not square, Pillow 13 takes the
    columns first where that is less work.)
    """
    x = images.double()
    for dim in (3, 2):
        weights = pillow_weights(x.shape[dim], size[dim - 2], kernel)
        sums = x.movedim(dim, -1) @ torch.from_numpy(weights.T).to(x.device)
        x = (sums / 2**BITS + 0.5).floor().clamp(0, 255).movedim(-1, dim)
    return x.float()


def pillow_weights(old, new, kernel):
    """(new, old): the weights of old pixels in new ones, whole numbers in units of 2^-BITS."""
    radius, curve = {"bilinear": (1, _triangle), "bicubic": (2, _cubic)}[kernel]
    stretch = max(old / new, 1.0)
    centre = (np.arange(new)[:, None] + 0.5) * (old / new)
    first = (centre - radius * stretch + 0.5).astype(int)  # of the pixels that count
    end = (centre + radius * stretch + 0.5).astype(int)
    pixel = np.arange(old)
    weights = curve(abs(pixel - centre + 0.5) * (1 / stretch))
    weights *= (pixel >= first) & (pixel < end)
    weights /= weights.sum(1, keepdims=True)
    return np.trunc(weights * 2**BITS + np.copysign(0.5, weights))


def _triangle(x):
    return np.maximum(1 - x, 0)


def _cubic(x, a=-0.5):
    return np.where(x < 1, ((a + 2) * x - (a + 3)) * x * x + 1,
                    np.where(x < 2, (((x - 5) * x + 8) * x - 4) * a, 0))

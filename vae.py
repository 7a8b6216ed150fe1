"""The space that the network works in: pixels, or latents of the Stable Diffusion VAE.

A space turns uint8 images into moments, the mean and std of a Gaussian per element; moments and
noise into x, the data of the method; and x back into uint8 images.
"""

import torch


class Pixels:
    """RGB in [-1, 1], nothing encoded: ``--vae none``."""

    name, channels, factor, scale = "none", 3, 1, 1.0

    def latent_shape(self, image_size):
        return self.channels, image_size, image_size

    def encode(self, images):
        """uint8 (B, 3, H, W) -> moments (B, 2, 3, H, W), float32, with std 0."""
        mean = images.float() / 127.5 - 1
        return torch.stack([mean, torch.zeros_like(mean)], dim=1)

    def decode(self, x):
        """x (B, 3, H, W) -> uint8 (B, 3, H, W)."""
        return to_uint8(x)


def posterior_sample(moments, noise, scale):
    """x = (mean + std * noise) * scale of moments (B, 2, C, h, w), float32."""
    mean, std = moments.float().unbind(1)
    return (mean + std * noise) * scale


def to_uint8(x):
    """Images in [-1, 1] -> uint8, truncating 127.5 x + 128 as ADM, DiT and MeanFlow do."""
    return (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8)


def load(name, device):
    """The space of this name, on device."""
    assert name == "none"
    return Pixels()

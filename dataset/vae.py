"""Codecs: images as pixels, or as latents of the Stable Diffusion VAE.

A codec encodes uint8 images as moments, the mean and std of a Gaussian per element, and decodes x,
the data of the method, to uint8 images. posterior_sample draws x from moments.
"""

import functools
import logging
import math
import os
import sys
import warnings

import torch

from engine.checkpoint import fingerprint
from engine.errors import UserError

# Two fine-tuned decoders of one autoencoder: their encoders, and so their latents, are the same
HUB = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}
PIXELS = 32 * 256**2  # at most in a pass: the decoder's largest activation is then 2 GiB in float32
# Of each channel of ImageNet's latents, unscaled: what improved MeanFlow normalises by
# (Lyy-iiis/imeanflow, utils/vae_util.py)
LATENT_NORMALISATION = {"latent_mean": [0.86488, -0.27787343, 0.21616915, 0.3738409],
                        "latent_std": [4.85503674, 5.31922414, 3.93725398, 3.9870003]}


class Pixels:
    """A codec that encodes images as themselves, RGB in [-1, 1], and decodes x: ``--vae none``."""

    name, scale = "none", 1.0

    def latent_shape(self, image_size):
        """(C, h, w) of an image's latent."""
        return 3, image_size, image_size

    def fingerprint(self):
        """Equal for two codecs whose encode returns the same moments."""
        return "pixels"

    def encode(self, images):
        """uint8 (B, 3, H, W) -> moments (B, 2, 3, H, W), float32, with std 0."""
        mean = images.float() / 127.5 - 1
        return torch.stack([mean, torch.zeros_like(mean)], dim=1)

    def decode(self, x):
        """x (B, 3, H, W) -> uint8 (B, 3, H, W)."""
        return to_uint8(x)


class VAE:
    """A codec of a diffusers AutoencoderKL: x are latents times scale, of about unit variance.

    precision: bf16 makes the weights bfloat16 and channels_last; fp32 and tf32 leave them float32
    (engine/distributed.py sets how float32 is multiplied). Autocast around it changes nothing.
    """

    def __init__(self, name, model, *, device, precision="fp32"):
        self.name, self.scale = name, model.config.scaling_factor
        self.factor = 2 ** (len(model.config.block_out_channels) - 1)  # one halving between blocks
        self.model = model.eval().requires_grad_(False).to(device)
        if precision == "bf16":
            self.model.to(torch.bfloat16, memory_format=torch.channels_last)

    def latent_shape(self, image_size):
        """(C, h, w) of an image's latent. Raises UserError for a size the VAE cannot halve."""
        if image_size % self.factor:
            raise UserError(f"--image-size must be a multiple of {self.factor} for --vae "
                            f"{self.name}, got {image_size}; change it or give --vae none")
        side = image_size // self.factor
        return self.model.config.latent_channels, side, side

    def fingerprint(self):
        """SHA-256 of the encoder's weights, which are the same for ema and mse."""
        return fingerprint({name: tensor for name, tensor in self.model.state_dict().items()
                            if name.startswith(("encoder.", "quant_conv."))})

    def encode(self, images):
        """uint8 (B, 3, H, W) -> moments (B, 2, C, h, w), float32: mean and std, unscaled."""
        def moments(x):
            posterior = self.model.encode(x).latent_dist
            std = (0.5 * posterior.logvar.float()).exp()  # logvar is clamped to [-30, 20]
            return torch.stack([posterior.mean.float(), std], dim=1)

        images = images.to(self.model.device).float() / 127.5 - 1
        return self._in_passes(moments, images, images.shape[2:].numel())

    def decode(self, x):
        """x (B, C, h, w) -> uint8 (B, 3, H, W), truncating as to_uint8 does."""
        latents = x.to(self.model.device).float() / self.scale
        return self._in_passes(lambda part: to_uint8(self.model.decode(part).sample), latents,
                               x.shape[2:].numel() * self.factor**2)

    @torch.no_grad()
    def _in_passes(self, network, x, pixels):
        """network(x) for x (B, ...), images of so many pixels or their latents."""
        parts = x.to(self.model.dtype).split(max(1, PIXELS // pixels))
        with torch.autocast(x.device.type, enabled=False):
            return torch.cat([network(part) for part in parts])


def normalisation(config, device="cpu"):
    """(scale, shift) with x = (latent - shift) * scale, by a config: numbers, or (C, 1, 1) if it
    has latent_mean and latent_std."""
    if "latent_mean" not in config:
        return config["scale"], 0.0
    mean, std = (torch.tensor(config[name], device=device)[:, None, None]
                 for name in ("latent_mean", "latent_std"))
    return 1 / std, mean


def posterior_sample(moments, noise, scale, shift=0.0):
    """x = (mean + std * noise - shift) * scale (B, C, h, w) of moments (B, 2, C, h, w), float32."""
    mean, std = moments.float().unbind(1)
    return (mean + std * noise - shift) * scale


def to_uint8(x):
    """Images in [-1, 1] -> uint8 of the same shape (B, 3, H, W); values beyond are clamped.

    Truncates 127.5 x + 128, as DiT and the official MeanFlow do; ADM has half a level less.
    """
    return (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8)


def load_codec(name, device="cpu", *, precision="fp32"):
    """The codec of this name, on device: "none", "ema", "mse", or a folder with an AutoencoderKL.

    precision: fp32, tf32 or bf16. ema and mse are downloaded once, into Hugging Face's cache.
    Weights are read as safetensors, which cannot hold code. Raises UserError.
    """
    if name == "none":
        return Pixels()
    try:
        if name not in HUB and not os.path.isdir(name):  # Path.is_dir raises if a name is too long
            raise ValueError("no such folder")
        model = _load(HUB.get(name, name))
    except Exception as error:  # of diffusers, safetensors, the hub's client or the network
        raise UserError(f"--vae must be ema, mse, none or a folder of an AutoencoderKL's "
                        f"save_pretrained, got {name} ({error!s:.200}); check the folder, or "
                        f"connect once for ema and mse") from error
    if model.config.get("shift_factor") or model.config.get("latents_mean"):
        raise UserError(f"--vae must not shift latents, got {name}; give a VAE of Stable Diffusion "
                        f"1 or 2")
    return VAE(name, model.float(), device=device, precision=precision)


def codec_of(config, name, device="cpu", *, precision="fp32"):
    """The codec of this name, as load_codec opens it, for a checkpoint of this config. Raises
    UserError unless it decodes the checkpoint's latents."""
    codec = load_codec(name, device, precision=precision)
    shape = list(codec.latent_shape(config["image_size"]))
    if shape != list(config["latent_shape"]):
        raise UserError(f"--vae must have latents {config['latent_shape']} for images of "
                        f"{config['image_size']} pixels, as the checkpoint, got {name} with "
                        f"{shape}; give another")
    return codec


def _load(source):
    """The AutoencoderKL of a folder or a repository. Raises errors of many kinds."""
    with warnings.catch_warnings():  # load_codec reports what matters
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            from diffusers import AutoencoderKL  # takes seconds to import, and pixels do without

            load = functools.partial(AutoencoderKL.from_pretrained, source, use_safetensors=True,
                                     output_loading_info=True)
            try:
                model, mismatches = load(local_files_only=True)  # the cache needs no network
            except Exception:
                if source not in HUB.values():
                    raise
                print(f"downloading {source}", file=sys.stderr)  # in vain for 25 s if offline
                model, mismatches = load()
        finally:
            logging.disable(logging.NOTSET)
    if any(mismatches.values()):
        raise ValueError("its weights do not fit its config.json")
    if not (all(p.isfinite().all() for p in model.parameters())
            and 0 < model.config.scaling_factor < math.inf):
        raise ValueError("its weights or its scaling_factor are not finite numbers")
    return model

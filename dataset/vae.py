"""What the network works on: pixels, or latents of the Stable Diffusion VAE.

A codec encodes uint8 images as moments, the mean and std of a Gaussian per element, and decodes x,
the data of the method, to uint8 images. posterior_sample draws x from moments.
"""

import contextlib
import logging
import os
import warnings

import torch

from engine.checkpoint import fingerprint
from engine.errors import UserError

# Two fine-tuned decoders of one autoencoder: their encoders, and so their latents, are the same
HUB = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}
PIXELS = 32 * 256**2  # at most in a pass: the decoder's largest activation is then 2 GiB in float32


# Of each channel of ImageNet's latents, unscaled: what improved MeanFlow normalises by
# (Lyy-iiis/imeanflow, utils/vae_util.py)
LATENT_MEAN = (0.86488, -0.27787343, 0.21616915, 0.3738409)
LATENT_STD = (4.85503674, 5.31922414, 3.93725398, 3.9870003)


class Pixels:
    """A codec that encodes images as themselves, RGB in [-1, 1], and decodes x: ``--vae none``."""

    name, channels, factor, scale = "none", 3, 1, 1.0

    def latent_shape(self, image_size):
        """(C, h, w) of an image's latent."""
        return self.channels, image_size, image_size

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
    """A codec that encodes images as latents of a diffusers AutoencoderKL and decodes x, which are
    latents times scale: about unit variance. scale comes from the model's config.

    precision: bf16 makes the weights bfloat16 and channels_last; fp32 and tf32 leave them float32
    (engine/distributed.py sets how float32 is multiplied). chunk: at most so many images go through
    the network at once, fewer if they have more than PIXELS together; this bounds the memory.
    """

    def __init__(self, name, model, *, device, precision="fp32", chunk=32):
        self.name, self.chunk = name, chunk
        self.channels, self.scale = model.config.latent_channels, model.config.scaling_factor
        self.factor = 2 ** (len(model.config.block_out_channels) - 1)  # one halving between blocks
        model = model.eval().requires_grad_(False).to(device)
        if precision == "bf16":
            model = model.to(torch.bfloat16, memory_format=torch.channels_last)
        self.model = model

    def latent_shape(self, image_size):
        """(C, h, w) of an image's latent. Raises UserError for a size the VAE cannot halve."""
        if image_size % self.factor:
            raise UserError(f"--image-size must be a multiple of {self.factor} for --vae "
                            f"{self.name}, got {image_size}; give another or --vae none")
        return self.channels, image_size // self.factor, image_size // self.factor

    def fingerprint(self):
        """SHA-256 of the encoder's weights, which are the same for ema and mse."""
        return fingerprint({name: tensor for name, tensor in self.model.state_dict().items()
                            if name.startswith(("encoder.", "quant_conv."))})

    @torch.no_grad()
    def encode(self, images):
        """uint8 (B, 3, H, W) -> moments (B, 2, C, h, w), float32: mean and std, unscaled.

        Runs in the precision of this codec, also under autocast.
        """
        return torch.cat([self._encode(part) for part in self._parts(images, images.shape[2:])])

    def _parts(self, batch, image_size):
        """The batch in parts of one pass; their length depends on the image size alone."""
        return batch.split(min(self.chunk, max(1, PIXELS // image_size.numel())))

    def _encode(self, images):
        images = (images.to(self.model.device).float() / 127.5 - 1).to(self.model.dtype)
        with torch.autocast(images.device.type, enabled=False):
            posterior = self.model.encode(images).latent_dist
        std = (0.5 * posterior.logvar.float()).exp()  # logvar is clamped to [-30, 20]
        return torch.stack([posterior.mean.float(), std], dim=1)

    @torch.no_grad()
    def decode(self, x):
        """x (B, C, h, w) -> uint8 (B, 3, H, W), truncating as to_uint8 does."""
        size = torch.Size(side * self.factor for side in x.shape[2:])
        return torch.cat([self._decode(part) for part in self._parts(x, size)])

    def _decode(self, x):
        latents = (x.to(self.model.device).float() / self.scale).to(self.model.dtype)
        with torch.autocast(latents.device.type, enabled=False):
            return to_uint8(self.model.decode(latents).sample)


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

    Truncates 127.5 x + 128 as DiT and the official MeanFlow do; ADM's own sampler truncates
    127.5 (x + 1), half a level less.
    """
    return (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8)


def load_codec(name, device="cpu", *, precision="fp32", chunk=32):
    """The codec of this name, on device: "none", "ema", "mse", or a folder with an AutoencoderKL.

    precision: fp32, tf32 or bf16; chunk: as in VAE. ema and mse are downloaded once, into Hugging
    Face's cache. Weights are read as safetensors, which cannot hold code. Raises UserError.
    """
    if name == "none":
        return Pixels()
    if name not in HUB and not os.path.isdir(name):  # Path.is_dir raises if a name is too long
        raise UserError(f"--vae must be ema, mse, none or a folder with a diffusers AutoencoderKL, "
                        f"got {name} (no such folder); check the path or take one of the names")
    remedy = ("connect once, or give --vae FOLDER with a local copy" if name in HUB else
              "it must hold config.json and diffusion_pytorch_model.safetensors of an "
              "AutoencoderKL: save it there with save_pretrained")
    try:
        with _quiet():
            model = _load(name)
    except Exception as error:  # of diffusers, safetensors, the hub's client or the network
        raise UserError(f"--vae {name}: cannot load {HUB.get(name, 'this folder')} "
                        f"({error!s:.200}); {remedy}") from error
    if model.config.get("shift_factor") or model.config.get("latents_mean"):
        raise UserError(f"--vae must have latents that one factor scales, got {name}, which also "
                        f"shifts them; give a VAE of Stable Diffusion 1 or 2")
    return VAE(name, model.float(), device=device, precision=precision, chunk=chunk)


def _load(name):
    """The AutoencoderKL of load_codec's name. Raises errors of many kinds."""
    from diffusers import AutoencoderKL  # takes seconds to import, and pixels do without

    if name in HUB:
        with contextlib.suppress(Exception):  # the cache needs no network
            return AutoencoderKL.from_pretrained(
                HUB[name], local_files_only=True, use_safetensors=True)
        return AutoencoderKL.from_pretrained(HUB[name], use_safetensors=True)
    model, mismatches = AutoencoderKL.from_pretrained(
        name, local_files_only=True, use_safetensors=True, output_loading_info=True)
    if AutoencoderKL.load_config(name)["_class_name"] != "AutoencoderKL":
        raise ValueError("its config.json is not of an AutoencoderKL")
    if any(mismatches.values()):
        raise ValueError("its weights do not fit its config.json")
    return model


@contextlib.contextmanager
def _quiet():
    """Silences diffusers and the hub's client; load_codec reports what matters as a UserError."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)

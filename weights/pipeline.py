"""The pipelines of a folder for diffusers, whose file is made of one of these classes.

Nothing imports this file: weights/diffusers_folder.py writes a class, and all that it uses, into a
file that stands alone.
"""

import inspect
import json
import operator
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from dataset.classes import find_label
from dataset.noise import noise_of
from dataset.vae import normalisation, to_uint8
from improved_meanflow import sample as sample_improved
from meanflow import sample, schedule, velocity_of
from soflow import sample as sample_soflow


class MeanFlowPipeline(DiffusionPipeline):
    """Images of given classes in one evaluation of a network, or in a few.

    transformer: the network u(z, r, t, y). vae: decodes its latents; None for a network of pixels,
    and where settings names the one to load. settings: what the weights say of data and method.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    sampler = staticmethod(sample)
    takes_noise = False  # whether sampler takes new noise for each step after the first

    def __init__(self, transformer: ModelMixin, vae: AutoencoderKL = None, settings: dict = None):
        super().__init__()
        if settings is None:
            raise ValueError("settings must be those of a pipeline, pipe.config.settings")
        if vae is None and settings["vae"]:
            vae = AutoencoderKL.from_pretrained(settings["vae"], torch_dtype=transformer.dtype)
        self.register_modules(transformer=transformer, vae=vae)
        self.register_to_config(settings=settings)

    def save_config(self, save_directory, **options):
        """As diffusers does for save_pretrained, with the code without which no folder opens."""
        super().save_config(save_directory, **options)
        path = Path(save_directory, self.config_name)
        index = json.loads(path.read_text(encoding="utf-8"))
        network = getattr(self.transformer, "_orig_mod", self.transformer)  # within torch.compile
        for name, part, place in (("_class_name", self, ""),
                                  ("transformer", network, "transformer")):
            code = Path(inspect.getfile(type(part)))
            index[name] = code.stem, type(part).__name__
            shutil.copyfile(code, path.parent / place / code.name)
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    @torch.no_grad()
    def __call__(self, class_labels, num_inference_steps=1, guidance_scale=None,
                 guidance_interval=None, generator=None, seed=None, latents=None, output_type="pil",
                 return_dict=True):
        """Images of these classes.

        class_labels: a class, or a list with one for each image: a label from 0, or a name.
        num_inference_steps: a count of equal steps, or times decreasing from 1 to 0.
        guidance_scale: omega, 1 = none, and guidance_interval: two times in [0, 1] between which it
            acts, for models of improved MeanFlow; by default those of settings.
        generator: a torch.Generator, or one for each image. seed: instead, the noise of image i is
            that of image i of MeanFlow-PyTorch's sample.py --seed. latents: instead, the noise
            itself, (B, C, h, w); a method that takes more noise has it from generator or seed.
        output_type: "pil", "np" (B, H, W, 3) or "pt" (B, 3, H, W) in [0, 1], or "latent", what the
            network makes (B, C, h, w).

        Returns an ImagePipelineOutput, whose images they are, or a tuple of them without
        return_dict. Raises ValueError.
        """
        guidance = self.guidance(guidance_scale, guidance_interval)
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be pil, np, pt or latent, got {output_type}")
        labels = [self.label(label) for label in (class_labels if np.ndim(class_labels) else
                                                  [class_labels])]
        y = torch.tensor(labels, device=self._execution_device)
        times = all_times(num_inference_steps)
        z1, *later = self.noise(len(y), times, generator, seed, latents)
        noise = {"noise": later} if self.takes_noise else {}
        with self.progress_bar(total=len(times) - 1) as bar:
            def network(z, *inputs, **options):
                bar.update()
                return self.transformer(z.to(self.transformer.dtype), *inputs, **options)

            net = velocity_of(network) if self.config.settings["velocity_only"] else network
            x = self.sampler(net, z1, y, steps=times, **noise, **guidance)
        images = self.decode(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def guidance(self, scale, interval):
        """What the sampler takes, beside steps and noise. Raises ValueError."""
        known = self.config.settings["guidance"]
        if not known and (scale, interval) != (None, None):
            raise ValueError("guidance_scale and guidance_interval must be None for this model, "
                             "whose guidance is fixed in training; leave them out")
        given = {} if scale is None else {"omega": scale}
        if interval is not None or scale == 1:
            given["interval"] = [0.0, 1.0] if interval is None else interval
        return {**known, **given}

    def label(self, label):
        """The label, from 0, of a class given as such or by name. Raises ValueError."""
        count, names = (self.config.settings[key] for key in ("num_classes", "classes"))
        if isinstance(label, str):
            try:
                return find_label(label, names or [[str(i)] for i in range(count)])
            except ValueError as error:
                raise ValueError(f"class_labels {error}") from None
        if not 0 <= (label := whole_number(label, "class_labels")) < count:
            raise ValueError(f"class_labels must be from 0 to {count - 1}, got {label}")
        return label

    def noise(self, count, times, generator, seed, latents):
        """z1 of so many images, float32, and where the sampler takes more that before each step
        after the first. Raises ValueError."""
        shape, device = self.config.settings["latent_shape"], self._execution_device
        if not count:
            raise ValueError("class_labels must have one class or more")
        if generator is not None and seed is not None:
            raise ValueError("generator and seed must not both be given; leave one out")
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"generator must be one, or a list of {count}, got {len(generator)}")
        if latents is not None and np.shape(latents) != (count, *shape):
            raise ValueError(f"latents must have the shape {(count, *shape)}, got "
                             f"{np.shape(latents)}")
        seed = None if seed is None else whole_number(seed, "seed")

        def draw(step):
            if latents is not None and step == 0:
                return torch.as_tensor(latents).to(device, torch.float32)
            if seed is not None:
                return noise_of(range(count), shape, seed, step).to(device)
            return randn_tensor((count, *shape), generator, device, torch.float32)

        return [draw(step) for step in range(len(times) - 1 if self.takes_noise else 1)]

    def decode(self, x, output_type):
        """The images of data x (B, C, h, w), as __call__ describes them."""
        if output_type == "latent":
            return x
        scale, shift = normalisation(self.config.settings, x.device)
        x = x / scale + shift
        if self.vae is not None:
            x = self.vae.decode(x.to(self.vae.dtype)).sample.float()
        if output_type == "pil":  # the very levels of sample.py
            return [Image.fromarray(image) for image in to_uint8(x).permute(0, 2, 3, 1)
                    .cpu().numpy()]
        x = (x / 2 + 0.5).clamp(0, 1)
        return x if output_type == "pt" else x.permute(0, 2, 3, 1).cpu().numpy()


def all_times(steps):
    """The times of num_inference_steps. Raises ValueError."""
    times = schedule(steps if np.ndim(steps) else whole_number(steps, "num_inference_steps"))
    if (times[0], times[-1]) != (1, 0):
        raise ValueError(f"num_inference_steps must be a count, or times from 1 to 0, got {times}")
    return times


def whole_number(value, name):
    """The int that an argument of this name is. Raises ValueError."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r:.60}") from None


class ImprovedMeanFlowPipeline(MeanFlowPipeline):
    """The same for improved MeanFlow, which takes guidance when sampling."""

    sampler = staticmethod(sample_improved)


class SoFlowPipeline(MeanFlowPipeline):
    """The same for SoFlow, which begins each step after the first with new noise."""

    sampler = staticmethod(sample_soflow)
    takes_noise = True

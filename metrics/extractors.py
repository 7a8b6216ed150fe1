"""Feature extractors: what each --protocol makes of images. A new one is a subclass of Extractor
and its line in EXTRACTORS.

    pytorch-fid   FID as pytorch-fid 0.3.0 computes it: images in [0, 1], bilinear resize with
                  half-pixel centres to 299, 2x - 1
    adm           FID, sFID, Inception Score, precision and recall as the evaluator of ADM
                  (openai/guided-diffusion) does: TensorFlow 1's resize to 299, (x - 128) / 128
    pixels        Frechet distance of the pixels themselves, in [-1, 1], of tiny images
    dinov2        FD-DINOv2 of Stein et al. (arXiv 2306.04675), as their code
                  (layer6ai-labs/dgm-eval) does: Pillow's bicubic resize of bytes to 224, ImageNet's
                  mean and deviation, the class token of DINOv2's ViT-L/14; precision and recall
    timm:NAME     Frechet distance of the pooled features of any network of timm, at its own size
"""

import argparse
from contextlib import suppress
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F

from engine.errors import BadValue, UserError
from metrics.inception import POOL, load_inception
from metrics.resize import resize_like_pillow, resize_like_tensorflow
from metrics.timm_networks import Plan, load_network, plan_of, set_size_like_dinov2

MAX_PIXELS = 32 * 32  # of an image that the protocol pixels takes


class Features(NamedTuple):
    """The features of a batch; only the protocol adm has more than the first."""

    pool: torch.Tensor  # (B, D), D = Extractor.dimension(image size)
    spatial: torch.Tensor | None = None  # (B, SPATIAL)
    logits: torch.Tensor | None = None  # (B, CLASSES) float64, without the bias


class Extractor:
    """Once load has loaded its network, calling it maps images, uint8 (B, 3, H, W), to Features, in
    float32 on the world's device. protocol: its name. Raises BadValue."""

    key, title = "fid", "FID"  # of its Frechet distance: in a result, and for a person
    gives = ("pool",)  # of these Statistics are made
    by_product = False  # as in frechet_distance
    is_fid = False  # whether what is published of FID holds for its distance

    def __init__(self, protocol):
        self.protocol = protocol

    def dimension(self, image_size):
        """D, the length of a pool feature of images of size (H, W). Raises UserError if they are
        too large."""
        return POOL

    def load(self, world, weights=None):
        """Load the network, of a file or its published weights; returns self. Every rank must call
        it. Raises UserError."""
        self.world = world
        self.network = self.load_network(weights).to(world.device)
        return self

    @torch.no_grad()
    def __call__(self, images):
        x = self.prepare(images.to(self.world.device, non_blocking=True))
        with self.world.full_precision():
            pool = self.network(x)
        return self.features(pool)

    def load_network(self, weights):
        """The network as load takes it, without gradients. Raises UserError."""
        raise NotImplementedError

    def prepare(self, images):
        """uint8 (B, 3, H, W) -> what the network takes."""
        raise NotImplementedError

    def features(self, pool):
        """The Features, of what the network returns."""
        return Features(pool)


class PytorchFID(Extractor):
    by_product = True  # the published number to rounding
    is_fid = True

    def load_network(self, weights):
        net = load_inception(weights, self.world)
        net.fc = torch.nn.Identity()
        return net

    def prepare(self, images):
        return 2 * F.interpolate(images.float() / 255, (299, 299), mode="bilinear") - 1


class ADM(Extractor):
    is_fid = True
    gives = ("pool", "spatial", "scores", "points")

    def load_network(self, weights):
        net = load_inception(weights, self.world)
        self.class_weights = net.fc.weight.to(self.world.device).double().T  # (POOL, CLASSES)
        net.fc = torch.nn.Identity()
        net.Mixed_6d.branch1x1.register_forward_hook(self._keep_map)
        return net

    def _keep_map(self, module, inputs, output):
        self.map = output  # (B, 192, 17, 17) after batch norm and ReLU

    def prepare(self, images):
        return (resize_like_tensorflow(images.float()) - 128) / 128

    def features(self, pool):
        # ADM flattens in TensorFlow's order, H, W, C; no other order matches its mu_s.
        spatial = self.map[:, :7].permute(0, 2, 3, 1).flatten(1)
        return Features(pool, spatial, pool.double() @ self.class_weights)


class Pixels(Extractor):
    title = "Frechet distance of pixels"

    def dimension(self, image_size):
        height, width = image_size
        if height * width > MAX_PIXELS:
            raise UserError(f"--protocol pixels takes images of at most 32 x 32, got {height} x "
                            f"{width}; use --protocol pytorch-fid or adm, or crop image files")
        return 3 * height * width

    def load_network(self, weights):
        return torch.nn.Identity()

    def prepare(self, images):
        return images.flatten(1).double() / 127.5 - 1


class TimmNetwork(Extractor):
    """A network of timm, by the size, interpolation, mean and deviation that timm says were those
    of its evaluation, without the crop."""

    key, title = "fd", "FD"

    def __init__(self, protocol):
        super().__init__(protocol)
        self.name = protocol.removeprefix("timm:")
        self.title = f"FD of {self.name:.60}"

    @cached_property
    def plan(self):
        return plan_of(self.name)

    def dimension(self, image_size):
        return self.plan.dimension

    def load_network(self, weights):
        return load_network(self.name, weights, self.world)

    def prepare(self, images):
        x = resize_like_pillow(images, self.plan.size, self.plan.interpolation) / 255
        mean, std = (torch.tensor(values, device=x.device).view(3, 1, 1)
                     for values in (self.plan.mean, self.plan.std))
        return (x - mean) / std


class DINOv2(TimmNetwork):
    """EDM2's code (NVlabs/edm2, calculate_metrics.py) resizes in float32 instead, without rounding
    to bytes, and else does the same."""

    key, title = "fd_dinov2", "FD-DINOv2"
    gives = ("pool", "points")
    name = "vit_large_patch14_dinov2.lvd142m"
    plan = Plan(1024, (224, 224), "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    __init__ = Extractor.__init__

    def load_network(self, weights):
        return set_size_like_dinov2(super().load_network(weights), self.plan.size[0])


EXTRACTORS = {  # by the name of the protocol, or by what comes before a name of its own
    "pytorch-fid": PytorchFID, "adm": ADM, "pixels": Pixels, "dinov2": DINOv2, "timm:": TimmNetwork}


def extractor_of(protocol):
    """The Extractor of this protocol. Raises BadValue."""
    kind, colon, _ = protocol.partition(":")
    if kind + colon not in EXTRACTORS:
        names = ", ".join(f"{name}NAME" if name.endswith(":") else name for name in EXTRACTORS)
        raise BadValue(f"must be one of {names}, got {protocol!r:.100}; give one")
    return EXTRACTORS[kind + colon](protocol)


def known_protocol(text):
    """An argparse type: the name of a protocol, as it stands."""
    try:
        extractor_of(text).dimension((1, 1))  # which looks a network of timm up
    except BadValue as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def distance_names(protocol):
    """The names of the Frechet distances by key, with that of this protocol, if it is one."""
    names = {}
    for kind in EXTRACTORS.values():
        names.setdefault(kind.key, kind.title)
    with suppress(BadValue):
        extractor = extractor_of(str(protocol))
        names[extractor.key] = extractor.title
    return names

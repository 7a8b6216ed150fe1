"""Features of images: a protocol's resize, then pytorch-fid's Inception, or the pixels themselves.

    pytorch-fid   FID as pytorch-fid 0.3.0 computes it: images in [0, 1], bilinear resize with
                  half-pixel centres to 299, 2x - 1
    adm           FID, sFID, Inception Score, precision and recall as the evaluator of ADM
                  (openai/guided-diffusion) does: TensorFlow 1's resize to 299, (x - 128) / 128
    pixels        Frechet distance of the pixels themselves, in [-1, 1], of tiny images
"""

import http.client
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from engine.errors import UserError

PROTOCOLS = ("pytorch-fid", "adm", "pixels")
POOL = 2048  # values of Inception's last pooling, "pool_3" in the TensorFlow graph
SPATIAL = 7 * 17 * 17  # for sFID: the first 7 channels of a 17 x 17 map
CLASSES = 1008  # of the Inception of 2015: 1000 classes and unused ones
MAX_PIXELS = 32 * 32  # of an image that the protocol pixels takes


class Features(NamedTuple):
    """The features of a batch; the protocol pixels has only the first."""

    pool: torch.Tensor  # (B, D), D = dimension(protocol, image size)
    spatial: torch.Tensor | None = None  # (B, SPATIAL)
    logits: torch.Tensor | None = None  # (B, CLASSES) float64, without the bias


def dimension(protocol, image_size):
    """D, the length of a pool feature of images of size (H, W). Raises UserError if too large."""
    if protocol != "pixels":
        return POOL
    height, width = image_size
    if height * width > MAX_PIXELS:
        raise UserError(f"--protocol pixels takes images of at most 32 x 32, got {height} x "
                        f"{width}; use --protocol pytorch-fid or adm, or crop image files")
    return 3 * height * width


class Extractor:
    """Calling it maps images, uint8 (B, 3, H, W), to Features by one protocol, in float32 on the
    world's device. Every rank must construct it. inception: as load_inception takes it."""

    def __init__(self, protocol, world, *, inception=None):
        self.protocol, self.world = protocol, world
        if protocol != "pixels":
            self.net = load_inception(inception, world).to(world.device)
            self.class_weights = self.net.fc.weight.double().T  # (POOL, CLASSES)
            self.net.fc = torch.nn.Identity()
            self.net.Mixed_6d.branch1x1.register_forward_hook(self._keep_map)

    def _keep_map(self, module, inputs, output):
        self.map = output  # (B, 192, 17, 17) after batch norm and ReLU

    @torch.no_grad()
    def __call__(self, images):
        images = images.to(self.world.device, non_blocking=True)
        if self.protocol == "pixels":
            return Features(images.flatten(1).double() / 127.5 - 1)
        if self.protocol == "adm":
            x = (resize_like_tensorflow(images.float()) - 128) / 128
        else:
            x = 2 * F.interpolate(images.float() / 255, (299, 299), mode="bilinear") - 1
        with self.world.full_precision():
            pool = self.net(x)
        # ADM flattens in TensorFlow's order, H, W, C; no other order matches its mu_s.
        spatial = self.map[:, :7].permute(0, 2, 3, 1).flatten(1)
        return Features(pool, spatial, pool.double() @ self.class_weights)


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


def load_inception(path, world):
    """pytorch-fid's Inception with the weights of a file, by default of the one in torch's hub
    cache, to which rank 0 downloads it. (By pytorch-fid's own fid_inception_v3 every process would,
    and would unpickle any file.) Raises UserError."""
    from pytorch_fid.inception import FID_WEIGHTS_URL  # takes a second to import

    cached = Path(torch.hub.get_dir(), "checkpoints", FID_WEIGHTS_URL.rsplit("/", 1)[1])

    def download():
        print(f"downloading {FID_WEIGHTS_URL}", file=sys.stderr)
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(FID_WEIGHTS_URL, str(cached))
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"cannot download the Inception weights ({error}): put {cached.name} "
                            f"from {FID_WEIGHTS_URL} into {cached.parent}, or name it with "
                            f"--inception") from error

    if path is None:
        world.on_main(lambda: cached.is_file() or download())
    path = path or cached
    try:
        net = build_inception()
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), assign=True)
    except Exception as error:  # torch.load raises errors of many kinds
        raise UserError(f"--inception must be a whole file of pytorch-fid's Inception weights, got "
                        f"{path}; get it again, or leave the option out to download it") from error
    return net.float().eval().requires_grad_(False)


def build_inception():
    """pytorch-fid's Inception on the meta device: values would cost time and random numbers."""
    from pytorch_fid import inception
    from torchvision.models import inception_v3

    with torch.device("meta"):
        net = inception_v3(weights=None, aux_logits=False, init_weights=False, num_classes=CLASSES)
        for name, width, pooled in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
            setattr(net, f"Mixed_{name}", inception.FIDInceptionA(width, pooled))
        for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            setattr(net, f"Mixed_{name}", inception.FIDInceptionC(768, width))
        net.Mixed_7b = inception.FIDInceptionE_1(1280)
        net.Mixed_7c = inception.FIDInceptionE_2(2048)
    return net

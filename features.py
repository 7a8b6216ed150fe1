"""From images to the features that evaluation compares: images of an .npz file, read as needed,
and pytorch-fid's Inception behind a protocol's resize (fid.py describes the protocols).

Images are uint8 (B, 3, H, W). The network is a conversion of TensorFlow's Inception of 2015.
"""

import contextlib
import http.client
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import runtime
from runtime import UserError, regular

POOL = 2048  # values of Inception's last pooling, "pool_3" in the TensorFlow graph
SPATIAL = 7 * 17 * 17  # for sFID: the first 7 channels of a 17 x 17 map
CLASSES = 1008  # of the Inception of 2015: 1000 classes and unused ones
TINY = 3 * 32 * 32  # values of the largest image that the protocol pixels takes


# ---- images --------------------------------------------------------------------------------


@contextlib.contextmanager
def reading(option, path):
    """Turns what a torn or foreign .npz file raises into a UserError naming option."""
    try:
        yield
    except UserError:
        raise
    except (OSError, EOFError, LookupError, MemoryError, RuntimeError, SyntaxError, TypeError,
            ValueError, pickle.UnpicklingError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{option} must be a whole .npz file of plain arrays, got {path} "
                        f"({error}); write it again or name another") from error


def verify(option, path, world):
    """Compare all of an .npz file with the archive's checksums, once, on rank 0.

    NumPy does so for an array that it reads whole, which arr_0 never is. Raises UserError.
    """
    def read():
        with reading(option, path):
            damage = runtime.find_damage(path)
            if damage:
                raise ValueError(f"damaged: {damage}")

    world.on_main(read)


class NpzImages:
    """The images of an .npz file: arr_0, uint8 (N, H, W, 3). Raises UserError naming option."""

    def __init__(self, path, *, option):
        self.name, self.option = str(path), option
        with reading(option, path), self._open() as (_, (shape, fortran, dtype)):
            fits = len(shape) == 4 and shape[3] == 3 and min(shape) > 0 and not fortran
            if dtype != np.uint8 or not fits:
                raise UserError(f"{option} must hold arr_0 of shape (N, H, W, 3), uint8, in C "
                                f"order, got {shape} {dtype} in {path}; write it so")
        self.count, self.image_size = shape[0], tuple(shape[1:3])

    def __len__(self):
        return self.count

    def check(self, world):
        """Read all of it before anything heavy. Raises UserError where a byte is damaged."""
        verify(self.option, self.name, world)

    @contextlib.contextmanager
    def _open(self):
        """The file, at its first image, and the header: shape, Fortran order, dtype."""
        with zipfile.ZipFile(regular(self.name)) as archive, archive.open("arr_0.npy") as file:
            old = np.lib.format.read_magic(file) == (1, 0)
            yield file, (np.lib.format.read_array_header_1_0 if old
                         else np.lib.format.read_array_header_2_0)(file)

    def batches(self, size, world):
        """Yields (first, images (B, 3, H, W)): this process's batches of size, dealt in turn.

        Read in order and never held together: 50,000 images of 256 x 256 are 9.8 GB.
        """
        height, width = self.image_size
        with reading(self.option, self.name), self._open() as (file, _):
            start = file.tell()
            for first in range(world.rank * size, self.count, world.size * size):
                count = min(size, self.count - first)
                file.seek(start + first * height * width * 3)
                data = bytearray(file.read(count * height * width * 3))
                images = torch.frombuffer(data, dtype=torch.uint8).view(count, height, width, 3)
                yield first, images.permute(0, 3, 1, 2)


# ---- features ------------------------------------------------------------------------------


class Features(NamedTuple):
    """What an image is reduced to; the protocol pixels has the first alone."""

    pool: torch.Tensor  # (B, D)
    spatial: torch.Tensor | None = None  # (B, SPATIAL)
    logits: torch.Tensor | None = None  # (B, CLASSES) float64, without the bias


def dimension(protocol, image_size):
    """D, the values that stand for an image of size (H, W). Raises UserError for too many."""
    if protocol != "pixels":
        return POOL
    height, width = image_size
    if 3 * height * width > TINY:
        raise UserError(f"--protocol pixels must have images of at most {TINY} values, 32 x 32, "
                        f"got {height} x {width}; use pytorch-fid or adm")
    return 3 * height * width


class Extractor:
    """uint8 images (B, 3, H, W) -> Features by one protocol, on the world's device, in float32.

    inception: a file of pytorch-fid's weights; by default the one in the torch hub cache, which
    is downloaded if missing. All processes take part. Raises UserError if there is none.
    """

    def __init__(self, protocol, world, *, inception=None):
        self.protocol, self.world = protocol, world
        if protocol != "pixels":
            self.net = load_inception(weight_file(world, inception)).to(world.device)
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
    """Bilinear resize of (B, 3, H, W) to (size, size) as TensorFlow 1 does it.

    Output pixel i lies at i * H / size of the input: corners are aligned at the origin only,
    there are no half-pixel centres, and shrinking does not smooth.
    """
    def blend(x, dim):
        step = torch.tensor(x.shape[dim] / size, dtype=torch.float32, device=x.device)
        place = torch.arange(size, device=x.device) * step
        low = place.long()
        high = (low + 1).clamp(max=x.shape[dim] - 1)
        share = (place - low).view(-1, *[1] * (3 - dim))
        low, high = x.index_select(dim, low), x.index_select(dim, high)
        return low + (high - low) * share

    return blend(blend(images, 3), 2)


def weight_file(world, path=None):
    """Where pytorch-fid's Inception weights are, downloaded by rank 0 if need be.

    Raises UserError, on every process, if they are neither there nor to be had.
    """
    if path is not None:
        if not Path(path).is_file():
            raise UserError(f"--inception must be a file of Inception weights, got {path} (no such "
                            f"file); name another, or leave it out to use the torch hub cache")
        return Path(path)
    from pytorch_fid.inception import FID_WEIGHTS_URL  # takes a second to import

    path = Path(torch.hub.get_dir(), "checkpoints", FID_WEIGHTS_URL.rsplit("/", 1)[1])
    problem = None
    if world.main and not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(FID_WEIGHTS_URL, str(path))
        except (OSError, http.client.HTTPException) as error:
            problem = error
    problem = world.agree(problem and str(problem))
    if problem or not path.is_file():
        raise UserError(f"the Inception weights must be cached or downloadable, and are neither "
                        f"({problem or 'missing on this machine'}); put {path.name} from "
                        f"{FID_WEIGHTS_URL} into {path.parent}, or name it with --inception")
    return path


def inception_network():
    """pytorch-fid's Inception, its patched pooling and 1008 classes, without values: on meta."""
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


def load_inception(path):
    """The network with the weights of a file. Raises UserError for one that does not fit.

    The file's tensors become the network's: initial values would cost time and random numbers.
    """
    net = inception_network()
    try:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), assign=True)
    except (OSError, RuntimeError, EOFError, LookupError, AttributeError, TypeError, ValueError,
            pickle.UnpicklingError) as error:
        raise UserError(f"the Inception weights must be pytorch-fid's, got {path} (torn, or of "
                        f"another network); remove that file and get it again") from error
    return net.float().eval().requires_grad_(False)

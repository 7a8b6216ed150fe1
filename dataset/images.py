"""Image files: ADM's centre crop, and training folders with one folder per class."""

import contextlib
import hashlib
import os
import warnings

import numpy as np
import torch
from PIL import Image

from dataset.loader import read_images, stack_images
from engine.errors import BadValue, UserError, naming

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
CACHE_BYTES = 16 * 2**20  # data sets up to this size, such as the quickstart's, stay in memory


def center_crop(image, size):
    """The centre square of a PIL image, resized to (size, size).

    ADM's recipe (openai/guided-diffusion), with which the published FID references were made:
    halve with BOX filtering while the shorter side is at least twice the size, then BICUBIC.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


@contextlib.contextmanager
def open_image(path):
    """Opens an image file with PIL. Raises BadValue, also for the decoding within ``with``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF or palette data do no harm here
            with Image.open(path) as image:
                yield image
    except UserError:
        raise
    except Exception as error:  # PIL's decoders raise errors of any kind on a broken file
        raise BadValue(f"must hold readable images, got {path} ({error}); repair or remove the "
                       f"file") from error


def read_image(path, size):
    """An image file as uint8 (3, size, size): PIL's conversion to RGB, then the centre crop. EXIF
    rotation is not applied, as by torchvision's ImageFolder. Raises BadValue."""
    with open_image(path) as image:
        pixels = np.array(center_crop(image.convert("RGB"), size))  # (H, W, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


class ImageFolder:
    """A data set for training (see dataset/loader.py): images in one folder per class, numbered as
    torchvision's ImageFolder does. Serves uint8 (B, 3, size, size) and labels (B,).

    world: rank 0 lists the folder for all; a million files take minutes on a network file system.
    Raises UserError if there is no such folder, no class, or a class without an image.
    """

    def __init__(self, path, image_size, world=None):
        self.root = os.path.join(os.path.expanduser(path), "")
        self.classes, self.files, self.labels = (world.on_main(self._list) if world
                                                 else self._list())
        self.image_size, self.cache = image_size, {}
        self.caches = len(self) * 3 * image_size**2 <= CACHE_BYTES

    def _list(self):
        """Classes, files (N,) relative to root, labels (N,) int64."""
        from torchvision import datasets  # takes a second to import; evaluate_fid.py does without

        if os.path.exists(self.root + "dataset.json"):
            raise UserError(f"--data-path must be a folder of images, got {self.root}, which holds "
                            f"latent shards; add --encoded-data or give the images")
        try:
            folder = datasets.ImageFolder(self.root)
        except (OSError, ValueError) as error:
            raise UserError(f"--data-path must be a folder with one folder of images per class, "
                            f"got {self.root} ({str(error).splitlines()[0][:300]}); check it, or "
                            f"give the folder above") from error
        # One array, not a million strings: updating their reference counts would copy the memory
        # that reading processes share
        files = np.array([os.fsencode(file[len(self.root):]) for file, _ in folder.samples])
        return folder.classes, files, torch.tensor(folder.targets)

    def __len__(self):
        return len(self.files)

    def batches(self, steps, workers):
        """Yields images (B, 3, size, size) and labels (B,) for each (rows, mirrored)."""
        items = (list(zip(rows.tolist(), mirrored.tolist())) for rows, mirrored in steps)
        for batch, images in read_images(self.read, items, workers=workers):
            yield stack_images(images), self.labels[[row for row, _ in batch]]

    def read(self, item):
        """The image (3, size, size) of (row, mirrored). Raises UserError."""
        row, mirrored = item
        image = self.cache.get(row)
        if image is None:
            with naming("--data-path"):
                image = read_image(os.path.join(self.root, self.name(row)), self.image_size)
            if self.caches:
                self.cache[row] = image
        return image.flip(2) if mirrored else image

    def name(self, row):
        """The path of an image relative to the folder."""
        return os.fsdecode(self.files[row])

    def fingerprint(self):
        """SHA-256 of the list of files, which says what each row is. Contents are not read."""
        return hashlib.sha256(b"\n".join(self.files.tolist())).hexdigest()

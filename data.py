"""Training data: image folders (class = folder), ADM's centre crop, and an order that can start
at any step without reading what came before.

The order is a function of (seed, step): every process works out the global batch's rows and takes
the rows rank::world, so the data a run sees does not depend on the number of processes.
"""

import warnings

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.utils import make_grid

import runtime
from runtime import UserError


def center_crop(image, size):
    """The centre square of a PIL image, resized to (size, size).

    ADM's recipe (openai/guided-diffusion), which the published FID references were made with:
    halve with BOX filtering while the shorter side is at least twice the size, then BICUBIC.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_image(path, size):
    """An image file as uint8 (3, size, size): PIL's conversion to RGB, then the centre crop.

    Raises UserError naming the file if it cannot be read.
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")  # odd EXIF or palette data, of no consequence here
            pixels = np.array(center_crop(image.convert("RGB"), size))  # (H, W, 3)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"--data-path must hold readable images, got {path} ({error}); "
                        f"repair or remove the file", local=True) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


class ImageFolder:
    """Images in one folder per class, served as uint8 (B, 3, size, size) and labels (B,).

    Classes are the sorted folder names, as torchvision's ImageFolder numbers them. Raises
    UserError if there is no such folder, no class or a class without an image.
    """

    def __init__(self, path, image_size):
        try:
            found = datasets.ImageFolder(path)
        except (OSError, ValueError) as error:
            raise UserError(f"--data-path must be a folder with one folder of images per class, "
                            f"got {path} ({str(error).splitlines()[0]})") from error
        self.image_size, self.classes = image_size, found.classes
        self.paths = [path for path, _ in found.samples]
        self.labels = torch.tensor(found.targets)  # (N,) int64

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, batch):
        """(rows, mirrored), both (B,) -> images and labels, or the UserError met on the way.

        Returned and not raised: a worker process would wrap it in its traceback.
        """
        rows, mirrored = batch
        try:
            images = [read_image(self.paths[row], self.image_size) for row in rows.tolist()]
        except UserError as error:
            return error
        images = torch.stack([x.flip(2) if m else x for x, m in zip(images, mirrored.tolist())])
        return images, self.labels[rows]


class Batches:
    """Yields (rows, mirrored) of this process for the steps start .. stop - 1.

    An epoch is count // global_batch steps over a fresh permutation; the rest of it is left out.
    """

    def __init__(self, count, global_batch, *, seed, start, stop, flip, world):
        self.count, self.global_batch, self.seed = count, global_batch, seed
        self.start, self.stop, self.flip, self.world = start, stop, flip, world

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        known, permutation = None, None
        for step in range(self.start, self.stop):
            epoch, position = divmod(step, self.count // self.global_batch)
            if epoch != known:
                order = runtime.generator(self.seed, epoch, "order")
                known, permutation = epoch, torch.randperm(self.count, generator=order)
            rows = permutation[position * self.global_batch:][:self.global_batch]
            mirrored = torch.zeros(self.global_batch, dtype=torch.bool)
            if self.flip:
                coin = runtime.generator(self.seed, step, "flip")
                mirrored = torch.rand(self.global_batch, generator=coin) < 0.5
            share = slice(self.world.rank, None, self.world.size)
            yield rows[share], mirrored[share]


def load(dataset, batches, *, workers, device):
    """Iterate over the batches of a dataset, on device: tensors as the dataset serves them.

    Raises UserError for what a worker could not read.
    """
    cuda = device.type == "cuda"
    loader = DataLoader(dataset, sampler=batches, batch_size=None, num_workers=workers,
                        pin_memory=cuda, persistent_workers=workers > 0,
                        prefetch_factor=4 if workers else None)
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield tuple(tensor.to(device, non_blocking=True) for tensor in batch)


def save_grid(path, images, columns):
    """Write uint8 images (B, 3, H, W) as one picture, enlarged where they are tiny."""
    enlarge = max(1, 64 // images.shape[3])
    images = images.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    grid = make_grid(images, nrow=columns, padding=2, pad_value=255)
    with runtime.whole_file(path) as temporary:
        Image.fromarray(grid.permute(1, 2, 0).cpu().numpy()).save(temporary, "PNG")

"""Images: ADM's centre crop, training folders (class = folder), image sets for evaluation, grids.

Images are uint8, (3, H, W) or in batches (B, 3, H, W).
"""

import contextlib
import hashlib
import os
import pickle
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torchvision import datasets
from torchvision.utils import make_grid

from dataset.loader import prefetch, read_images, stack_images
from engine.files import atomic_file, find_damage, regular_file
from engine.options import UserError

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


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

    EXIF rotation is left alone, as torchvision's ImageFolder leaves it. Raises UserError naming
    the file if it cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF or palette data, of no consequence here
            with Image.open(regular_file(path)) as image:
                pixels = np.array(center_crop(image.convert("RGB"), size))  # (H, W, 3)
    except Exception as error:  # PIL's decoders raise errors of any kind on a broken file
        raise UserError(f"--data-path must hold readable images, got {path} ({error}); "
                        f"repair the file") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def list_images(path, root):
    """Classes, files (N,) relative to root, labels (N,) int64 of --data-path, or a UserError."""
    if os.path.exists(root + "dataset.json"):
        return UserError(f"--data-path must be a folder of images, got {path}, which holds latent "
                         f"shards; add --encoded-data or give the images")
    try:
        found = datasets.ImageFolder(root)
    except (OSError, ValueError) as error:
        return UserError(f"--data-path must be a folder with one folder of images per class, got "
                         f"{path} ({str(error).splitlines()[0][:300]}); check the path")
    # one array and not a million strings: worker processes share its memory for good
    files = np.array([os.fsencode(file[len(root):]) for file, _ in found.samples])
    return found.classes, files, torch.tensor(found.targets)


class ImageFolder:
    """Images in one folder per class, served as uint8 (B, 3, size, size) and labels (B,).

    Classes are the sorted folder names, as torchvision's ImageFolder numbers them. Raises
    UserError if there is no such folder, no class or a class without an image.

    world: of several processes rank 0 lists the folder and sends the others what it found; to list
    a million files takes a network's file system minutes.
    """

    def __init__(self, path, image_size, world=None):
        self.root = os.path.join(os.path.expanduser(path), "")
        found = list_images(path, self.root) if world is None or world.main else None
        found = found if world is None else world.agree(found)
        if isinstance(found, UserError):
            raise UserError(found)
        self.classes, self.files, self.labels = found
        self.image_size = image_size
        # Decoded images of a set as small as the quickstart's are kept
        self.kept = {} if len(self) * 3 * image_size**2 <= 16 * 2**20 else None

    def __len__(self):
        return len(self.files)

    def __getitem__(self, batch):
        """(rows, mirrored), both (B,) -> images uint8 (B, 3, size, size) and labels (B,).

        Raises UserError.
        """
        rows, mirrored = batch
        return (torch.stack([self.read(item) for item in zip(rows.tolist(), mirrored.tolist())]),
                self.labels[rows])

    def read(self, row_and_mirrored):
        """uint8 (3, size, size). Raises UserError."""
        row, mirrored = row_and_mirrored
        return self.image(row).flip(2) if mirrored else self.image(row)

    def image(self, row):
        """uint8 (3, size, size), not mirrored. Raises UserError."""
        if self.kept is None:
            return read_image(self.path(row), self.image_size)
        if row not in self.kept:
            self.kept[row] = read_image(self.path(row), self.image_size)
        return self.kept[row]

    def name(self, row):
        """The path of an image relative to the folder."""
        return os.fsdecode(self.files[row])

    def path(self, row):
        return os.path.join(self.root, self.name(row))

    def fingerprint(self):
        """SHA-256 of the list of files: what a row stands for. Their content is not read."""
        return hashlib.sha256(b"\n".join(self.files.tolist())).hexdigest()


def save_grid(path, images, columns):
    """Write uint8 images (B, 3, H, W) as one picture, enlarged where they are tiny."""
    enlarge = max(1, 64 // images.shape[3])
    images = images.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    grid = make_grid(images, nrow=columns, padding=2, pad_value=255)
    with atomic_file(path) as temporary:
        Image.fromarray(grid.permute(1, 2, 0).cpu().numpy()).save(temporary, "PNG")


@contextlib.contextmanager
def reading_npz(option, path):
    """Turns what a torn or foreign .npz file raises into a UserError naming option."""
    try:
        yield
    except UserError:
        raise
    except (OSError, EOFError, LookupError, MemoryError, RuntimeError, SyntaxError, TypeError,
            ValueError, pickle.UnpicklingError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{option} must be a whole .npz file of plain arrays, got {path} "
                        f"({error}); write it again or name another") from error


def verify_npz(option, path, world):
    """Compare all of an .npz file with the archive's checksums, once, on rank 0.

    NumPy does so for an array that it reads whole, which arr_0 never is. Raises UserError.
    """
    def read():
        with reading_npz(option, path):
            damage = find_damage(path)
            if damage:
                raise ValueError(f"damaged: {damage}")

    world.on_main(read)


class NpzImages:
    """The images of an .npz file: arr_0, uint8 (N, H, W, 3). Raises UserError naming option."""

    def __init__(self, path, *, option):
        self.name, self.option = str(path), option
        with reading_npz(option, path), self._open() as (_, (shape, fortran, dtype)):
            fits = len(shape) == 4 and shape[3] == 3 and min(shape) > 0 and not fortran
            if dtype != np.uint8 or not fits:
                raise UserError(f"{option} must hold arr_0 of shape (N, H, W, 3), uint8, in C "
                                f"order, got {shape} {dtype} in {path}; write it so")
        self.count, self.image_size = shape[0], tuple(shape[1:3])

    def __len__(self):
        return self.count

    def check(self, world):
        """Read all of it before anything heavy. Raises UserError where a byte is damaged."""
        verify_npz(self.option, self.name, world)

    @contextlib.contextmanager
    def _open(self):
        """The file, at its first image, and the header: shape, Fortran order, dtype."""
        with zipfile.ZipFile(regular_file(self.name)) as archive, archive.open("arr_0.npy") as file:
            old = np.lib.format.read_magic(file) == (1, 0)
            yield file, (np.lib.format.read_array_header_1_0 if old
                         else np.lib.format.read_array_header_2_0)(file)

    def batches(self, size, world):
        """Yields (first, images (B, 3, H, W)): this process's batches of size, dealt in turn.

        Read in order and never held together: 50,000 images of 256 x 256 are 9.8 GB.
        """
        height, width = self.image_size
        with reading_npz(self.option, self.name), self._open() as (file, _):
            start = file.tell()
            for first in range(world.rank * size, self.count, world.size * size):
                count = min(size, self.count - first)
                file.seek(start + first * height * width * 3)
                data = bytearray(file.read(count * height * width * 3))
                images = torch.frombuffer(data, dtype=torch.uint8).view(count, height, width, 3)
                yield first, images.permute(0, 3, 1, 2)


class FolderImages:
    """The image files of a folder and its subfolders, in the order of their paths.

    They are taken as they are, and so must be RGB and of one size; or, with a crop, converted and
    centre-cropped. Raises UserError naming option.
    """

    def __init__(self, path, crop, workers, *, option):
        self.name, self.crop, self.workers, self.option = str(path), crop, workers, option
        self.paths = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        self.image_size = (crop, crop) if crop else None
        if self.paths and not crop:
            self.image_size = tuple(self.read(self.paths[0]).shape[1:])

    def __len__(self):
        return len(self.paths)

    def read(self, path, *, header=False):
        """A file as uint8 (3, H, W); with header alone, only its mode and size are checked."""
        try:
            with warnings.catch_warnings(), Image.open(regular_file(path)) as image:
                warnings.simplefilter("ignore")  # odd EXIF data, of no consequence here
                if not self.crop:
                    self._check_header(path, image)
                if header:
                    return None
                if self.crop:
                    image = center_crop(image.convert("RGB"), self.crop)
                return torch.from_numpy(np.array(image)).permute(2, 0, 1)
        except UserError:
            raise
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{self.option} must hold readable images, got {path} ({error}); "
                            f"repair or remove the file") from error

    def _check_header(self, path, image):
        if image.mode != "RGB":
            raise UserError(f"{self.option} must hold RGB images, got {path} of mode {image.mode}; "
                            f"convert it, or have all converted and cropped by --image-size")
        if self.image_size not in (None, (image.height, image.width)):
            raise UserError(f"{self.option} must hold images of one size, got {path} of "
                            f"{image.width} x {image.height} after {self.image_size[1]} x "
                            f"{self.image_size[0]}; remove it, or have all cropped by --image-size")

    def check(self, world):
        """Read every header before anything heavy, each process its share, in agreement."""
        def faulty(path):
            try:
                return self.read(path, header=True) is not None
            except UserError:
                return True

        flags = torch.zeros(len(self), dtype=torch.int32, device=world.device)
        with ThreadPoolExecutor(16) as pool:
            mine = list(pool.map(faulty, self.paths[world.rank::world.size]))
        flags[world.rank::world.size] = torch.tensor(mine, dtype=torch.int32, device=world.device)
        for number in world.total(flags).nonzero()[:1]:
            self.read(self.paths[number], header=True)  # raises on every process; rank 0 says it

    def batches(self, size, world):
        """Yields (first, images (B, 3, H, W)): this process's batches of size, dealt in turn."""
        firsts = range(0, len(self), size)[world.rank::world.size]
        share = [self.paths[first:first + size] for first in firsts]
        found = read_images(self.read, share, workers=min(self.workers, len(share)))
        batches = (stack_images(images) for _, images in found)
        yield from zip(firsts, prefetch(batches) if self.workers else batches)

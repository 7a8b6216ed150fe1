"""Image sets for evaluation: a folder of files, or an .npz file.

Each has a name, a length, image_size (H, W), and batches(parts), which yields the images, uint8
(B, 3, H, W), of each list of rows.
"""

import contextlib
import math
import os
import sys
import zipfile

import numpy as np
import torch
from PIL import Image

from dataset.images import SUFFIXES, center_crop, list_images, open_image, read_image
from dataset.loader import read_images, stack_images
from engine.errors import BadValue, UserError
from engine.files import find_damage


def open_images(path, world, crop=None, workers=0):
    """The images of a folder, as FolderImages takes it, or of an .npz file, two or more. Raises
    BadValue."""
    if path.is_dir():
        images = FolderImages(path, world, crop, workers)
    else:
        verify_npz(path, world)
        images = NpzImages(path, crop)
    if len(images) < 2:
        raise BadValue(f"must hold 2 images or more, got {len(images)} in {path}; add some "
                       f"({' '.join(SUFFIXES)})")
    return images


@contextlib.contextmanager
def reading_npz(path):
    """Turns the errors of a damaged or foreign .npz file into a BadValue."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib, pickle and NumPy each raise their own
        raise BadValue(f"must be a whole .npz file of plain arrays, got {path} ({error}); write it "
                       f"again or name another") from error


def verify_npz(path, world):
    """Compare every byte of an .npz file with the archive's checksums, on rank 0, as NumPy does
    only for arrays that it reads whole. Raises BadValue."""
    def verify():
        with reading_npz(path):
            if damage := find_damage(path):
                raise ValueError(f"damaged: {damage}")

    world.on_main(verify)


class NpzImages:
    """The images of an .npz file: arr_0, uint8 (N, H, W, 3). Raises BadValue.

    crop: the side to which they are centre-cropped.
    """

    def __init__(self, path, crop=None):
        self.name, self.crop = str(path), crop
        with reading_npz(path), self._open() as (_, stored, (shape, fortran, dtype)):
            fits = len(shape) == 4 and shape[3] == 3 and min(shape) > 0 and not fortran
            if dtype != np.uint8 or not fits:
                raise BadValue(f"must hold arr_0 of shape (N, H, W, 3), uint8, in C order, got "
                               f"{shape} {dtype}{' in Fortran order' * fortran} in {path}; write "
                               f"it so")
            if stored != math.prod(shape):
                raise ValueError(f"arr_0 of shape {shape} has {stored} bytes")
        self.count, self.size = shape[0], tuple(shape[1:3])
        self.image_size = (crop, crop) if crop else self.size

    def __len__(self):
        return self.count

    @contextlib.contextmanager
    def _open(self):
        """The file, at its first image, the bytes from there on, and the header: shape, Fortran
        order, dtype."""
        with zipfile.ZipFile(self.name) as archive:
            keys = [name.removesuffix(".npy") for name in archive.namelist()]
            if "arr_0" not in keys:
                raise BadValue(f"must hold images as arr_0, got {self.name} with "
                               f"{', '.join(keys):.200}; write it so")
            with archive.open("arr_0.npy") as file:
                np.lib.format.read_magic(file)
                header = np.lib.format.read_array_header_1_0(file)
                yield file, archive.getinfo("arr_0.npy").file_size - file.tell(), header

    def batches(self, parts):
        """Yields images (B, 3, H, W) for each list of rows; rows that increase are read fastest.
        50,000 images of 256 x 256 are 9.8 GB: they are never held together."""
        height, width = self.size
        with reading_npz(self.name), self._open() as (file, *_):
            start, size = file.tell(), height * width * 3
            for rows in parts:
                pixels = bytearray()
                for row in rows:
                    file.seek(start + row * size)
                    pixels += file.read(size)
                images = np.frombuffer(pixels, np.uint8).reshape(len(rows), height, width, 3)
                if self.crop:
                    images = np.stack([center_crop(Image.fromarray(image), self.crop)
                                       for image in images])
                yield torch.from_numpy(images).permute(0, 3, 1, 2)


class FolderImages:
    """The image files of a folder and its subfolders, which rank 0 lists for all.

    crop: the side to which they are centre-cropped, in RGB; without, they must be RGB and of one
    size. workers: processes that read them. Raises BadValue.
    """

    def __init__(self, path, world, crop=None, workers=0):
        self.name, self.crop, self.workers = str(path), crop, workers
        self.paths = world.on_main(self._list)
        self.image_size = (crop, crop) if crop else None
        if self.paths and not crop:
            with open_image(self.paths[0]) as image:
                self.image_size = image.height, image.width

    def _list(self):
        folders, note = list_images(self.name)
        if note:
            print(note, file=sys.stderr)
        return [os.path.join(self.name, folder, name)
                for folder, names in folders.items() for name in names]

    def __len__(self):
        return len(self.paths)

    def read(self, row):
        """An image as uint8 (3, H, W). Raises BadValue."""
        path = self.paths[row]
        if self.crop:
            return read_image(path, self.crop)
        with open_image(path) as image:
            size = image.height, image.width
            if image.mode != "RGB" or size != self.image_size:
                raise BadValue(f"must hold RGB images of one size, {self.image_size}, got {path} "
                               f"of mode {image.mode} and {size}; crop all with --image-size")
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def batches(self, parts):
        """Yields images (B, 3, H, W) for each list of rows."""
        for _, images in read_images(self.read, parts, workers=min(self.workers, len(parts))):
            yield stack_images(images)

"""Image files: which of a folder are, ADM's centre crop, and folders with one folder per class."""

import contextlib
import hashlib
import os
import sys
import warnings
from collections import Counter

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dataset.loader import read_images, stack_images
from engine.errors import BadValue, UserError, naming

SUFFIXES = (".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png",
            ".pnm", ".ppm", ".tif", ".tiff", ".webp")
# Beside names that begin with a dot: what archives of macOS, NAS and disks add to a folder
HIDDEN = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "$Recycle.Bin", "lost+found",
          "System Volume Information"}
CACHE_BYTES = 16 * 2**20  # data sets up to this size, such as the quickstart's, stay in memory
SHOWN = 8  # names or kinds of files at most in a line


def list_images(root):
    """({folder: names}, note): the image files in a folder and those below it, and a line that
    counts what else is there, or "".

    Folders are relative to root. They and the names come in the order of torchvision's ImageFolder.
    Hidden files and folders are left out. Links are followed, and each real folder is read once,
    by its own path if it lies below root. Raises BadValue for a folder that cannot be read.
    """
    images, left_out, read = {}, Counter(), set()
    folders, links, above = [""], [], os.path.realpath(root)
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        path = os.path.join(root, folder)
        real = os.path.realpath(path)
        if real in read or above.startswith(os.path.join(real, "")):
            left_out["link to a folder read already"] += 1
            continue
        read.add(real)
        try:
            with os.scandir(path) as entries:
                kinds = [(entry.name, _kind(entry)) for entry in entries]
        except OSError as error:
            raise BadValue(f"must be a folder that can be read, got {path} ({error.strerror}); "
                           f"check it") from error
        images[folder] = sorted(name for name, kind in kinds if kind == "image")
        for paths, wanted in (folders, "folder"), (links, "link to a folder"):
            paths += sorted(os.path.join(folder, name) for name, kind in kinds if kind == wanted)
        left_out.update(kind for _, kind in kinds)
    for kind in ("image", "folder", "link to a folder"):
        del left_out[kind]
    texts = [f"{count:,} {kind}" for kind, count in left_out.most_common(SHOWN)]
    note = f"left out of {root}: {', '.join(texts)}" if texts else ""
    return {folder: images[folder] for folder in sorted(images, key=_class_first)}, note


def _kind(entry):
    """What an entry of a folder is to list_images; of a file that is left out, its suffix."""
    name, is_link = entry.name, entry.is_symlink()
    if name[0] == "." or name in HIDDEN:
        return "hidden"
    if os.path.isdir(entry) if is_link else entry.is_dir():
        return "link to a folder" if is_link else "folder"
    if name.lower().endswith(SUFFIXES):
        return "image"
    if is_link and not os.path.exists(entry):
        return "broken link"
    suffix = os.path.splitext(name)[1].lower()
    return suffix if suffix[1:].isalnum() else "of other names"


def _class_first(folder):
    """The key to sort folders by: a class and, below it, the path."""
    return folder.split(os.sep, 1)


def center_crop(image, size):
    """The centre square of a PIL image, resized to (size, size).

    ADM's recipe (openai/guided-diffusion), with which the published FID references were made:
    halve with BOX filtering while the shorter side is at least twice the size, then BICUBIC.
    """
    short, long = sorted(image.size)
    if long > 100 * short:  # enlarged as a whole, 1 x 6000 pixels would take 2 GB
        image = _centre(image, *(min(side, 10 * short + long % 2) for side in image.size))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    return _centre(image.resize((width, height), Image.Resampling.BICUBIC), size, size)


def _centre(image, width, height):
    """The centre of a PIL image."""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


@contextlib.contextmanager
def open_image(path):
    """Opens an image file with PIL. Raises BadValue, also for the decoding within ``with``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF or palette data do no harm here
            with Image.open(path) as image:
                if image.mode[0] in "IF":  # PIL would clip 16 bits to 8: all white
                    raise BadValue(f"must hold images of 8 bits a channel, got {path} of mode "
                                   f"{image.mode}; convert it, as only you know its white")
                yield image
    except (UserError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise BadValue(f"must hold images of {2 * Image.MAX_IMAGE_PIXELS:,} pixels at most, got "
                       f"more in {path}; make it smaller") from error
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
    skip_bad_images: in a batch the next readable image of its class replaces an unreadable one.
    notes: lines for the log. Raises UserError if there is no such folder, no class, or a class
    without an image.
    """

    def __init__(self, path, image_size, world=None, *, skip_bad_images=False):
        self.root = os.path.join(os.path.expanduser(path), "")
        self.classes, self.files, self.labels, self.notes = (world.on_main(self._list) if world
                                                             else self._list())
        self.image_size, self.cache = image_size, {}
        self.caches = len(self) * 3 * image_size**2 <= CACHE_BYTES
        self.skip_bad_images, self.skipped = skip_bad_images, set()

    def _list(self):
        """Classes, files (N,) relative to root, labels (N,) int64, lines for the log."""
        if os.path.exists(self.root + "dataset.json"):
            raise UserError(f"--data-path must be a folder of images, got {self.root}, which holds "
                            f"latent shards; add --encoded-data or give the images")
        with naming("--data-path"):
            folders, note = list_images(self.root)
        outside, notes = folders.pop(""), [note] if note else []
        counts, nested = Counter(), Counter()
        for folder, names in folders.items():
            name, *below = _class_first(folder)
            counts[name] += len(names)
            nested[name] += bool(below) * len(names)
        empty = [name for name, count in counts.items() if not count]
        if empty or not counts:
            fault = f"no images in {_names(empty)}" if empty else "no folders in it"
            raise UserError(f"--data-path must be a folder with one folder of images per class, "
                            f"got {self.root} ({'; '.join([fault, *notes])}); check it, or give "
                            f"the folder above")
        if outside:
            notes.append(f"left out: {len(outside):,} images that lie in no class folder")
        if nested := [name for name, count in counts.items() if count == nested[name]]:
            notes.append(f"class folders that hold folders and no images: {_names(nested)}; if "
                         f"those below are the classes, give one of these as --data-path")
        # One array, not a million strings: updating their reference counts would copy the memory
        # that reading processes share
        files = np.array([os.fsencode(f"{folder}/{name}")
                          for folder, names in folders.items() for name in names])
        labels = torch.arange(len(counts)).repeat_interleave(torch.tensor([*counts.values()]))
        return list(counts), files, labels, notes

    def __len__(self):
        return len(self.files)

    def batches(self, steps, workers):
        """Yields images (B, 3, size, size) and labels (B,) for each (rows, mirrored)."""
        items = (list(zip(rows.tolist(), mirrored.tolist())) for rows, mirrored in steps)
        for batch, images in read_images(self.read, items, workers=workers):
            if self.skip_bad_images:
                images = [*map(self._replace, batch, images)]
            yield stack_images(images), self.labels[[row for row, _ in batch]]

    def _replace(self, item, image):
        """The image that was read, or for an error the next readable image of the same class."""
        if not isinstance(image, UserError):
            return image
        row, mirrored = item
        rows = (self.labels == self.labels[row]).nonzero()[:, 0].tolist()
        place = rows.index(row)
        if row not in self.skipped:
            self.skipped.add(row)
            fault = str(image).rpartition("; ")[0]
            tqdm.write(f"skipped, another of its class is taken: {fault}", file=sys.stderr)
        for other in rows[place + 1:] + rows[:place]:
            with contextlib.suppress(UserError):
                return self.read((other, mirrored)).numpy()
        raise image

    def read(self, item):
        """The image (3, size, size) of (row, mirrored). Raises UserError."""
        row, mirrored = item
        image = self.cache.get(row)
        if image is None:
            try:
                image = read_image(os.path.join(self.root, self.name(row)), self.image_size)
            except BadValue as error:
                raise UserError(f"--data-path {error}, or add --skip-bad-images") from error
            if self.caches:
                self.cache[row] = image
        return image.flip(2) if mirrored else image

    def name(self, row):
        """The path of an image relative to the folder."""
        return os.fsdecode(self.files[row])

    def fingerprint(self):
        """SHA-256 of the list of files, which says what each row is. Contents are not read."""
        return hashlib.sha256(b"\n".join(self.files.tolist())).hexdigest()


def _names(names):
    """The first names of a list, for a line."""
    return ", ".join(names[:SHOWN]) + (" ..." if names[SHOWN:] else "")

"""Images: ADM's centre crop, training folders (class = folder), image sets for evaluation, grids.

Images are uint8, (3, H, W) or in batches (B, 3, H, W).
"""

import contextlib
import hashlib
import os
import unicodedata
import warnings
import zipfile

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from dataset.loader import read_images, stack_images
from engine.files import atomic_file, find_damage, regular_file
from engine.options import UserError

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
CACHED = 16 * 2**20  # bytes of decoded images, such as the quickstart's, that are kept in memory


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
def open_image(path, option):
    """Opens an image file with PIL. Raises a UserError that names file and option if that, or the
    decoding in the with block, fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF or palette data do no harm here
            with Image.open(regular_file(path)) as image:
                yield image
    except UserError:
        raise
    except Exception as error:  # PIL's decoders raise errors of any kind on a broken file
        raise UserError(f"{option} must hold readable images, got {path} ({error}); repair or "
                        f"remove the file") from error


def read_image(path, size, option="--data-path"):
    """An image file as uint8 (3, size, size): PIL's conversion to RGB, then the centre crop.

    EXIF rotation is not applied; torchvision's ImageFolder does not apply it either. Raises
    UserError.
    """
    with open_image(path, option) as image:
        pixels = np.array(center_crop(image.convert("RGB"), size))  # (H, W, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


class ImageFolder:
    """A data set for training (see dataset/loader.py): images in one folder per class.

    Serves uint8 (B, 3, size, size) and labels (B,). Classes are the sorted folder names, as
    torchvision's ImageFolder numbers them. Raises UserError if there is no such folder, no class,
    or a class without an image.

    world: rank 0 lists the folder for all; a million files take minutes on a network file system.
    """

    def __init__(self, path, image_size, world=None):
        self.root = os.path.join(os.path.expanduser(path), "")
        listed = world.on_main(self._list) if world else self._list()
        self.classes, self.files, self.labels = listed
        self.image_size, self.cache = image_size, {}
        self.caches = len(self) * 3 * image_size**2 <= CACHED

    def _list(self):
        """Classes, files (N,) relative to root, labels (N,) int64."""
        from torchvision import datasets  # takes a second to import; evaluate_fid.py does without

        if os.path.exists(self.root + "dataset.json"):
            raise UserError(f"--data-path must be a folder of images, got {self.root}, which holds "
                            f"latent shards; add --encoded-data or give the images")
        if not os.path.isdir(self.root):
            raise UserError(f"--data-path must be a folder with one folder of images per class, "
                            f"got {self.root.rstrip('/')} (no such folder); check the path")
        try:
            found = datasets.ImageFolder(self.root)
        except (OSError, ValueError) as error:
            raise UserError(f"--data-path must be a folder with one folder of images per class, "
                            f"got {self.root} ({str(error).splitlines()[0][:300]}); check the "
                            f"path, or give the folder above") from error
        # One array, not a million strings: updating their reference counts would copy the memory
        # that reading processes share
        files = np.array([os.fsencode(file[len(self.root):]) for file, _ in found.samples])
        return found.classes, files, torch.tensor(found.targets)

    def __len__(self):
        return len(self.files)

    def batches(self, sampler, workers):
        """Yields images (B, 3, size, size) and labels (B,) for each (rows, mirrored)."""
        items = (list(zip(rows.tolist(), mirrored.tolist())) for rows, mirrored in sampler)
        for batch, images in read_images(self.read, items, workers=workers):
            yield stack_images(images), self.labels[[row for row, _ in batch]]

    def read(self, item):
        """The image (3, size, size) of (row, mirrored). Raises UserError."""
        row, mirrored = item
        image = self.cache.get(row)
        if image is None:
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


def save_grid(path, images, columns, captions=None):
    """Write uint8 images (B, 3, H, W) as one picture; tiny ones are enlarged.

    captions: a text for each image, above it; above the columns only where all of a column are
    alike.
    """
    enlarge = max(1, 64 // images.shape[3])
    images = images.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    images, header = images.cpu(), None
    if captions:
        bars = write_captions(captions, images.shape[3])  # (B, 3, h, W)
        if captions == [captions[i % columns] for i in range(len(captions))]:
            header = make_tiles(bars[:columns], columns)[:, :-2]
        else:
            images = torch.cat([bars, images], dim=2)
    grid = make_tiles(images, columns)
    if header is not None:
        grid = torch.cat([header, grid], dim=1)
    with atomic_file(path) as temporary:
        Image.fromarray(grid.permute(1, 2, 0).numpy()).save(temporary, "PNG")


def make_tiles(images, columns):
    """Images (B, 3, H, W) in rows of so many, with white around each: (3, H', W')."""
    from torchvision.utils import make_grid  # see ImageFolder._list

    if len(images) == 1:  # make_grid would leave out the white
        return F.pad(images[0], (2, 2, 2, 2), value=255)
    return make_grid(images, nrow=columns, padding=2, pad_value=255)


def write_captions(captions, width):
    """Bars (B, 3, h, width), uint8, with black texts, each broken into lines that fit the width and
    leave a gap to the neighbours'."""
    size = min(max(width // 8, 11), 28)
    font = ImageFont.load_default(size)
    texts = [break_lines(drawable(caption, font), font, width - 4) for caption in captions]
    height = (size + 3) * max(map(len, texts)) + 4
    bars = []
    for lines in texts:
        bar = Image.new("RGB", (width, height), "white")
        text = "\n".join(lines)
        ImageDraw.Draw(bar).multiline_text((width / 2, height - 3), text, "black", font, "md",
                                           align="center", spacing=2)
        bars.append(torch.from_numpy(np.array(bar)).permute(2, 0, 1))
    return torch.stack(bars)


def drawable(text, font):
    """The text in characters that the font can draw; of a letter with an accent that it lacks the
    letter, of all others a question mark."""
    box = bytes(font.getmask("\uffff"))  # what it draws for all that it lacks

    def has(character):
        return character.isspace() or bytes(font.getmask(character)) != box

    letters = "".join(character if has(character) else unicodedata.normalize("NFKD", character)
                      for character in unicodedata.normalize("NFC", text))
    return "".join(character if has(character) else "?" for character in letters
                   if unicodedata.category(character)[0] != "M")  # accents


def break_lines(caption, font, width):
    """The lines of a caption, broken at spaces, three at most of each paragraph; what does not fit
    is cut."""
    lines = []
    for paragraph in caption.split("\n"):
        broken = [""]
        for word in paragraph.split():
            wider = f"{broken[-1]} {word}".strip()
            if broken[-1] and font.getlength(wider) > width:
                broken.append(word)
            else:
                broken[-1] = wider
        broken[2:] = [" ".join(broken[2:])] if broken[2:] else []
        lines += [cut(line, font, width) for line in broken]
    return lines


def cut(line, font, width):
    """The line, shortened with an ellipsis where it is wider than width."""
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "\u2026") > width:
        line = line[:-1]
    return line.rstrip() + "\u2026"


# ---- image sets for evaluation ---------------------------------------------------------------


@contextlib.contextmanager
def reading_npz(option, path):
    """Turns the errors of a damaged or foreign .npz file into a UserError that names option."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib, pickle and NumPy each raise their own
        raise UserError(f"{option} must be a whole .npz file of plain arrays, got {path} "
                        f"({error}); write it again or name another") from error


def verify_npz(option, path, world):
    """Compare every byte of an .npz file with the archive's checksums, on rank 0.

    NumPy does so only for an array that it reads whole, and arr_0 is read in parts. Raises
    UserError.
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

    @contextlib.contextmanager
    def _open(self):
        """The file, at its first image, and the header: shape, Fortran order, dtype."""
        with zipfile.ZipFile(regular_file(self.name)) as archive, archive.open("arr_0.npy") as file:
            old = np.lib.format.read_magic(file) == (1, 0)
            yield file, (np.lib.format.read_array_header_1_0 if old
                         else np.lib.format.read_array_header_2_0)(file)

    def numbered_batches(self, size, world):
        """Yields (number of the first image, images (B, 3, H, W)): this rank's batches of size,
        dealt in turn.

        They are read in order and never held together: 50,000 images of 256 x 256 are 9.8 GB.
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

    With a crop they are converted to RGB and centre-cropped; without, they must be RGB and of one
    size. Raises UserError naming option.
    """

    def __init__(self, path, crop, workers, *, option):
        self.name, self.crop, self.workers, self.option = str(path), crop, workers, option
        self.paths = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        self.image_size = (crop, crop) if crop else None
        if self.paths and not crop:
            with open_image(self.paths[0], option) as image:
                self.image_size = image.height, image.width

    def __len__(self):
        return len(self.paths)

    def read(self, path):
        """A file as uint8 (3, H, W). Raises UserError."""
        if self.crop:
            return read_image(path, self.crop, self.option)
        with open_image(path, self.option) as image:
            size = image.height, image.width
            if image.mode != "RGB":
                raise UserError(f"{self.option} must hold RGB images, got {path} of mode "
                                f"{image.mode}; convert all with --image-size")
            if size != self.image_size:
                raise UserError(f"{self.option} must hold images of one size, got {path} of {size} "
                                f"after {self.image_size}; crop all with --image-size")
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def numbered_batches(self, size, world):
        """Yields (number of the first image, images (B, 3, H, W)): this rank's batches of size,
        dealt in turn."""
        firsts = range(0, len(self), size)[world.rank::world.size]
        share = [self.paths[first:first + size] for first in firsts]
        found = read_images(self.read, share, workers=min(self.workers, len(share)))
        yield from zip(firsts, (stack_images(images) for _, images in found))

"""Training data: image folders (class = folder), ADM's centre crop, shards of latents, and an
order that can start at any step without reading what came before.

The order is a function of (seed, step): every process works out the global batch's rows and takes
the rows rank::world, so the data a run sees does not depend on the number of processes.

A data set of latents is a folder: dataset.json; shard-00000.npy ..., (n, 2, C, h, w), the mean and
std of every image's posterior, unscaled; shard-00000.labels.npy, (n,) int64; and, if it stores
mirror images, shard-00000.flip.npy. encode_imagenet.py writes it, LatentShards serves it.
"""

import contextlib
import hashlib
import json
import math
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.utils import make_grid

import runtime
from runtime import UserError

FORMAT_VERSION = 1
CROP = "adm-center"
DTYPES = {"float16": torch.float16, "float32": torch.float32}


# ---- images ---------------------------------------------------------------------------------


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
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")  # odd EXIF or palette data, of no consequence here
            pixels = np.array(center_crop(image.convert("RGB"), size))  # (H, W, 3)
    except Exception as error:  # PIL's decoders raise errors of any kind on a broken file
        raise UserError(f"--data-path must hold readable images, got {path} ({error}); "
                        f"repair or remove the file", local=True) from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


class ImageFolder:
    """Images in one folder per class, served as uint8 (B, 3, size, size) and labels (B,).

    Classes are the sorted folder names, as torchvision's ImageFolder numbers them. Raises
    UserError if there is no such folder, no class or a class without an image.
    """

    def __init__(self, path, image_size):
        self.root = os.path.join(os.path.expanduser(path), "")
        if (Path(self.root) / "dataset.json").exists():
            raise UserError(f"--data-path must be a folder of images, got {path}, which holds "
                            f"latent shards; add --encoded-data or give the images")
        try:
            found = datasets.ImageFolder(self.root)
        except (OSError, ValueError) as error:
            raise UserError(f"--data-path must be a folder with one folder of images per class, "
                            f"got {path} ({str(error).splitlines()[0][:300]}); check the path"
                            ) from error
        self.image_size, self.classes = image_size, found.classes
        self.labels = torch.tensor(found.targets)  # (N,) int64
        # one array and not a million strings: worker processes share its memory for good
        self.files = np.array([os.fsencode(file[len(self.root):]) for file, _ in found.samples])

    def __len__(self):
        return len(self.files)

    def __getitem__(self, batch):
        """(rows, mirrored), both (B,) -> images and labels, or the UserError met on the way.

        Returned and not raised: a worker process would wrap it in its traceback.
        """
        rows, mirrored = batch
        try:
            images = [read_image(self.path(row), self.image_size) for row in rows.tolist()]
        except UserError as error:
            return error
        images = torch.stack([x.flip(2) if m else x for x, m in zip(images, mirrored.tolist())])
        return images, self.labels[rows]

    def name(self, row):
        """The path of an image relative to the folder."""
        return os.fsdecode(self.files[row])

    def path(self, row):
        return os.path.join(self.root, self.name(row))

    def fingerprint(self):
        """SHA-256 of the list of files: what a row stands for. Their content is not read."""
        return hashlib.sha256(b"\n".join(self.files.tolist())).hexdigest()


# ---- latents: writing -----------------------------------------------------------------------


class ShardFiles:
    """The paths of one shard's files."""

    def __init__(self, folder, index):
        stem = Path(folder) / f"shard-{index:05d}"
        self.moments, self.labels = Path(f"{stem}.npy"), Path(f"{stem}.labels.npy")
        self.flip = Path(f"{stem}.flip.npy")
        self.skipped = Path(f"{stem}.skipped.json")  # only where images could not be read


class GrowingArray:
    """An .npy file that grows by whole batches of rows, so no shard has to fit in memory."""

    def __init__(self, path, row_shape, dtype):
        self.row_shape, self.dtype = tuple(row_shape), np.dtype(dtype)
        self.rows, self.file = 0, open(path, "wb")
        self._write_header()
        self.start = self.file.tell()

    def append(self, rows):
        """Add rows (n, *row_shape)."""
        assert rows.shape[1:] == self.row_shape and rows.dtype == self.dtype
        self.file.write(np.ascontiguousarray(rows).data)
        self.rows += len(rows)

    def _write_header(self):
        np.lib.format.write_array_header_1_0(self.file, {
            "shape": (self.rows, *self.row_shape), "fortran_order": False,
            "descr": np.lib.format.dtype_to_descr(self.dtype)})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.seek(0)
        self._write_header()
        assert self.file.tell() == self.start  # numpy pads the header so that the count may grow
        self.file.close()


def write_shard(files, batches, *, latent_shape, dtype, flip):
    """Write one shard's ShardFiles; each appears whole, the moments last: then it is complete.

    batches: of (labels (n,) int64, moments (n, 2, C, h, w), the same of the mirror images or
    None, complaints about unreadable images), tensors of the named dtype. Raises UserError where
    the disk is full.
    """
    labels, skipped = [], []
    with contextlib.ExitStack() as stack:  # left in reverse order
        def create(path):
            temporary = stack.enter_context(runtime.whole_file(path))
            return stack.enter_context(GrowingArray(temporary, (2, *latent_shape), dtype))
        moments_file = create(files.moments)
        mirror_file = create(files.flip) if flip else None
        for batch_labels, moments, mirror, complaints in batches:
            labels.append(batch_labels.numpy())
            moments_file.append(moments.numpy())
            if flip:
                mirror_file.append(mirror.numpy())
            skipped += complaints
        with runtime.whole_file(files.labels) as path, open(path, "wb") as file:
            np.save(file, np.concatenate(labels))
        if skipped:
            write_json(files.skipped, skipped)


def write_json(path, value):
    """Write a JSON file, whole or not at all."""
    with runtime.whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


# ---- latents: reading -----------------------------------------------------------------------


def map_array(path, dtype, shape):
    """A .npy file as a memory-mapped tensor; read when touched, and no descriptor stays open.

    Raises UserError unless it is all there, of this dtype and this shape.
    """
    expected = f"{path} must hold {' x '.join(map(str, shape))} numbers of {dtype}"
    remedy = "remove it and repeat the encode_imagenet.py command"
    try:
        with open(path, "rb") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("another version of the .npy format")
            header = np.lib.format.read_array_header_1_0(file)  # evaluates literals, runs nothing
            start, size = file.tell(), os.fstat(file.fileno()).st_size
    except FileNotFoundError as error:
        raise UserError(f"{expected}, got no such file; {remedy}") from error
    except Exception as error:  # the parser lets errors of many kinds through
        raise UserError(f"{expected}, got a file that is no such array ({error}); {remedy}"
                        ) from error
    if header != (tuple(shape), False, np.dtype(dtype)) or start % 8:
        raise UserError(f"{expected}, got {' x '.join(map(str, header[0]))} of {header[2]}; "
                        f"it belongs to another data set: {remedy}")
    if size != start + math.prod(shape) * np.dtype(dtype).itemsize:
        raise UserError(f"{expected}, got a file of {size} bytes, cut short or too long; {remedy}")
    whole = torch.from_file(str(path), size=size, dtype=torch.uint8)  # private: never written to
    return whole[start:].view(getattr(torch, dtype)).view(shape)


def read_dataset_json(folder):
    """dataset.json of a folder of shards, its fields checked. Raises UserError."""
    path = Path(folder) / "dataset.json"
    if (Path(folder) / "encoding.json").exists() and not path.exists():
        raise UserError(f"--data-path must be a finished data set, got {folder}, whose encoding "
                        f"was interrupted; repeat the encode_imagenet.py command")
    if not path.exists():
        raise UserError(f"--data-path must be a folder written by encode_imagenet.py for "
                        f"--encoded-data, got {folder} without dataset.json; encode the images or "
                        f"leave out --encoded-data")
    try:
        info = json.loads(path.read_text())
        if info["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version is {info['format_version']}, not {FORMAT_VERSION}")
        counts, shape, classes = info["shards"], info["latent_shape"], info["classes"]
        for name, ok in {
            "classes": bool(classes) and all(isinstance(name, str) for name in classes),
            "image_size": _is_count(info["image_size"]),
            "latent_shape": len(shape) == 3 and all(map(_is_count, shape)),
            "vae": isinstance(info["vae"], str),
            "scale": isinstance(info["scale"], float) and 0 < info["scale"] < math.inf,
            "dtype": info["dtype"] in DTYPES,
            "flip": isinstance(info["flip"], bool),
            "crop": info["crop"] == CROP,
            "shards": all(_is_count(count, 0) for count in counts),
            "count": _is_count(info["count"]) and info["count"] == sum(counts),
        }.items():
            if not ok:
                raise ValueError(f"{name} is {str(info[name])[:100]}")
    except KeyError as error:
        raise UserError(f"{path} must be as encode_imagenet.py writes it, got no field {error}; "
                        f"encode again") from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} must be as encode_imagenet.py writes it, got a file where "
                        f"{error}; encode again") from error
    return info


def _is_count(value, low=1):
    return type(value) is int and low <= value < 2**63


class LatentShards:
    """A folder written by encode_imagenet.py, served as moments (B, 2, C, h, w) and labels (B,).

    The moments keep the dtype they have on disk: half the way to a GPU. Shards are memory-mapped,
    so opening reads the labels only, and many processes share one page cache. Raises UserError
    for a data set that is missing, unfinished, damaged or foreign.
    """

    def __init__(self, path):
        info = read_dataset_json(path)
        self.folder = Path(path)
        self.classes, self.image_size = info["classes"], info["image_size"]
        self.latent_shape = tuple(info["latent_shape"])
        self.vae, self.scale = info["vae"], info["scale"]
        self.flip, self.dtype = info["flip"], info["dtype"]
        row = (2, *self.latent_shape)
        moments, mirrors, labels = [], [], []
        for index, count in enumerate(info["shards"]):
            files = ShardFiles(path, index)
            moments.append(map_array(files.moments, self.dtype, (count, *row)).numpy())
            if self.flip:
                mirrors.append(map_array(files.flip, self.dtype, (count, *row)).numpy())
            labels.append(self._labels(files.labels, count))
        self.labels = torch.cat(labels)  # (N,) int64
        self._shards = moments, mirrors  # numpy copies one row in a tenth of torch's time
        self._starts = np.cumsum([0, *info["shards"]])[:-1]

    def _labels(self, path, count):
        labels = map_array(path, "int64", (count,)).clone()
        if count and not 0 <= labels.min() <= labels.max() < len(self.classes):
            raise UserError(f"{path} must hold labels below {len(self.classes)}, got "
                            f"{labels.min()} to {labels.max()}; encode again")
        return labels

    def __reduce__(self):
        """A process that is not forked opens the files itself."""
        return LatentShards, (self.folder,)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, batch):
        """(rows, mirrored), both (B,) -> moments and labels."""
        rows, mirrored = batch
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        moments = torch.empty(len(rows), 2, *self.latent_shape, dtype=DTYPES[self.dtype])
        target = moments.numpy()
        places = zip(mirrored.tolist(), shards.tolist(), (rows - self._starts[shards]).tolist())
        for i, (mirror, shard, row) in enumerate(places):
            target[i] = self._shards[mirror][shard][row]
        return moments, self.labels[rows]

    def check(self, *, space, image_size, flip):
        """Raise UserError unless the shards suit the options --vae, --image-size and --flip."""
        if image_size != self.image_size:
            raise UserError(f"--image-size must be that of the latents in {self.folder}, "
                            f"{self.image_size}, got {image_size}; give --image-size "
                            f"{self.image_size} or encode again")
        if (space.scale, space.latent_shape(image_size)) != (self.scale, self.latent_shape):
            raise UserError(f"--vae must be the one that encoded {self.folder}, {self.vae} with "
                            f"scale {self.scale} and latents {self.latent_shape}, got "
                            f"{space.name} with {space.scale} and "
                            f"{space.latent_shape(image_size)}; give --vae {self.vae}")
        if flip and not self.flip:
            raise UserError(f"--flip needs mirror images among the latents, got {self.folder} "
                            f"without; leave it out or encode with --flip")


# ---- order ----------------------------------------------------------------------------------


class Batches:
    """Yields (rows, mirrored) of this process for the steps start .. stop - 1.

    An epoch is count // global_batch steps over a fresh permutation; the rest of it is left out.
    Raises UserError if the images do not fill one batch.
    """

    def __init__(self, count, global_batch, *, seed, start, stop, flip, world):
        if count < global_batch:
            raise UserError(f"--global-batch-size must be at most the number of images, {count}, "
                            f"got {global_batch}; lower it or add images")
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

    Workers read ahead, so neither a slow image nor a cold disk holds up the caller. Raises
    UserError for what a worker could not read.
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

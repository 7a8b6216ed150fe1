"""Latents on disk: a folder that encode_imagenet.py writes and LatentShards serves.

    dataset.json             what the shards hold, how they were made, and the CRC-32 of each file's
                             numbers and of itself
    shard-00000.npy ...      (n, 2, C, h, w): mean and std of every image's posterior, unscaled
    shard-00000.labels.npy   (n,) int64
    shard-00000.flip.npy     as shard-00000.npy, of the mirror images; where dataset.json says flip

A few hundred large files, memory-mapped: serving an image copies its numbers once.
"""

import contextlib
import json
import math
import mmap
import resource
import zlib
from pathlib import Path

import numpy as np
import torch

from dataset.loader import map_ahead
from engine.errors import UserError
from engine.files import atomic_file, write_json

FORMAT_VERSION = 1
CROP = "adm-center"
DTYPES = {"float16": torch.float16, "float32": torch.float32}
UNFINISHED = "encoding.json"  # stands in for dataset.json until the last shard is written
# train.py compares latents with their checksums up to so many bytes: 2 s from a disk of 2 GB/s
VERIFIED = 4e9


class ShardFiles:
    """The paths of one shard's files."""

    def __init__(self, folder, index):
        stem = f"{Path(folder)}/shard-{index:05d}"
        self.moments, self.labels = Path(f"{stem}.npy"), Path(f"{stem}.labels.npy")
        self.flip = Path(f"{stem}.flip.npy")
        self.skipped = Path(f"{stem}.skipped.json")  # only where images could not be read
        self.sums = Path(f"{stem}.crc32.json")  # until dataset.json has them

    def arrays(self, flip):
        """The files that must be there, and of which dataset.json has a checksum."""
        return [self.labels, self.moments, *[self.flip][:flip]]


def map_array(path, dtype, shape):
    """An .npy file as a read-only array of any shape; its ``base`` is the memory map.

    Raises UserError unless the file exists, is complete, and has this dtype and shape.
    """
    expected = f"{path} must hold {' x '.join(map(str, shape))} numbers of {dtype}"
    remedy = "remove it and repeat the encode_imagenet.py command"
    try:
        with open(path, "rb") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("another version of the .npy format")
            header = np.lib.format.read_array_header_1_0(file)  # evaluates literals, runs nothing
            start, mapping = file.tell(), mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"{expected}, got {error.strerror}; {remedy}, or raise the limit of open "
                        f"files (ulimit -n) if they are too many") from error
    except Exception as error:  # the parser lets errors of many kinds through
        raise UserError(f"{expected}, got a file that is no such array ({error}); {remedy}"
                        ) from error
    if header != (tuple(shape), False, np.dtype(dtype)):
        raise UserError(f"{expected}, got {' x '.join(map(str, header[0]))} of {header[2]}; "
                        f"it belongs to another data set: {remedy}")
    if len(mapping) != start + math.prod(shape) * np.dtype(dtype).itemsize:
        raise UserError(f"{expected}, got a file of {len(mapping)} bytes, cut short or too long; "
                        f"{remedy}")
    mapping.madvise(mmap.MADV_RANDOM)  # else a touched page reads up to megabytes around it
    return np.ndarray(shape, dtype, buffer=mapping, offset=start)


def prefetch_row(array, row):
    """Ask the disk for a row of an array (N, ...) of map_array, without waiting for it."""
    size = array.nbytes // len(array)
    start = len(array.base) - array.nbytes + row * size
    page = start - start % mmap.PAGESIZE
    array.base.madvise(mmap.MADV_WILLNEED, page, start + size - page)


def checksum(path):
    """The CRC-32 of an .npy file's numbers, zlib.crc32(np.load(path)), in constant memory.

    The header needs none: map_array compares all of it. Raises UserError.
    """
    crc = 0
    try:
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            while chunk := file.read(2**20):
                crc = zlib.crc32(chunk, crc)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read all of {path} ({error!s:.200}): check the disk, or remove "
                        f"the file and repeat the encode_imagenet.py command") from error
    return crc


def sealed(info):
    """The content of dataset.json with the checksum of that content beside those of the shards."""
    sums = {name: crc for name, crc in info["crc32"].items() if name != "dataset.json"}
    text = json.dumps({**info, "crc32": sums}, sort_keys=True)
    return {**info, "crc32": {**sums, "dataset.json": zlib.crc32(text.encode())}}


def read_dataset_json(folder):
    """dataset.json of a folder of shards. Raises UserError if it is missing or damaged.

    What it says of a shard is compared with that shard's headers when they are opened.
    """
    path = Path(folder) / "dataset.json"
    if not path.exists():
        state, remedy = "without dataset.json", "encode the images or leave out --encoded-data"
        if path.with_name(UNFINISHED).exists():
            state, remedy = "whose encoding was cut short", "repeat the encode_imagenet.py command"
        raise UserError(f"--data-path must be a folder that encode_imagenet.py has finished for "
                        f"--encoded-data, got {folder} {state}; {remedy}")
    try:
        info = json.loads(path.read_text())
        if (info["format_version"], info["crop"]) != (FORMAT_VERSION, CROP):
            raise ValueError("it is of another version")
        if sealed(info) != info:
            raise ValueError("it differs from its checksum")
    except Exception as error:  # of the file, of JSON, or for whatever JSON holds instead
        fault = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{path} must be as encode_imagenet.py writes it, got another ({fault}); "
                        f"repeat that command") from error
    return info


class LatentShards:
    """A data set for training (see dataset/loader.py): a folder written by encode_imagenet.py.

    Serves moments (B, 2, C, h, w) in the dtype on disk: float16 halves the transfer to a GPU,
    and labels (B,). Shards are memory-mapped: opening reads headers and labels, and processes share
    one page cache. Raises UserError for a folder that is missing, unfinished, damaged or foreign.
    """

    def __init__(self, path):
        info = read_dataset_json(path)
        self.folder, self.counts = Path(path), info["shards"]
        self.classes, self.image_size = info["classes"], info["image_size"]
        self.latent_shape = tuple(info["latent_shape"])
        self.vae, self.scale = info["vae"], info["scale"]
        self.flip, self.dtype = info["flip"], info["dtype"]
        self.sums, self.note = info["crc32"], None
        row, labels = (2, *self.latent_shape), [np.empty(0, np.int64)]
        self.arrays = [], []  # moments, those of the mirror images
        for index, count in enumerate(self.counts):
            paths = ShardFiles(path, index)
            self.arrays[0].append(map_array(paths.moments, self.dtype, (count, *row)))
            if self.flip:
                self.arrays[1].append(map_array(paths.flip, self.dtype, (count, *row)))
            labels.append(self._read_labels(paths.labels, count))
        self.labels = torch.from_numpy(np.concatenate(labels))  # (N,) int64
        self.starts = np.cumsum([0, *self.counts])[:-1]
        self.cold = 0  # batches that are still to be prefetched

    def _read_labels(self, path, count):
        labels = map_array(path, "int64", (count,))
        if count and not 0 <= labels.min() <= labels.max() < len(self.classes):
            raise UserError(f"{path} must hold labels below {len(self.classes)}, got "
                            f"{labels.min()} to {labels.max()}; encode again")
        return labels

    def __len__(self):
        return len(self.labels)

    def batches(self, sampler, workers):
        """Yields moments (B, 2, C, h, w) and labels (B,) for each (rows, mirrored)."""
        if not workers:
            return map(self.read, sampler)
        # Threads: passing latents between processes costs ten times as much as reading them
        return map_ahead(self.read, sampler, threads=workers, depth=2 * workers)

    def read(self, batch):
        """The moments (B, 2, C, h, w) and labels (B,) of (rows, mirrored).

        On a cold disk all rows are prefetched before the first is copied, which is 3 to 7 times as
        fast. From memory a prefetch costs as much as the copy, so it is made only for some batches
        after one that waited for the disk.
        """
        rows, mirrored = (part.numpy() for part in batch)
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        places = [(self.arrays[mirror][shard], row) for mirror, shard, row in zip(
            mirrored.tolist(), shards.tolist(), (rows - self.starts[shards]).tolist())]
        if self.cold:
            for array, row in places:
                prefetch_row(array, row)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt  # pages that were on disk
        moments = torch.empty(len(rows), 2, *self.latent_shape, dtype=DTYPES[self.dtype])
        target = moments.numpy()  # NumPy copies a row in a tenth of torch's time
        for i, (array, row) in enumerate(places):
            target[i] = array[row]
        waited = resource.getrusage(resource.RUSAGE_SELF).ru_majflt > faults
        self.cold = 64 if waited else max(0, self.cold - 1)
        return moments, self.labels[batch[0]]

    def verify(self):
        """Compare labels and, of up to VERIFIED bytes, latents with the checksums of dataset.json.

        Returns a line that says what was not compared, else None. Raises UserError.
        """
        remedy = "repeat the encode_imagenet.py command"
        size = sum(array.nbytes for arrays in self.arrays for array in arrays)
        for index in range(len(self.counts)):
            files = ShardFiles(self.folder, index)
            for path in files.arrays(self.flip) if size <= VERIFIED else [files.labels]:
                if checksum(path) != self.sums.get(path.name):
                    raise UserError(f"{path} is damaged: {remedy}, which encodes that shard again")
        if size > VERIFIED:
            return (f"of {self.folder} the labels were compared with their checksums, "
                    f"{size / 1e9:.0f} GB of latents were not: {remedy} to do so")
        return None

    def check(self, *, codec, image_size, flip):
        """Raise UserError unless the shards suit --vae (codec, or None), --image-size, --flip."""
        if image_size != self.image_size:
            raise UserError(f"--image-size must be that of the latents in {self.folder}, "
                            f"{self.image_size}, got {image_size}; give --image-size "
                            f"{self.image_size} or encode again")
        if codec and (codec.scale, codec.latent_shape(image_size)) != (self.scale,
                                                                       self.latent_shape):
            raise UserError(f"--vae must be the one that encoded {self.folder}, {self.vae} with "
                            f"scale {self.scale} and latents {self.latent_shape}, got "
                            f"{codec.name} with {codec.scale} and "
                            f"{codec.latent_shape(image_size)}; give --vae {self.vae}")
        if flip and not self.flip:
            raise UserError(f"--flip must come with latents of mirror images, got {self.folder} "
                            f"without; leave it out or encode with --flip")


class ArrayWriter:
    """Writes an .npy file batch by batch, as a shard may be larger than memory.

    Plain writes and no memory map: where the disk is full a map kills the process without a
    message. ``crc32`` is that of the numbers so far.
    """

    def __init__(self, path, row_shape, dtype):
        self.row_shape, self.dtype = row_shape, np.dtype(dtype)
        self.file, self.rows, self.crc32 = open(path, "wb"), 0, 0
        self._write_header()

    def append(self, rows):
        """Add rows, a contiguous array (n, *row_shape)."""
        assert rows.shape[1:] == self.row_shape and rows.dtype == self.dtype
        self.file.write(rows.data)
        self.crc32 = zlib.crc32(rows.data, self.crc32)
        self.rows += len(rows)

    def _write_header(self):
        np.lib.format.write_array_header_1_0(self.file, {
            "shape": (self.rows, *self.row_shape), "fortran_order": False,
            "descr": np.lib.format.dtype_to_descr(self.dtype)})

    def close(self):
        """Write the number of rows into the header, for which NumPy pads it, and close."""
        with self.file:
            self.file.seek(0)
            self._write_header()


def write_shard(files, batches, *, latent_shape, dtype, flip):
    """Write one shard's files. Each appears whole. The moments come last and mark the shard as
    complete.

    batches: of (labels (n,) int64, moments (n, 2, C, h, w), the same of the mirror images or
    None, names of skipped images), tensors of dtype on the CPU. Raises UserError if the disk is
    full.
    """
    labels, skipped = [], []
    with contextlib.ExitStack() as stack:  # left in reverse order: closed, flushed, renamed
        def create(path):
            array = ArrayWriter(stack.enter_context(atomic_file(path)), (2, *latent_shape), dtype)
            return stack.enter_context(contextlib.closing(array))

        arrays = {path: create(path) for path in [files.moments, *[files.flip][:flip]]}
        for batch_labels, *moments, names in batches:
            labels.append(batch_labels.numpy())
            for array, rows in zip(arrays.values(), moments):
                array.append(rows.numpy())
            skipped += names
        labels = np.concatenate(labels)
        with atomic_file(files.labels) as path, open(path, "wb") as file:
            np.save(file, labels)
        if skipped:
            write_json(files.skipped, skipped)
        # Computed from the data in memory: reading it back shows what the disk has damaged
        sums = {path.name: array.crc32 for path, array in arrays.items()}
        write_json(files.sums, {files.labels.name: zlib.crc32(labels), **sums})

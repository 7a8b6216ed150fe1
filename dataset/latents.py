"""Latents on disk: a folder that encode_imagenet.py writes and LatentShards serves.

    dataset.json             what the shards hold, how they were made, and the CRC-32 of each file's
                             numbers and of itself
    shard-00000.npy ...      (n, 2, C, h, w): mean and std of every image's posterior, unscaled
    shard-00000.labels.npy   (n,) int64
    shard-00000.flip.npy     as shard-00000.npy, of the mirror images; where dataset.json says flip

A few hundred large files, memory-mapped: to serve an image is to copy its numbers once.
"""

import contextlib
import json
import math
import mmap
import os
import resource
import zlib
from pathlib import Path

import numpy as np
import torch

from engine.files import atomic_file, write_json
from engine.options import UserError

FORMAT_VERSION = 1
CROP = "adm-center"
DTYPES = {"float16": torch.float16, "float32": torch.float32}
UNFINISHED = "encoding.json"  # stands in for dataset.json until the last shard is written
# Bytes of latents up to which a start of training compares them: 2 s of a cold disk of 2 GB/s
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
    """A .npy file as a read-only array whose ``base`` is its memory map.

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
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise UserError(f"{expected}, got no such file; {remedy}") from error
    except OSError as error:
        raise UserError(f"{expected}, got {error.strerror}; if too many files are open, raise "
                        f"the limit (ulimit -n), else check the disk") from error
    except Exception as error:  # the parser lets errors of many kinds through
        raise UserError(f"{expected}, got a file that is no such array ({error}); {remedy}"
                        ) from error
    if header != (tuple(shape), False, np.dtype(dtype)):
        raise UserError(f"{expected}, got {' x '.join(map(str, header[0]))} of {header[2]}; "
                        f"it belongs to another data set: {remedy}")
    if size != start + math.prod(shape) * np.dtype(dtype).itemsize:
        raise UserError(f"{expected}, got a file of {size} bytes, cut short or too long; {remedy}")
    mapping.madvise(mmap.MADV_RANDOM)  # else a touched page reads up to megabytes around it
    return np.ndarray(shape, dtype, buffer=mapping, offset=start)


def checksum(path):
    """The CRC-32 of an .npy file's numbers: zlib.crc32(np.load(path)), in constant memory.

    Raises UserError. The header needs none: map_array compares all of it.
    """
    crc, buffer = 0, memoryview(bytearray(2**20))
    try:
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            while count := file.readinto(buffer):
                crc = zlib.crc32(buffer[:count], crc)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} must be readable to its end, got {error!s:.200}; check the disk, "
                        f"or remove the file and repeat the encode_imagenet.py command") from error
    return crc


def sealed(info):
    """dataset.json's content with a checksum of its own among those of the shards."""
    sums = {name: crc for name, crc in info["crc32"].items() if name != "dataset.json"}
    text = json.dumps({**info, "crc32": sums}, sort_keys=True)
    return {**info, "crc32": {**sums, "dataset.json": zlib.crc32(text.encode())}}


def read_ahead(array, row):
    """Ask the disk for a row of a mapped array without waiting for it."""
    size = array.nbytes // len(array)
    start = len(array.base) - array.nbytes + row * size
    page = start - start % mmap.PAGESIZE
    array.base.madvise(mmap.MADV_WILLNEED, page, start + size - page)


def read_dataset_json(folder):
    """dataset.json of a folder of shards, its fields checked. Raises UserError."""
    path = Path(folder) / "dataset.json"
    if not path.exists():
        state, remedy = "without dataset.json", "encode the images or leave out --encoded-data"
        if path.with_name(UNFINISHED).exists():
            state, remedy = "whose encoding was cut short", "repeat the encode_imagenet.py command"
        raise UserError(f"--data-path must be a folder that encode_imagenet.py has finished for "
                        f"--encoded-data, got {folder} {state}; {remedy}")
    try:
        info = json.loads(path.read_text())
        shape, classes, counts = info["latent_shape"], info["classes"], info["shards"]
        for name, ok in {
            "format_version": info["format_version"] == FORMAT_VERSION,
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
        # Those of earlier versions have no checksums
        if "crc32" in info and sealed(info) != info:
            raise ValueError("the checksum is another's: it is damaged or was changed")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        fault = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{path} must be as encode_imagenet.py writes it, got one where {fault}; "
                        f"encode again") from error
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
        self.sums, self.note = info.get("crc32"), None
        row = (2, *self.latent_shape)
        moments, mirrors, labels = [], [], []
        for index, count in enumerate(info["shards"]):
            files = ShardFiles(path, index)
            moments.append(map_array(files.moments, self.dtype, (count, *row)))
            if self.flip:
                mirrors.append(map_array(files.flip, self.dtype, (count, *row)))
            labels.append(self._read_labels(files.labels, count))
        self.labels = torch.from_numpy(np.concatenate(labels))  # (N,) int64
        self._shards, self._starts = (moments, mirrors), np.cumsum([0, *info["shards"]])[:-1]
        self._cold = 0  # batches to read ahead

    def _read_labels(self, path, count):
        labels = map_array(path, "int64", (count,))
        if count and not 0 <= labels.min() <= labels.max() < len(self.classes):
            raise UserError(f"{path} must hold labels below {len(self.classes)}, got "
                            f"{labels.min()} to {labels.max()}; encode again")
        return labels

    def verify(self):
        """Compare labels and, of up to VERIFIED bytes, latents with the checksums of dataset.json.

        Returns a line that says what was not compared, else None. Raises UserError.
        """
        remedy = "repeat the encode_imagenet.py command"
        if self.sums is None:
            return (f"{self.folder} was not compared with checksums, which earlier versions did "
                    f"not write: {remedy} to add them")
        size = sum(array.nbytes for arrays in self._shards for array in arrays)
        for index in range(len(self._starts)):
            files = ShardFiles(self.folder, index)
            for path in files.arrays(self.flip) if size <= VERIFIED else [files.labels]:
                if checksum(path) != self.sums.get(path.name):
                    raise UserError(f"{path} must be as it was written, got a damaged file; "
                                    f"{remedy}, which encodes that shard again")
        if size > VERIFIED:
            return (f"of {self.folder} the labels were compared with their checksums, "
                    f"{size / 1e9:.0f} GB of latents were not: {remedy} to do so")
        return None

    def __reduce__(self):
        """A process that is not forked opens the files itself."""
        return LatentShards, (self.folder,)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, batch):
        """(rows, mirrored), both (B,) -> moments (B, 2, C, h, w) and labels (B,).

        Rows that come from a cold disk are asked for together before the first is copied: one
        after the other they take 16 times as long. From memory the asking would cost as much as
        the copy, so it goes on for some batches after a page had to wait for the disk.
        """
        rows, mirrored = (part.numpy() for part in batch)
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        places = [(self._shards[mirror][shard], row) for mirror, shard, row in zip(
            mirrored.tolist(), shards.tolist(), (rows - self._starts[shards]).tolist())]
        if self._cold:
            for array, row in places:
                read_ahead(array, row)
        waited = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        moments = torch.empty(len(rows), 2, *self.latent_shape, dtype=DTYPES[self.dtype])
        target = moments.numpy()  # numpy copies a row in a tenth of torch's time
        for i, (array, row) in enumerate(places):
            target[i] = array[row]
        waited = resource.getrusage(resource.RUSAGE_SELF).ru_majflt - waited
        self._cold = 64 if waited else max(0, self._cold - 1)
        return moments, self.labels[batch[0]]

    def check(self, *, space, image_size, flip):
        """Raise UserError unless the shards suit --vae (space, or None), --image-size, --flip."""
        if image_size != self.image_size:
            raise UserError(f"--image-size must be that of the latents in {self.folder}, "
                            f"{self.image_size}, got {image_size}; give --image-size "
                            f"{self.image_size} or encode again")
        if space and (space.scale, space.latent_shape(image_size)) != (self.scale,
                                                                       self.latent_shape):
            raise UserError(f"--vae must be the one that encoded {self.folder}, {self.vae} with "
                            f"scale {self.scale} and latents {self.latent_shape}, got "
                            f"{space.name} with {space.scale} and "
                            f"{space.latent_shape(image_size)}; give --vae {self.vae}")
        if flip and not self.flip:
            raise UserError(f"--flip needs mirror images among the latents, got {self.folder} "
                            f"without; leave it out or encode with --flip")


class GrowingArray:
    """An .npy file that grows by batches of rows, so that no shard has to fit in memory.

    ``crc32`` is that of its numbers so far.
    """

    def __init__(self, path, row_shape, dtype):
        self.row_shape, self.dtype, self.crc32 = row_shape, np.dtype(dtype), 0
        self.rows, self.file = 0, open(path, "wb")
        self._write_header()
        self.start = self.file.tell()

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

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with self.file:
            self.file.seek(0)
            self._write_header()
            assert self.file.tell() == self.start  # numpy leaves room in it for a larger count


def write_shard(files, batches, *, latent_shape, dtype, flip):
    """Write one shard's files; each appears whole, the moments last: then it is complete.

    Their checksums are computed of what is written, not of what the disk made of it.

    batches: of (labels (n,) int64, moments (n, 2, C, h, w), the same of the mirror images or
    None, names of images left out), tensors of dtype on the CPU. Raises UserError where the disk
    is full.
    """
    labels, skipped = [], []
    with contextlib.ExitStack() as stack:  # left in reverse order: closed, flushed, renamed
        def create(path):
            temporary = stack.enter_context(atomic_file(path))
            return stack.enter_context(GrowingArray(temporary, (2, *latent_shape), dtype))
        moments_file = create(files.moments)
        mirror_file = create(files.flip) if flip else None
        for batch_labels, moments, mirror, names in batches:
            labels.append(batch_labels.numpy())
            moments_file.append(moments.numpy())
            if flip:
                mirror_file.append(mirror.numpy())
            skipped += names
        labels = np.concatenate(labels)
        with atomic_file(files.labels) as path, open(path, "wb") as file:
            np.save(file, labels)
        if skipped:
            write_json(files.skipped, skipped)
        sums = {files.labels.name: zlib.crc32(labels), files.moments.name: moments_file.crc32}
        if flip:
            sums[files.flip.name] = mirror_file.crc32
        write_json(files.sums, sums)

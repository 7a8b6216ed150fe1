"""Latents on disk: a folder that encode_imagenet.py writes and LatentShards serves.

    dataset.json             what the shards hold, how they were made, and checksums (CRC-32)
    shard-00000.npy ...      (n, 2, C, h, w): mean and std of every image's posterior, unscaled
    shard-00000.labels.npy   (n,) int64
    shard-00000.flip.npy     as shard-00000.npy, of the mirror images; where dataset.json says flip

While a folder is being encoded, encoding.json stands in for dataset.json, and shard-00000.json
holds the shard's checksums.
"""

import itertools
import json
import mmap
import zlib
from pathlib import Path

import numpy as np
import torch

from dataset.loader import map_ahead
from engine.errors import UserError
from engine.files import atomic_file, write_json

FORMAT = {"format_version": 1, "crop": "adm-center"}  # a part of dataset.json
# train.py compares latents with their checksums up to so many bytes: 2 s from a disk of 2 GB/s
VERIFIED = 4e9


class ShardFiles:
    """The paths of one shard's files."""

    def __init__(self, folder, index):
        stem = f"{Path(folder)}/shard-{index:05d}"
        self.labels, self.moments, self.flip, self.note = (
            Path(stem + end) for end in (".labels.npy", ".npy", ".flip.npy", ".json"))

    def arrays(self, flip):
        """The files that must be there, and of which dataset.json has a checksum."""
        return [self.labels, self.moments, self.flip][:2 + flip]


def map_array(path, dtype, shape):
    """An .npy file as a read-only array of any shape; its ``base`` is an np.memmap.

    Raises UserError unless the file exists, is complete, and has this dtype and shape.
    """
    try:
        array, size = np.load(path, mmap_mode="r", allow_pickle=False), path.stat().st_size
        if (array.shape, array.dtype, array.flags.c_contiguous, size) != (
                tuple(shape), dtype, True, array.offset + array.nbytes):
            raise ValueError(f"it has {array.shape} of {array.dtype} in {size} bytes")
    except Exception as error:  # NumPy lets errors of many kinds through
        raise UserError(f"{path} must hold {' x '.join(map(str, shape))} numbers of {dtype}, got "
                        f"another file ({error!s:.200}); repeat the encode_imagenet.py command, or "
                        f"raise the limit of open files (ulimit -n)") from error
    return np.asarray(array)  # rows of an np.memmap take longer


def prefetch_row(array, row):
    """Ask the disk for a row of an array (N, ...) of map_array, without waiting for it."""
    size = array.nbytes // len(array)
    start = array.base.offset + row * size
    page = start - start % mmap.PAGESIZE
    array.base.base.madvise(mmap.MADV_WILLNEED, page, start + size - page)


def is_intact(path, sums):
    """Whether an .npy file's numbers can be read and have the CRC-32 in sums, by file name. Headers
    are compared by map_array."""
    try:
        return zlib.crc32(np.load(path, allow_pickle=False)) == sums.get(path.name)
    except (OSError, ValueError):
        return False


def add_checksum(info):
    """The content of dataset.json with its own checksum."""
    text = json.dumps({key: info[key] for key in info if key != "checksum"}, sort_keys=True)
    return {**info, "checksum": zlib.crc32(text.encode())}


def read_dataset_json(folder):
    """dataset.json of a folder of shards. Raises UserError if it is missing or damaged."""
    path = Path(folder) / "dataset.json"
    if not path.exists():
        raise UserError(f"--data-path must be a folder that encode_imagenet.py has finished, got "
                        f"{folder} without dataset.json; repeat that command or leave out "
                        f"--encoded-data")
    try:
        info = json.loads(path.read_text())
        if info != {**add_checksum(info), **FORMAT}:
            raise ValueError("damaged or of another version")
    except Exception as error:  # of the file, of JSON, or for whatever JSON holds instead
        raise UserError(f"{path} must be as encode_imagenet.py writes it, got another ({error}); "
                        f"repeat that command") from error
    return info


class LatentShards:
    """A data set for training (see dataset/loader.py): a folder written by encode_imagenet.py.

    Serves moments (B, 2, C, h, w) in the dtype on disk and labels (B,). Files are memory-mapped:
    processes share one page cache. Raises UserError for missing, damaged or foreign files.
    """

    def __init__(self, path):
        info = read_dataset_json(path)
        self.folder, self.flip, self.dtype = Path(path), info["flip"], info["dtype"]
        self.classes, self.image_size = info["classes"], info["image_size"]
        self.latent_shape = tuple(info["latent_shape"])
        self.vae, self.scale, self.sums = info["vae"], info["scale"], info["crc32"]
        self.files = [ShardFiles(path, shard) for shard in range(len(info["shards"]))]
        self.arrays, labels = ([], []), []  # moments, those of the mirror images
        for files, count in zip(self.files, info["shards"]):
            labels.append(map_array(files.labels, "int64", (count,)))
            for arrays, file in zip(self.arrays, files.arrays(self.flip)[1:]):
                arrays.append(map_array(file, self.dtype, (count, 2, *self.latent_shape)))
        self.labels = torch.from_numpy(np.concatenate(labels))  # (N,) int64
        self.starts = np.cumsum([0, *info["shards"]])[:-1]

    def __len__(self):
        return len(self.labels)

    def batches(self, steps, workers):
        """Yields moments (B, 2, C, h, w) and labels (B,) for each (rows, mirrored)."""
        if not workers:
            return map(self.read, steps)
        # Threads: passing latents between processes costs ten times as much as reading them
        return map_ahead(self.read, steps, threads=workers, depth=2 * workers)

    def read(self, batch):
        """The moments (B, 2, C, h, w) and labels (B,) of (rows, mirrored)."""
        rows, mirrored = (part.numpy() for part in batch)
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        places = [(self.arrays[mirror][shard], row) for mirror, shard, row in zip(
            mirrored.tolist(), shards.tolist(), (rows - self.starts[shards]).tolist())]
        for array, row in places:  # 3 to 8 times as fast from a cold disk (benchmarks/loading.py)
            prefetch_row(array, row)
        moments = np.empty((len(rows), 2, *self.latent_shape), self.dtype)
        for i, (array, row) in enumerate(places):  # torch takes ten times as long for a row
            moments[i] = array[row]
        return torch.from_numpy(moments), self.labels[batch[0]]

    def verify(self):
        """Compare labels and, of up to VERIFIED bytes, latents with the checksums of dataset.json.

        Returns lines for the log: one if latents were not compared. Raises UserError.
        """
        size = sum(array.nbytes for arrays in self.arrays for array in arrays)
        for files in self.files:
            for path in files.arrays(self.flip) if size <= VERIFIED else [files.labels]:
                if not is_intact(path, self.sums):
                    raise UserError(f"{path} is damaged: repeat the encode_imagenet.py command, "
                                    f"which encodes that shard again")
        return [] if size <= VERIFIED else [
            f"{size / 1e9:.0f} GB of latents were not compared with their checksums: repeat the "
            f"encode_imagenet.py command to do so"]

    def check(self, *, codec, image_size, flip):
        """Raise UserError unless the shards suit --vae (codec, or None), --image-size, --flip."""
        if image_size != self.image_size:
            raise UserError(f"--image-size must be that of the latents in {self.folder}, "
                            f"{self.image_size}, got {image_size}; leave it out or encode again")
        shape = codec and codec.latent_shape(image_size)
        if codec and (codec.scale, shape) != (self.scale, self.latent_shape):
            raise UserError(f"--vae must be that of {self.folder}, {self.vae} with scale "
                            f"{self.scale}, got {codec.name} with {codec.scale}, {shape}; leave it "
                            f"out")
        if flip and not self.flip:
            raise UserError(f"--flip must come with latents of mirror images, got {self.folder} "
                            f"without; leave it out or encode with --flip")


def write_shard(files, batches):
    """Write one shard's files, each whole, and a note with the CRC-32 of their numbers and the
    names of skipped images, which dataset.json takes over. Raises UserError if the disk is full.

    batches: of (names of skipped images, labels (n,) int64, moments (n, 2, C, h, w) and, with
    --flip, those of the mirror images), tensors on the CPU, all in memory at once.
    """
    skipped, *parts = zip(*batches)
    arrays = {path: torch.cat(tensors).numpy() for path, tensors in zip(files.arrays(True), parts)}
    # First: files of two runs must not pass for a shard
    write_json(files.note, {
        "skipped": list(itertools.chain(*skipped)),
        "crc32": {path.name: zlib.crc32(array) for path, array in arrays.items()}})
    for path, array in arrays.items():
        with atomic_file(path) as temporary, open(temporary, "wb") as file:
            np.save(file, array)

"""Latents on disk: a folder that encode_imagenet.py writes and LatentShards serves.

    dataset.json             what the shards hold, how they were made, and the CRC-32 of each file's
                             numbers and of itself
    shard-00000.npy ...      (n, 2, C, h, w): mean and std of every image's posterior, unscaled
    shard-00000.labels.npy   (n,) int64
    shard-00000.flip.npy     as shard-00000.npy, of the mirror images; where dataset.json says flip

While a folder is being encoded, encoding.json stands in for dataset.json, and shard-00000.json
holds the shard's checksums. Files are memory-mapped: serving an image copies its numbers once.
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
        self.note = Path(f"{stem}.json")  # see write_shard

    def arrays(self, flip):
        """The files that must be there, and of which dataset.json has a checksum."""
        return [self.labels, self.moments, *[self.flip][:flip]]


def map_array(path, dtype, shape):
    """An .npy file as a read-only array of any shape; its ``base`` is an np.memmap.

    Raises UserError unless the file exists, is complete, and has this dtype and shape.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if (array.shape, array.dtype, array.flags.c_contiguous) != (tuple(shape), dtype, True):
            raise ValueError(f"it holds {array.shape} of {array.dtype}")
        if path.stat().st_size != array.offset + array.nbytes:
            raise ValueError("it is too long")
    except Exception as error:  # NumPy lets errors of many kinds through
        raise UserError(f"{path} must hold {' x '.join(map(str, shape))} numbers of {dtype}, got "
                        f"another file ({error!s:.200}); remove it and repeat the "
                        f"encode_imagenet.py command, or raise the limit of open files (ulimit -n) "
                        f"if there are too many") from error
    return np.asarray(array)  # rows of an np.memmap take longer


def prefetch_row(array, row):
    """Ask the disk for a row of an array (N, ...) of map_array, without waiting for it."""
    size = array.nbytes // len(array)
    start = array.base.offset + row * size
    page = start - start % mmap.PAGESIZE
    array.base.base.madvise(mmap.MADV_WILLNEED, page, start + size - page)


def checksum(path):
    """The CRC-32 of an .npy file's numbers; map_array compares the header. Raises UserError."""
    try:
        return zlib.crc32(np.load(path, allow_pickle=False))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read all of {path} ({error!s:.200}): check the disk, or remove "
                        f"the file and repeat the encode_imagenet.py command") from error


def add_checksum(info):
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
        if add_checksum(info) != info:
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
        self.arrays, labels = ([], []), []  # moments, those of the mirror images
        for index, count in enumerate(self.counts):
            files, shape = ShardFiles(path, index), (count, 2, *self.latent_shape)
            for arrays, file in zip(self.arrays, [files.moments, *[files.flip][:self.flip]]):
                arrays.append(map_array(file, self.dtype, shape))
            labels.append(map_array(files.labels, "int64", (count,)))
            if count and not 0 <= labels[-1].min() <= labels[-1].max() < len(self.classes):
                raise UserError(f"{files.labels} must hold labels below {len(self.classes)}, got "
                                f"others; repeat the encode_imagenet.py command")
        self.labels = torch.from_numpy(np.concatenate(labels))  # (N,) int64
        self.starts = np.cumsum([0, *self.counts])[:-1]

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

        All rows are prefetched before the first is copied. From a cold disk that is 3 to 8 times
        as fast; from memory it takes 1.2 to 1.8 times as long (benchmarks/loading.py).
        """
        rows, mirrored = (part.numpy() for part in batch)
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        places = [(self.arrays[mirror][shard], row) for mirror, shard, row in zip(
            mirrored.tolist(), shards.tolist(), (rows - self.starts[shards]).tolist())]
        for array, row in places:
            prefetch_row(array, row)
        moments = torch.empty(len(rows), 2, *self.latent_shape, dtype=DTYPES[self.dtype])
        target = moments.numpy()  # NumPy copies a row in a tenth of torch's time
        for i, (array, row) in enumerate(places):
            target[i] = array[row]
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
        if codec and (codec.scale, codec.latent_shape(image_size)) != (
                self.scale, self.latent_shape):
            raise UserError(f"--vae must be the one that encoded {self.folder}, {self.vae} with "
                            f"scale {self.scale} and latents {self.latent_shape}, got "
                            f"{codec.name} with {codec.scale} and "
                            f"{codec.latent_shape(image_size)}; give --vae {self.vae}")
        if flip and not self.flip:
            raise UserError(f"--flip must come with latents of mirror images, got {self.folder} "
                            f"without; leave it out or encode with --flip")


def write_shard(files, batches):
    """Write one shard's files, each whole. The moments come last and mark the shard as complete.

    batches: of (labels (n,) int64, moments (n, 2, C, h, w), the same of the mirror images or None,
    names of skipped images), tensors on the CPU, all in memory at once. The note holds these names
    and the CRC-32 of the numbers; dataset.json takes them over. Raises UserError if the disk is
    full.
    """
    labels, moments, mirrors, skipped = zip(*batches)
    parts = {files.labels: labels, files.flip: mirrors, files.moments: moments}
    arrays = {path: torch.cat(tensors).numpy() for path, tensors in parts.items()
              if tensors[0] is not None}
    # First, so that files of two runs do not pass for a shard; of the data in memory, so that what
    # the disk damages is noticed
    write_json(files.note, {
        "skipped": list(itertools.chain(*skipped)),
        "crc32": {path.name: zlib.crc32(array) for path, array in arrays.items()}})
    for path, array in arrays.items():
        with atomic_file(path) as temporary, open(temporary, "wb") as file:
            np.save(file, array)

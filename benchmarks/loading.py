"""Time the data: loading latents, reading JPEG files, start-up and encoding.

    python benchmarks/loading.py                                           # CPU, a few minutes
    python benchmarks/loading.py --encode-images 20000 --encode-size 256   # a GPU
    torchrun --standalone --nproc_per_node=2 benchmarks/loading.py --list-files 200000

Each part prints a line for our way and for the alternatives, measured in turn in one run: shards of
latents against one torch.load per image, and with and without prefetching; three ways to read
images in parallel; encode_imagenet.py against the bare VAE. The third command times only the
opening of an image folder. Latents and weights are random; images are real photographs.
"""

import itertools
import json
import mmap
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dataset.images import ImageFolder  # noqa: E402
from dataset.latents import (  # noqa: E402
    FORMAT,
    LatentShards,
    ShardFiles,
    add_checksum,
    prefetch_row,
    write_shard,
)
from dataset.loader import (  # noqa: E402
    BatchSampler,
    load_batches,
    map_ahead,
    read_images,
    stack_images,
)
from dataset.vae import load_codec  # noqa: E402
from engine.distributed import World, start_processes  # noqa: E402
from engine.errors import run_main  # noqa: E402
from engine.files import write_json  # noqa: E402
from engine.log import describe_environment  # noqa: E402
from engine.options import Parser, int_range  # noqa: E402

SHAPE = (4, 32, 32)  # latents of ImageNet at 256 px
IMAGENET = 1_281_167  # training images
CPU = torch.device("cpu")


def parse_args(argv=None):
    parser = Parser(__doc__.split("\n", 1)[0])
    parser.add_argument("--latents", type=int_range(1), default=8192,
                        help="latents on disk: 32 KiB each")
    parser.add_argument("--cold-latents", type=int_range(0), default=65536,
                        help="latents on disk for reading with and without prefetching, 4096 or "
                             "more; 0 = none")
    parser.add_argument("--batch-size", type=int_range(1), default=256, help="latents per batch")
    parser.add_argument("--num-workers", type=int_range(0), default=2,
                        help="processes or threads that load latents or read images")
    parser.add_argument("--repeats", type=int_range(1), default=5,
                        help="interleaved runs of each way")
    parser.add_argument("--encode-images", type=int_range(0), default=96,
                        help="images to encode; 0 = none")
    parser.add_argument("--encode-size", type=int_range(1), default=64, help="their side in pixels")
    parser.add_argument("--encode-batch", type=int_range(1), default=8,
                        help="images per forward of the VAE")
    parser.add_argument("--read-images", type=int_range(0), default=512,
                        help="JPEG files to decode to 256 px, 86 or more: fewer would be cached; "
                             "0 = none")
    parser.add_argument("--list-files", type=int_range(0), default=0,
                        help="time only the opening of an image folder of so many empty files in "
                             "1,000 class folders; 0 = off")
    return parser.parse_args(argv)


def main(args):
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, start_processes() as world:
        folder = Path(world.broadcast(folder))
        if world.main:
            print(*describe_environment(world), sep="\n")
        if args.list_files:
            compare_listing(args, folder / "files", world)
            return
        compare_loaders(args, folder)
        if args.cold_latents:
            compare_prefetching(args, folder / "cold")
        if args.read_images:
            compare_readers(args, folder / "read")
        time_start_up(args, folder)
        if args.encode_images:
            compare_encoding(args, folder, world)


# ---- loading ---------------------------------------------------------------------------------


class FilePerImage:
    """Moments as other implementations store them: one torch.save per image."""

    def __init__(self, folder, count):
        folder.mkdir()
        self.paths = [folder / f"{row:08d}.pt" for row in range(count)]
        for row, path in enumerate(self.paths):
            torch.save({"image": torch.randn(8, 32, 32), "label": row % 1000}, path)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, batch):
        items = [torch.load(self.paths[row], weights_only=True) for row in batch[0].tolist()]
        return (torch.stack([item["image"] for item in items]),
                torch.tensor([item["label"] for item in items]))


def write_shards(folder, count):
    """Write a data set of random latents in the format of encode_imagenet.py."""
    folder.mkdir()
    counts, sums = [min(8192, count - first) for first in range(0, count, 8192)], {}
    for index, size in enumerate(counts):
        batch = [], torch.arange(size) % 1000, torch.randn(size, 2, *SHAPE).half()
        files = ShardFiles(folder, index)
        write_shard(files, [batch])
        sums |= json.loads(files.note.read_text())["crc32"]
    write_description(folder, counts, sums)


def write_description(folder, counts, sums):
    """Write dataset.json for shards of so many latents, with the checksums of their files."""
    write_json(folder / "dataset.json", add_checksum({
        **FORMAT, "image_size": 256, "latent_shape": SHAPE, "vae": "none", "scale": 0.18215,
        "dtype": "float16", "flip": False, "classes": [str(i) for i in range(1000)],
        "count": sum(counts), "shards": counts, "crc32": sums}))


def rate(dataset, args, workers, steps, seed):
    """Latents per second: float32 batches in the shuffled order of training."""
    world = World(0, 1, CPU, "fp32")
    order = BatchSampler(len(dataset), args.batch_size, seed=seed, flip=False,
                         world=world).steps(0, steps + 1)
    batches = (load_batches(dataset, order, workers=workers, device=CPU)
               if isinstance(dataset, LatentShards) else
               iter(DataLoader(dataset, sampler=order, batch_size=None, num_workers=workers,
                               prefetch_factor=4 if workers else None)))
    batch = next(batches)[0].float()  # from now on the workers run
    start = time.perf_counter()
    for moments, _ in batches:
        batch.copy_(moments.view_as(batch))
    return steps * args.batch_size / (time.perf_counter() - start)


def compare_loaders(args, folder):
    """Print latents per second of shards and of one file per image, without and with workers."""
    torch.set_num_threads(1)  # neither computes in parallel: more threads would only wait
    files = FilePerImage(folder / "files", args.latents)
    write_shards(folder / "shards", args.latents)
    shards = LatentShards(folder / "shards")
    steps = args.latents // args.batch_size
    for workers in (0, args.num_workers):
        rates = []
        for repeat in range(args.repeats + 1):
            rates.append((rate(files, args, workers, max(4, steps // 8), repeat),
                          rate(shards, args, workers, 4 * steps, repeat)))
        ours = statistics.median(new for _, new in rates[1:])  # the first run warms the cache
        theirs = statistics.median(old for old, _ in rates[1:])
        ratio = statistics.median(new / old for old, new in rates[1:])
        print(f"loading, {workers} workers: {ours:,.0f} latents/s from shards, {theirs:,.0f}/s by "
              f"one torch.load each, ratio {ratio:.0f}")


def drop_cache(folder):
    """Remove the files of a folder from the page cache."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare_prefetching(args, folder):
    """Print latents per second of shards with and without prefetching, from disk and from memory.

    Without also means without the system's read-ahead, which reads megabytes for a row: it would
    soon have all of a set as small as this one in memory, and of ImageNet mostly what nobody asks
    for.
    """
    write_shards(folder, args.cold_latents)
    steps = min(24, args.cold_latents // args.batch_size - 1)
    for workers, place in itertools.product((0, args.num_workers), ("disk", "memory")):
        rates = []
        for repeat in range(args.repeats):
            for prefetch in (prefetch_row, lambda array, row: None):
                if place == "disk":
                    drop_cache(folder)
                shards = LatentShards(folder)
                if prefetch != prefetch_row:
                    [array.base.base.madvise(mmap.MADV_RANDOM) for array in shards.arrays[0]]
                with mock.patch("dataset.latents.prefetch_row", prefetch):
                    rates.append(rate(shards, args, workers, steps, repeat))
                del shards  # what is mapped stays in memory
        ours, theirs = (statistics.median(rates[first::2]) for first in (0, 1))
        print(f"from {place}, {workers} workers: {ours:,.0f} latents/s with prefetching, "
              f"{theirs:,.0f}/s without, ratio {ours / theirs:.2f}")


def time_start_up(args, folder):
    """Print the time from opening a data set of ImageNet's length to a batch of a late step.

    Its files are sparse: they have ImageNet's sizes and take no disk.
    """
    folder = folder / "imagenet"
    folder.mkdir()
    counts = [min(8192, IMAGENET - first) for first in range(0, IMAGENET, 8192)]
    for index, count in enumerate(counts):
        files = ShardFiles(folder, index)
        for path, dtype, shape in ((files.moments, "float16", (count, 2, *SHAPE)),
                                   (files.labels, "int64", (count,))):
            np.lib.format.open_memmap(path, "w+", dtype, shape)
    write_description(folder, counts, {})
    start = time.perf_counter()
    shards = LatentShards(folder)
    opened = time.perf_counter()
    order = BatchSampler(len(shards), args.batch_size, seed=0, flip=False,
                         world=World(0, 1, CPU, "fp32")).steps(123_456, 123_460)
    next(load_batches(shards, order, workers=args.num_workers, device=CPU))
    end = time.perf_counter()
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"start-up at {len(shards):,} latents: {end - start:.2f} s to the batch of step 123456, "
          f"{opened - start:.2f} s of it to open; {len(list(folder.iterdir()))} files, "
          f"{size / 1e9:.1f} GB")


# ---- raw images ------------------------------------------------------------------------------


def compare_listing(args, folder, world):
    """Print the time to open an image folder if every process lists it, and if only rank 0 does."""
    for row in range(args.list_files if world.main else 0):
        path = folder / f"n{row % 1000:08d}" / f"n{row % 1000:08d}_{row // 1000}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    seconds = {"every process": [], "rank 0": []}
    for _ in range(args.repeats + 1):
        for name, lister in (("every process", None), ("rank 0", world)):
            world.barrier()
            start, busy = time.perf_counter(), time.process_time()
            ImageFolder(folder, 256, lister)
            busy = world.total(torch.tensor(time.process_time() - busy))
            seconds[name].append((time.perf_counter() - start, float(busy)))
    for name, pairs in seconds.items():
        if world.main:
            wall, busy = (statistics.median(values) for values in zip(*pairs[1:]))
            print(f"{args.list_files:,} files listed by {name}: {wall:.2f} s, {busy:.2f} s of "
                  f"CPU time")


def read_by_pipe(images, batches, workers):
    items = [[(row, False) for row in batch] for batch in batches]
    count = sum(len(stack_images(results)) for _, results in
                read_images(images.read, items, workers=workers))
    for child in multiprocessing.active_children():
        child.join()  # their processor time counts from then on
    return count


class Stacked(torch.utils.data.Dataset):
    """Whole batches as tensors, for PyTorch's DataLoader."""

    def __init__(self, images):
        self.images = images

    def __getitem__(self, batch):
        return torch.stack([self.images.read((row, False)) for row in batch])


def read_by_shared_memory(images, batches, workers):
    """Whole batches as tensors, as PyTorch's DataLoader hands them over."""
    loader = DataLoader(Stacked(images), sampler=batches, batch_size=None, num_workers=workers,
                        prefetch_factor=4)
    return sum(map(len, loader))


def read_by_threads(images, batches, workers):
    return sum(map(len, map_ahead(Stacked(images).__getitem__, batches, threads=workers,
                                  depth=4 * workers)))


def compare_readers(args, folder):
    """Print images per second and CPU time per image of each way to read JPEG files."""
    images, ways = save_images(folder, args.read_images, 256), (
        read_by_pipe, read_by_shared_memory, read_by_threads)
    batches = [range(i, min(i + 32, len(images))) for i in range(0, len(images), 32)]
    results = {way: [] for way in ways}
    for _ in range(args.repeats + 1):
        for way in ways:
            start, busy = time.perf_counter(), sum(os.times()[:4])
            way(images, batches, args.num_workers)
            results[way].append((len(images) / (time.perf_counter() - start),
                                 (sum(os.times()[:4]) - busy) / len(images) * 1e3))
    for way, pairs in results.items():
        rate, busy = (statistics.median(values) for values in zip(*pairs[1:]))
        print(f"{way.__name__}, {args.num_workers} workers: {rate:.0f} images/s, {busy:.2f} ms of "
              f"CPU time per image")


# ---- encoding --------------------------------------------------------------------------------


def stable_diffusion_vae():
    """An AutoencoderKL of Stable Diffusion's architecture, with random weights."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2,
                         latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 4,
                         up_block_types=("UpDecoderBlock2D",) * 4)


def save_images(folder, count, size):
    """Write JPEG files of 500 x 375; returns them as an ImageFolder cropped to size."""
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    (folder / "photos").mkdir(parents=True)
    for i in range(count):
        box = (i % 140, i % 50, i % 140 + 500, i % 50 + 375)
        photos[i % 2].crop(box).save(folder / "photos" / f"{i:06d}.jpg")
    return ImageFolder(folder, size)


def bare_rate(codec, images, args, device):
    """Images a second of the VAE on batches that wait in memory, moments back on the CPU."""
    count = min(len(images), 8 * args.encode_batch)
    batches = [Stacked(images)[range(first, min(first + args.encode_batch, count))]
               for first in range(0, count, args.encode_batch)]
    codec.encode(batches[0].to(device)).cpu()  # warm
    start, done = time.perf_counter(), 0
    for batch in itertools.islice(itertools.cycle(batches), len(images) // args.encode_batch):
        codec.encode(batch.to(device)).half().cpu()
        done += len(batch)
    return done / (time.perf_counter() - start)


def compare_encoding(args, folder, world):
    """Print images per second of encode_imagenet.py, and of the VAE alone before and after it."""
    stable_diffusion_vae().save_pretrained(folder / "vae")
    images = save_images(folder / "images", args.encode_images, args.encode_size)
    if world.device.type == "cpu":
        torch.set_num_threads(1)  # as in encode_imagenet.py
    codec = load_codec(str(folder / "vae"), world.device)
    bare = [bare_rate(codec, images, args, world.device)]
    done = subprocess.run(
        [sys.executable, ROOT / "encode_imagenet.py", "--data-path", folder / "images",
         "--out-path", folder / "encoded", "--vae", folder / "vae",
         "--image-size", str(args.encode_size), "--batch-size", str(args.encode_batch),
         "--num-workers", str(args.num_workers)],
        check=True, capture_output=True, text=True)
    encoding = float(re.search(r"([\d.]+) images/s$", done.stderr.strip()).group(1))
    bare.append(bare_rate(codec, images, args, world.device))
    count = json.loads((folder / "encoded" / "dataset.json").read_text())["count"]
    print(f"encoding {count} images of {args.encode_size} px: {encoding:.2f} images/s, bare VAE "
          f"{bare[0]:.2f} before and {bare[1]:.2f} after, ratio "
          f"{encoding / statistics.mean(bare):.2f}")


if __name__ == "__main__":
    run_main(main, parse_args)

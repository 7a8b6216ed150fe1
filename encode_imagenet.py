"""Encode a folder of images, once, into the latents that train.py --encoded-data reads.

    torchrun --standalone --nproc_per_node=8 encode_imagenet.py \\
        --data-path imagenet/train --out-path imagenet-latents

One process needs no torchrun. Killed at any moment, the same command goes on where it stopped and
ends with the same bytes, whatever the number of processes: the unit of work is one shard, whose
batches do not depend on who encodes it. It compares what is there with its checksums and encodes
damaged shards again. The format is described in dataset/latents.py.
"""

import functools
import itertools
import json
import math
import shutil
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of Ctrl-C during the imports

import numpy as np
import torch
from tqdm import tqdm

from dataset.images import ImageFolder
from dataset.latents import (
    CROP,
    DTYPES,
    FORMAT_VERSION,
    UNFINISHED,
    ShardFiles,
    checksum,
    map_array,
    sealed,
    write_shard,
)
from dataset.loader import map_ahead, prefetch, read_images, stack_images
from dataset.vae import load_vae
from engine.distributed import one_thread, run_main, start_processes
from engine.files import LOCK, check_folder, lock_folder, write_json
from engine.log import describe_environment
from engine.options import Parser, UserError, int_range

# what two runs into one folder must share, and the option that sets it
IDENTITY = {
    "format_version": "the version of the format", "files": "--data-path (its list of images)",
    "image_size": "--image-size", "encoder": "--vae", "dtype": "--dtype", "flip": "--flip",
    "precision": "--precision", "shard_size": "--shard-size", "crop": "the crop",
}


def parse_args(argv=None):
    parser = Parser("Encode a folder of images into shards of latents for training.")
    group = parser.add_argument_group("data")
    group.add_argument("--data-path", type=Path, required=True,
                       help="folder with one folder of images per class, such as ImageNet's train")
    group.add_argument("--out-path", type=Path, required=True,
                       help="folder for the shards: new, empty, or of the same command before")
    group.add_argument("--image-size", type=int_range(1), default=256,
                       help="side of the centre crop in pixels")
    group.add_argument("--flip", action="store_true",
                       help="store the latents of the mirror images too: twice the disk and time")
    group.add_argument("--skip-bad-images", action="store_true",
                       help="leave out unreadable images and list them in dataset.json; else they "
                            "are named and no dataset.json is written")
    group = parser.add_argument_group("encoding")
    group.add_argument("--vae", default="ema",
                       help="ema or mse (one encoder), a folder with an AutoencoderKL, or none: "
                            "pixels")
    group.add_argument("--dtype", choices=list(DTYPES), default="float16",
                       help="numbers on disk; float16 halves the disk and rounds by 2^-11")
    group.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32",
                       help="of the VAE on a GPU; tf32 and bf16 are faster and coarser")
    group = parser.add_argument_group("run")
    group.add_argument("--batch-size", type=int_range(1), default=32,
                       help="images per batch of a process; above 256 px they go through the VAE "
                            "in several passes")
    group.add_argument("--shard-size", type=int_range(1), default=8192,
                       help="images per shard: what a killed process loses at most")
    group.add_argument("--num-workers", type=int_range(0, 1024), default=8,
                       help="processes that read images, for each that encodes")
    args = parser.parse_args(argv)
    if args.data_path.resolve() in (args.out_path.resolve(), *args.out_path.resolve().parents):
        parser.error(f"--out-path must lie outside --data-path, where it would be taken for a "
                     f"class, got {args.out_path}; choose another folder")
    return args


def main(args):
    # A process without work waits for another's shard, which may take hours on a CPU
    with start_processes(args.precision, patience_h=7 * 24) as world, ExitStack() as stack:
        read_record(args.out_path)  # refuses another folder before anything heavy
        check_folder("--out-path", args.out_path)
        images = ImageFolder(args.data_path, args.image_size, world)
        try:
            space = load_vae(args.vae, world.device, precision=args.precision,
                             chunk=args.batch_size)
            config = configuration(args, images, space)
        except (ValueError, OSError) as error:
            raise UserError(error) from error
        examine(args, config)
        world.barrier()  # everyone has looked at the folder before anyone writes to it
        todo = open_folder(args, config, world, stack)
        start = time.monotonic()
        encode(args, images, space, config, todo, world)
        world.barrier()
        if world.main and todo:
            count, seconds = count_images(config, todo), time.monotonic() - start
            print(f"{count} images in {seconds:.1f} s, {count / seconds:.1f} images/s",
                  file=sys.stderr)
        finish(args, config, world)


# ---- the folder ------------------------------------------------------------------------------


def configuration(args, images, space):
    """What encoding.json, and later dataset.json, say of this encoding. Raises ValueError."""
    return {
        "format_version": FORMAT_VERSION, "crop": CROP,
        "image_size": args.image_size, "latent_shape": list(space.latent_shape(args.image_size)),
        "vae": args.vae, "scale": float(space.scale), "encoder": space.fingerprint(),
        "precision": args.precision, "dtype": args.dtype, "flip": args.flip,
        "shard_size": args.shard_size, "images": len(images), "files": images.fingerprint(),
        "classes": images.classes,
    }


def read_record(out):
    """What --out-path says of the encoding in it; None for a new or empty folder.

    Raises UserError for a folder that holds anything else.
    """
    if not out.exists():
        return None
    rule = f"--out-path must be new, empty or of the same command before, got {out}"
    if not out.is_dir():
        raise UserError(f"{rule}, which is a file; choose a folder")
    records = [out / name for name in ("dataset.json", UNFINISHED)
               if (out / name).exists()]
    if not records:
        foreign = next((path.name for path in out.iterdir()
                        if not is_temporary(path) and path.name != LOCK), None)
        if foreign is not None:
            raise UserError(f"{rule} with {foreign} in it; choose another folder")
        return None
    try:
        record = json.loads(records[0].read_text())
        for key in (*IDENTITY, "vae", "images"):
            record[key]
        if not isinstance(record.get("skipped", []), list):
            raise ValueError("skipped is no list")
        if not isinstance(record.get("crc32", {}), dict):
            raise ValueError("crc32 is no dict")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{rule} with a {records[0].name} that is not of this script; choose "
                        f"another folder") from error
    return record


def check_record(args, record, config):
    """Raise UserError if what --out-path holds was made in another way."""
    rule = f"--out-path must be new, empty or of the same command before, got {args.out_path}"
    differing = [f"{option} was {shown(record, key)} and is {shown(config, key)}"
                 for key, option in IDENTITY.items() if record[key] != config[key]]
    if differing:
        raise UserError(f"{rule} of another: {', '.join(differing)}; repeat the command that "
                        f"began it or choose another folder")
    if record.get("skipped") and not args.skip_bad_images:
        raise UserError(f"{rule}, finished with --skip-bad-images and {len(record['skipped'])} "
                        f"images left out; give that option again or choose another folder")


def shown(config, key):
    """A value as a message shows it: the name and not the hash, and no more than a line of it."""
    names = {"encoder": "vae", "files": "images"}
    value = f"{config[names[key]]} ({config[key]!s:.8})" if key in names else config[key]
    return f"{value!s:.200}"


def is_temporary(path):
    """Whether a file is one that atomic_file left behind when this script was killed."""
    return (path.name.startswith((".shard-", ".encoding.", ".dataset."))
            and path.name.endswith(".tmp"))


def rows_of(config, shard):
    """The rows of the image folder that a shard holds, but for unreadable ones."""
    first = shard * config["shard_size"]
    return range(first, min(first + config["shard_size"], config["images"]))


def shards_of(config):
    return range(math.ceil(config["images"] / config["shard_size"]))


def count_images(config, shards):
    return sum(len(rows_of(config, shard)) for shard in shards)


def read_beside(path, kind, of):
    """The list or dict (kind) of values (of) that was written beside a shard, if any, else an
    empty one. Raises UserError."""
    if not path.exists():
        return kind()
    try:
        found = json.loads(path.read_text())
        values = found.values() if isinstance(found, dict) else found
        if not isinstance(found, kind) or not all(isinstance(value, of) for value in values):
            raise ValueError(f"no {kind.__name__} of {of.__name__}")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} must be as this script writes it, got one that is not "
                        f"({error!s:.200}); remove that shard's files and repeat the command"
                        ) from error
    return found


def read_skipped(files):
    """The names of the images that are missing from a complete shard. Raises UserError."""
    return read_beside(files.skipped, list, str)


def read_sums(out, config):
    """The checksums by file name, as far as they are known. Raises UserError."""
    record = read_record(out) or {}
    sums = dict(record.get("crc32", {}))
    for shard in shards_of(config):
        sums |= read_beside(ShardFiles(out, shard).sums, dict, int)
    return sums


def pending(args, config):
    """The shards to encode: those not complete, and, unless bad images may be left out, those
    that lack some. Raises UserError for a complete shard that is damaged or foreign."""
    todo, row = [], (2, *config["latent_shape"])
    for shard in shards_of(config):
        files = ShardFiles(args.out_path, shard)
        arrays = [files.moments, files.flip][:1 + args.flip]
        whole = all(path.exists() for path in (*arrays, files.labels))
        if not whole or (files.skipped.exists() and not args.skip_bad_images):
            todo.append(shard)
            continue
        count = len(rows_of(config, shard)) - len(read_skipped(files))
        map_array(files.labels, "int64", (count,))
        for path in arrays:
            map_array(path, args.dtype, (count, *row))
    return todo


def describe_work(args, config, todo):
    """One line about the work and the disk it takes. Raises UserError if that is not free."""
    numbers = 2 * math.prod(config["latent_shape"]) * (1 + args.flip)
    size = numbers * np.dtype(args.dtype).itemsize + 8  # bytes an image, with its label
    need = count_images(config, todo) * size + 1e6  # dataset.json and headers
    out = args.out_path
    free = shutil.disk_usage(next(path for path in (out, *out.parents) if path.exists())).free
    if need > free:
        raise UserError(f"--out-path must have {need / 1e9:.1f} GB free, got {out} with "
                        f"{free / 1e9:.1f} GB; make room or choose another folder")
    shards = len(shards_of(config))
    return (f"{config['images']} images of {len(config['classes'])} classes in {shards} shards, "
            f"{shards - len(todo)} complete; {need / 1e9:.2f} GB to write, "
            f"{free / 1e9:.1f} GB free")


def examine(args, config):
    """(shards to encode, known checksums, a line about the work). Raises UserError for a folder
    that is not this command's."""
    record = read_record(args.out_path)
    if record:
        check_record(args, record, config)
    todo = pending(args, config)
    return todo, read_sums(args.out_path, config), describe_work(args, config, todo)


def open_folder(args, config, world, stack):
    """Hold the folder until the stack is left, and compare what is complete with its checksums;
    the shards to encode."""
    def hold():
        stack.enter_context(lock_folder("--out-path", args.out_path))
        return examine(args, config)  # again: another command may have been waited for

    todo, sums, plan = world.on_main(hold)
    if world.main:
        for line in (*describe_environment(world), plan):
            print(line, file=sys.stderr)
    damaged = find_damaged(args, config, todo, sums, world)
    todo = sorted({*todo, *(shard for shard, _ in damaged)})
    if world.main:
        for _, path in damaged:
            print(f"{path} is damaged: its shard is encoded again", file=sys.stderr)
        claim(args.out_path, config, todo)
    world.barrier()
    return todo


def find_damaged(args, config, todo, sums, world):
    """(shard, path) of each file of the complete shards that differs from its checksum. Each
    process reads its share of them."""
    complete = [shard for shard in shards_of(config) if shard not in todo]
    paths = [(shard, path) for shard in complete
             for path in ShardFiles(args.out_path, shard).arrays(args.flip)
             if path.name in sums]
    if not paths:
        return []
    found = []
    with world.progress(len(paths), desc="verify", unit="file") as bar:
        for shard, path in paths[world.rank::world.size]:
            if checksum(path) != sums[path.name]:
                found.append((shard, path))
            bar.update(min(world.size, len(paths) - bar.n))
    return list(itertools.chain(*world.gather(found)))


def claim(out, config, todo):
    """Rank 0 marks the folder as ours, and clears away what a killed run left half done."""
    if not (out / "dataset.json").exists():
        write_json(out / UNFINISHED, config)
    for path in filter(is_temporary, list(out.iterdir())):
        path.unlink()
    for shard in todo:  # incomplete first, so that no mixture of two runs can pass for a shard
        files = ShardFiles(out, shard)
        for path in (files.moments, files.flip, files.labels, files.skipped, files.sums):
            path.unlink(missing_ok=True)


def finish(args, config, world):
    """Write dataset.json, on rank 0. Raises UserError if images or shards are missing."""
    todo = pending(args, config)
    files = [ShardFiles(args.out_path, shard) for shard in shards_of(config)]
    skipped = [read_skipped(of_shard) for of_shard in files]
    names = list(itertools.chain(*skipped))
    if names and not args.skip_bad_images:
        if world.main:
            print("unreadable images:", *names, sep="\n  ", file=sys.stderr)
        raise UserError(f"--data-path must hold readable images, got {len(names)} of "
                        f"{config['images']} unreadable; repair them or add --skip-bad-images, "
                        f"then repeat the command: what is encoded stays")
    if todo:
        raise UserError(f"--out-path must keep its shards during a run, got {args.out_path} "
                        f"without shard {todo[0]}; repeat the command")
    if len(names) == config["images"]:
        raise UserError(f"--data-path must hold a readable image, got none in {args.data_path}; "
                        f"check the files")
    if world.main:
        counts = [len(rows_of(config, shard)) - len(skipped[shard]) for shard in range(len(files))]
        known = read_sums(args.out_path, config)  # of all, unless an earlier version wrote them
        sums = {path.name: known[path.name] if path.name in known else checksum(path)
                for of_shard in files for path in of_shard.arrays(args.flip)}
        write_json(args.out_path / "dataset.json", sealed({
            **config, "count": sum(counts), "shards": counts, "skipped": names, "crc32": sums}))
        for path in (args.out_path / UNFINISHED, *(of_shard.sums for of_shard in files)):
            path.unlink(missing_ok=True)
        print(args.out_path)


# ---- the work --------------------------------------------------------------------------------


def encode(args, images, space, config, todo, world):
    """Encode this process's part of the shards: reading, the VAE and writing overlap."""
    mine = todo[world.rank::world.size]
    parts = {shard: split(rows_of(config, shard), args.batch_size) for shard in mine}
    batches = list(itertools.chain(*parts.values()))
    found = read_images(images.image, batches, workers=min(args.num_workers, len(batches)))
    readable = prefetch(sort_out(images, *batch) for batch in found)
    left, own = count_images(config, todo), count_images(config, mine)
    with world.progress(config["images"], initial=config["images"] - left, desc="encode",
                        unit="image") as bar:
        work = functools.partial(encode_batch, args, space, config, world.device)
        stream = watched(map_ahead(work, readable, threads=1, depth=4), bar, left / max(1, own))
        for shard in mine:
            write_shard(
                ShardFiles(args.out_path, shard),
                itertools.islice(stream, len(parts[shard])),
                latent_shape=config["latent_shape"], dtype=args.dtype, flip=args.flip)


def split(rows, size):
    """A range in pieces of size; the last may be shorter."""
    return [rows[i:i + size] for i in range(0, len(rows), size)]


def sort_out(images, rows, found):
    """The readable ones of what was found at these rows, uint8 (n, 3, H, W), their labels (n,),
    and the (name, fault) of the others."""
    pixels, kept, faults = [], [], []
    for row, image in zip(rows, found):
        if isinstance(image, UserError):
            faults.append((images.name(row), str(image)))
        else:
            pixels.append(image)
            kept.append(row)
    pixels = stack_images(pixels) if kept else torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    return pixels, images.labels[kept], faults


def encode_batch(args, space, config, device, batch):
    """What sort_out returns -> labels, moments, those of the mirror images or None, faults."""
    pixels, labels, faults = batch
    try:
        with one_thread():
            pixels = pixels.to(device, non_blocking=True)
            moments = to_disk(args, space, config, pixels)
            mirror = to_disk(args, space, config, pixels.flip(3)) if args.flip else None
    except torch.OutOfMemoryError as error:
        raise UserError(f"--batch-size must fit in the GPU's memory, got {args.batch_size}; lower "
                        f"it and repeat the command") from error
    return labels, moments, mirror, faults


def to_disk(args, space, config, pixels):
    """uint8 (n, 3, H, W) -> moments (n, 2, C, h, w) of --dtype on the CPU. Raises UserError."""
    dtype = DTYPES[args.dtype]
    if not len(pixels):
        return torch.empty(0, 2, *config["latent_shape"], dtype=dtype)
    moments = space.encode(pixels).to(dtype)
    if not moments.isfinite().all():
        raise UserError(f"--dtype must hold the moments of --vae, got values beyond {args.dtype} "
                        f"or not finite; give --dtype float32 or another VAE")
    return moments.cpu()


def watched(batches, bar, scale):
    """What write_shard takes of each batch; faults go to the screen, the pace to the bar.

    scale: images that all processes encode for each of this one's.
    """
    first, done = bar.n, 0
    for labels, moments, mirror, faults in batches:
        for _, fault in faults:
            tqdm.write(fault, file=sys.stderr)
        done += len(labels) + len(faults)
        bar.update(first + round(done * scale) - bar.n)
        yield labels, moments, mirror, [name for name, _ in faults]


if __name__ == "__main__":
    run_main(main, parse_args)

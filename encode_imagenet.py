"""Encode a folder of images, once, as the latents that train.py --encoded-data reads.

    torchrun --standalone --nproc_per_node=8 encode_imagenet.py \\
        --data-path imagenet/train --out-path imagenet-latents

One process needs no torchrun. If interrupted, rerun the command: it continues, and ends with the
same bytes for any number of processes, because a shard's content does not depend on who encodes it.
Rerun on a finished folder, it compares every file with its checksum and encodes damaged shards
again. dataset/latents.py describes the format.
"""

import functools
import itertools
import json
import math
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of Ctrl-C during the imports

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
from dataset.vae import load_codec
from engine.checkpoint import differences
from engine.distributed import one_thread, start_processes
from engine.errors import UserError, naming, run_main
from engine.files import FolderLock, check_folder, list_folder, remove_temporary_files, write_json
from engine.log import describe_environment
from engine.options import Parser, int_range

# What two runs into one folder must share: files is the list of images, encoder the VAE's weights
IDENTITY = ("format_version", "files", "image_size", "encoder", "dtype", "flip", "precision",
            "shard_size", "crop")


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
                       help="skip unreadable images and list them in dataset.json; without it they "
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
                       help="images per shard, the most that a killed process loses")
    group.add_argument("--num-workers", type=int_range(0, 1024), default=8,
                       help="reading processes per process; 0 = none")
    args = parser.parse_args(argv)
    if args.data_path.resolve() in (args.out_path.resolve(), *args.out_path.resolve().parents):
        parser.error(f"--out-path must lie outside --data-path, where it would be taken for a "
                     f"class, got {args.out_path}; choose another folder")
    return args


def main(args):
    # A rank that is done waits for the others, which may take hours on a CPU
    with start_processes(args.precision, timeout_hours=7 * 24) as world, ExitStack() as stack:
        read_record(args.out_path)  # refuses a foreign folder before anything heavy
        with naming("--out-path"):
            check_folder(args.out_path)
        images = ImageFolder(args.data_path, args.image_size, world)
        space = load_codec(args.vae, world.device, precision=args.precision, chunk=args.batch_size)
        config = describe(args, images, space)
        todo = open_folder(args, config, world, stack)
        start = time.monotonic()
        encode(args, images, space, config, todo, world)
        world.barrier()
        if world.main and todo:
            count, seconds = count_images(config, todo), time.monotonic() - start
            print(f"{count} images in {seconds:.1f} s, {count / seconds:.1f} images/s",
                  file=sys.stderr)
        world.on_main(lambda: finish(args, config))
        if world.main:
            print(args.out_path)


# ---- the folder ------------------------------------------------------------------------------


def describe(args, images, space):
    """What encoding.json, and later dataset.json, say of this encoding. Raises UserError."""
    return {
        "format_version": FORMAT_VERSION, "crop": CROP,
        "image_size": args.image_size, "latent_shape": list(space.latent_shape(args.image_size)),
        "vae": args.vae, "scale": float(space.scale), "encoder": space.fingerprint(),
        "precision": args.precision, "dtype": args.dtype, "flip": args.flip,
        "shard_size": args.shard_size, "images": len(images), "files": images.fingerprint(),
        "classes": images.classes,
    }


def read_record(out):
    """The content of dataset.json, or of encoding.json, in --out-path; None if it is empty or new.

    Raises UserError for a folder that holds anything else.
    """
    rule = f"--out-path must be new, empty or of the same command before, got {out}"
    if not out.exists():
        return None
    if not out.is_dir():
        raise UserError(f"{rule}, which is a file; choose a folder")
    found = [path.name for path in list_folder(out)]
    name = next((name for name in ("dataset.json", UNFINISHED) if name in found), None)
    if not found:
        return None
    if name is None:
        raise UserError(f"{rule} with {found[0]} in it; choose another folder")
    try:
        record = json.loads((out / name).read_text())
        if not record.keys() >= set(IDENTITY):
            raise ValueError
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{rule} with a {name} that is not of this script; choose another folder"
                        ) from error
    return record


def check_record(args, record, config):
    """Raise UserError if what --out-path holds was made in another way."""
    rule = f"--out-path must be new, empty or of the same command before, got {args.out_path}"
    fault = differences({key: record[key] for key in IDENTITY},
                        {key: config[key] for key in IDENTITY})
    if fault:
        raise UserError(f"{rule} of another ({fault}); repeat the command that began it or choose "
                        f"another folder")
    if record.get("skipped") and not args.skip_bad_images:
        raise UserError(f"{rule}, finished with --skip-bad-images and {len(record['skipped'])} "
                        f"images left out; give that option again or choose another folder")


def rows_of(config, shard):
    """The rows of the image folder that a shard holds, unreadable ones included."""
    first = shard * config["shard_size"]
    return range(first, min(first + config["shard_size"], config["images"]))


def count_images(config, shards):
    return sum(len(rows_of(config, shard)) for shard in shards)


def all_files(args, config):
    """ShardFiles of every shard."""
    return [ShardFiles(args.out_path, shard)
            for shard in range(math.ceil(config["images"] / config["shard_size"]))]


def read_json(path, default):
    """What write_shard wrote beside a shard; default if there is no such file. Raises UserError."""
    try:
        found = json.loads(path.read_text())
        if type(found) is not type(default):
            raise ValueError(f"no {type(default).__name__}")
    except FileNotFoundError:
        return default
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--out-path: cannot read {path} ({error!s:.200}); remove the files of "
                        f"that shard and repeat the command") from error
    return found


def open_folder(args, config, world, stack):
    """Lock the folder until the stack is left. Returns the shards to encode: those with a missing
    or damaged file and, without --skip-bad-images, those that lack images. Raises UserError for
    another command's folder."""
    def lock():
        with naming("--out-path"):
            stack.enter_context(FolderLock(args.out_path))
        record = read_record(args.out_path) or {}
        if record:
            check_record(args, record, config)
        return pending(args, config), known_sums(args, config, record)

    todo, sums = world.on_main(lock)
    damaged = find_damaged(args, config, todo, sums, world)
    todo = sorted({*todo, *(shard for shard, _ in damaged)})
    world.on_main(lambda: claim(args, config, todo, damaged, world))
    return todo


def known_sums(args, config, record):
    """CRC-32 by file name: in dataset.json, or beside a shard that was written since."""
    sums = dict(record.get("crc32", {}))
    for files in all_files(args, config):
        sums |= read_json(files.sums, {})
    return sums


def pending(args, config):
    """The shards that are incomplete or, unless bad images are to be skipped, lack images."""
    return [shard for shard, files in enumerate(all_files(args, config))
            if not all(path.exists() for path in files.arrays(args.flip))
            or (read_json(files.skipped, []) and not args.skip_bad_images)]


def find_damaged(args, config, todo, sums, world):
    """(shard, path) of each damaged file of the complete shards. Each rank reads its share."""
    complete = [(shard, path) for shard, files in enumerate(all_files(args, config))
                if shard not in todo for path in files.arrays(args.flip)]
    if not complete:
        return []
    found = []
    with world.progress(len(complete), desc="verify", unit="file") as bar:
        for shard, path in complete[world.rank::world.size]:
            if is_damaged(args, config, shard, path, sums.get(path.name)):
                found.append((shard, path))
            bar.update(min(world.size, bar.total - bar.n))
    return list(itertools.chain(*world.gather(found)))


def is_damaged(args, config, shard, path, crc):
    """Whether a shard's file is not the array it must be, or differs from its CRC-32, if known."""
    files = ShardFiles(args.out_path, shard)
    count = len(rows_of(config, shard)) - len(read_json(files.skipped, []))
    dtype, shape = ("int64", (count,)) if path == files.labels else (
        args.dtype, (count, 2, *config["latent_shape"]))
    try:
        map_array(path, dtype, shape)
        return crc is not None and checksum(path) != crc
    except UserError:
        return True


def claim(args, config, todo, damaged, world):
    """Mark the folder as this command's, and remove what a killed run left half done."""
    out, files = args.out_path, all_files(args, config)
    print(*describe_environment(world), f"{config['images']} images of {len(config['classes'])} "
          f"classes in {len(files)} shards, {len(files) - len(todo)} complete", sep="\n",
          file=sys.stderr)
    for _, path in damaged:
        print(f"{path} is damaged: its shard is encoded again", file=sys.stderr)
    if not (out / "dataset.json").exists():
        write_json(out / UNFINISHED, config)
    remove_temporary_files(out)
    for shard in todo:  # else a shard could be a mixture of two runs
        for path in vars(files[shard]).values():
            path.unlink(missing_ok=True)


def finish(args, config):
    """Write dataset.json. Raises UserError if images are unreadable and may not be skipped."""
    files = all_files(args, config)
    skipped = [read_json(of_shard.skipped, []) for of_shard in files]
    names = list(itertools.chain(*skipped))
    if names and not args.skip_bad_images:
        print("unreadable images:", *names, sep="\n  ", file=sys.stderr)
        raise UserError(f"--data-path must hold readable images, got {len(names)} of "
                        f"{config['images']} unreadable; repair them or add --skip-bad-images, "
                        f"then repeat the command: what is encoded stays")
    if len(names) == config["images"]:
        raise UserError(f"--data-path must hold a readable image, got none in {args.data_path}; "
                        f"check the files")
    counts = [len(rows_of(config, shard)) - len(skipped[shard]) for shard in range(len(files))]
    sums = known_sums(args, config, read_record(args.out_path) or {})
    sums = {path.name: sums[path.name]
            for of_shard in files for path in of_shard.arrays(args.flip)}
    write_json(args.out_path / "dataset.json", sealed({
        **config, "count": sum(counts), "shards": counts, "skipped": names, "crc32": sums}))
    for path in (args.out_path / UNFINISHED, *(of_shard.sums for of_shard in files)):
        path.unlink(missing_ok=True)


# ---- the work --------------------------------------------------------------------------------


def encode(args, images, space, config, todo, world):
    """Encode this rank's share of the shards. Reading, the VAE and writing overlap."""
    mine = todo[world.rank::world.size]
    batches = {shard: split(rows_of(config, shard), args.batch_size) for shard in mine}
    items = [[(row, False) for row in rows] for rows in itertools.chain(*batches.values())]
    found = read_images(images.read, items, workers=min(args.num_workers, len(items)))
    readable = prefetch(sort_out(images, *batch) for batch in found)
    work = functools.partial(encode_batch, args, space, config, world.device)
    encoded = map_ahead(work, readable, threads=1, depth=4)
    total = config["images"]
    with world.progress(total, initial=total - count_images(config, todo), desc="encode",
                        unit="image") as bar:
        for shard in mine:
            of_shard = itertools.islice(encoded, len(batches[shard]))
            write_shard(ShardFiles(args.out_path, shard), report(of_shard, bar, world),
                        latent_shape=config["latent_shape"], dtype=args.dtype, flip=args.flip)


def split(rows, size):
    """A range in pieces of size; the last may be shorter."""
    return [rows[i:i + size] for i in range(0, len(rows), size)]


def sort_out(images, items, found):
    """The readable images of a batch, uint8 (n, 3, H, W), their labels (n,), and (name, error) of
    the others."""
    pixels, kept, faults = [], [], []
    for (row, _), image in zip(items, found):
        if isinstance(image, UserError):
            faults.append((images.name(row), str(image)))
        else:
            pixels.append(image)
            kept.append(row)
    pixels = stack_images(pixels) if kept else torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    return pixels, images.labels[kept], faults


def encode_batch(args, space, config, device, batch):
    """What sort_out returns -> (labels, moments, those of the mirror images or None, faults).

    labels (n,) int64; moments (n, 2, C, h, w) of --dtype, on the CPU; faults: (name, error) of each
    unreadable image. Raises UserError.
    """
    pixels, labels, faults = batch
    try:
        with one_thread():
            pixels = pixels.to(device, non_blocking=True)
            moments = encode_pixels(args, space, config, pixels)
            mirror = encode_pixels(args, space, config, pixels.flip(3)) if args.flip else None
    except torch.OutOfMemoryError as error:
        raise UserError("out of GPU memory: lower --batch-size and repeat the command") from error
    return labels, moments, mirror, faults


def encode_pixels(args, space, config, pixels):
    """uint8 (n, 3, H, W) -> moments (n, 2, C, h, w) of --dtype on the CPU. Raises UserError."""
    dtype = DTYPES[args.dtype]
    if not len(pixels):
        return torch.empty(0, 2, *config["latent_shape"], dtype=dtype)
    moments = space.encode(pixels).to(dtype)
    if not moments.isfinite().all():
        raise UserError(f"--dtype must hold the moments of --vae, got values beyond {args.dtype} "
                        f"or not finite; give --dtype float32 or another VAE")
    return moments.cpu()


def report(batches, bar, world):
    """Shows faults and progress on stderr; yields each batch of encode_batch as write_shard takes
    it: labels (n,), moments (n, 2, C, h, w), those of the mirror images, names of faults."""
    for labels, moments, mirror, faults in batches:
        for _, fault in faults:
            tqdm.write(fault, file=sys.stderr)
        bar.update(min(world.size * (len(labels) + len(faults)), bar.total - bar.n))
        yield labels, moments, mirror, [name for name, _ in faults]


if __name__ == "__main__":
    run_main(main, parse_args)

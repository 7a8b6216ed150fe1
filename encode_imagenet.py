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
import signal
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of Ctrl-C during the imports

import numpy as np
from tqdm import tqdm

from dataset.images import ImageFolder
from dataset.latents import (
    CROP,
    DTYPES,
    FORMAT_VERSION,
    UNFINISHED,
    ShardFiles,
    add_checksum,
    checksum,
    map_array,
    write_shard,
)
from dataset.loader import map_ahead, read_images, stack_images
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
# What reading a file of JSON, and parts of it, raises if it is missing or damaged
BAD_JSON = (OSError, ValueError, LookupError, TypeError, RecursionError)


def parse_args(argv=None):
    parser = Parser("Encode a folder of images into shards of latents for training.")
    add = parser.add_argument_group("data").add_argument
    add("--data-path", type=Path, required=True,
        help="folder with one folder of images per class, such as ImageNet's train")
    add("--out-path", type=Path, required=True,
        help="folder for the shards: new, empty, or of the same command before")
    add("--image-size", type=int_range(1), default=256, help="side of the centre crop in pixels")
    add("--flip", action="store_true",
        help="store the latents of the mirror images too: twice the disk and time")
    add("--skip-bad-images", action="store_true",
        help="skip unreadable images and list them in dataset.json; without it they are named and "
             "no dataset.json is written")
    add = parser.add_argument_group("encoding").add_argument
    add("--vae", default="ema",
        help="ema or mse (one encoder), a folder with an AutoencoderKL, or none: pixels")
    add("--dtype", choices=list(DTYPES), default="float16",
        help="numbers on disk; float16 halves the disk and rounds by 2^-11")
    add("--precision", choices=("fp32", "tf32", "bf16"), default="fp32",
        help="of the VAE on a GPU; tf32 and bf16 are faster and coarser")
    add = parser.add_argument_group("run").add_argument
    add("--batch-size", type=int_range(1), default=32,
        help="images per batch of a process; above 256 px they go through the VAE in several "
             "passes")
    add("--shard-size", type=int_range(1), default=8192,
        help="images per shard, the most that a killed process loses; it is held in memory: 8192 "
             "of 256 px take 0.3 GB, twice that with --flip")
    add("--num-workers", type=int_range(0, 1024), default=8,
        help="reading processes per process; 0 = none")
    args = parser.parse_args(argv)
    if args.data_path.resolve() in (args.out_path.resolve(), *args.out_path.resolve().parents):
        parser.error(f"--out-path must lie outside --data-path, where it would be taken for a "
                     f"class, got {args.out_path}; choose another folder")
    return args


def main(args):
    # A rank that is done waits for the others, which may take hours on a CPU
    with start_processes(args.precision, timeout_hours=7 * 24) as world, ExitStack() as stack:
        with naming("--out-path"):
            check_folder(args.out_path)
        read_record(args.out_path)  # refuses a foreign folder before anything heavy
        images = ImageFolder(args.data_path, args.image_size, world)
        codec = load_codec(args.vae, world.device, precision=args.precision, chunk=args.batch_size)
        output = OutputFolder(args, make_record(args, images, codec))
        todo = output.open(world, stack)
        if world.main:
            print(*describe_environment(world), f"{len(images)} images of {len(images.classes)} "
                  f"classes in {len(output.rows)} shards, {len(output.rows) - len(todo)} complete",
                  sep="\n", file=sys.stderr)
        encode(args, images, codec, output, todo, world)
        world.on_main(output.finish)
        if world.main:
            print(args.out_path)


# ---- the folder ------------------------------------------------------------------------------


def make_record(args, images, codec):
    """What encoding.json, and later dataset.json, say of this encoding. Raises UserError.

    images: an ImageFolder; codec: see dataset/vae.py.
    """
    return {
        "format_version": FORMAT_VERSION, "crop": CROP,
        "image_size": args.image_size, "latent_shape": list(codec.latent_shape(args.image_size)),
        "vae": args.vae, "scale": float(codec.scale), "encoder": codec.fingerprint(),
        "precision": args.precision, "dtype": args.dtype, "flip": args.flip,
        "shard_size": args.shard_size, "images": len(images), "files": images.fingerprint(),
        "classes": images.classes,
    }


def read_record(out):
    """The content of dataset.json, or of encoding.json, in --out-path; {} if it is empty or new.

    Raises UserError for a folder that holds anything else.
    """
    names = [path.name for path in list_folder(out)] if out.exists() else []
    if not names:
        return {}
    try:
        path = out / ("dataset.json" if "dataset.json" in names else UNFINISHED)
        record = json.loads(path.read_text())
        return {key: record[key] for key in IDENTITY} | record
    except BAD_JSON as error:
        raise UserError(f"--out-path must be new, empty or of the same command before, got {out} "
                        f"with {min(names)} of something else; choose another folder") from error


class OutputFolder:
    """--out-path: its shards and, at the end, dataset.json.

    record: of make_record. rows: of the image folder, by shard, unreadable images included.
    """

    def __init__(self, args, record):
        self.args, self.path, self.record = args, args.out_path, record
        self.rows = split(range(record["images"]), args.shard_size)
        self.files = [ShardFiles(self.path, shard) for shard in range(len(self.rows))]

    def read_notes(self):
        """(names of the skipped images by shard, CRC-32 by file name), by dataset.json and the
        notes of shards (see write_shard). A shard whose note is damaged counts as damaged."""
        sums, skipped = dict(read_record(self.path).get("crc32", {})), [[] for _ in self.files]
        for files, names in zip(self.files, skipped):
            with suppress(*BAD_JSON):
                note = json.loads(files.note.read_text())
                sums |= note["crc32"]
                names += note["skipped"]
        return skipped, sums

    def open(self, world, stack):
        """Lock the folder until the stack is left. Returns the shards to encode: those with a
        missing or damaged file and, without --skip-bad-images, those that lack images. Raises
        UserError for another command's folder."""
        def lock():
            with naming("--out-path"):
                stack.enter_context(FolderLock(self.path))
            self._check(read_record(self.path))
            remove_temporary_files(self.path)
            if not (self.path / "dataset.json").exists():
                write_json(self.path / UNFINISHED, self.record)
            return self.read_notes()

        notes, todo = world.on_main(lock), []
        with world.progress(len(self.files), desc="verify", unit="shard") as bar:
            for shard in range(world.rank, len(self.files), world.size):
                if not self._is_whole(shard, *notes):
                    todo.append(shard)
                bar.update(min(world.size, bar.total - bar.n))
        return sorted(itertools.chain(*world.gather(todo)))

    def _check(self, record):
        """Raise UserError if what the folder holds was made in another way."""
        if not record:
            return
        fault = differences(*({key: config[key] for key in IDENTITY}
                              for config in (record, self.record)))
        if record.get("skipped") and not self.args.skip_bad_images:
            fault = f"--skip-bad-images and {len(record['skipped'])} images left out"
        if fault:
            raise UserError(f"--out-path must be new, empty or of the same command before, got "
                            f"{self.path} of another ({fault}); repeat the command that began it "
                            f"or choose another folder")

    def _is_whole(self, shard, skipped, sums):
        """Whether a shard needs no encoding. skipped, sums: of read_notes."""
        files, gaps = self.files[shard], skipped[shard]
        count, paths = len(self.rows[shard]) - len(gaps), files.arrays(self.args.flip)
        if not all(path.exists() for path in paths) or (gaps and not self.args.skip_bad_images):
            return False
        for path in paths:
            dtype, shape = ("int64", (count,)) if path == files.labels else (
                self.args.dtype, (count, 2, *self.record["latent_shape"]))
            with suppress(UserError):
                map_array(path, dtype, shape)
                if checksum(path) == sums.get(path.name):
                    continue
            tqdm.write(f"{path} is damaged: its shard is encoded again", file=sys.stderr)
            return False
        return True

    def finish(self):
        """Write dataset.json. Raises UserError if images are unreadable and may not be skipped."""
        skipped, sums = self.read_notes()
        names, count = list(itertools.chain(*skipped)), self.record["images"]
        if len(names) == count or (names and not self.args.skip_bad_images):
            print("unreadable images:", *names, sep="\n  ", file=sys.stderr)
            raise UserError(f"--data-path must hold readable images, got {len(names)} of {count} "
                            f"unreadable; repair them or, if others are left, add "
                            f"--skip-bad-images, then repeat the command: what is encoded stays")
        paths = [path for files in self.files for path in files.arrays(self.args.flip)]
        write_json(self.path / "dataset.json", add_checksum({
            **self.record, "count": count - len(names),
            "shards": [len(rows) - len(gaps) for rows, gaps in zip(self.rows, skipped)],
            "skipped": names, "crc32": {path.name: sums[path.name] for path in paths}}))
        (self.path / UNFINISHED).unlink(missing_ok=True)
        for files, gaps in zip(self.files, skipped):
            if not gaps:  # dataset.json does not say in which shard an image is missing
                files.note.unlink(missing_ok=True)


# ---- the work --------------------------------------------------------------------------------


def encode(args, images, codec, output, todo, world):
    """Encode the shards todo, each rank its share. Reading, the VAE and writing overlap.

    images: an ImageFolder; codec: see dataset/vae.py; output: an OutputFolder.
    """
    batches = {shard: split(output.rows[shard], args.batch_size) for shard in todo}
    mine, start = todo[world.rank::world.size], time.monotonic()
    items = [[(row, False) for row in rows] for shard in mine for rows in batches[shard]]
    results = read_images(images.read, items, workers=min(args.num_workers, len(items)))
    work = functools.partial(encode_batch, args, images, codec, world.device)
    encoded = map_ahead(work, results, threads=1, depth=8)  # work while a shard is written
    count, total = sum(len(output.rows[shard]) for shard in todo), len(images)
    with world.progress(total, initial=total - count, desc="encode", unit="image") as bar:
        for shard in mine:
            of_shard = []
            for rows in batches[shard]:
                of_shard.append(next(encoded))
                bar.update(min(world.size * len(rows), bar.total - bar.n))
            write_shard(output.files[shard], of_shard)
    world.barrier()
    if world.main and todo:
        seconds = time.monotonic() - start
        print(f"{count} images in {seconds:.1f} s, {count / seconds:.1f} images/s",
              file=sys.stderr)


def split(rows, size):
    """A range in pieces of size; the last may be shorter."""
    return [rows[i:i + size] for i in range(0, len(rows), size)]


def encode_batch(args, images, codec, device, batch):
    """The (items, results) of read_images -> what write_shard takes: labels (n,) int64, moments
    (n, 2, C, h, w) of --dtype, on the CPU, those of the mirror images or None, and the names of
    unreadable images, whose errors are printed. Raises UserError."""
    rows, pixels, unreadable = [], [], []
    for (row, _), image in zip(*batch):
        if isinstance(image, UserError):
            tqdm.write(str(image), file=sys.stderr)
            unreadable.append(images.name(row))
        else:
            rows.append(row)
            pixels.append(image)
    blank = np.zeros((3, args.image_size, args.image_size), np.uint8)
    pixels = stack_images(pixels or [blank]).to(device)  # a codec need not take empty batches
    with one_thread():
        moments = encode_pixels(args, codec, pixels)[:len(rows)]
        mirror = encode_pixels(args, codec, pixels.flip(3))[:len(rows)] if args.flip else None
    return images.labels[rows], moments, mirror, unreadable


def encode_pixels(args, codec, pixels):
    """uint8 (n, 3, H, W) -> moments (n, 2, C, h, w) of --dtype on the CPU. Raises UserError."""
    moments = codec.encode(pixels).to(DTYPES[args.dtype])
    if not moments.isfinite().all():
        raise UserError(f"--dtype must hold the moments of --vae, got values beyond {args.dtype} "
                        f"or not finite; give --dtype float32 or another VAE")
    return moments.cpu()


if __name__ == "__main__":
    run_main(main, parse_args)

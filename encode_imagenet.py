"""Encode a folder of images, once, as the latents that train.py --encoded-data reads.

    torchrun --standalone --nproc_per_node=8 encode_imagenet.py \\
        --data-path imagenet/train --out-path imagenet-latents

One process needs no torchrun. If interrupted, rerun the command: it continues, and ends with the
same bytes for any number of processes. Rerun on a finished folder, it compares every file with its
checksum and encodes damaged shards again. dataset/latents.py describes the format.
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

import torch
from tqdm import tqdm

from dataset.images import ImageFolder
from dataset.latents import FORMAT, ShardFiles, add_checksum, is_intact, map_array, write_shard
from dataset.loader import map_ahead, read_images, stack_images
from dataset.vae import load_codec
from engine.checkpoint import differences
from engine.distributed import one_thread, start_processes
from engine.errors import UserError, naming, run_main
from engine.files import FolderLock, check_folder, list_folder, remove_temporary_files, write_json
from engine.log import describe_environment
from engine.options import Parser, int_range

UNFINISHED = "encoding.json"  # stands in for dataset.json until the last shard is written
# What two runs into one folder must share: files is the list of images, encoder the VAE's weights
IDENTITY = ("format_version", "files", "image_size", "encoder", "dtype", "flip", "precision",
            "shard_size", "crop")


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
        help="skip unreadable images and list them in dataset.json, not written without it")
    add = parser.add_argument_group("encoding").add_argument
    add("--vae", default="ema",
        help="ema or mse (one encoder), a folder with an AutoencoderKL, or none: pixels")
    add("--dtype", choices=("float16", "float32"), default="float16",
        help="numbers on disk; float16 halves the disk and rounds by 2^-11")
    add("--precision", choices=("fp32", "tf32", "bf16"), default="fp32",
        help="of the VAE on a GPU; tf32 and bf16 are faster and coarser")
    add = parser.add_argument_group("run").add_argument
    add("--batch-size", type=int_range(1), default=32,
        help="images per batch of a process; above 256 px the VAE takes several passes")
    add("--shard-size", type=int_range(1), default=8192,
        help="images per shard, the most that a killed process loses; 8192 of 256 px take 0.3 GB "
             "of memory, twice that with --flip")
    add("--num-workers", type=int_range(0, 1024), default=8,
        help="reading processes per process; 0 = none")
    args = parser.parse_args(argv)
    if args.out_path.resolve().is_relative_to(args.data_path.resolve()):
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
        codec = load_codec(args.vae, world.device, precision=args.precision)
        output = OutputFolder(args, images, codec)
        todo = output.open(world, stack)
        if world.main:
            print(*describe_environment(world), f"{len(images)} images of {len(images.classes)} "
                  f"classes in {len(output.rows)} shards, {len(output.rows) - len(todo)} complete",
                  *images.notes, sep="\n", file=sys.stderr)
        encode(args, images, codec, output, todo, world)
        world.on_main(output.finish)
        if world.main:
            print(args.out_path)


# ---- the folder ------------------------------------------------------------------------------


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
    except Exception as error:  # of the file, of JSON, or for whatever JSON holds instead
        raise UserError(f"--out-path must be new, empty or of the same command before, got {out} "
                        f"with {min(names)} of something else; choose another folder") from error


class OutputFolder:
    """--out-path: its shards and, at the end, dataset.json.

    record: what dataset.json says of this encoding. rows: those of the image folder, by shard.
    """

    def __init__(self, args, images, codec):
        self.args, self.path = args, args.out_path
        self.rows = split(range(len(images)), args.shard_size)
        self.files = [ShardFiles(self.path, shard) for shard in range(len(self.rows))]
        shape = codec.latent_shape(args.image_size)
        self.record = {
            **FORMAT, "image_size": args.image_size, "latent_shape": list(shape), "vae": args.vae,
            "scale": float(codec.scale), "encoder": codec.fingerprint(),
            "precision": args.precision, "dtype": args.dtype, "flip": args.flip,
            "shard_size": args.shard_size, "images": len(images), "files": images.fingerprint(),
            "classes": images.classes}

    def open(self, world, stack):
        """Lock the folder until the stack is left. Returns the shards to encode: those with a
        missing or damaged file and, without --skip-bad-images, those that lack images. Raises
        UserError for another command's folder."""
        def lock():
            with naming("--out-path"):
                stack.enter_context(FolderLock(self.path))
            record = read_record(self.path)
            fault = record and differences(*({key: each[key] for key in IDENTITY}
                                             for each in (record, self.record)))
            if fault:
                raise UserError(f"--out-path must be new, empty or of the same command before, got "
                                f"{self.path} of another ({fault}); repeat the command that began "
                                f"it or choose another folder")
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

    def read_notes(self):
        """(names of the skipped images by shard, CRC-32 by file name), by dataset.json and the
        notes of shards (see write_shard). A shard whose note is damaged counts as damaged."""
        skipped, sums = [[] for _ in self.files], read_record(self.path).get("crc32", {})
        for shard, files in enumerate(self.files):
            with suppress(Exception):
                note = json.loads(files.note.read_text())
                sums |= note["crc32"]
                skipped[shard] = note["skipped"]
        return skipped, sums

    def _is_whole(self, shard, skipped, sums):
        """Whether a shard needs no encoding. skipped, sums: of read_notes."""
        files, gaps = self.files[shard], skipped[shard]
        count, paths = len(self.rows[shard]) - len(gaps), files.arrays(self.args.flip)
        if not all(path.exists() for path in paths) or (gaps and not self.args.skip_bad_images):
            return False
        latents = self.args.dtype, (count, 2, *self.record["latent_shape"])
        for path, (dtype, shape) in zip(paths, [("int64", (count,)), latents, latents]):
            with suppress(UserError):
                map_array(path, dtype, shape)
                if is_intact(path, sums):
                    continue
            tqdm.write(f"{path} is damaged: its shard is encoded again", file=sys.stderr)
            return False
        return True

    def finish(self):
        """Write dataset.json. Raises UserError if images are unreadable and may not be skipped."""
        skipped, sums = self.read_notes()
        names, count = list(itertools.chain(*skipped)), self.record["images"]
        if len(names) == count or names and not self.args.skip_bad_images:
            print("unreadable images:", *names, sep="\n  ", file=sys.stderr)
            raise UserError(f"--data-path must hold readable images, got {len(names)} of {count} "
                            f"unreadable; repair them or add --skip-bad-images, then repeat the "
                            f"command: what is encoded stays")
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
        print(f"{count / (time.monotonic() - start):.1f} images/s", file=sys.stderr)


def split(rows, size):
    """A range in pieces of size; the last may be shorter."""
    return [rows[i:i + size] for i in range(0, len(rows), size)]


def encode_batch(args, images, codec, device, batch):
    """The (items, results) of read_images -> what write_shard takes: names of unreadable images,
    whose errors are printed, labels (n,) int64, moments (n, 2, C, h, w) of --dtype, on the CPU,
    and with --flip those of the mirror images. Raises UserError."""
    rows, pixels, unreadable = [], [], []
    for (row, _), image in zip(*batch):
        if isinstance(image, UserError):
            tqdm.write(str(image).rpartition("; ")[0], file=sys.stderr)  # finish says what to do
            unreadable.append(images.name(row))
        else:
            rows.append(row)
            pixels.append(image)
    blank = torch.zeros(1, 3, args.image_size, args.image_size)  # diffusers takes no empty batch
    pixels = (stack_images(pixels) if rows else blank).to(device)
    with one_thread():
        moments = [codec.encode(side)[:len(rows)].to(getattr(torch, args.dtype)).cpu()
                   for side in (pixels, pixels.flip(3))[:1 + args.flip]]
    if not all(part.isfinite().all() for part in moments):
        raise UserError(f"--dtype must hold the moments of --vae, got values beyond {args.dtype} "
                        f"or not finite; give --dtype float32 or another VAE")
    return unreadable, images.labels[rows], *moments


if __name__ == "__main__":
    run_main(main, parse_args)

"""Sample images from a checkpoint, in one network evaluation each.

    python sample.py --ckpt results/quickstart/checkpoints/0001950.pt --num-fid-samples 80
    torchrun --standalone --nproc_per_node=8 sample.py --ckpt CHECKPOINT.pt --fid-ref REF.npz

This writes <sample-dir>/000000.png ..., <sample-dir>.npz with arr_0 uint8 (N, H, W, 3), which ADM's
evaluator reads, and <sample-dir>.png, a picture of the first ones. With --fid-ref it also prints
the metrics. Image i depends on the seed and on i alone, and no two seeds share an image. If
interrupted, rerun the command: it continues.
"""

import argparse
import copy
import hashlib
import json
import os
import signal
import sys
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback if Ctrl-C comes during the imports

import numpy as np
import torch
from PIL import Image

import improved_meanflow
import meanflow
from dataset.classes import class_names, find_classes
from dataset.pictures import save_grid
from dataset.vae import load_codec, normalisation
from engine.checkpoint import differences, fingerprint, network_of
from engine.distributed import one_thread, start_processes
from engine.errors import UserError, naming, run_main
from engine.files import (
    FolderLock,
    atomic_file,
    check_folder,
    list_folder,
    remove_temporary_files,
    write_json,
)
from engine.options import Parser, float_range, int_range
from metrics.inception import PROTOCOLS
from metrics.reference import Evaluation, notes
from models import is_improved
from weights.hub import file_or_address, open_checkpoint

MARKER = "samples.json"  # in the sample folder: what its images depend on
NOISE = "sha256(seed, i)"  # how noise_and_labels draws, as recorded in samples.json
THREADS = min(16, os.cpu_count())  # that read or write image files


def parse_args(argv=None):
    parser = Parser("Sample images from a checkpoint. Repeat a command to continue it.")
    add_image_options(parser.add_argument_group("images"))
    add_output_options(parser.add_argument_group("output"))
    args = parser.parse_args(argv)
    if args.fid_ref is None and not args.save_images:
        parser.error("--no-save-images must come with --fid-ref, got neither images nor metrics "
                     "to make; give one")
    if len(set(args.num_sampling_steps)) < len(args.num_sampling_steps):
        parser.error(f"--num-sampling-steps must be different counts, got "
                     f"{' '.join(map(str, args.num_sampling_steps))}; name each once")
    if args.cfg_interval and args.cfg_interval[0] > args.cfg_interval[1]:
        parser.error(f"--cfg-interval must be two increasing times, got {args.cfg_interval[0]} "
                     f"{args.cfg_interval[1]}; swap them")
    return args


def add_image_options(group):
    group.add_argument("--ckpt", type=file_or_address, required=True, metavar="FILE",
                       help="checkpoint that train.py or convert_checkpoint.py wrote, .pt or "
                            ".safetensors, or hf://OWNER/REPO/FILE; its EMA weights sample")
    count = group.add_mutually_exclusive_group()
    count.add_argument("--num-fid-samples", type=int_range(1), default=50000,
                       help="count of images")
    count.add_argument("--per-class", type=int_range(1), metavar="N",
                       help="N images of each class, in place of --num-fid-samples")
    group.add_argument("--num-sampling-steps", type=int_range(1, 10000), nargs="+", default=[1],
                       metavar="STEPS",
                       help="network evaluations per image, at equal steps of time; several counts "
                            "give several sample folders, and a picture of the same noise side by "
                            "side")
    group.add_argument("--seed", type=int_range(0), default=0,
                       help="fixes the images; no two seeds share one")
    group.add_argument("--labels", choices=("balanced", "random"), default="balanced",
                       help="label of image i: i modulo the number of classes, or random")
    group.add_argument("--classes", nargs="+", metavar="CLASS",
                       help="only these classes: folder names, numbers from 0, or names of "
                            "ImageNet's (default: all)")
    group.add_argument("--cfg", type=float_range(1), metavar="W",
                       help="guidance scale omega of an iMF model, 1 = none (default: the "
                            "published one of its size for one step)")
    group.add_argument("--cfg-interval", type=float_range(0, 1), nargs=2, metavar=("A", "B"),
                       help="times in which guidance of an iMF model acts (default: the published "
                            "ones of its size for one step; 0 1 with --cfg 1)")
    group.add_argument("--vae", help="decoder: ema, mse, a local folder, or none (default: the "
                                     "checkpoint's)")
    group.add_argument("--per-proc-batch-size", type=int_range(1), default=25,
                       help="images per batch; the rounding of an image depends on it")
    group.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="tf32",
                       help="fp32; tf32: fp32 with TensorFloat-32 products on GPUs; bf16: "
                            "autocast")


def add_output_options(group):
    group.add_argument("--sample-dir", type=Path, default=Path("samples"),
                       help="new folder for the PNG files")
    group.add_argument("--save-images", action=argparse.BooleanOptionalAction, default=True,
                       help="write the images; without, only measure them by --fid-ref")
    group.add_argument("--fid-ref", type=Path, metavar="REF.npz",
                       help="reference statistics: measure the images while they are made")
    group.add_argument("--protocol", choices=PROTOCOLS, default="pytorch-fid",
                       help="how to evaluate; evaluate_fid.py --help says more")


def main(args):
    # A rank that has finished waits for the others, which may take hours on a CPU
    with start_processes(args.precision, timeout_hours=7 * 24) as world, ExitStack() as stack:
        with naming("--ckpt"):
            state = open_checkpoint(args.ckpt, world)
            net, config = network_of(state, args.ckpt), state["config"]
        guidance = choose_guidance(args, config)
        classes = find_classes(args.classes, config) if args.classes else None
        if args.per_class:
            args.num_fid_samples = args.per_class * len(classes or range(config["num_classes"]))
        parts = [of_one_count(args, steps) for steps in args.num_sampling_steps]
        weights = None  # a hash of gigabytes, for the sample folders only
        if args.save_images:
            weights = world.on_main(lambda: fingerprint(net.state_dict()))
        wanted = [settings(part, config, weights) | guidance | {"classes": classes}
                  for part in parts]
        if args.save_images:
            for part, entries in zip(parts, wanted):
                check_sample_dir(part, entries)
        evaluation = (Evaluation(args.fid_ref, args.protocol, config, world) if args.fid_ref
                      else None)
        space = load_codec(args.vae or config["vae"], world.device, precision=args.precision)
        net.to(world.device)
        samplers = [ImageSampler(net, space, config, world, seed=args.seed, labels=args.labels,
                                 classes=classes, steps=part.num_sampling_steps, guidance=guidance)
                    for part in parts]
        shown = []
        for part, sampler, entries in zip(parts, samplers, wanted):
            if args.save_images:
                open_sample_dir(part, entries, world, stack)
            shown.append(sample_one_count(part, sampler, entries, evaluation))
        if args.save_images and world.main:
            picture = output_path(args, ".png")  # of a single count: it is there already
            if len(parts) > 1:
                counts = "-".join(map(str, args.num_sampling_steps))
                picture = output_path(args, f"-{counts}-steps.png")
                save_picture(picture, samplers, shown)
            print(f"picture: {picture}", file=sys.stderr)


def of_one_count(args, steps):
    """The options for one of the counts of steps. Of several each has a sample folder of its own:
    <sample-dir>-2-steps."""
    part = copy.copy(args)
    part.num_sampling_steps = steps
    if len(args.num_sampling_steps) > 1:
        part.sample_dir = Path(f"{output_path(args, '')}-{steps}-step{'s' if steps > 1 else ''}")
    return part


def sample_one_count(args, sampler, wanted, evaluation):
    """Make the images of one count of steps, write and measure them, and print the result.

    Returns the images of their picture, uint8 (B, 3, H, W), on rank 0 if images are saved.
    """
    world, shown = sampler.world, None
    statistics = evaluation.statistics(args.num_fid_samples) if evaluation else None
    make_images(args, sampler, statistics)
    world.barrier()
    if args.save_images and world.main:
        paths = [png_path(args.sample_dir, i) for i in range(args.num_fid_samples)]
        write_npz(output_path(args, ".npz"), paths, world)
        shown = read_images([paths[i] for i in sampler.picture_rows(len(paths))])
        save_picture(output_path(args, ".png"), [sampler], [shown])
    result = evaluation.metrics(statistics) if evaluation else None
    if world.main:
        report(args, wanted, evaluation, result)
    return shown


# ---- image i of a network ------------------------------------------------------------------------


def noise_and_labels(indices, shape, *, seed, num_classes, labels="balanced"):
    """Noise z1 (B, C, H, W) and labels y (B,) int64 of the images with these indices, on the CPU.

    Both depend on a hash of (seed, index) alone, so an image depends neither on its batch nor on
    the number of ranks, and no two seeds share an image. labels: "balanced" is the index modulo
    num_classes, "random" is uniform; both have the same noise.
    """
    z1, y = [], []
    for i in indices:
        z1.append(torch.from_numpy(_generator(seed, i).standard_normal(shape)).float())
        y.append(i if labels == "balanced" else int.from_bytes(_digest(seed, i, "label"), "little"))
    return torch.stack(z1), torch.tensor([number % num_classes for number in y])


def _generator(seed, i):
    """The generator of an image's noise, seeded with all 256 bits of a hash.

    PyTorch's CPU generator keeps 32 bits of a seed: two of 100,000 images would share theirs.
    NumPy guarantees that the numbers of this generator never change.
    """
    return np.random.RandomState(np.frombuffer(_digest(seed, i, "noise"), "<u4"))


def _digest(seed, i, purpose):
    return hashlib.sha256(f"{seed} {i} {purpose}".encode()).digest()


# omega and interval of the published FIDs in one step, searched by their authors for the best one
# (Lyy-iiis/imeanflow, configs/eval_config.yml)
PUBLISHED_GUIDANCE = {"iMF-B/2": (8.0, 0.4, 0.65), "iMF-M/2": (10.5, 0.4, 0.6),
                      "iMF-L/2": (10.5, 0.4, 0.6), "iMF-XL/2": (8.0, 0.42, 0.62)}


def default_guidance(config):
    """{"omega", "interval"} of an improved model, {} of any other.

    None, omega 1, where nothing is published for its size or for its training.
    """
    if not is_improved(config["model"]):
        return {}
    none = 1.0, 0.0, 1.0
    published = (config.get("omega_max", 8) >= 8 and config["vae"] != "none"
                 and not (config.get("sizes") or {}).keys() - {"v_head"})
    omega, t_min, t_max = PUBLISHED_GUIDANCE.get(config["model"], none) if published else none
    return {"omega": omega, "interval": [t_min, t_max]}


def choose_guidance(args, config):
    """The guidance to sample with: --cfg and --cfg-interval where given, else the default.

    Raises UserError for a MeanFlow model.
    """
    guidance = default_guidance(config)
    if guidance and args.cfg == 1:
        guidance["interval"] = [0.0, 1.0]
    for option, name in (("--cfg", "omega"), ("--cfg-interval", "interval")):
        value = args.cfg if name == "omega" else args.cfg_interval
        if value is not None and not guidance:
            raise UserError(f"{option} must come with an iMF checkpoint, got one of "
                            f"{config['model']}, whose guidance is fixed in training; leave it out")
        if value is not None:
            guidance[name] = value
    return guidance


def is_flow(config):
    """Whether a network was trained by plain flow matching, so that it knows u(z, t, t) alone."""
    return config.get("ratio") == 0


class ImageSampler:
    """Makes image i of a network, for any i.

    net: (z, r, t, y) -> u, or called as ImprovedDiT is; space: the VAE or pixels; config: of the
    checkpoint; labels: as in noise_and_labels; classes: their labels, all by default; steps: as in
    meanflow.sample; guidance: as default_guidance returns it.
    """

    def __init__(self, net, space, config, world, *, seed=0, labels="balanced", classes=None,
                 steps=1, guidance=None):
        self.net, self.space, self.config, self.world = net, space, config, world
        self.seed, self.labels, self.steps = seed, labels, steps
        self.classes = torch.tensor(classes or range(config["num_classes"]))
        self.guidance = default_guidance(config) if guidance is None else guidance
        self.sample = improved_meanflow.sample if self.guidance else meanflow.sample
        self.field = meanflow.velocity_of(net) if is_flow(config) else net

    def inputs(self, rows):
        """Noise z1 (B, C, H, W) and labels y (B,) of the images of these numbers, on the CPU."""
        z1, y = noise_and_labels(rows, self.config["latent_shape"], seed=self.seed,
                                 labels=self.labels, num_classes=len(self.classes))
        return z1, self.classes[y]

    @torch.no_grad()
    def images(self, rows):
        """The images of these numbers, uint8 (B, 3, H, W), on the device of this rank."""
        z1, y = self.inputs(rows)
        with one_thread():  # on a CPU the bits depend on the number of threads
            with self.world.autocast():
                x = self.sample(self.field, z1.to(self.world.device), y.to(self.world.device),
                                steps=self.steps, **self.guidance)
            if "latent_mean" in self.config or self.config["scale"] != self.space.scale:
                scale, shift = normalisation(self.config, x.device)
                x = (x / scale + shift) * self.space.scale  # which decode takes back
            return self.space.decode(x)

    def batches(self, count, batch_size):
        """The batches of this rank, as ranges, of the images 0 .. count - 1.

        Ranks take whole batches in turn: no batch depends on the number of ranks.
        """
        firsts = range(0, count, batch_size)[self.world.rank::self.world.size]
        return [range(first, min(first + batch_size, count)) for first in firsts]

    def picture_rows(self, count=80):
        """The numbers of the images of a picture, of so many: a column per class, ten at most, and
        eight rows."""
        return range(min(8 * min(len(self.classes), 10), count))

    def picture(self, path):
        """Make images and write them as one picture."""
        save_picture(path, [self], [self.images(self.picture_rows())])


# ---- making and writing -------------------------------------------------------------------------


def make_images(args, sampler, statistics):
    """Make, measure and write the batches of this rank. Batches on disk are measured from there.

    Threads write while the next batches are made. They also wait for the copy from the GPU.
    """
    world, jobs = sampler.world, deque()
    with (world.progress(args.num_fid_samples, desc="sampling", unit="image") as bar,
          ThreadPoolExecutor(THREADS) as pool):
        for rows in sampler.batches(args.num_fid_samples, args.per_proc_batch_size):
            world.position = f"image {rows.start}"
            paths = [png_path(args.sample_dir, i) for i in rows]
            stored = args.save_images and all(path.exists() for path in paths)
            if not stored:
                images = sampler.images(rows)
                if args.save_images:
                    jobs.append(pool.submit(write_images, paths, images))
            elif statistics:
                images = read_images(paths)
            if statistics:
                statistics.add(images, rows.start)
            while len(jobs) > THREADS:  # bounds the memory
                jobs.popleft().result()
            bar.update(min(len(rows) * world.size, bar.total - bar.n))
        for job in jobs:
            job.result()


def save_picture(path, samplers, images):
    """Write images of samplers, which differ in their steps alone, as one picture, side by side.

    images: of each sampler those of picture_rows, uint8 (B, 3, H, W). Names of the classes, and
    steps if there are several samplers, stand above them.
    """
    first, several = samplers[0], len(samplers) > 1
    _, labels = first.inputs(range(len(images[0])))
    captions = [f"{name}\n{sampler.steps} step{'s' if sampler.steps > 1 else ''}"
                if several else name
                for name in class_names(first.config, labels.tolist()) for sampler in samplers]
    columns = min(len(first.classes), 10) * len(samplers)
    save_grid(path, torch.stack(images, dim=1).flatten(0, 1), columns, captions)


def write_images(paths, images):
    """Write uint8 images (B, 3, H, W), on any device, as PNG files."""
    for path, image in zip(paths, images.permute(0, 2, 3, 1).cpu().numpy()):
        with atomic_file(path, durable=False) as temporary:
            Image.fromarray(image).save(temporary, "PNG")


def read_image(path):
    """A PNG file as uint8 (H, W, 3). Raises UserError if it is torn or damaged."""
    try:
        with Image.open(path) as image:
            image.verify()  # compares checksums, unlike decoding; then the file must be reopened
        with Image.open(path) as image:
            return np.array(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"--sample-dir must hold whole images, got {path} ({error}); remove that "
                        f"file and repeat the command") from error


def read_images(paths):
    """PNG files as uint8 (B, 3, H, W). Raises UserError as read_image does."""
    return torch.from_numpy(np.stack([read_image(path) for path in paths])).permute(0, 3, 1, 2)


def write_npz(path, paths, world):
    """Write the images at paths, in order, as arr_0 of an .npz file, without holding them all."""
    shape = (len(paths), *read_image(paths[0]).shape)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with (world.progress(len(paths), desc=path.name, unit="image") as bar,
          atomic_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive,
          archive.open("arr_0.npy", "w", force_zip64=True) as file,
          ThreadPoolExecutor(THREADS) as pool):
        np.lib.format.write_array_header_1_0(file, header)
        for first in range(0, len(paths), 1000):
            for image in pool.map(read_image, paths[first:first + 1000]):
                file.write(image.tobytes())
                bar.update()


def report(args, wanted, evaluation, result):
    """Print the result, alone, on stdout: the metrics, or the sample folder."""
    if result is None:
        print(args.sample_dir)
        return
    for line in notes(evaluation.reference, args.protocol, args.num_fid_samples):
        print(line, file=sys.stderr)
    about = {"num_reference": evaluation.reference.count, "ref": str(args.fid_ref),
             "ckpt": str(args.ckpt), "vae": wanted["vae"], "labels": args.labels,
             "seed": args.seed, "steps": args.num_sampling_steps,
             "sampling_precision": args.precision}  # "precision" is a metric
    about |= {name: wanted[name] for name in ("omega", "interval", "classes") if wanted.get(name)}
    assert result.keys().isdisjoint(about)
    print(json.dumps(result | about))


# ---- the sample folder ---------------------------------------------------------------------------


def png_path(folder, i):
    return folder / f"{i:06d}.png"


def output_path(args, suffix):
    """The file next to the sample folder, of the same name with a suffix."""
    return Path(os.path.abspath(args.sample_dir) + suffix)


def settings(args, config, weights):
    """The content of samples.json: all that the images depend on, but guidance and classes."""
    return {"images": args.num_fid_samples, "steps": args.num_sampling_steps, "seed": args.seed,
            "noise": NOISE, "labels": args.labels, "batch": args.per_proc_batch_size,
            "precision": args.precision, "vae": args.vae or config["vae"], "weights": weights,
            **({"field": "u(z, t, t)"} if is_flow(config) else {})}


def check_sample_dir(args, wanted):
    """Raise UserError unless the sample folder is new or samples.json is that of this command.

    Another command may take a folder without images, as a failed command leaves it.
    """
    folder = args.sample_dir
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--sample-dir must be a folder, got the file {folder}; choose another "
                        f"--sample-dir")
    with naming("--sample-dir"):
        check_folder(folder)
    found = [path for path in (*(list_folder(folder) if folder.exists() else ()),
                               output_path(args, ".npz"), output_path(args, ".png"))
             if path.exists()]
    if not found:
        return
    try:
        stored = json.loads((folder / MARKER).read_text())
        fault = differences(stored, wanted)
        has_images = found != [folder / MARKER] or stored.keys() != wanted.keys()
    except (OSError, ValueError, AttributeError, RecursionError):
        fault, has_images = f"{found[0]} is not of this command", True
    if fault and has_images:
        raise UserError(f"--sample-dir must be new, or hold the images of this very command, got "
                        f"{folder} ({fault}); choose another --sample-dir")


def open_sample_dir(args, wanted, world, stack):
    """Make the sample folder, lock it until the stack is left, and write samples.json."""
    def hold():
        with naming("--sample-dir"):
            stack.enter_context(FolderLock(args.sample_dir))
        check_sample_dir(args, wanted)  # again: another command may have used it meanwhile
        remove_temporary_files(args.sample_dir)
        write_json(args.sample_dir / MARKER, wanted)

    world.barrier()  # all ranks have checked it
    world.on_main(hold)


if __name__ == "__main__":
    run_main(main, parse_args)

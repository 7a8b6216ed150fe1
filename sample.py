"""Sample images from a checkpoint, in one network evaluation each.

    python sample.py --ckpt results/quickstart/checkpoints/0001950.pt --num-fid-samples 80
    torchrun --standalone --nproc_per_node=8 sample.py --ckpt CHECKPOINT.pt --fid-ref REF.npz

This writes <sample-dir>/000000.png ..., <sample-dir>.npz with arr_0 uint8 (N, H, W, 3), which ADM's
evaluator reads, and <sample-dir>.png, a picture of the first ones. With --fid-ref it also prints
the metrics. Of the same options image i depends on the seed and on i. If interrupted, rerun it; for
more images rerun it with a larger count.
"""

import argparse
import json
import os
import signal
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback if Ctrl-C comes during the imports

import torch
from torch.utils._pytree import tree_map

from dataset.classes import class_names, find_classes
from dataset.noise import noise_and_labels, noise_of
from dataset.pictures import THREADS, load_pngs, save_grid, write_npz, write_pngs
from dataset.vae import codec_of, normalisation
from engine.checkpoint import differences, fingerprint, network_of
from engine.distributed import one_thread, start_processes
from engine.errors import BadValue, UserError, naming, run_main
from engine.files import FolderLock, check_folder, list_folder, remove_temporary_files, write_json
from engine.options import Parser, float_range, int_range
from meanflow import schedule
from methods import method_of
from metrics.extractors import known_protocol
from metrics.reference import Evaluation, evaluate, metrics_of, notes
from metrics.spread import resampling_note, spread
from metrics.statistics import rank_batches
from weights.hub import file_or_address, open_checkpoint

RECORD = "samples.json"  # in the sample folder: what its images depend on


def parse_args(argv=None):
    parser = Parser("Sample images from a checkpoint. Repeat a command to continue it.")
    add_image_options(parser.add_argument_group("images"))
    add = parser.add_argument_group("output").add_argument
    add("--sample-dir", type=Path, default=Path("samples"),
        help="folder for the PNG files: new, or of the same command for fewer images, which stay")
    add("--save-images", action=argparse.BooleanOptionalAction, default=True,
        help="write the images; without, only measure them by --fid-ref")
    add("--fid-ref", type=Path, metavar="REF.npz",
        help="reference statistics: measure the images while they are made")
    add("--protocol", type=known_protocol, default="pytorch-fid",
        help="how to evaluate; evaluate_fid.py --help says more")
    args = parser.parse_args(argv)
    if args.fid_ref is None and not args.save_images:
        parser.error("--no-save-images must come with --fid-ref, got neither; give one")
    if args.per_class and args.labels == "random":
        parser.error("--per-class must come without --labels random, got both; leave one out")
    args.num_sampling_steps = list(dict.fromkeys(args.num_sampling_steps))  # each once
    if args.seeds and len({*args.seeds}) < max(2, len(args.seeds)):
        parser.error(f"--seeds must be two or more, each once, got "
                     f"{' '.join(map(str, args.seeds))}; leave repeated ones out, and for one seed "
                     f"use --seed")
    args.seeds = args.seeds or [args.seed or 0]
    if args.cfg_interval and args.cfg_interval[0] > args.cfg_interval[1]:
        parser.error(f"--cfg-interval must be two increasing times, got {args.cfg_interval[0]} "
                     f"{args.cfg_interval[1]}; swap them")
    return args


def add_image_options(group):
    add, count = group.add_argument, group.add_mutually_exclusive_group()
    add("--ckpt", type=file_or_address, required=True, metavar="FILE",
        help="checkpoint that train.py or convert_checkpoint.py wrote, .pt or .safetensors, or "
             "hf://OWNER/REPO/FILE; its EMA weights sample")
    count.add_argument("--num-fid-samples", type=int_range(1), default=50000,
                       help="count of images")
    count.add_argument("--per-class", type=int_range(1), metavar="N",
                       help="N images of each class, in place of --num-fid-samples")
    add("--num-sampling-steps", type=int_range(1, 10000), nargs="+", default=[1], metavar="STEPS",
        help="network evaluations per image, at equal steps of time; of several counts each has a "
             "sample folder, and one picture shows all")
    seed = group.add_mutually_exclusive_group()
    seed.add_argument("--seed", type=int_range(0),
                      help="fixes the images; no two seeds share one (default: 0)")
    seed.add_argument("--seeds", type=int_range(0), nargs="+", metavar="SEED",
                      help="two or more in place of --seed: each has a sample folder, and with "
                           "--fid-ref a last line has mean and standard deviation")
    add("--labels", choices=("balanced", "random"), default="balanced",
        help="label of image i: i modulo the number of classes, or random")
    add("--classes", nargs="+", metavar="CLASS",
        help="only these: folder names, numbers from 0, or names of ImageNet's (default: all)")
    add("--cfg", type=float_range(1), metavar="W",
        help="guidance scale omega of an iMF model, 1 = none (default: the published one of its "
             "size for one step)")
    add("--cfg-interval", type=float_range(0, 1), nargs=2, metavar=("A", "B"),
        help="times in which guidance of an iMF model acts (default: the published ones of its "
             "size for one step; 0 1 with --cfg 1)")
    add("--vae", help="decoder: ema, mse, a local folder, or none (default: the checkpoint's)")
    add("--per-proc-batch-size", type=int_range(1), default=25,
        help="images per batch; the rounding of an image depends on it")
    add("--precision", choices=("fp32", "tf32", "bf16"), default="tf32",
        help="tf32: fp32 with TensorFloat-32 products on GPUs; bf16: autocast")


def main(args):
    # A rank that has finished waits for the others, which may take hours on a CPU
    with start_processes(args.precision, timeout_hours=7 * 24) as world, ExitStack() as stack:
        net, config, method = open_network(args.ckpt, world)
        guidance = choose_guidance(args, config, method)
        classes = find_classes(args.classes, config) if args.classes else None
        if args.per_class:
            args.num_fid_samples = args.per_class * len(classes or range(config["num_classes"]))
        if args.fid_ref and args.num_fid_samples < 2:
            raise UserError(f"--num-fid-samples must be 2 or more with --fid-ref, got "
                            f"{args.num_fid_samples}; ask for more images")
        # The content of samples.json: all that the images depend on
        record = {"images": args.num_fid_samples, "seed": None, "labels": args.labels,
                  "batch": args.per_proc_batch_size, "precision": args.precision,
                  "vae": args.vae or config["vae"], **({"classes": classes} if classes else {}),
                  **guidance}
        if args.save_images:  # the hash of gigabytes takes a while
            record["weights"] = world.on_main(lambda: fingerprint(net.state_dict()))
        parts = [options_for(args, steps, seed, record) for steps in args.num_sampling_steps
                 for seed in args.seeds]
        for part in parts if args.save_images else ():
            check_sample_dir(part)
        evaluation = args.fid_ref and Evaluation(args.fid_ref, args.protocol, config, world)
        codec = codec_of(config, record["vae"], world.device, precision=world.precision)
        net.to(world.device)
        samplers = [ImageSampler(net, codec, config, world, seed=part.seed, labels=args.labels,
                                 classes=classes, steps=part.steps, guidance=guidance)
                    for part in parts]
        count = len(args.seeds)
        for first in range(0, len(parts), count):
            of_steps = slice(first, first + count)
            sample_seeds(parts[of_steps], samplers[of_steps], evaluation, stack)
        for seed in range(count) if args.save_images and world.main else ():
            picture_steps(parts[seed::count], samplers[seed::count])


def open_network(name, world):
    """(network, config, method) of a checkpoint. Raises UserError where y is no labels."""
    with naming("--ckpt"):
        state = open_checkpoint(name, world)
        net, config = network_of(state, name), state["config"]
        if config.get("conditions"):
            raise BadValue(f"must be of a network whose conditions are labels, got {name} of "
                           f"others; sample from Python, as docs/extend.md does")
        return net, config, method_of(config, net)


def options_for(args, steps, seed, record):
    """The options for one count of steps and one seed, with its record and the picture of all
    counts. Of several counts or seeds each has a folder."""
    part = argparse.Namespace(**vars(args) | {
        "steps": steps, "seed": seed, "record": record | {"seed": seed, "steps": steps}})
    of_seed = f"-seed-{seed}" if len(args.seeds) > 1 else ""
    if len(args.num_sampling_steps) == 1:
        folder, picture = of_seed, of_seed
    else:
        folder = f"-{steps}-step{'s' if steps > 1 else ''}{of_seed}"
        picture = f"-{'-'.join(map(str, args.num_sampling_steps))}-steps{of_seed}"
    part.picture = output_path(args, f"{picture}.png")
    if folder:
        part.sample_dir = output_path(args, folder)
    return part


def sample_seeds(parts, samplers, evaluation, stack):
    """Make the images of one count of steps, of each seed. Print the spread of their metrics."""
    world, args = samplers[0].world, parts[0]
    if evaluation and world.main:
        for line in notes(evaluation.reference, args.protocol, args.num_fid_samples,
                          evaluation.image_size):
            print(line, file=sys.stderr)
    results = []
    for part, sampler in zip(parts, samplers):
        if part.save_images:
            open_sample_dir(part, world, stack)
        results.append(sample_one_part(part, sampler, evaluation))
    if evaluation and world.main and len(parts) > 1:
        extractor = evaluation.extractor
        summary = spread(results, metrics_of(extractor), "seed", "seeds")
        print(json.dumps(summary))
        print(resampling_note(extractor, summary), file=sys.stderr)


def sample_one_part(args, sampler, evaluation):
    """Make the images of one count of steps and one seed. Print on stdout the metrics, which are
    returned, or the sample folder."""
    world, count = sampler.world, args.num_fid_samples
    statistics = evaluation.statistics(count) if evaluation else None
    with naming("--sample-dir"):
        make_images(args, sampler, statistics)
        world.barrier()
        if args.save_images and world.main:
            write_npz(output_path(args, ".npz"), png_paths(args, range(count)),
                      sampler.config["image_size"], world)
    metrics = evaluate(statistics, evaluation.reference) if evaluation else None
    if metrics:
        metrics |= about(args, evaluation.reference.count)
        print(json.dumps(metrics))
    elif world.main:
        print(args.sample_dir)
    return metrics


def picture_steps(parts, samplers):
    """Write the picture of all counts of steps, of one seed."""
    rows = samplers[0].picture_rows(parts[0].num_fid_samples)
    with naming("--sample-dir"):
        images = [load_pngs(png_paths(part, rows), samplers[0].config["image_size"])
                  for part in parts]
    save_picture(parts[0].picture, samplers, images)
    print(f"picture: {parts[0].picture}", file=sys.stderr)


def make_images(args, sampler, statistics):
    """Make, measure and write this rank's batches but those on disk. Threads write them, for which
    they also wait for the copy from the GPU.

    A batch that an earlier command cut short is written anew from its first image on, as rounding
    depends on the batch; until its last image is there, it counts as missing.
    """
    world, jobs = sampler.world, deque()
    with (world.progress(args.num_fid_samples, desc="sampling", unit="image") as bar,
          ThreadPoolExecutor(THREADS) as pool):
        for rows in rank_batches(args.num_fid_samples, args.per_proc_batch_size, world):
            world.position = f"image {rows.start}"
            paths = png_paths(args, rows)
            if not (args.save_images and all(path.exists() for path in paths)):
                images = sampler.images(rows)
                if args.save_images:
                    jobs.append(pool.submit(write_pngs, paths, images))
            elif statistics:
                images = load_pngs(paths, sampler.config["image_size"])
            if statistics:
                statistics.add(images, rows.start)
            while len(jobs) > THREADS:  # bounds the memory
                jobs.popleft().result()
            bar.update(min(len(rows) * world.size, bar.total - bar.n))
        for job in jobs:
            job.result()


def about(args, num_reference):
    """What the metrics depend on, for their JSON line."""
    return {"num_reference": num_reference, "ref": str(args.fid_ref), "ckpt": str(args.ckpt),
            "sampling_precision": args.precision,  # "precision" is a metric
            **{name: value for name, value in args.record.items()
               if name not in ("images", "batch", "precision", "weights")}}


# ---- image i of a network ------------------------------------------------------------------------


def choose_guidance(args, config, method):
    """The method's guidance, changed by --cfg and --cfg-interval. Raises UserError where it has
    none."""
    options = {} if args.cfg is None else {"omega": args.cfg}
    if args.cfg_interval or args.cfg == 1:
        options["interval"] = args.cfg_interval or [0.0, 1.0]
    guidance = method.guidance(config)
    if not options.keys() <= guidance.keys():
        raise UserError(f"--cfg and --cfg-interval must come with an iMF checkpoint, got one of "
                        f"{config['model']}, whose guidance is fixed in training; leave them out")
    return guidance | options


class ImageSampler:
    """Makes image i of a network, for any i.

    net: a module that its method fits; codec: the VAE or pixels; config: of the checkpoint; labels:
    as in noise_and_labels; classes: their labels, all by default; steps: as in meanflow.sample;
    guidance: as the method's guidance returns it, by default that; conditions: what makes y of the
    images of these numbers, where it is no labels.
    """

    def __init__(self, net, codec, config, world, *, seed=0, labels="balanced", classes=None,
                 steps=1, guidance=None, conditions=None):
        self.seed, self.labels, self.steps = seed, labels, steps
        self.classes = torch.tensor(classes or range(config["num_classes"]))
        self.method, self.conditions = method_of(config, net), conditions
        self.guidance = self.method.guidance(config) if guidance is None else guidance
        self.net, self.codec, self.config, self.world = net, codec, config, world

    def inputs(self, rows):
        """Noise z1 (B, C, ...) and labels y (B,), or the conditions, of the images of these
        numbers, on the CPU."""
        z1, y = noise_and_labels(rows, self.config["latent_shape"], seed=self.seed,
                                 labels=self.labels, num_classes=len(self.classes))
        return z1, self.conditions(rows) if self.conditions else self.classes[y]

    def later_noise(self, rows):
        """{"noise": a tensor like z1 for each step after the first}, on the CPU, for a method that
        takes it; else {}."""
        if not self.method.takes_noise:
            return {}
        shape = self.config["latent_shape"]
        return {"noise": [noise_of(rows, shape, self.seed, step)
                          for step in range(1, len(schedule(self.steps)) - 1)]}

    @torch.no_grad()
    def data(self, rows):
        """The data x (B, C, ...) of the images of these numbers, on the device of this rank."""
        inputs = [*self.inputs(rows), self.later_noise(rows)]
        z1, y, noise = tree_map(lambda tensor: tensor.to(self.world.device), inputs)
        with self.world.autocast():
            return self.method.sample(self.net, z1, y, steps=self.steps, **noise, **self.guidance)

    @torch.no_grad()
    def images(self, rows):
        """The images of these numbers, uint8 (B, 3, H, W), on the device of this rank."""
        with one_thread():  # on a CPU the bits depend on the number of threads
            x = self.data(rows)
            if "latent_mean" in self.config or self.config["scale"] != self.codec.scale:
                scale, shift = normalisation(self.config, x.device)
                x = (x / scale + shift) * self.codec.scale  # which decode takes back
            return self.codec.decode(x)

    def picture_rows(self, count=80):
        """The images, of so many, in a picture: a column per class, ten at most, of eight."""
        return range(min(8 * min(len(self.classes), 10), count))

    def picture(self, path):
        """Make images and write them as one picture."""
        save_picture(path, [self], [self.images(self.picture_rows())])


def save_picture(path, samplers, images):
    """Write images, for each sampler uint8 (B, 3, H, W) of picture_rows, side by side as one
    picture. The samplers differ in their steps only."""
    first = samplers[0]
    rows = range(len(images[0]))
    names = ([""] * len(rows) if first.conditions else
             class_names(first.config, first.inputs(rows)[1].tolist()))
    steps = [f"\n{sampler.steps} step{'s' if sampler.steps > 1 else ''}" for sampler in samplers]
    captions = [name + text for name in names for text in (steps if len(steps) > 1 else [""])]
    columns = min(len(first.classes), 10) * len(samplers)
    save_grid(path, torch.stack(images, dim=1).flatten(0, 1), columns, captions)


# ---- the sample folder ---------------------------------------------------------------------------


def png_paths(args, numbers):
    return [args.sample_dir / f"{i:06d}.png" for i in numbers]


def output_path(args, suffix):
    """The file next to the sample folder, of the same name with a suffix."""
    return Path(os.path.abspath(args.sample_dir) + suffix)


def check_sample_dir(args):
    """Raise UserError unless the folder has no images yet, or the samples.json of this command, if
    for fewer images."""
    folder = args.sample_dir
    with naming("--sample-dir"):
        check_folder(folder)
    paths = [*(list_folder(folder) if folder.exists() else ()),
             *filter(Path.exists, (output_path(args, ".npz"), args.picture))]
    if not paths:
        return
    try:
        stored = json.loads((folder / RECORD).read_text())
        without_images = len(paths) == 1 and "weights" in stored  # as a failed command leaves it
        grows = stored["images"] <= args.record["images"]
        difference = "" if without_images else differences(
            stored, args.record, may_change=["images"] if grows else [])
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
        difference = f"{paths[0]} is not of this command"
    if difference:
        raise UserError(f"--sample-dir must be new, or hold images of this very command, no more "
                        f"than it makes, got {folder} ({difference}); choose another --sample-dir")


def open_sample_dir(args, world, stack):
    """Make the sample folder, lock it until the stack is left, and write samples.json."""
    def lock():
        with naming("--sample-dir"):
            stack.enter_context(FolderLock(args.sample_dir))
        check_sample_dir(args)  # again: another command may have used it meanwhile
        remove_temporary_files(args.sample_dir)
        write_json(args.sample_dir / RECORD, args.record)

    world.barrier()  # all ranks have checked it
    world.on_main(lock)


if __name__ == "__main__":
    run_main(main, parse_args)

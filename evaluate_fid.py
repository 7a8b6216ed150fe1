"""Evaluate a folder or an .npz of images, by the features of Inception or of another network.

    python evaluate_fid.py --samples samples.npz --ref VIRTUAL_imagenet256_labeled.npz
    torchrun --standalone --nproc_per_node=8 evaluate_fid.py --samples samples --ref REF.npz
        --protocol adm
    python evaluate_fid.py --samples images --make-ref REF.npz

prints one JSON line on stdout: counts, names, fid and, with adm, sfid, inception_score, precision
and recall, if the reference has what they need. Of several --samples each has a line, and a last
one their mean and standard deviation. --make-ref writes a reference in ADM's layout: mu,
sigma, mu_s, sigma_s and arr_0. metrics/extractors.py describes the protocols.
"""

import json
import signal
import sys
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of Ctrl-C during the imports

import numpy as np
import torch

from engine.distributed import start_processes
from engine.errors import BadValue, UserError, naming, run_main
from engine.files import atomic_file, make_folder
from engine.options import Parser, int_range
from metrics.extractors import extractor_of, known_protocol
from metrics.image_sets import open_images
from metrics.reference import Reference, evaluate, metrics_of, notes
from metrics.spread import closeness_notes, spread
from metrics.statistics import Statistics

STORED_IMAGES = 10000  # images at most in a reference's arr_0, as in ADM's


def parse_args(argv=None):
    parser = Parser("Evaluate images against a reference, or make a reference of them.")
    add = parser.add_argument_group("images").add_argument
    add("--samples", type=Path, required=True, nargs="+",
        help="a folder of RGB files, with its subfolders, or an .npz with arr_0; of several each "
             "is measured, and a last line has mean and standard deviation")
    add("--image-size", type=int_range(1), metavar="S",
        help="centre-crop images to S x S and convert files to RGB, as train.py does (default: "
             "they must be RGB and of one size already)")
    add = parser.add_argument_group("result").add_argument
    add("--ref", type=Path,
        help="reference: an .npz with mu and sigma, EDM2's .pkl, or a folder of images")
    add("--make-ref", type=Path, metavar="OUT.npz",
        help="write the samples' statistics as a new reference instead")
    add("--protocol", type=known_protocol, default="pytorch-fid",
        help="pytorch-fid: FID; adm: FID, sFID, Inception Score, precision and recall; pixels: "
             "Frechet distance of tiny images, without a network; dinov2: FD-DINOv2, precision and "
             "recall; timm:NAME: Frechet distance of features of a network of timm")
    add = parser.add_argument_group("run").add_argument
    add("--weights", type=Path, metavar="FILE",
        help="weights of the protocol's network: pytorch-fid's, DINOv2's or timm's file (default: "
             "in the cache of torch hub or Hugging Face, or downloaded)")
    add("--batch-size", type=int_range(1), default=64, help="images per batch")
    add("--num-workers", type=int_range(0), default=4,
        help="processes that read image files, per process; 0 = none")
    args = parser.parse_args(argv)
    if (args.ref is None) == (args.make_ref is None):
        parser.error(f"--ref or --make-ref must be given, got {args.ref} and {args.make_ref}; name "
                     f"one of the two")
    if args.make_ref and len(args.samples) > 1:
        parser.error(f"--make-ref must come with one --samples, got {len(args.samples)}; put the "
                     f"images into one folder")
    if args.weights and args.protocol == "pixels":
        parser.error(f"--weights must come with a protocol that has a network, got --protocol "
                     f"pixels and {args.weights}; leave it out")
    return args


def main(args):
    extractor = extractor_of(args.protocol)
    with start_processes() as world:
        sets = open_sets(args, world)
        extractor.dimension(sets[0].image_size)  # refuses what is too large
        if args.make_ref:
            make_reference(args, sets[0], extractor, world)
        else:
            compare(args, sets, extractor, world)


def open_sets(args, world):
    """The sample sets, each another one, of one image size and one count: else their metrics are
    not comparable. Raises UserError."""
    with naming("--samples"):
        sets = [open_images(path, world, args.image_size, args.num_workers)
                for path in args.samples]
        for images in sets:
            if images.image_size != sets[0].image_size:
                raise BadValue(f"must hold images of one size, got {images.image_size} in "
                               f"{images.name} and {sets[0].image_size} in {sets[0].name}; "
                               f"crop all with --image-size")
            if len(images) != len(sets[0]):
                raise BadValue(f"must hold one number of images, on which a Frechet distance "
                               f"depends, got {len(images)} in {images.name} and {len(sets[0])} in "
                               f"{sets[0].name}; take as many of each")
        if len({path.resolve() for path in args.samples}) < len(sets):
            raise BadValue(f"must be different sets, got {' '.join(map(str, args.samples))}; name "
                           f"each once")
        return sets


def compare(args, sets, extractor, world):
    """Print the metrics of each sample set, and of several their spread."""
    reference, results = open_reference(args, sets[0].image_size, extractor, world), []
    for samples in sets:
        if world.main:
            for line in notes(reference, args.protocol, len(samples), samples.image_size):
                print(line, file=sys.stderr, flush=True)
        metrics = evaluate(measure(args, "--samples", samples, extractor, **reference.wants),
                           reference)
        if world.main:
            if "precision" in metrics:
                metrics["num_reference_images"] = len(reference.points)
            results.append(metrics | {"num_reference": reference.count, "samples": samples.name,
                                      "ref": reference.name})
            print(json.dumps(results[-1]), flush=True)
    if results[1:]:
        print(json.dumps(spread(results, metrics_of(extractor), "samples", "samples")), flush=True)
        for line in closeness_notes(results) if extractor.is_fid else ():
            print(line, file=sys.stderr)


def open_reference(args, image_size, extractor, world):
    """The Reference that --ref names, for samples of this size, and the extractor loaded."""
    with naming("--ref"):
        if args.ref.is_dir():
            images = open_images(args.ref, world, args.image_size, args.num_workers)
            if args.protocol == "pixels" and images.image_size != image_size:
                raise BadValue(f"must hold images of the samples' size, {image_size}, got "
                               f"{images.image_size} in {args.ref}; crop either with --image-size")
        else:
            reference = Reference.load(args.ref, extractor, image_size, world)
    extractor.load(world, args.weights)
    if args.ref.is_dir():
        wants = {part: part in extractor.gives for part in ("spatial", "points")}
        reference = Reference.of(measure(args, "--ref", images, extractor, **wants), images.name)
    return reference


def measure(args, option, images, extractor, **wants):
    """Statistics of the images of an option. Every rank must call it."""
    with naming(option):
        statistics = Statistics(extractor, len(images), images.image_size, **wants)
        return statistics.add_all(images.batches, args.batch_size, Path(images.name).name)


def make_reference(args, images, extractor, world):
    """Write --make-ref, in ADM's layout, and print what was done."""
    path = args.make_ref
    if path.suffix != ".npz" or path.exists():
        raise UserError(f"--make-ref must be a new .npz file, got {path}; choose another name")
    with naming("--make-ref"):
        make_folder(path.parent)
    extractor.load(world, args.weights)
    reference = Reference.of(measure(args, "--samples", images, extractor,
                                     spatial="spatial" in extractor.gives), str(path))
    if world.main:
        arrays = dict(zip(("mu", "sigma"), reference.pool))
        if reference.spatial is not None:
            arrays |= dict(zip(("mu_s", "sigma_s"), reference.spatial))
        count = min(STORED_IMAGES, len(images))
        rows = torch.arange(count) * len(images) // count  # evenly spaced, as classes are sorted
        batches = images.batches([part.tolist() for part in rows.split(64)])
        with atomic_file(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays, num_images=len(images), protocol=args.protocol,
                     arr_0=torch.cat([*batches]).permute(0, 2, 3, 1).numpy())
    world.barrier()
    if world.main:
        print(json.dumps({"protocol": args.protocol, "num_samples": len(images),
                          "samples": images.name, "make_ref": str(path)}), flush=True)


if __name__ == "__main__":
    run_main(main, parse_args)

"""Evaluate a folder or an .npz of images, by pytorch-fid's protocol, by ADM's, or by pixels.

    python evaluate_fid.py --samples samples.npz --ref VIRTUAL_imagenet256_labeled.npz
    torchrun --standalone --nproc_per_node=8 evaluate_fid.py --samples samples --ref REF.npz
        --protocol adm
    python evaluate_fid.py --samples images --make-ref REF.npz

prints one JSON line on stdout: protocol, num_samples, fid and, with adm, sfid, inception_score,
precision and recall, if the reference has what they need. --make-ref writes a reference in
ADM's layout: mu, sigma, mu_s, sigma_s and arr_0. metrics/inception.py describes the protocols.
"""

import dataclasses
import json
import signal
import sys
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of Ctrl-C during the imports

import numpy as np

from dataset.images import SUFFIXES
from engine.distributed import start_processes
from engine.errors import BadValue, UserError, naming, run_main
from engine.files import atomic_file, make_folder
from engine.options import Parser, int_range
from metrics.image_sets import FolderImages, NpzImages, verify_npz
from metrics.inception import PROTOCOLS, Extractor, dimension
from metrics.reference import Reference, evaluate, metric_names, notes
from metrics.statistics import Statistics

KEPT = 10000  # images at most in a reference's arr_0, as in ADM's


def parse_args(argv=None):
    parser = Parser("Evaluate images against a reference, or make a reference of them.")
    images = parser.add_argument_group("images")
    images.add_argument("--samples", type=Path, required=True,
                        help="a folder of RGB files, with its subfolders, or an .npz with arr_0")
    images.add_argument("--image-size", type=int_range(1), metavar="S",
                        help="convert files to RGB and centre-crop them to S x S, as train.py does "
                             "(default: they must be RGB and of one size already)")
    result = parser.add_argument_group("result")
    result.add_argument("--ref", type=Path,
                        help="reference: an .npz with mu and sigma, or a folder of images")
    result.add_argument("--make-ref", type=Path, metavar="OUT.npz",
                        help="write the samples' statistics as a new reference instead")
    result.add_argument("--protocol", choices=PROTOCOLS, default="pytorch-fid",
                        help="pytorch-fid: FID; adm: FID, sFID, Inception Score, precision and "
                             "recall; pixels: Frechet distance of tiny images, without a network")
    run = parser.add_argument_group("run")
    run.add_argument("--inception", type=Path, metavar="FILE",
                     help="pytorch-fid's weights (default: in the torch hub cache, or downloaded)")
    run.add_argument("--batch-size", type=int_range(1), default=64, help="images per batch")
    run.add_argument("--num-workers", type=int_range(0), default=4,
                     help="processes that read image files, per process; 0 = none")
    args = parser.parse_args(argv)
    if (args.ref is None) == (args.make_ref is None):
        given = "neither" if args.ref is None else "both"
        parser.error(f"--ref or --make-ref must be given, and not both, got {given}; name a "
                     "reference to compare with, or one to make")
    return args


def main(args):
    with start_processes() as world, naming("--samples"):
        samples = open_images(args.samples, args, world)
        dimension(args.protocol, samples.image_size)  # refuses what is too large
        reference, other = None, None
        with naming("--ref"):
            if args.make_ref is not None:
                check_new(args.make_ref)
            elif args.ref.is_dir():
                other = open_images(args.ref, args, world)
                if args.protocol == "pixels" and other.image_size != samples.image_size:
                    raise BadValue(f"must hold images of the samples' size, {samples.image_size}, "
                                   f"got {other.image_size} in {args.ref}; crop either with "
                                   f"--image-size")
            else:
                reference = Reference.load(args.ref, args.protocol, samples.image_size)
                verify_npz(args.ref, world)
        extractor = Extractor(args.protocol, world, inception=args.inception)
        if args.make_ref is not None:
            result = make_reference(args, samples, extractor)
        else:
            if other is not None:
                adm = args.protocol == "adm"
                with naming("--ref"):
                    reference = Reference.of(
                        measure(args, other, extractor, spatial=adm, points=adm), other.name)
            result = compare(args, samples, reference, extractor)
        if world.main:
            print(json.dumps(result), flush=True)


def check_new(path):
    """Check, without writing, that --make-ref can be written. Raises UserError."""
    if path.suffix != ".npz" or path.exists():
        raise UserError(f"--make-ref must be a new file that ends in .npz, got {path}; choose "
                        f"another name, or remove it first")
    with naming("--make-ref"):
        make_folder(path.parent)


def open_images(path, args, world):
    """The images of a folder or of an .npz file, two or more. Raises BadValue."""
    if not path.exists():
        raise BadValue(f"must be a folder or an .npz file, got {path} (no such file); name one "
                       f"that exists")
    if path.is_dir():
        images = FolderImages(path, args.image_size, args.num_workers)
    else:
        images = NpzImages(path)
        verify_npz(path, world)
    if len(images) < 2:
        raise BadValue(f"must hold 2 images or more, for a covariance, got {len(images)} in "
                       f"{path}; add some ({' '.join(sorted(SUFFIXES))})")
    return images


def measure(args, images, extractor, **wants):
    """Statistics of all images. Every rank must call it."""
    statistics = Statistics(extractor, len(images), images.image_size, **wants)
    return statistics.add_all(images.numbered_batches(args.batch_size, extractor.world),
                              Path(images.name).name)


def compare(args, samples, reference, extractor):
    """The result on rank 0, which also prints it as a table on stderr; None elsewhere."""
    if extractor.world.main:
        for line in notes(reference, args.protocol, len(samples)):
            print(line, file=sys.stderr, flush=True)
    result = evaluate(measure(args, samples, extractor, **reference.wants), reference)
    if result is None:
        return None
    result |= {"num_reference": reference.count, "samples": samples.name, "ref": reference.name}
    if "precision" in result:
        result["num_reference_images"] = len(reference.points)
    print(f"{args.protocol}: {len(samples)} samples of {samples.name} against {reference.name}",
          file=sys.stderr)
    for key, name in metric_names(args.protocol).items():
        if key in result:
            print(f"  {name:<28}{result[key]:>12.4f}", file=sys.stderr)
    sys.stderr.flush()
    return result


def make_reference(args, images, extractor):
    """Write --make-ref, in ADM's layout, and return what was done."""
    world = extractor.world
    statistics = measure(args, images, extractor, spatial=args.protocol != "pixels")
    reference = Reference.of(statistics, str(args.make_ref))
    if world.main:
        arrays = dict(zip(("mu", "sigma"), reference.pool))
        if reference.spatial is not None:
            arrays |= dict(zip(("mu_s", "sigma_s"), reference.spatial))
        with atomic_file(args.make_ref) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays, num_images=len(images), protocol=args.protocol,
                     arr_0=evenly_spaced(images, dataclasses.replace(world, rank=0, size=1)))
    world.barrier()
    return {"protocol": args.protocol, "num_samples": len(images), "samples": images.name,
            "make_ref": str(args.make_ref)}


def evenly_spaced(images, alone):
    """KEPT images, or all, uint8 (N, H, W, 3). alone: the world of rank 0 without the others."""
    kept = np.arange(min(KEPT, len(images))) * len(images) // min(KEPT, len(images))
    if isinstance(images, FolderImages):  # read no more files than needed
        images.paths, kept = [images.paths[i] for i in kept], np.arange(len(kept))
    parts = []
    for first, batch in images.numbered_batches(64, alone):
        rows = kept[(kept >= first) & (kept < first + len(batch))] - first
        parts.append(batch[rows].permute(0, 2, 3, 1).numpy())
    return np.concatenate(parts)


if __name__ == "__main__":
    run_main(main, parse_args)

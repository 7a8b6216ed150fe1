"""Evaluate a folder or an .npz of images, by pytorch-fid's protocol, by ADM's, or by pixels.

    python evaluate_fid.py --samples samples.npz --ref VIRTUAL_imagenet256_labeled.npz
    torchrun --standalone --nproc_per_node=8 evaluate_fid.py --samples samples --ref REF.npz
        --protocol adm
    python evaluate_fid.py --samples images --make-ref REF.npz

prints one JSON line on stdout: protocol, num_samples, fid and, with adm, sfid, inception_score,
precision and recall, if the reference has what they need. --make-ref writes a reference in
ADM's layout: mu, sigma, mu_s, sigma_s and arr_0. metrics/inception.py describes the protocols.
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
from metrics.image_sets import FolderImages, open_images, verify_npz
from metrics.inception import PROTOCOLS, Extractor, dimension
from metrics.reference import Reference, evaluate, metric_names, notes
from metrics.statistics import Statistics

STORED_IMAGES = 10000  # images at most in a reference's arr_0, as in ADM's


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
        parser.error(f"--ref or --make-ref must be given, and not both, got {args.ref} and "
                     f"{args.make_ref}; name a reference to compare with, or one to make")
    return args


def main(args):
    with start_processes() as world:
        folder = {"crop": args.image_size, "workers": args.num_workers}
        with naming("--samples"):
            samples = open_images(args.samples, world, **folder)
        dimension(args.protocol, samples.image_size)  # refuses what is too large
        reference = None
        with naming("--ref"):
            if args.make_ref is not None:
                check_new(args.make_ref)
            elif args.ref.is_dir():
                reference = open_images(args.ref, world, **folder)
                if args.protocol == "pixels" and reference.image_size != samples.image_size:
                    raise BadValue(f"must hold images of the samples' size, {samples.image_size}, "
                                   f"got {reference.image_size} in {args.ref}; crop either with "
                                   f"--image-size")
            else:
                reference = Reference.load(args.ref, args.protocol, samples.image_size)
                verify_npz(args.ref, world)
        extractor = Extractor(args.protocol, world, inception=args.inception)
        if args.make_ref is not None:
            result = make_reference(args, samples, extractor)
        else:
            if isinstance(reference, FolderImages):
                adm = args.protocol == "adm"
                reference = Reference.of(measure("--ref", reference, extractor, args.batch_size,
                                                 spatial=adm, points=adm), reference.name)
            result = compare(args, samples, reference, extractor)
        if world.main:
            print(json.dumps(result), flush=True)


def check_new(path):
    """Raise UserError unless --make-ref is a new file. Its folder is made."""
    if path.suffix != ".npz" or path.exists():
        raise UserError(f"--make-ref must be a new file that ends in .npz, got {path}; choose "
                        f"another name, or remove it first")
    with naming("--make-ref"):
        make_folder(path.parent)


def measure(option, images, extractor, batch_size, **wants):
    """Statistics of all images of an option. Every rank must call it."""
    with naming(option):
        statistics = Statistics(extractor, len(images), images.image_size, **wants)
        return statistics.add_all(images.batches, batch_size, Path(images.name).name)


def compare(args, samples, reference, extractor):
    """The result on rank 0, which also prints it as a table on stderr; None elsewhere."""
    if extractor.world.main:
        for line in notes(reference, args.protocol, len(samples)):
            print(line, file=sys.stderr, flush=True)
    result = evaluate(measure("--samples", samples, extractor, args.batch_size,
                              **reference.wants), reference)
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
    return result


def make_reference(args, images, extractor):
    """Write --make-ref, in ADM's layout, and return what was done."""
    reference = Reference.of(measure("--samples", images, extractor, args.batch_size,
                                     spatial=args.protocol != "pixels"), str(args.make_ref))
    if extractor.world.main:
        arrays = dict(zip(("mu", "sigma"), reference.pool))
        if reference.spatial is not None:
            arrays |= dict(zip(("mu_s", "sigma_s"), reference.spatial))
        count = min(STORED_IMAGES, len(images))
        rows = torch.arange(count) * len(images) // count  # evenly spaced, as classes are sorted
        batches = images.batches([part.tolist() for part in rows.split(64)])
        with atomic_file(args.make_ref) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays, num_images=len(images), protocol=args.protocol,
                     arr_0=torch.cat([*batches]).permute(0, 2, 3, 1).numpy())
    extractor.world.barrier()
    return {"protocol": args.protocol, "num_samples": len(images), "samples": images.name,
            "make_ref": str(args.make_ref)}


if __name__ == "__main__":
    run_main(main, parse_args)

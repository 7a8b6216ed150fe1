"""Make a checkpoint of other people's weights, or other people's files of ours.

    python convert_checkpoint.py --in hf://Lyy0725/iMF/iMF-B-2.pth --out iMF-B-2.pt
    python convert_checkpoint.py --in results/run/checkpoints/0400000.pt --out model.safetensors
    python convert_checkpoint.py --in results/run/checkpoints/0400000.pt --out model
        --format diffusers

sample.py and train.py --init take the files that this writes, DiffusionPipeline.from_pretrained the
folders. stderr has a report, stdout the new path.
"""

import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of Ctrl-C during the imports

from dataset.vae import LATENT_NORMALISATION
from engine.checkpoint import save_checkpoint
from engine.errors import UserError, naming, run_main
from engine.files import check_folder, make_folder
from engine.options import Parser, int_range
from methods import METHODS
from weights.convert import FORMATS, REPOSITORIES, convert, export
from weights.diffusers_folder import read_figures, write_diffusers_folder
from weights.foreign_files import read_weights
from weights.hub import file_or_address, identifier, push_folder, read_file, repository


def parse_args(argv=None):
    parser = Parser("Make a checkpoint of weights from elsewhere: MeanFlow, improved MeanFlow, "
                    "SoFlow, or a flow model (SiT, REPA) as a start for training. Or write ours "
                    "for others.")
    add = parser.add_argument
    add("--in", dest="input", type=file_or_address, required=True, metavar="PATH",
        help="file or folder, or hf://OWNER/REPO[@REVISION]/FILE")
    add("--out", type=Path, required=True,
        help="new file, .pt or .safetensors; a new folder for diffusers")
    add("--raw", action="store_true", help="take the weights of the last step, not their average")
    add("--heads", type=int_range(1, 1024),
        help="attention heads, for a DiT of a width that is not published")
    add("--image-size", type=int_range(1, 2**16),
        help="in pixels, for files that do not tell (default: 256)")
    add("--num-classes", type=int_range(1, 2**24),
        help="for a file of SoFlow, whose label table may lack the null row "
             "(default: 1000 of 1,000 rows, else one less than rows)")
    add("--source", choices=REPOSITORIES,
        help="repository that saved the weights, where the file does not tell")
    add("--format", choices=(*FORMATS, "diffusers"), default="ours",
        help="write the names of another repository, to run a model there, or a "
             "folder that DiffusionPipeline.from_pretrained opens")
    add_folder_options(parser.add_argument_group("for --format diffusers").add_argument)
    args = parser.parse_args(argv)
    if args.format == "diffusers":
        return args
    if given := [option for option in ("vae", "license", "figures", "push")
                 if getattr(args, option) != parser.get_default(option)]:
        parser.error(f"--{given[0]} must come with --format diffusers, got {args.format}; leave "
                     f"one out")
    suffixes = (".pt", ".safetensors") if args.format == "ours" else (".pt",)
    if args.out.suffix not in suffixes:
        parser.error(f"--out must end in {' or '.join(suffixes)} with --format {args.format}, got "
                     f"{args.out}; rename it")
    return args


def add_folder_options(add):
    add("--vae", help="decoder: ema, mse, OWNER/REPO, which the folder names, or a local folder, "
                      "which is copied into it (default: the checkpoint's)")
    add("--license", type=identifier, default="unknown",
        help="identifier for the model card, such as mit")
    add("--figures", type=Path, metavar="FILE",
        help="lines that evaluate_fid.py or sample.py printed, for the model card")
    add("--push", type=repository, metavar="OWNER/REPO", help="upload it to the Hugging Face Hub")


def main(args):
    if os.path.lexists(args.out):
        raise UserError(f"--out must be new, got {args.out}; remove it or choose another")
    with naming("--out"):
        check_folder(args.out.parent)
    with naming("--figures"):
        figures = read_figures(args.figures) if args.figures else ()
    with naming("--in"):
        foreign = read_file(args.input, lambda path: read_weights(path, raw=args.raw))
        state, report = convert(foreign, heads=args.heads, image_size=args.image_size,
                                source=args.source, num_classes=args.num_classes)
    config = state["config"]
    normalises = foreign.config is None and METHODS[config["method"]].normalises_channels
    if normalises and config["vae"] != "none":
        config |= LATENT_NORMALISATION
    scaled = "per channel" if "latent_mean" in config else f"by {config['scale']}"
    report[:0] = [foreign.origin]
    report.append(f"data: {config['image_size']} pixels, VAE {config['vae']}, latents "
                  f"{config['latent_shape']} scaled {scaled}")
    with naming("--out"):
        make_folder(args.out.parent)
    if args.format == "diffusers":
        decoder = write_diffusers_folder(args.out, state, vae=args.vae, license=args.license,
                                         figures=figures, repository=args.push,
                                         about=foreign.about)
        report.append(f"written: for diffusers; decoder: {decoder}")
    elif args.format == "ours":
        save_checkpoint(args.out, state)
    else:
        save_checkpoint(args.out, export(state, args.format))
        report.append(f"written: for {args.format}, which scales latents its own way")
    print(*report, sep="\n", file=sys.stderr)
    if args.push:
        push_folder(args.out, args.push)
    print(args.out)


if __name__ == "__main__":
    run_main(main, parse_args)

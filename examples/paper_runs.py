"""Both ends of reproduce.sh: what a run of docs/reproduce.md needs, and its row of the page.

    python examples/paper_runs.py check "OPTIONS OF encode_imagenet.py" "OF train.py" "OF sample.py"
    python examples/paper_runs.py report "ROW OF THE PAGE" RUN_DIR EVALUATION.jsonl

check refuses what would fail or falsify the result hours later, downloads the weights of the VAE
and of Inception, and prints the number of processes, and options of train.py that the GPUs demand.
report prints the row with our figure, the metrics, and what a reader must know of the run.
"""

import argparse
import json
import math
import shlex
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import encode_imagenet  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from dataset.vae import load_codec  # noqa: E402
from engine.distributed import start_processes  # noqa: E402
from engine.errors import UserError, run_main  # noqa: E402
from engine.files import list_folder  # noqa: E402
from engine.log import read_records  # noqa: E402
from metrics.reference import Evaluation  # noqa: E402
from models import DiT_models  # noqa: E402

CLASSES, IMAGES = 1000, 1281167  # of ImageNet's training set
BFLOAT16_SINCE = (8, 0)  # compute capability, of the A100
REFERENCES = "https://github.com/openai/guided-diffusion/tree/main/evaluations"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Check what a paper's run needs, or report it.")
    parser.add_argument("action", choices=("check", "report"), help="before, or after the run")
    parser.add_argument("words", nargs=3, help="see the first lines of this file")
    return parser.parse_args(argv)


def main(args):
    if args.action == "report":
        row, run_dir, evaluation = args.words
        print(*report(row, Path(run_dir), Path(evaluation)), sep="\n")
        return
    parts = [shlex.split(words) for words in args.words]
    check(encode_imagenet.parse_args(parts[0]), train.parse_args(parts[1]),
          sample.parse_args(["--ckpt", "of train.py", *parts[2]]))
    gpus = torch.cuda.device_count()
    if not gpus:
        print("found no GPU: a CPU is too slow for a row of the page", file=sys.stderr)
    bfloat16 = gpus and torch.cuda.get_device_capability() >= BFLOAT16_SINCE
    processes = 2 ** (max(gpus, 1).bit_length() - 1)  # which divides the batch
    print(processes, "" if bfloat16 else "--precision tf32")


def check(encoding, training, sampling):
    """Raise UserError unless images, reference, weights and space are there. Arguments: the parsed
    options of the parts."""
    check_imagenet(encoding.data_path)
    if not sampling.fid_ref.is_file():
        raise UserError(f"REFERENCE.npz must be ADM's VIRTUAL_imagenet256_labeled.npz, got "
                        f"{sampling.fid_ref} (no such file); download it from {REFERENCES}")
    with start_processes() as world:
        codec = load_codec(sampling.vae)
        Evaluation(sampling.fid_ref, sampling.protocol, vars(encoding), world)
    latent = math.prod(codec.latent_shape(encoding.image_size))
    check_space(encoding.out_path, training.run_dir, sampling.sample_dir,
                latents=IMAGES * 2 * latent * 2,  # mean and std, float16
                training=(training.keep_last + 1) * checkpoint_size(training.model),
                samples=2 * sampling.num_fid_samples * len(sampling.num_sampling_steps)
                * 3 * encoding.image_size**2)  # .npz, and .png of that size at most


def check_imagenet(folder):
    """Raise UserError unless the folder holds as many class folders as ImageNet."""
    count = sum(path.is_dir() for path in list_folder(folder)) if folder.is_dir() else 0
    if count != CLASSES:
        raise UserError(f"IMAGENET_TRAIN must hold {CLASSES} folders, one of each class, got "
                        f"{folder} with {count}; name the folder train of ILSVRC2012")


def checkpoint_size(model):
    """Bytes of a checkpoint: weights, their average and two moments, float32."""
    with torch.device("meta"):
        return 16 * sum(p.numel() for p in DiT_models[model]().parameters())


def check_space(latents_dir, run_dir, sample_dir, **sizes):
    """Raise UserError unless the disk has room for so many bytes, less what is there."""
    present = sum(path.stat().st_size for path in {
        path for folder in (latents_dir, run_dir, sample_dir.parent) for path in folder.rglob("*")
        if path.is_file()})
    place = next(place for place in latents_dir.absolute().parents if place.exists())
    needed, free = sum(sizes.values()) - present, shutil.disk_usage(place).free
    if free < needed:
        parts = ", ".join(f"{name} {size / 1e9:.0f}" for name, size in sizes.items())
        raise UserError(f"{place} must have {needed / 1e9:.0f} GB free ({parts}), got "
                        f"{free / 1e9:.0f}; free some, or set REPRODUCE_OUT to another folder")


def report(row, run_dir, evaluation):
    """Lines to publish: the row of the page with our figures, one per count of steps, the metrics
    as JSON, and what they depend on."""
    metrics, cells = evaluation.read_text().splitlines(), row.split("|")
    cells[3] = " " + " / ".join(f"{json.loads(line)['fid']:.2f}" for line in metrics) + " "
    config = json.loads((run_dir / "config.json").read_text())
    hardware = [line for line in (run_dir / "log.txt").read_text().splitlines()
                if " process(es) on " in line][-1].split(" ", 2)[2]  # without date and time
    return ["|".join(cells), "", *metrics, config["command"],
            f"commit {config['commit']}, torch {config['torch']}, {hardware}; "
            f"{config['num_images']:,} images, {config['total_steps']:,} steps in "
            f"{training_hours(run_dir, config['global_batch_size']):.1f} hours",
            "", "Please send these lines in an issue or a pull request."]


def training_hours(run_dir, batch):
    """Hours of a run's steps, by the rates of its records."""
    hours = before = 0
    for record in read_records(run_dir / "metrics.jsonl")[0]:
        if rate := record.get("images_per_second"):
            hours += (record["step"] - before) * batch / rate / 3600
            before = record["step"]
    return hours


if __name__ == "__main__":
    run_main(main, parse_args)

"""Write Fashion-MNIST (arXiv 1708.07747) as image folders, or judge samples of it.

    python examples/fashion_mnist.py write data/fashion_mnist     # downloads; offline: --source DIR
    python examples/fashion_mnist.py judge data/fashion_mnist     # real images: the best to expect
    python examples/fashion_mnist.py judge data/fashion_mnist samples/seed-?-1-step.npz

write makes train/ (60,000 grey images of 28 x 28) and test/ (10,000), one folder per class each.
DIR holds the four files of the data set, as does /usr/share/datasets/fashion-mnist of Debian's
package dataset-fashion-mnist. The runs of docs/results.md:

    train="python train.py --data-path data/fashion_mnist/train --vae none --image-size 28
        --global-batch-size 64 --max-steps 6000 --lr 2e-3 --warmup-steps 100 --ema-decay 0.998
        --p-mean 0.1 --p-std 1.2 --num-workers 0 --compile --ckpt-every 1000 --keep-last 0"
    plain="--model DiT-T/4 --cfg 1 --label-drop 0"
    $train $plain --ratio 0.5 --run-dir results/meanflow
    $train --model DiT-T/4 --cfg 2 --ratio 0.5 --run-dir results/guided
    $train $plain --ratio 0.5 --tangent network --run-dir results/boundary
    $train --model iMF-T/4 --omega-max 4 --ratio 0.5 --run-dir results/imf
    $train $plain --ratio 0 --run-dir results/flow

and for each run and each seed 0, 1, 2 (flow: also 50 steps; imf: with --cfg 1 and with --cfg 2):

    python sample.py --ckpt results/meanflow/checkpoints/0006000.pt --num-fid-samples 1000
        --per-proc-batch-size 250 --num-sampling-steps 1 2 4 --seed 0 --sample-dir samples/seed-0

judge prints one JSON line for real images and one for each .npz or folder of samples; after
several, their mean and standard deviation. Real images are reduced to the size of the samples. A
convolutional classifier, trained on train/ when that size is first judged and then kept in
classifier-SIZE.pt, tells both figures:

accuracy            the share of samples recognised as their label, which of sample i is i modulo
                    10, as in sample.py --labels balanced; of real images, of all of test/
frechet_distance    of the 64 features before its last layer, between samples and test/; of real
                    images, between as many of train/ and test/
"""

import gzip
import json
import os
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import datasets

sys.path.insert(0, str(Path(__file__).parents[1]))
from dataset.images import ImageFolder  # noqa: E402
from dataset.loader import BatchSampler  # noqa: E402
from engine.distributed import start_processes  # noqa: E402
from engine.errors import UserError, naming, run_main  # noqa: E402
from engine.files import atomic_file, make_folder  # noqa: E402
from engine.options import Parser  # noqa: E402
from metrics.distances import frechet_distance  # noqa: E402
from metrics.image_sets import open_images  # noqa: E402
from metrics.statistics import Moments, rank_batches  # noqa: E402

FILES = {split: [f"{prefix}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
         for split, prefix in (("train", "train"), ("test", "t10k"))}
CLASSES = ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
           "Ankle boot"]  # label 0 is "T-shirt/top", and no folder has a slash in its name
SIZE, LEAST = 28, 8  # pixels: of the images, and of what three poolings halve
FEATURES = 64
EPOCHS, BATCH, RATE = 5, 100, 5e-3  # of the classifier
OFFLINE = ("give the folder of its four .gz files, which apt install dataset-fashion-mnist puts "
           "into /usr/share/datasets/fashion-mnist")


def parse_args(argv=None):
    parser = Parser("Write Fashion-MNIST, or judge samples of it.")
    parser.add_argument("action", choices=("write", "judge"),
                        help="write the images, or judge samples")
    parser.add_argument("data", type=Path, help="folder of train/ and test/")
    parser.add_argument("samples", type=Path, nargs="*",
                        help="samples to judge: .npz files or folders of sample.py")
    parser.add_argument("--source", type=Path, metavar="DIR",
                        help="folder with the four .gz files (default: download them)")
    args = parser.parse_args(argv)
    if args.action == "write" and args.samples:
        parser.error(f"samples must come with judge, got write and {args.samples[0]}; leave them "
                     f"out")
    if args.action == "judge" and args.source:
        parser.error(f"--source must come with write, got judge and {args.source}; leave it out")
    return args


def main(args):
    if args.action == "write":
        write(args.data, args.source)
        return
    with start_processes() as world:
        for line in judge(args.data, args.samples, world):
            print(json.dumps(line), flush=True)


# ---- the data set --------------------------------------------------------------------------------


def write(folder, source=None):
    """Write the splits that folder does not hold yet, each whole or not at all.

    Raises UserError for missing, torn or foreign files.
    """
    missing = [split for split in FILES if not (folder / split).exists()]
    if not missing:
        print(f"{folder} holds both splits already", file=sys.stderr)
        return
    source = download(folder) if source is None else source
    splits = {split: read_split(source, *FILES[split]) for split in missing}
    with naming("data"):
        make_folder(folder)
    for split, (images, labels) in splits.items():
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{split}.") as temporary:
            write_split(Path(temporary, split), images, labels)
            os.rename(Path(temporary, split), folder / split)


def download(folder):
    """The folder of the four files, which torchvision downloads and whose MD5 sums it compares.

    Raises UserError where it cannot.
    """
    try:
        data = datasets.FashionMNIST(folder, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"--source must be given where Fashion-MNIST cannot be downloaded, got "
                        f"none ({error}); {OFFLINE}") from error
    return Path(data.raw_folder)


def read_split(source, images, labels):
    """Images (N, 28, 28) and labels (N,), uint8, of the two files. Raises UserError."""
    found = read_idx(source / images), read_idx(source / labels)
    shapes = [array.shape for array in found]
    if shapes != [(len(found[1]), SIZE, SIZE), (len(found[0]),)] or found[1].max(initial=0) > 9:
        raise UserError(f"--source must hold images of {SIZE} x {SIZE} and as many labels from 0 "
                        f"to 9, got {shapes[0]} and {shapes[1]} in {source}; {OFFLINE}")
    return found


def read_idx(path):
    """The uint8 array of a gzipped IDX file. Raises UserError.

    IDX (yann.lecun.com/exdb/mnist): two zeros, the type (8: unsigned bytes), the number of
    dimensions, then each dimension as a big-endian int32, then the values.
    """
    try:
        data = gzip.decompress(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"--source must hold {path.name}, got {path.parent} without; "
                        f"{OFFLINE}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise torn(path, error) from error
    head = 4 + 4 * data[3] if data[:3] == b"\0\0\x08" and len(data) > 3 else 0
    if not head or len(data) < head:
        raise torn(path, "no IDX file of bytes")
    shape = np.frombuffer(data, ">i4", data[3], offset=4)
    if len(data) - head != np.prod(shape, dtype=np.int64):
        raise torn(path, f"{len(data) - head} values for the shape {tuple(shape.tolist())}")
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)


def torn(path, reason):
    return UserError(f"--source must hold whole files, got {path} ({reason}); {OFFLINE}")


def write_split(folder, images, labels):
    """Write images uint8 (N, 28, 28) as PNG files, in one folder per class."""
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
    for i, (image, label) in enumerate(zip(images, labels)):
        Image.fromarray(image).save(folder / CLASSES[label] / f"{i:05d}.png")


# ---- the judge -----------------------------------------------------------------------------------


def judge(folder, samples, world):
    """Yields the JSON lines, dicts, for the samples at these paths. Raises UserError."""
    with naming("samples"):
        sets = [open_images(path, world) for path in samples]
    size = check_sizes(samples, sets)
    test, train = open_split(folder, "test", size), open_split(folder, "train", size)
    net = load_classifier(folder / f"classifier-{size}.pt", train, test, world)
    reference, accuracy = measure(net, batches_of(test))
    count = min(len(images) for images in sets or [test])
    spread = torch.arange(count) * len(train) // count  # rows are in the order of the classes
    real, _ = measure(net, batches_of(train, spread))
    yield {"samples": "real images", "num_samples": count, "accuracy": round(accuracy, 4),
           "frechet_distance": round(frechet_distance(real, reference), 3)}

    results = []
    for path, images in zip(samples, sets):
        with naming("samples"):
            found, accuracy = measure(net, labelled(images, world))
        results.append((accuracy, frechet_distance(found, reference)))
        yield {"samples": str(path), "num_samples": len(images), "accuracy": round(accuracy, 4),
               "frechet_distance": round(results[-1][1], 3)}
    if len(results) > 1:
        mean, deviation = np.mean(results, 0), np.std(results, 0, ddof=1)
        yield {"samples": f"mean of {len(results)}", "accuracy": round(mean[0], 4),
               "accuracy_std": round(deviation[0], 4), "frechet_distance": round(mean[1], 3),
               "frechet_distance_std": round(deviation[1], 3)}


def open_split(folder, split, size):
    """The ImageFolder of a split, at size pixels. Raises UserError if it is not there."""
    path = folder / split
    if not path.is_dir():
        raise UserError(f"data must be a folder that write made, got {folder} without {split}/; "
                        f"run examples/fashion_mnist.py write {folder}")
    return ImageFolder(path, size)


def check_sizes(paths, sets):
    """The side of the samples, 28 if there are none. Raises UserError unless all are of one."""
    size = sets[0].image_size[0] if sets else SIZE
    for path, images in zip(paths, sets):
        if images.image_size != (size, size) or not LEAST <= size <= SIZE:
            raise UserError(f"samples must be square, all of one size from {LEAST} to {SIZE} "
                            f"pixels, got {images.image_size} in {path}; judge other sizes apart")
    return size


def labelled(images, world):
    """Yields batches of samples, (B, 3, H, W) uint8, with the labels (B,) they were made for."""
    parts = rank_batches(len(images), BATCH, world)
    for rows, batch in zip(parts, images.batches(parts)):
        yield batch, torch.tensor(rows) % len(CLASSES)


def batches_of(split, rows=None):
    """Yields batches of images (B, 3, H, W) uint8 with their labels (B,): of these rows, or
    all."""
    rows = torch.arange(len(split)) if rows is None else rows
    return split.batches(((part, torch.zeros(len(part), dtype=torch.bool))
                          for part in rows.split(BATCH)), workers=0)


@torch.no_grad()
def measure(net, batches):
    """((mean, covariance) of the features, share of images recognised as their label)."""
    moments, right = Moments(FEATURES, "cpu"), 0
    for images, labels in batches:
        features = net.features(images)
        moments.add(features)
        right += int((net.last(features).argmax(1) == labels).sum())
    return moments.numpy(), right / moments.count


class Classifier(nn.Module):
    """Logits (B, 10) of images uint8 (B, 3, size, size), of which it sees the first channel."""

    def __init__(self, size):
        super().__init__()

        def block(width, wider):
            return (nn.Conv2d(width, wider, 3, padding=1, bias=False), nn.BatchNorm2d(wider),
                    nn.ReLU(), nn.MaxPool2d(2))

        self.body = nn.Sequential(*block(1, 32), *block(32, 64), *block(64, 64), nn.Flatten(),
                                  nn.Linear(64 * (size // 8)**2, FEATURES), nn.ReLU())
        self.last = nn.Linear(FEATURES, len(CLASSES))

    def features(self, images):
        """The features (B, 64), 0 or more, before the last layer."""
        return self.body(images[:, :1].float() / 127.5 - 1)

    def forward(self, images):
        return self.last(self.features(images))


def load_classifier(path, train, test, world):
    """The classifier of a file, or a new one of these splits, which is written there."""
    if not path.exists():
        net = train_classifier(train, world)
        _, accuracy = measure(net.eval(), batches_of(test))
        print(f"classifier: {accuracy:.2%} of the test split recognised", file=sys.stderr)
        with atomic_file(path) as temporary:
            torch.save(net.state_dict(), temporary)
    net = Classifier(train.image_size)
    try:
        net.load_state_dict(torch.load(path, weights_only=True))
    except Exception as error:  # torch.load raises errors of any kind for a torn or foreign file
        raise UserError(f"data must hold a whole {path.name} or none, got {path} ({error}); "
                        f"remove it, and it is trained again") from error
    return net.eval()


def train_classifier(split, world):
    """A Classifier of a split, after EPOCHS epochs of AdamW with a one-cycle rate; seed 0."""
    torch.manual_seed(0)
    net, batch = Classifier(split.image_size), min(BATCH, len(split))
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.05)
    steps = EPOCHS * (len(split) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    print(f"training the classifier: {steps} steps of {batch} images", file=sys.stderr)
    rows = BatchSampler(len(split), batch, seed=0, flip=True, world=world)
    for images, labels in split.batches(rows.steps(0, steps), workers=0):
        F.cross_entropy(net(images), labels, label_smoothing=0.05).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return net


if __name__ == "__main__":
    run_main(main, parse_args)

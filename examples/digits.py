"""Write the quickstart's data, scikit-learn's 1,797 handwritten digits of 8 x 8, or judge samples.

    python examples/digits.py write data/digits           # one folder of PNG files per digit
    python examples/digits.py judge samples.npz ...       # a JSON line each: how good they are

accuracy is the share of samples that an SVM, trained on the real digits, recognises as their
label; the label of sample i is i modulo 10, as in sample.py --labels balanced.
frechet_distance_of_pixels compares samples and real digits as evaluate_fid.py --protocol pixels
does; between two halves of the real digits (every other one) it is 0.84.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC

sys.path.insert(0, str(Path(__file__).parents[1]))
from engine.errors import run_main  # noqa: E402
from metrics.distances import frechet_distance  # noqa: E402


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Write the digits, or judge samples of them.")
    parser.add_argument("action", choices=("write", "judge"),
                        help="write the digits, or judge samples")
    parser.add_argument("path", type=Path, nargs="+", help="folder to write, or .npz of samples")
    return parser.parse_args(argv)


def main(args):
    digits = load_digits()
    if args.action == "write":
        for folder in args.path:
            write(folder, digits)
        return
    for path in args.path:
        samples = np.load(path, allow_pickle=False)["arr_0"]
        print(json.dumps({"samples": str(path), **judge(samples, digits)}))


def pictures(digits):
    """The digits as uint8 (N, 8, 8): grey levels 0 .. 16 become 0 .. 255."""
    return np.round(digits.images * 255 / 16).astype(np.uint8)


def write(folder, digits):
    """Write one PNG file per digit, in one folder per class."""
    for i, (image, label) in enumerate(zip(pictures(digits), digits.target)):
        path = folder / str(label) / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def judge(samples, digits):
    """The JSON line, a dict, for samples uint8 (N, 8, 8, 3)."""
    grey = samples.mean(axis=3).reshape(len(samples), 64)  # (N, 64), 0 .. 255
    svm = SVC(kernel="rbf", gamma=0.001, C=10).fit(digits.data, digits.target)
    accuracy = (svm.predict(grey * 16 / 255) == np.arange(len(grey)) % 10).mean()
    real = pictures(digits)[..., None].repeat(3, axis=3)  # RGB, as evaluate_fid.py reads them
    distance = frechet_distance(gaussian(samples), gaussian(real))
    return {"num_samples": len(grey), "accuracy": round(float(accuracy), 4),
            "frechet_distance_of_pixels": round(distance, 4)}


def gaussian(images):
    """Mean (192,) and covariance (192, 192) of images uint8 (N, 8, 8, 3) as values in [-1, 1]."""
    rows = images.reshape(len(images), -1) / 127.5 - 1
    return rows.mean(0), np.cov(rows, rowvar=False)


if __name__ == "__main__":
    run_main(main, parse_args)

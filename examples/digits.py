"""The quickstart's data and its judge: scikit-learn's 1,797 real handwritten digits, 8 x 8.

    python examples/digits.py write data/digits           the digits as an image folder
    python examples/digits.py judge samples.npz           how good samples of them are

The judge prints one JSON line. accuracy: share of samples i that an SVM trained on the real digits
takes for i modulo 10, the label of sample.py's balanced order. frechet_distance_of_pixels: to the
real digits, as evaluate_fid.py --protocol pixels measures it; two halves of them, every other one,
are 0.84 apart.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC

sys.path.insert(0, str(Path(__file__).parent.parent))
from metrics.distances import frechet_distance  # noqa: E402


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Write the digits, or judge samples of them.")
    parser.add_argument("action", choices=("write", "judge"), help="what to do")
    parser.add_argument("path", type=Path, help="folder to write, or .npz file to judge")
    return parser.parse_args(argv)


def main(args):
    digits = load_digits()
    if args.action == "write":
        write(args.path, digits)
    else:
        print(json.dumps(judge(np.load(args.path, allow_pickle=False)["arr_0"], digits)))


def pictures(digits):
    """uint8 (N, 8, 8): grey levels 0 .. 16 become 0 .. 255."""
    return np.round(digits.images * 255 / 16).astype(np.uint8)


def write(folder, digits):
    """One PNG file per digit, in a folder per class."""
    for i, (image, label) in enumerate(zip(pictures(digits), digits.target)):
        path = folder / str(label) / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def judge(samples, digits):
    """Accuracy and Frechet distance of samples uint8 (N, 8, 8, 3)."""
    grey = samples.mean(axis=3).reshape(len(samples), 64)  # (N, 64), 0 .. 255
    judge = SVC(kernel="rbf", gamma=0.001, C=10).fit(digits.data, digits.target)
    accuracy = (judge.predict(grey * 16 / 255) == np.arange(len(grey)) % 10).mean()
    real = pictures(digits)[..., None].repeat(3, axis=3)  # RGB, as evaluate_fid.py reads them
    distance = frechet_distance(gaussian(samples), gaussian(real))
    return {"num_samples": len(grey), "accuracy": round(float(accuracy), 4),
            "frechet_distance_of_pixels": round(distance, 4)}


def gaussian(images):
    """Mean and covariance of the pixels, in [-1, 1], of images uint8 (N, 8, 8, 3)."""
    rows = images.reshape(len(images), -1) / 127.5 - 1
    return rows.mean(0), np.cov(rows, rowvar=False)


if __name__ == "__main__":
    main(parse_args())

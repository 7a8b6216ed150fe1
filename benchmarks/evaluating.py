"""Time of the Frechet distance against pytorch-fid's matrix root, on 2048-dimensional statistics.

    python benchmarks/evaluating.py [--samples 5000 1000]

prints a table: processor seconds of pytorch-fid's formula (scipy.linalg.sqrtm), of ours and of
ours by_product, which the protocol pytorch-fid uses; their shares of pytorch-fid's; the relative
differences of the distances. With fewer samples than dimensions pytorch-fid takes roots of
rounding errors, so its distance and the exact one differ by about 1e-6.
"""

import argparse
import sys
import time
import warnings
from pathlib import Path

import numpy as np
from scipy import linalg

sys.path.insert(0, str(Path(__file__).parent.parent))

from metrics.distances import frechet_distance  # noqa: E402

DIM = 2048


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Time the Frechet distance.")
    parser.add_argument("--samples", type=int, nargs="+", default=[5000, 1000],
                        help="counts of samples behind the statistics")
    return parser.parse_args(argv)


def main(args):
    print("| samples | pytorch-fid | ours | share | difference | by_product | share | difference |")
    print("|---|---|---|---|---|---|---|---|")
    for count in args.samples:
        pairs = [statistics(count, seed) for seed in (0, 1)]
        theirs, their_time = timed(matrix_root, *pairs)
        ours, our_time = timed(frechet_distance, *pairs)
        product, product_time = timed(frechet_distance, *pairs, by_product=True)
        print(f"| {count} | {their_time:.1f} s | {our_time:.1f} s | {our_time / their_time:.2f} | "
              f"{abs(ours / theirs - 1):.0e} | {product_time:.1f} s | "
              f"{product_time / their_time:.2f} | {abs(product / theirs - 1):.0e} |", flush=True)


def statistics(count, seed):
    """Mean and covariance of non-negative features whose spectrum falls, as Inception's does."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(9).standard_normal((DIM, DIM)) * np.arange(1, DIM + 1) ** -0.8
    rows = np.maximum(0, rng.standard_normal((count, DIM)) @ mix.T * 0.3 + 0.4 + 0.1 * seed)
    return rows.mean(0), np.cov(rows, rowvar=False)


def matrix_root(first, second):
    """The Frechet distance by the root of a matrix, as pytorch-fid 0.3.0 computes it."""
    (m1, s1), (m2, s2) = first, second
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # singular covariances are meant
        root = np.trace(linalg.sqrtm(s1 @ s2)).real
    return (m1 - m2) @ (m1 - m2) + np.trace(s1) + np.trace(s2) - 2 * root


def timed(function, *args, **kwargs):
    """The result and the processor seconds it took, of all threads."""
    start = time.process_time()
    result = function(*args, **kwargs)
    return result, time.process_time() - start


if __name__ == "__main__":
    main(parse_args())

"""Time the Frechet distance of 2048-dimensional statistics, against pytorch-fid's formula.

    python benchmarks/evaluating.py                   # a minute on two cores
    python benchmarks/evaluating.py --samples 1000

It prints a table with a row per count of samples: CPU seconds of pytorch-fid's formula
(scipy.linalg.sqrtm), of our exact distance and of by_product, which our protocol pytorch-fid
uses; our times as shares of pytorch-fid's; the relative differences of the distances. With fewer
samples than dimensions pytorch-fid takes roots of rounding errors and differs from the exact
distance.
"""

import sys
import time
import warnings
from pathlib import Path

import numpy as np
from scipy import linalg

sys.path.insert(0, str(Path(__file__).parents[1]))
from engine.errors import run_main  # noqa: E402
from engine.options import Parser, int_range  # noqa: E402
from metrics.distances import frechet_distance  # noqa: E402

DIM = 2048


def parse_args(argv=None):
    parser = Parser(__doc__.split("\n", 1)[0])
    parser.add_argument("--samples", type=int_range(2), nargs="+", default=[5000, 1000],
                        help="numbers of samples behind the statistics, a row each")
    return parser.parse_args(argv)


def main(args):
    print("| samples | pytorch-fid | exact | share | difference "
          "| by_product | share | difference |")
    print("|---" * 8 + "|")
    for count in args.samples:
        pairs = [statistics(count, seed) for seed in (0, 1)]
        theirs, their_time = timed(matrix_root, *pairs)
        ours, our_time = timed(frechet_distance, *pairs)
        product, product_time = timed(frechet_distance, *pairs, by_product=True)
        print(f"| {count} | {their_time:.1f} s | {our_time:.1f} s | {our_time / their_time:.2f} | "
              f"{abs(ours / theirs - 1):.0e} | {product_time:.1f} s | "
              f"{product_time / their_time:.2f} | {abs(product / theirs - 1):.0e} |", flush=True)


def statistics(count, seed):
    """Mean (DIM,) and covariance (DIM, DIM) of non-negative features with a falling spectrum, as
    Inception's are."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(9).standard_normal((DIM, DIM)) * np.arange(1, DIM + 1) ** -0.8
    rows = np.maximum(0, rng.standard_normal((count, DIM)) @ mix.T * 0.3 + 0.4 + 0.1 * seed)
    return rows.mean(0), np.cov(rows, rowvar=False)


def matrix_root(first, second):
    """The Frechet distance with a matrix root, as pytorch-fid 0.3.0 computes it.

    first, second: pairs of mean (D,) and covariance (D, D).
    """
    (m1, s1), (m2, s2) = first, second
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of singular covariances
        root = np.trace(linalg.sqrtm(s1 @ s2)).real
    return (m1 - m2) @ (m1 - m2) + np.trace(s1) + np.trace(s2) - 2 * root


def timed(function, *args, **kwargs):
    """(result, CPU seconds of all threads)."""
    start = time.process_time()
    result = function(*args, **kwargs)
    return result, time.process_time() - start


if __name__ == "__main__":
    run_main(main, parse_args)

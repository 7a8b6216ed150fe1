"""Several results as one: mean and standard deviation of each metric, and a line that says which
differences are no larger than chance.

Dufour et al., "The FID Lottery" (arXiv 2606.20536), trained several hundred SiTs on ImageNet 256:
training a network again from another seed moves FID 3.2 times as much as sampling it again, and the
coefficient of variation is 1 to 2 %.
"""

from itertools import pairwise

import numpy as np

RETRAINING = 3.2  # by how many times the spread of resampling FID moves
LIMIT = 0.02  # the upper end of the coefficient of variation
SOURCE = "arXiv 2606.20536"


def spread(results, metrics, name, names):
    """One result of several, which differ in the value of name: what is the same in all, their
    values of name as names, and mean and std (n - 1) of the metrics, each a dict by key."""
    values = {key: [result[key] for result in results] for key in metrics if key in results[0]}
    same = {key: value for key, value in results[0].items()
            if key not in values and all(result[key] == value for result in results)}
    return same | {names: [result[name] for result in results],
                   "mean": {key: float(np.mean(row)) for key, row in values.items()},
                   "std": {key: float(np.std(row, ddof=1)) for key, row in values.items()}}


def resampling_note(key, summary):
    """A line on what the spread of one model's seeds says of other differences in the metric."""
    mean, std = summary["mean"][key], summary["std"][key]
    share = f" or {100 * std / mean:.2g} %" if mean else ""
    return (f"note: resampling alone moves {key} by {std:.2g}{share} (standard deviation over "
            f"{len(summary['seeds'])} seeds): values of one seed each that differ by less than "
            f"{8**0.5 * std:.2g} say nothing about two models; retraining moves FID {RETRAINING} "
            f"times as much ({SOURCE})")


def closeness_notes(key, results):
    """Lines on the sample sets whose metrics are so close that retraining alone explains it: in the
    order of the metric, neighbours closer than LIMIT."""
    runs = []
    for result in sorted(results, key=lambda result: result[key]):
        if runs and _share(runs[-1][-1][key], result[key]) < LIMIT:
            runs[-1].append(result)
        else:
            runs.append([result])
    return [f"note: {key} of {', '.join(result['samples'] for result in run)} differs by "
            f"{100 * max(_share(a[key], b[key]) for a, b in pairwise(run)):.2g} % from one to the "
            f"next: retraining alone moves FID by 1 to 2 % ({SOURCE}), which tells no models apart"
            for run in runs if len(run) > 1]


def _share(low, high):
    """Their difference as a share of the larger."""
    return (high - low) / high if high else 0.0

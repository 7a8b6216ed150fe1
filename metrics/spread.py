"""Several results as one: mean and standard deviation of each metric, and a line that says which
differences are no larger than chance.

Dufour et al., "The FID Lottery" (arXiv 2606.20536), trained several hundred SiTs on ImageNet 256:
training a network again from another seed moves FID 3.2 times as much as sampling it again, and the
coefficient of variation is 1 to 2 %.
"""

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


def resampling_note(extractor, summary):
    """A line on what the spread of one model's seeds says of other differences in the distance of
    an Extractor; of FID also on retraining, of which nothing is published for other distances."""
    mean, std = summary["mean"][extractor.key], summary["std"][extractor.key]
    share = f" or {100 * std / mean:.2g} %" if mean else ""
    retraining = (f"; retraining moves FID {RETRAINING} times as much ({SOURCE})"
                  if extractor.is_fid else "")
    return (f"note: resampling alone moves {extractor.key} by {std:.2g}{share} (standard deviation "
            f"over {len(summary['seeds'])} seeds): values of one seed each that differ by less "
            f"than {8**0.5 * std:.2g} say nothing about two models{retraining}")


def closeness_notes(results):
    """Lines on the sample sets whose FIDs are so close that retraining alone explains it: in the
    order of FID, neighbours closer than LIMIT."""
    runs = []
    for result in sorted(results, key=lambda result: result["fid"]):
        if runs and _share(runs[-1][-1], result) < LIMIT:
            runs[-1].append(result)
        else:
            runs.append([result])
    return [f"note: fid of {', '.join(result['samples'] for result in run)} differs by "
            f"{100 * max(map(_share, run, run[1:])):.2g} % from one to the "
            f"next: retraining alone moves FID by 1 to 2 % ({SOURCE}), which tells no models apart"
            for run in runs if len(run) > 1]


def _share(low, high):
    """The difference of the FIDs of two results as a share of the larger."""
    return (high["fid"] - low["fid"]) / high["fid"] if high["fid"] else 0.0

"""Mean and standard deviation of results, and what is said of their differences."""

import numpy as np
import pytest

from metrics.extractors import extractor_of
from metrics.spread import closeness_notes, resampling_note, spread

RESULTS = [{"protocol": "adm", "seed": seed, "fid": fid, "recall": recall, "ref": "r", "n": seed}
           for seed, fid, recall in ((3, 4.0, 0.5), (1, 4.1, 0.25), (7, 4.5, 0.75))]


def test_spread_has_what_is_the_same_and_numpys_mean_and_deviation():
    summary = spread(RESULTS, ["fid", "sfid", "recall"], "seed", "seeds")
    assert summary.keys() == {"protocol", "ref", "seeds", "mean", "std"}
    assert summary["protocol"] == "adm" and summary["seeds"] == [3, 1, 7]
    for key in ("fid", "recall"):
        row = np.array([result[key] for result in RESULTS])
        assert summary["mean"][key] == pytest.approx(row.mean(), rel=1e-12)
        assert summary["std"][key] == pytest.approx(
            (((row - row.mean()) ** 2).sum() / (len(row) - 1)) ** 0.5, rel=1e-12)
    same = spread(RESULTS[:1] * 2, ["fid", "recall"], "seed", "seeds")
    assert same["std"] == {"fid": 0, "recall": 0} and same["mean"]["recall"] == 0.5  # no constant


def test_the_spread_of_seeds_says_which_differences_are_chance():
    summary = {"seeds": [0, 1], "mean": {"fid": 20.0}, "std": {"fid": 0.1}}
    line = resampling_note(extractor_of("adm"), summary)
    assert "moves fid by 0.1 or 0.5 % (standard deviation over 2 seeds)" in line
    assert "less than 0.28 " in line and line.endswith("3.2 times as much (arXiv 2606.20536)")
    # Of the Frechet distance of pixels nothing of the kind is published
    assert resampling_note(extractor_of("pixels"), summary).endswith("nothing about two models")
    summary["mean"]["fid"] = summary["std"]["fid"] = 0.0
    assert "moves fid by 0 (standard" in resampling_note(extractor_of("adm"), summary)


@pytest.mark.parametrize("values, lines", [
    ([4.0, 4.1], []), ([4.0, 4.06], ["a, b differs by 1.5 %"]),
    ([4.06, 4.0], ["b, a differs by 1.5 %"]), ([4.0, 4.06, 5.0], ["a, b differs by 1.5 %"]),
    ([5.0, 4.06, 4.0, 4.02, 5.02], ["c, d, b differs by 0.99 %", "a, e differs by 0.4 %"]),
    ([0.0, 0.0], ["a, b differs by 0 %"]), ([0.0, 1.0], []), ([4.0], [])])
def test_sets_that_retraining_alone_would_explain_are_named(values, lines):
    """One line for neighbours in the order of the metric that differ by less than 2 %."""
    said = closeness_notes([{"samples": name, "fid": value}
                            for name, value in zip("abcde", values)])
    assert len(said) == len(lines)
    for line, words in zip(said, lines):
        assert f"fid of {words} from one to the next" in line and "arXiv 2606.20536" in line

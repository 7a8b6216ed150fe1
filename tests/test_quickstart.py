"""The first command of README.md, from nothing to pictures, with a few steps of training."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from PIL import Image


@pytest.mark.slow
def test_the_quickstart_trains_samples_and_evaluates(tmp_path):
    """Without a warning: a newcomer saw PyTorch's own between the first lines."""
    settings = {"QUICKSTART_PYTHON": sys.executable, "QUICKSTART_DATA": str(tmp_path / "digits"),
                "QUICKSTART_RUN": str(tmp_path / "run"), "QUICKSTART_STEPS": "3"}
    done = subprocess.run(["bash", ROOT / "quickstart.sh"], env=os.environ | settings, text=True,
                          capture_output=True)
    assert done.returncode == 0 and "Warning:" not in done.stderr, done.stderr
    for name in ("run/1-step.png", "run/2-step.png", "run/samples/0000003.png"):
        assert Image.open(tmp_path / name).width == 10 * 66 + 2
    metrics = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [m["num_samples"] for m in metrics] == [1797, 1797, 1797]
    measured, judged, other = metrics
    assert (judged["samples"], other["samples"]) == (f"{tmp_path}/run/1-step.npz",
                                                     f"{tmp_path}/run/2-step.npz")
    assert measured["fid"] == pytest.approx(judged["frechet_distance_of_pixels"], abs=1e-3)

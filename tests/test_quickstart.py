"""The first command of README.md, from nothing to pictures, with a few steps of training; and the
.venv that it makes."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

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


# Makes and fills a .venv as Python does, but for the packages: notes what it is asked
PYTHON = """#!/bin/bash
echo "$*" >> asked
case "$*" in
    "-c import sys"*) exit ${TOO_OLD:-0};;
    "-c import os"*) test -e .venv/pyvenv.cfg;;
    "-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python; touch .venv/pyvenv.cfg
                eval "$INTERRUPT_VENV"; touch .venv/pip;;
    "-m pip --version") test -e .venv/pip;;
    "-m ensurepip") touch .venv/pip;;
    "-m pip install"*) eval "$INTERRUPT_PIP"; test -e .venv/pip;;
esac
"""


@pytest.fixture
def prepare(tmp_path):
    """A function that sources environment.sh in a folder: (exit code, stderr, what a stand-in for
    Python was asked)."""
    shutil.copy(ROOT / "environment.sh", tmp_path)
    (tmp_path / "requirements.txt").write_text("torch")
    (tmp_path / "bin").mkdir()
    for name in ("python3", "python"):
        (tmp_path / "bin" / name).write_text(PYTHON)
        (tmp_path / "bin" / name).chmod(0o755)

    def run(**variables):
        (tmp_path / "asked").write_text("")
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", "source environment.sh; prepare requirements.txt"],
            cwd=tmp_path, text=True, capture_output=True,
            env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "INTERRUPT_VENV": "true",
                 "INTERRUPT_PIP": "true", **variables})
        return done.returncode, done.stderr, (tmp_path / "asked").read_text()
    return run


def test_a_venv_is_made_and_filled_once(prepare, tmp_path):
    code, _, asked = prepare()
    assert code == 0 and "-m venv" in asked and "-r requirements.txt" in asked
    code, said, asked = prepare()
    assert code == 0 and said == "" and "-m" not in asked
    (tmp_path / "requirements.txt").write_text("torch\nnumpy")
    code, _, asked = prepare()
    assert code == 0 and "-m venv" not in asked and "--force-reinstall" not in asked
    assert "-r requirements.txt" in asked


@pytest.mark.parametrize("interrupt, repairs", [
    ("INTERRUPT_VENV", "-m ensurepip"), ("INTERRUPT_PIP", "--force-reinstall -r")])
def test_what_was_interrupted_is_repaired(interrupt, repairs, prepare):
    """No pip, or half a package, was there for good."""
    assert prepare(**{interrupt: "kill -9 $PPID; exit"})[0] == -9
    code, _, asked = prepare()
    assert code == 0 and repairs in asked
    assert "-m" not in prepare()[2]


def test_a_venv_whose_python_is_gone_is_made_anew_and_an_old_one_named(prepare, tmp_path):
    prepare()
    (tmp_path / ".venv" / "mine").touch()
    code, said, _ = prepare(TOO_OLD="1")
    assert code == 2 and said.count("\n") == 1 and "remove the folder .venv" in said
    assert (tmp_path / ".venv" / "mine").exists()
    (tmp_path / ".venv" / "bin" / "python").unlink()
    (tmp_path / ".venv" / "bin" / "python").symlink_to("/nowhere/python3.9")
    code, said, _ = prepare(TOO_OLD="1")
    assert code == 2 and "Found no Python" in said
    code, said, _ = prepare(INTERRUPT_VENV="exit 1")
    assert code == 2 and "remove .venv" in said
    (tmp_path / ".venv" / "bin" / "python").unlink()
    code, _, asked = prepare()
    assert code == 0 and "-m venv --clear .venv" in asked


def test_a_venv_that_is_half_removed_is_made_anew(prepare, tmp_path):
    """Without pyvenv.cfg its Python installs into the one that it was made with."""
    prepare()
    (tmp_path / ".venv" / "pyvenv.cfg").unlink()
    assert "-m venv --clear .venv" in prepare()[2]


@pytest.mark.skipif(not shutil.which("flock"), reason="needs flock")
def test_of_two_at_once_one_waits_for_the_other(prepare):
    """Each cleared what the other made."""
    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(lambda _: prepare(INTERRUPT_PIP="sleep 0.5"), range(2)))
    assert [code for code, *_ in ends] == [0, 0]
    assert max((asked for *_, asked in ends), key=len).count("-m venv") == 1

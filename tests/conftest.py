"""What several test files share: the digits as an image folder, and scripts run as users do."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tests run beside each other's processes; threads would fight for the cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """200 real handwritten digits, 8 x 8, in ten class folders."""
    folder = tmp_path_factory.mktemp("digits")
    source = load_digits()
    for i in range(200):
        path = folder / str(source.target[i]) / f"{i:04d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((source.images[i] * 15).astype(np.uint8)).save(path)
    return folder


def command(script, *options, processes=1):
    """The command line of a script in so many processes."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launch, str(ROOT / script), *map(str, options)]


def run_script(script, *options, processes=1, timeout=300, **env):
    """Run a script to its end; (exit code, stdout, stderr) are in the result."""
    return subprocess.run(
        command(script, *options, processes=processes), capture_output=True, text=True,
        timeout=timeout, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **env})


@pytest.fixture(scope="session")
def trained(tmp_path_factory, digits):
    """The checkpoint of a tiny run: 12 steps in pixel space."""
    folder = tmp_path_factory.mktemp("trained")
    done = run_script("train.py", *tiny(digits, folder), "--max-steps", 12)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def tiny(digits, run_dir):
    """Options of a run that takes seconds."""
    return ["--data-path", digits, "--run-dir", run_dir, "--vae", "none", "--image-size", 8,
            "--model", "DiT-T/4", "--global-batch-size", 16, "--num-workers", 0, "--lr", 1e-3,
            "--ema-decay", 0.9, "--log-every", 4, "--sample-every", 0, "--ckpt-every", 10]

"""Sampling from a checkpoint alone, in any number of processes."""

import json

import numpy as np
import pytest
from conftest import run_script
from PIL import Image


@pytest.fixture(scope="module")
def sampled(trained, tmp_path_factory):
    """21 images in two processes, whose last batch is not full."""
    folder = tmp_path_factory.mktemp("sampled") / "two"
    done = run_script("sample.py", *options(trained, folder), processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(folder)
    return folder


def options(trained, folder):
    return ["--ckpt", trained, "--sample-dir", folder, "--num-fid-samples", 21,
            "--per-proc-batch-size", 4]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_one_and_two_processes_sample_the_same_bytes(trained, sampled):
    one = sampled.with_name("one")
    done = run_script("sample.py", *options(trained, one))
    assert done.returncode == 0, done.stderr
    assert files(one) == files(sampled)
    npz = [np.load(folder.with_name(folder.name + ".npz"))["arr_0"] for folder in (one, sampled)]
    assert np.array_equal(*npz)


def test_the_npz_holds_the_images_in_order(sampled):
    images = np.load(sampled.with_name("two.npz"), allow_pickle=False)["arr_0"]
    assert images.shape == (21, 8, 8, 3) and images.dtype == np.uint8
    for i in range(21):
        assert np.array_equal(images[i], np.asarray(Image.open(sampled / f"{i:06d}.png")))
    assert len({image.tobytes() for image in images}) == 21
    assert Image.open(sampled.with_name("two.png")).width == 10 * 66 + 2


def test_an_interrupted_command_goes_on_where_it_stopped(trained, sampled):
    before = files(sampled)
    (sampled / "000002.png").unlink()
    (sampled / "000020.png").unlink()
    untouched = (sampled / "000005.png").stat().st_mtime_ns
    done = run_script("sample.py", *options(trained, sampled))
    assert done.returncode == 0, done.stderr
    assert files(sampled) == before
    assert (sampled / "000005.png").stat().st_mtime_ns == untouched


def test_image_i_depends_on_seed_plus_i(trained, sampled):
    shifted = sampled.with_name("shifted")
    done = run_script("sample.py", *options(trained, shifted), "--seed", 10)
    assert done.returncode == 0, done.stderr
    # Labels are balanced over ten classes, so that image 10 + i has the label of image i
    assert (shifted / "000003.png").read_bytes() == (sampled / "000013.png").read_bytes()


def test_steps_and_random_labels_change_the_images(trained, sampled):
    for name, extra in (("steps", ["--num-sampling-steps", 2]), ("labels", ["--labels", "random"])):
        other = sampled.with_name(name)
        done = run_script("sample.py", *options(trained, other), *extra)
        assert done.returncode == 0, done.stderr
        assert files(other) != files(sampled)
        assert json.loads((other / "samples.json").read_text())["images"] == 21

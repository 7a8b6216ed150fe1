"""Sampling from a checkpoint alone, in any number of processes."""

import json
import random
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import call, run_script
from PIL import Image
from soak import Child

import sample
from engine.files import lock_folder
from engine.options import UserError
from metrics.inception import PROTOCOLS
from metrics.reference import METRICS, Reference


@pytest.fixture(scope="module")
def sampled(trained, tmp_path_factory):
    """21 images in two processes of two threads each, whose last batch is not full."""
    folder = tmp_path_factory.mktemp("sampled") / "two"
    done = run_script("sample.py", *options(trained, folder), processes=2, OMP_NUM_THREADS="2")
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
    call("sample", *options(trained, one))
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
    call("sample", *options(trained, sampled))
    assert files(sampled) == before
    assert (sampled / "000005.png").stat().st_mtime_ns == untouched


def test_a_killed_command_loses_nothing(trained, sampled):
    """SIGKILL at four random moments, of which the last ones may come too late."""
    killed, moments, codes = sampled.with_name("killed"), random.Random(0), []
    for _ in range(4):
        there = len(list(killed.glob("*.png")))
        child = Child("sample", *options(trained, killed), output=killed.with_suffix(".txt"))
        target = min(there + moments.randint(0, 8), 17)
        while child.alive and len(list(killed.glob("*.png"))) < target:
            time.sleep(0.001)
        child.process.kill()
        codes.append(child.wait()[0])
    assert codes[0] == -9 and set(codes) <= {-9, 0}
    call("sample", *options(trained, killed))
    assert files(killed) == files(sampled)


def test_images_of_another_seed_are_others(trained, sampled):
    """Image i of seed 1 was image i + 1 of seed 0, noise and random label alike."""
    def images(name, *extra):
        call("sample", *options(trained, sampled.with_name(name)), *extra)
        return {image.tobytes() for image in np.load(sampled.with_name(f"{name}.npz"))["arr_0"]}

    seeds = [images(f"{labels} {seed}", "--labels", labels, "--seed", seed)
             for labels in ("balanced", "random") for seed in (0, 1)]
    assert not seeds[0] & seeds[1] and not seeds[2] & seeds[3]


def test_a_folder_of_images_from_another_rule_of_noise_is_refused(trained, tmp_path):
    """Half of the images would be of seed + i, as they were once made, the rest of the hash."""
    call("sample", *options(trained, tmp_path / "old"))
    (tmp_path / "old" / "000020.png").unlink()
    marker = tmp_path / "old" / "samples.json"
    stored = json.loads(marker.read_text())
    del stored["noise"]
    marker.write_text(json.dumps(stored))
    before = files(tmp_path / "old")
    with pytest.raises(UserError, match="--sample-dir must be new.*noise None there.*another"):
        call("sample", *options(trained, tmp_path / "old"))
    assert files(tmp_path / "old") == before


def test_a_folder_without_an_image_may_become_another_commands(trained, tmp_path):
    """As a command that failed for its batch size, say, leaves it."""
    call("sample", *options(trained, tmp_path / "new"), "--per-proc-batch-size", 10000)
    for path in [*tmp_path.glob("new.*"), *(tmp_path / "new").glob("*.png")]:
        path.unlink()
    (tmp_path / "new" / ".samples.json.1.tmp").write_text("{")
    call("sample", *options(trained, tmp_path / "new"))
    assert len(list((tmp_path / "new").iterdir())) == 22


def test_one_command_samples_into_a_folder_at_a_time(trained, sampled, tmp_path):
    """Two commands mixed their images, and both exited with 0."""
    with lock_folder("--sample-dir", tmp_path / "new"):
        with pytest.raises(UserError, match="--sample-dir must be of one run .*process .* since"):
            call("sample", *options(trained, tmp_path / "new"))
        assert [path.name for path in (tmp_path / "new").iterdir()] == [".lock"]
    (tmp_path / "new" / ".lock").write_text("process 1")  # as a killed command leaves it
    call("sample", *options(trained, tmp_path / "new"))
    assert files(tmp_path / "new") == files(sampled)


def test_the_folder_is_checked_again_once_it_is_held(trained, sampled, tmp_path, monkeypatch):
    """A command that waited for another's end took over its folder."""
    alone = lock_folder

    def wait_for_another_command(option, folder):
        shutil.copytree(sampled, folder)
        return alone(option, folder)

    monkeypatch.setattr("sample.lock_folder", wait_for_another_command)
    with pytest.raises(UserError, match="--sample-dir must be new.*seed 0 there, 1 here"):
        call("sample", *options(trained, tmp_path / "new"), "--seed", 1)
    assert files(tmp_path / "new") == files(sampled)


def test_files_beside_the_folder_are_not_replaced(trained, tmp_path):
    """A reference that is named as the folder, say."""
    (tmp_path / "new.npz").write_text("precious")
    with pytest.raises(UserError, match="--sample-dir must be new.*new.npz is not of this"):
        call("sample", *options(trained, tmp_path / "new"))
    assert [path.name for path in tmp_path.iterdir()] == ["new.npz"]


def test_steps_and_random_labels_change_the_images(trained, sampled):
    for name, extra in (("steps", ["--num-sampling-steps", 2]), ("labels", ["--labels", "random"])):
        other = sampled.with_name(name)
        call("sample", *options(trained, other), *extra)
        assert files(other) != files(sampled)
        assert json.loads((other / "samples.json").read_text())["images"] == 21


def reference(digits, path):
    """Pixel statistics of the real digits."""
    call("evaluate_fid", "--samples", digits, "--make-ref", path, "--protocol", "pixels",
         "--image-size", 8, "--num-workers", 0)
    return path


def result(capfd):
    return json.loads(capfd.readouterr().out.strip().splitlines()[-1])


def test_metrics_of_sampling_are_those_of_the_files(trained, digits, tmp_path, capfd):
    """With and without files, in one and two processes, and of files that are there already."""
    ref = reference(digits, tmp_path / "ref.npz")
    evaluate = ["--fid-ref", ref, "--protocol", "pixels"]
    call("evaluate_fid", "--samples", sample_all(trained, tmp_path / "files"), "--ref", ref,
         "--protocol", "pixels", "--num-workers", 0)
    expected = result(capfd)["fid"]
    for folder, extra in (("files", []), ("new", []), ("none", ["--no-save-images"])):
        call("sample", *options(trained, tmp_path / folder), *evaluate, *extra)
        metrics = result(capfd)
        assert metrics["fid"] == pytest.approx(expected, rel=1e-9)
        assert metrics["num_samples"] == 21 and metrics["protocol"] == "pixels"
        assert metrics["num_reference"] == 200 and metrics["seed"] == 0
    assert not (tmp_path / "none").exists() and not (tmp_path / "none.npz").exists()
    done = run_script("sample.py", *options(trained, tmp_path / "two"), *evaluate,
                      "--no-save-images", processes=2)
    assert json.loads(done.stdout)["fid"] == pytest.approx(expected, rel=1e-9), done.stderr


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_setting_replaces_a_metric(protocol, capfd, monkeypatch):
    """The option --precision, tf32, once stood where ADM's precision belongs."""
    metrics = {"protocol": protocol, "num_samples": 5, "fid": 2.5} | (
        {"sfid": 3.5, "inception_score": 4.5, "precision": 0.5, "recall": 0.25}
        if protocol == "adm" else {})
    assert metrics.keys() <= {"protocol", "num_samples", *METRICS}
    args = sample.parse_args(["--ckpt", "x.pt", "--fid-ref", "ref.npz", "--protocol", protocol])
    reference = Reference("ref", (), scores=False, count=5)
    sample.report(args, {"vae": "none"}, SimpleNamespace(reference=reference), metrics)
    said = result(capfd)
    assert {key: said[key] for key in metrics} == metrics
    assert len(said) == len(metrics) + 8 and said["sampling_precision"] == "tf32"


def sample_all(trained, folder):
    call("sample", *options(trained, folder))
    return folder

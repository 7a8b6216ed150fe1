"""examples/fashion_mnist.py with small made-up files: what it writes, judges and refuses."""

import gzip
import importlib
import json
from urllib.error import URLError

import numpy as np
import pytest
import torch
from conftest import ROOT, call, flip_bit
from PIL import Image
from torchvision import datasets

COUNTS = {"train": 300, "t10k": 100}


@pytest.fixture(autouse=True)
def module(monkeypatch):
    """The module, found as when it is run, with a classifier of a few steps."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    module = importlib.import_module("fashion_mnist")
    monkeypatch.setattr(module, "BATCH", 20)
    monkeypatch.setattr(module, "EPOCHS", 4)
    return module


def idx(array):
    """The bytes of a gzipped IDX file."""
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    return gzip.compress(head + array.tobytes(), mtime=0)


def made_up(count, seed):
    """Images (N, 28, 28), a bright bar in the place of the label in noise, and labels (N,)."""
    random = np.random.RandomState(seed)
    labels = random.permutation(np.arange(count) % 10).astype(np.uint8)
    images = random.randint(0, 100, (count, 28, 28)).astype(np.uint8)
    for image, label in zip(images, labels):
        image[2 * label + 3:2 * label + 7] += 150
    return images, labels


@pytest.fixture
def source(tmp_path):
    """A folder with the four files."""
    folder = tmp_path / "source"
    folder.mkdir()
    for seed, (prefix, count) in enumerate(COUNTS.items()):
        images, labels = made_up(count, seed)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(idx(labels))
    return folder


@pytest.fixture
def data(source, tmp_path):
    """The folder that the script wrote."""
    call("fashion_mnist", "write", tmp_path / "data", "--source", source)
    return tmp_path / "data"


def test_write_makes_a_folder_of_each_class(data, module):
    for seed, (split, count) in enumerate(zip(("train", "test"), COUNTS.values())):
        images, labels = made_up(count, seed)
        assert sorted(path.name for path in (data / split).iterdir()) == sorted(module.CLASSES)
        assert len(list((data / split).rglob("*.png"))) == count
        for i in (0, 1, count - 1):
            path = data / split / module.CLASSES[labels[i]] / f"{i:05d}.png"
            assert np.array_equal(Image.open(path), images[i])


def test_write_makes_only_what_is_missing(data, source, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "FashionMNIST", None)  # to download is an error
    before = (data / "test" / "Bag").stat().st_mtime_ns
    call("fashion_mnist", "write", data)
    assert "already" in capsys.readouterr().err
    (data / "train").rename(data / "old")
    call("fashion_mnist", "write", data, "--source", source)
    assert len(list((data / "train").rglob("*.png"))) == COUNTS["train"]
    assert (data / "test" / "Bag").stat().st_mtime_ns == before


def test_write_takes_the_files_that_torchvision_downloads(source, tmp_path, monkeypatch):
    class Downloaded:
        raw_folder = str(source)

        def __init__(self, root, download):
            assert root == tmp_path / "data" and download
    monkeypatch.setattr(datasets, "FashionMNIST", Downloaded)
    call("fashion_mnist", "write", tmp_path / "data")
    assert len(list((tmp_path / "data" / "test").rglob("*.png"))) == COUNTS["t10k"]


def samples_of(data, module):
    """Real images (50, 28, 28, 3) with the labels that sample.py gives: i modulo 10 of the sorted
    classes."""
    files = [sorted((data / "test" / name).iterdir())[:5] for name in sorted(module.CLASSES)]
    return np.stack([np.array(Image.open(path).convert("RGB")) for row in zip(*files)
                     for path in row])


def test_judge_tells_good_samples_from_bad(data, module, tmp_path, monkeypatch, capsys):
    """And the classifier is trained once."""
    good = samples_of(data, module)
    noise = np.random.RandomState(9).randint(0, 256, good.shape).astype(np.uint8)
    (tmp_path / "good").mkdir()
    for i, image in enumerate(good):
        Image.fromarray(image).save(tmp_path / "good" / f"{i:06d}.png")
    for name, images in {"good": good, "shifted": np.roll(good, 1, 0), "noise": noise}.items():
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
    call("fashion_mnist", "judge", data)
    out, err = capsys.readouterr()
    alone = json.loads(out)
    assert alone["num_samples"] == 100 and "of the test split recognised" in err

    monkeypatch.setattr(module, "train_classifier", None)
    names = ["good.npz", "good", "shifted.npz", "noise.npz"]
    call("fashion_mnist", "judge", data, *(tmp_path / name for name in names))
    real, *lines, mean = map(json.loads, capsys.readouterr().out.splitlines())
    assert real["num_samples"] == 50 and real["accuracy"] == alone["accuracy"] > 0.9
    assert [line["samples"] for line in lines] == [str(tmp_path / name) for name in names]
    npz, folder, shifted, bad = lines
    assert npz["accuracy"] > 0.9 and npz | {"samples": ""} == folder | {"samples": ""}
    assert shifted["accuracy"] < 0.1
    assert shifted["frechet_distance"] == pytest.approx(npz["frechet_distance"], abs=2e-3)
    assert bad["accuracy"] < 0.5 and bad["frechet_distance"] > 10 * npz["frechet_distance"]
    for key in ("accuracy", "frechet_distance"):
        values = [line[key] for line in lines]
        assert mean[key] == pytest.approx(np.mean(values), abs=2e-3)
        assert mean[f"{key}_std"] == pytest.approx(np.std(values, ddof=1), abs=2e-3)


@pytest.mark.slow
def test_samples_of_a_run_are_judged(data, tmp_path, capsys):
    """At the size of the run, beside real images of that size."""
    call("train", "--data-path", data / "train", "--run-dir", tmp_path / "run", "--vae", "none",
         "--image-size", 16, "--model", "DiT-T/4", "--cfg", 1, "--max-steps", 2,
         "--global-batch-size", 8, "--num-workers", 0, "--sample-every", 0)
    call("sample", "--ckpt", tmp_path / "run" / "checkpoints" / "0000002.pt", "--num-fid-samples",
         20, "--sample-dir", tmp_path / "samples")
    capsys.readouterr()
    call("fashion_mnist", "judge", data, tmp_path / "samples", tmp_path / "samples.npz")
    _, folder, npz, _ = map(json.loads, capsys.readouterr().out.splitlines())
    assert folder["num_samples"] == 20 and folder | {"samples": ""} == npz | {"samples": ""}
    assert [path.name for path in data.glob("*.pt")] == ["classifier-16.pt"]


def change(path, edit):
    path.write_bytes(edit(path.read_bytes()))


@pytest.mark.parametrize("edit, word", [
    (lambda data: data[:1000], "end-of-stream"),
    (lambda data: b"<html>" + data, "gzip"),
    (lambda data: data[:-8] + b"\0" * 8, "CRC"),
    (lambda data: gzip.compress(b"\0\0\x0d\1" + b"\0" * 4), "no IDX"),
    (lambda data: gzip.compress(b"\0\0\x08"), "no IDX"),
    (lambda data: gzip.compress(gzip.decompress(data)[:-1]), "78399 values"),
])
def test_write_refuses_torn_files(edit, word, source, tmp_path, refusal):
    change(source / "t10k-images-idx3-ubyte.gz", edit)
    line = refusal("fashion_mnist", ["write", tmp_path / "data", "--source", source], "--source")
    assert "t10k-images-idx3-ubyte.gz" in line and word in line, line


@pytest.mark.parametrize("name, array", [
    ("images-idx3", np.zeros((100, 32, 32), np.uint8)), ("labels-idx1", np.zeros(99, np.uint8)),
    ("labels-idx1", np.full(100, 10, np.uint8)), ("labels-idx1", np.zeros((100, 1), np.uint8)),
])
def test_write_refuses_other_data(name, array, source, tmp_path, refusal):
    (source / f"t10k-{name}-ubyte.gz").write_bytes(idx(array))
    refusal("fashion_mnist", ["write", tmp_path / "data", "--source", source], "--source")


def test_write_without_files_says_where_they_are(source, tmp_path, monkeypatch, refusal):
    (source / "train-labels-idx1-ubyte.gz").unlink()
    line = refusal("fashion_mnist", ["write", tmp_path / "data", "--source", source], "--source")
    assert "train-labels-idx1-ubyte.gz" in line and "apt install dataset-fashion-mnist" in line

    def offline(*_, **__):
        raise URLError("Name or service not known")
    monkeypatch.setattr(datasets, "FashionMNIST", offline)
    line = refusal("fashion_mnist", ["write", tmp_path / "data"], "--source")
    assert "apt install dataset-fashion-mnist" in line


def test_options_of_the_other_action_are_refused(tmp_path, refusal):
    refusal("fashion_mnist", ["write", tmp_path, tmp_path / "a.npz"], "samples")
    refusal("fashion_mnist", ["judge", tmp_path, "--source", tmp_path], "--source")


def test_judge_refuses_what_it_cannot_read(data, module, tmp_path, refusal):
    np.savez(tmp_path / "small.npz", arr_0=np.zeros((3, 7, 7, 3), np.uint8))
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((3, 32, 32, 3), np.uint8))
    np.savez(tmp_path / "wide.npz", arr_0=np.zeros((3, 16, 20, 3), np.uint8))
    np.savez(tmp_path / "one.npz", arr_0=np.zeros((1, 28, 28, 3), np.uint8))
    np.savez(tmp_path / "torn.npz", arr_0=np.zeros((9, 28, 28, 3), np.uint8))
    flip_bit(tmp_path / "torn.npz", 5000)
    for name in ("small.npz", "large.npz", "wide.npz", "one.npz", "torn.npz", "missing.npz"):
        line = refusal("fashion_mnist", ["judge", data, tmp_path / name], "samples")
        assert name in line
    for size in (12, 16):
        np.savez(tmp_path / f"{size}.npz", arr_0=np.zeros((3, size, size, 3), np.uint8))
    assert "one size" in refusal(
        "fashion_mnist", ["judge", data, tmp_path / "12.npz", tmp_path / "16.npz"], "16.npz")
    refusal("fashion_mnist", ["judge", tmp_path / "nothing"], "write")
    torch.save({"other": 1}, data / "classifier-28.pt")
    assert "remove it" in refusal("fashion_mnist", ["judge", data], "classifier-28.pt")
    (data / "classifier-28.pt").write_bytes(b"torn")
    refusal("fashion_mnist", ["judge", data], "classifier-28.pt")

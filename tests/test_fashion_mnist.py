"""examples/fashion_mnist.py with small made-up files: what it writes, judges and refuses."""

import gzip
import importlib
import json
from types import SimpleNamespace
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
def data(source, tmp_path, monkeypatch):
    """The folder that the script wrote, of files that torchvision would have downloaded."""
    monkeypatch.setattr(datasets, "FashionMNIST", lambda root, download: SimpleNamespace(
        raw_folder=source if download and root == tmp_path / "data" else None))
    call("fashion_mnist", "write", tmp_path / "data")
    return tmp_path / "data"


def test_write_makes_a_folder_of_each_class_and_only_what_is_missing(data, source, module,
                                                                     monkeypatch):
    for seed, (split, count) in enumerate(zip(("train", "test"), COUNTS.values())):
        images, labels = made_up(count, seed)
        assert sorted(path.name for path in (data / split).iterdir()) == sorted(module.CLASSES)
        assert len(list((data / split).rglob("*.png"))) == count
        for i in (0, 1, count - 1):
            path = data / split / module.CLASSES[labels[i]] / f"{i:05d}.png"
            assert np.array_equal(Image.open(path), images[i])
    monkeypatch.setattr(datasets, "FashionMNIST", None)  # to download is an error
    (data / "train").rename(data / "old")
    (data / "test" / "mark").mkdir()
    call("fashion_mnist", "write", data, "--source", source)
    call("fashion_mnist", "write", data)
    assert len(list((data / "train").rglob("*.png"))) == COUNTS["train"]
    assert (data / "test" / "mark").exists()


def test_judge_tells_good_samples_from_bad(data, module, tmp_path, monkeypatch, capsys):
    """Sample i is of the class i modulo 10, in the order of names. The classifier of a size is
    trained once."""
    files = [sorted((data / "test" / name).iterdir())[:5] for name in sorted(module.CLASSES)]
    good = np.stack([Image.open(path).convert("RGB") for row in zip(*files) for path in row])
    small = np.stack([Image.fromarray(image).resize((16, 16), Image.BOX) for image in good])
    (tmp_path / "good").mkdir()
    for i, image in enumerate(good):
        Image.fromarray(image).save(tmp_path / "good" / f"{i:06d}.png")
    noise = np.random.RandomState(9).randint(0, 256, good.shape).astype(np.uint8)
    for name, images in (("good", good), ("shifted", np.roll(good, 1, 0)), ("noise", noise),
                         ("small", small)):
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
    call("fashion_mnist", "judge", data)
    call("fashion_mnist", "judge", data, tmp_path / "small.npz")
    monkeypatch.setattr(module, "train_classifier", None)
    names = ["good.npz", "good", "shifted.npz", "noise.npz"]
    call("fashion_mnist", "judge", data, *(tmp_path / name for name in names))
    everything, _, reduced, real, *lines, mean = map(json.loads,
                                                     capsys.readouterr().out.splitlines())
    assert everything["num_samples"] == 100 and real["num_samples"] == 50
    assert real["accuracy"] == everything["accuracy"] > 0.9 and reduced["accuracy"] > 0.9
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


@pytest.mark.parametrize(("name", "edit"), [
    ("images-idx3", lambda data: data[:1000]), ("images-idx3", lambda data: b"<html>" + data),
    ("images-idx3", lambda data: data[:-8] + b"\0" * 8),  # another CRC
    ("images-idx3", lambda data: gzip.compress(b"\0\0\x0d\1" + b"\0" * 4)),  # floats
    ("images-idx3", lambda data: gzip.compress(b"\0\0\x08")),
    ("images-idx3", lambda data: gzip.compress(gzip.decompress(data)[:-1])),
    ("images-idx3", lambda _: idx(np.zeros((100, 32, 32), np.uint8))),
    ("labels-idx1", lambda _: idx(np.zeros(99, np.uint8))),
    ("labels-idx1", lambda _: idx(np.full(100, 10, np.uint8))),
    ("labels-idx1", lambda _: idx(np.zeros((100, 1), np.uint8)))])
def test_write_refuses_torn_files_and_other_data(name, edit, source, tmp_path, refusal):
    path = source / f"t10k-{name}-ubyte.gz"
    path.write_bytes(edit(path.read_bytes()))
    refusal("fashion_mnist", ["write", tmp_path / "data", "--source", source], "--source")


def test_write_without_files_says_where_they_are(source, tmp_path, monkeypatch, refusal):
    def offline(*_, **__):
        raise URLError("Name or service not known")
    monkeypatch.setattr(datasets, "FashionMNIST", offline)
    (source / "train-labels-idx1-ubyte.gz").unlink()
    for options in (["--source", source], []):
        line = refusal("fashion_mnist", ["write", tmp_path / "data", *options], "--source")
        assert "apt install dataset-fashion-mnist" in line


def test_judge_refuses_what_it_cannot_read(data, tmp_path, refusal):
    refusal("fashion_mnist", ["write", data, tmp_path / "a.npz"], "samples")
    refusal("fashion_mnist", ["judge", data, "--source", tmp_path], "--source")
    refusal("fashion_mnist", ["judge", tmp_path / "nothing"], "write")
    for name, *shape in (("small", 3, 7, 7), ("large", 3, 32, 32), ("wide", 3, 16, 20),
                         ("one", 1, 28, 28), ("torn", 9, 28, 28), ("12", 3, 12, 12),
                         ("16", 3, 16, 16)):
        np.savez(tmp_path / f"{name}.npz", arr_0=np.zeros((*shape, 3), np.uint8))
    flip_bit(tmp_path / "torn.npz", 5000)
    for name in ("small", "large", "wide", "one", "torn", "missing"):
        path = tmp_path / f"{name}.npz"
        assert str(path) in refusal("fashion_mnist", ["judge", data, path], "samples")
    refusal("fashion_mnist", ["judge", data, tmp_path / "12.npz", tmp_path / "16.npz"], "16.npz")
    torch.save({"other": 1}, data / "classifier-28.pt")
    refusal("fashion_mnist", ["judge", data], "classifier-28.pt")
    (data / "classifier-28.pt").write_bytes(b"torn")
    refusal("fashion_mnist", ["judge", data], "classifier-28.pt")

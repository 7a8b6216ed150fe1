"""examples/fashion_mnist.py with small made-up files: what it writes, judges and refuses."""

import gzip
import json
from types import SimpleNamespace
from urllib.error import URLError

import fashion_mnist  # soak.py, which conftest.py imports, finds examples/
import numpy as np
import pytest
from conftest import call, flip_bit
from PIL import Image
from torchvision import datasets

COUNTS = {"train": 300, "t10k": 100}


def idx(array):
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
    folder = tmp_path / "source"
    folder.mkdir()
    for seed, (prefix, count) in enumerate(COUNTS.items()):
        images, labels = made_up(count, seed)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(idx(labels))
    return folder


@pytest.fixture
def data(source, tmp_path, monkeypatch):
    """The folder that the script wrote, of files that torchvision would download."""
    monkeypatch.setattr(datasets, "FashionMNIST", lambda root, download: SimpleNamespace(
        raw_folder=source if download and root == tmp_path / "data" else None))
    call("fashion_mnist", "write", tmp_path / "data")
    return tmp_path / "data"


def test_write_makes_a_folder_of_each_class_and_only_what_is_missing(data, source, monkeypatch):
    for seed, (split, count) in enumerate(zip(("train", "test"), COUNTS.values())):
        images, labels = made_up(count, seed)
        assert len(list((data / split).rglob("*.png"))) == count
        for i in (0, 1, count - 1):
            path = data / split / fashion_mnist.CLASSES[labels[i]] / f"{i:05d}.png"
            assert np.array_equal(Image.open(path), images[i])
    monkeypatch.setattr(datasets, "FashionMNIST", None)  # to download is an error
    (data / "train").rename(data / "old")
    (data / "test" / "mark").mkdir()
    call("fashion_mnist", "write", data, "--source", source)
    assert len(list((data / "train").rglob("*.png"))) == COUNTS["train"]
    assert (data / "test" / "mark").exists()


def test_judge_tells_good_samples_from_bad(data, tmp_path, monkeypatch, capsys):
    """Sample i is of the class i modulo 10, in the order of names."""
    monkeypatch.setattr(fashion_mnist, "BATCH", 20)
    monkeypatch.setattr(fashion_mnist, "EPOCHS", 4)
    files = [sorted(folder.iterdir())[:5] for folder in sorted((data / "test").iterdir())]
    good = np.stack([Image.open(path).convert("RGB") for row in zip(*files) for path in row])
    noise = np.random.RandomState(9).randint(0, 256, good.shape).astype(np.uint8)
    for name, images in (("good", good), ("shifted", np.roll(good, 1, 0)), ("noise", noise),
                         ("small", good[:, ::2, ::2])):
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
    call("fashion_mnist", "judge", data, tmp_path / "small.npz")
    call("fashion_mnist", "judge", data)
    monkeypatch.setattr(fashion_mnist, "train_classifier", None)  # once for each size
    call("fashion_mnist", "judge", data,
         *(tmp_path / f"{name}.npz" for name in ("good", "shifted", "noise")))
    _, _, everything, real, *lines, mean = map(json.loads, capsys.readouterr().out.splitlines())
    assert everything["num_samples"] == 100 and real["num_samples"] == 50
    assert real["accuracy"] == everything["accuracy"] > 0.9
    good, shifted, bad = lines
    assert good["accuracy"] > 0.9 and shifted["accuracy"] < 0.1 and bad["accuracy"] < 0.5
    assert shifted["frechet_distance"] == pytest.approx(good["frechet_distance"], abs=2e-3)
    assert bad["frechet_distance"] > 10 * good["frechet_distance"]
    for key in ("accuracy", "frechet_distance"):
        values = [line[key] for line in lines]
        assert mean[key] == pytest.approx(np.mean(values), abs=2e-3)
        assert mean[f"{key}_std"] == pytest.approx(np.std(values, ddof=1), abs=2e-3)


@pytest.mark.parametrize(("name", "edit"), [
    ("images-idx3", lambda data: data[:1000]), ("images-idx3", lambda data: b"<html>" + data),
    ("images-idx3", lambda data: data[:-8] + b"\0" * 8),  # another CRC
    ("images-idx3", lambda data: gzip.compress(b"\0\0\x0d\1" + b"\0" * 4)),  # floats
    ("images-idx3", lambda data: gzip.compress(gzip.decompress(data)[:-1])),
    ("images-idx3", lambda _: idx(np.zeros((100, 32, 32), np.uint8))),
    ("labels-idx1", lambda _: idx(np.zeros(99, np.uint8))),
    ("labels-idx1", lambda _: idx(np.full(100, 10, np.uint8)))])
def test_write_refuses_torn_files_and_other_data(name, edit, source, tmp_path, refusal):
    path = source / f"t10k-{name}-ubyte.gz"
    path.write_bytes(edit(path.read_bytes()))
    refusal("fashion_mnist", ["write", tmp_path / "data", "--source", source], "--source")


def test_write_refuses_where_it_has_no_files(source, tmp_path, monkeypatch, refusal):
    def offline(*_, **__):
        raise URLError("Name or service not known")
    monkeypatch.setattr(datasets, "FashionMNIST", offline)
    (source / "train-labels-idx1-ubyte.gz").unlink()
    for options in (["--source", source], []):
        refusal("fashion_mnist", ["write", tmp_path / "data", *options], "--source")


def test_judge_refuses_what_it_cannot_read(data, tmp_path, refusal):
    refusal("fashion_mnist", ["judge", tmp_path / "nothing"], "write")
    for name, *shape in (("small", 3, 7, 7), ("wide", 3, 16, 20), ("one", 1, 28, 28),
                         ("torn", 9, 28, 28), ("12", 3, 12, 12), ("16", 3, 16, 16)):
        np.savez(tmp_path / f"{name}.npz", arr_0=np.zeros((*shape, 3), np.uint8))
    flip_bit(tmp_path / "torn.npz", 5000)
    for name in ("small", "wide", "one", "torn", "missing"):
        refusal("fashion_mnist", ["judge", data, tmp_path / f"{name}.npz"], f"{name}.npz")
    refusal("fashion_mnist", ["judge", data, tmp_path / "12.npz", tmp_path / "16.npz"], "16.npz")
    (data / "classifier-28.pt").write_bytes(b"torn")
    refusal("fashion_mnist", ["judge", data], "classifier-28.pt")

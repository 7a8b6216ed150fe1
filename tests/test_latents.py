"""Shards of latents: what is written, served and refused."""

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import flip_bit, refused, save_folder

from dataset.images import ImageFolder
from dataset.latents import (
    DTYPES,
    LatentShards,
    ShardFiles,
    add_checksum,
    checksum,
    write_shard,
)
from dataset.loader import BatchSampler, load_batches
from engine.files import write_json

CPU = torch.device("cpu")
SHAPE = (4, 8, 8)
COUNTS = [6, 0, 5]
INFO = {"format_version": 1, "classes": ["a", "b", "c"], "image_size": 64, "crop": "adm-center",
        "latent_shape": list(SHAPE), "vae": "ema", "scale": 0.18215, "dtype": "float16",
        "flip": True, "shards": COUNTS, "count": 11}


def stored(mirrored=False, dtype=torch.float16):
    """The moments of the shards below, (11, 2, 4, 8, 8)."""
    generator = torch.Generator().manual_seed(int(mirrored))
    return torch.randn(sum(COUNTS), 2, *SHAPE, generator=generator).to(dtype)


def describe(path, **changes):
    """Write dataset.json as encode_imagenet.py does, with these changes."""
    sums = {file.name: checksum(file) for file in path.glob("*.npy")}
    write_json(path / "dataset.json", add_checksum({**INFO, "crc32": sums, **changes}))


def save_shards(path, dtype="float16"):
    """A data set of 11 latents in shards of 6, 0 and 5; image i has label i % 3."""
    path.mkdir(parents=True)
    kind, starts = DTYPES[dtype], np.cumsum([0, *COUNTS])
    for index, (start, stop) in enumerate(zip(starts, starts[1:])):
        batches = [(torch.arange(a, b) % 3, stored(dtype=kind)[a:b], stored(True, kind)[a:b], [])
                   for a, b in ((start, min(start + 2, stop)), (min(start + 2, stop), stop))]
        write_shard(ShardFiles(path, index), batches)
    describe(path, dtype=dtype)
    return path


@pytest.fixture
def shards(tmp_path):
    return save_shards(tmp_path / "shards")


def test_shards_are_plain_npy_files(shards):
    files = ShardFiles(shards, 0)
    assert files.moments.name == "shard-00000.npy"
    assert np.array_equal(np.load(files.moments, allow_pickle=False), stored()[:6].numpy())
    assert np.array_equal(np.load(files.flip, allow_pickle=False), stored(True)[:6].numpy())
    assert np.load(files.labels, allow_pickle=False).tolist() == [0, 1, 2, 0, 1, 2]
    assert not list(shards.glob(".*"))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_shards_serve_any_rows_and_their_mirrors(tmp_path, dtype):
    shards = LatentShards(save_shards(tmp_path / "shards", dtype))
    assert len(shards) == 11 and shards.classes == ["a", "b", "c"] and shards.flip
    assert (shards.image_size, shards.latent_shape, shards.scale) == (64, SHAPE, 0.18215)
    rows = torch.tensor([10, 0, 6, 5, 5, 10])
    mirrored = torch.tensor([True, False, True, False, True, False])
    moments, labels = shards.read((rows, mirrored))
    kind = DTYPES[dtype]
    assert moments.dtype == kind and moments.shape == (6, 2, *SHAPE)
    expected = torch.where(mirrored[:, None, None, None, None], stored(True, kind)[rows],
                           stored(dtype=kind)[rows])
    assert torch.equal(moments, expected) and labels.tolist() == (rows % 3).tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_serves_shards_in_order(shards, workers):
    dataset = LatentShards(shards)
    sampler = BatchSampler(11, 4, seed=1, flip=True, stop=5, world=SimpleNamespace(rank=0, size=1))
    served = list(load_batches(dataset, sampler, workers=workers, device=CPU))
    for (moments, labels), batch in zip(served, sampler, strict=True):
        assert torch.equal(moments, dataset.read(batch)[0])
        assert torch.equal(labels, batch[0] % 3)


# What happens to a file of the shard with rows 6 to 10, by the file and its bytes
DAMAGE = {
    "missing": lambda path, data: path.unlink(),
    "truncated": lambda path, data: path.write_bytes(data[:-1]),
    "too long": lambda path, data: path.write_bytes(data + b"0"),
    "of another dtype": lambda path, data: np.save(path, stored()[6:].float().numpy()),
    "of another shape": lambda path, data: np.save(path, stored()[6:, :1].numpy()),
    "in Fortran order": lambda path, data: np.save(path, np.asfortranarray(stored()[6:].numpy())),
    "pickled": lambda path, data: np.save(path, np.array([print] * 5), allow_pickle=True),
    "an archive": lambda path, data: np.savez(open(path, "wb"), stored()[6:].numpy()),
    "hostile": lambda path, data: path.write_bytes(data[:10] + (b"-" * 117 + b"1") + data[128:]),
    "huge": lambda path, data: path.write_bytes(
        data[:128].replace(b"(5, ", b"(5" + b"0" * 17 + b", ")[:127] + b"\n" + data[128:]),
    "a folder": lambda path, data: (path.unlink(), path.mkdir()),
    "labels too high": lambda path, data: np.save(path, np.array([0, 1, 2, 0, 3])),
    "labels below 0": lambda path, data: np.save(path, np.array([0, 1, 2, 0, -1])),
}


@pytest.mark.parametrize(("name", "how"), [
    *(("moments", how) for how in DAMAGE if "labels" not in how),
    *(("labels", how) for how in DAMAGE if "labels" in how), ("labels", "missing"),
    ("flip", "missing")])
def test_a_damaged_or_foreign_shard_is_refused_by_name(shards, name, how):
    path = getattr(ShardFiles(shards, 2), name)
    DAMAGE[how](path, path.read_bytes())
    with refused(path.name):
        LatentShards(shards)


@pytest.mark.parametrize("change", [
    {"format_version": 2}, {"crop": "random"}, {"crc32": 5}, {"crc32": {}}, "changed", "missing",
    "[]", "", "{", "[" * 100000, "\xff"])
def test_a_dataset_json_that_is_not_ours_is_refused(shards, change):
    path = shards / "dataset.json"
    info = json.loads(path.read_text())
    if isinstance(change, dict):
        info |= change
        path.write_text(json.dumps(info if "crc32" in change else add_checksum(info)))
    elif change == "changed":
        path.write_text(json.dumps(info | {"classes": ["a", "b", "d"]}))
    elif change == "missing":
        path.write_text(json.dumps({name: info[name] for name in info if name != "crc32"}))
    else:
        path.write_bytes(change.encode("latin-1"))
    with refused(path, "repeat"):
        LatentShards(shards)


def test_folders_without_dataset_json_are_refused_with_the_remedy(shards, tmp_path):
    with refused("holds latent shards", "--encoded-data"):
        ImageFolder(shards, 64)
    with refused("without dataset.json", "leave out --encoded-data"):
        LatentShards(save_folder(tmp_path / "images"))
    (shards / "dataset.json").rename(shards / "encoding.json")
    with refused("cut short", "repeat the encode_imagenet.py command"):
        LatentShards(shards)


@pytest.mark.parametrize("name", ["moments", "labels", "flip"])
def test_a_flipped_bit_is_found_by_checksum(shards, name):
    assert LatentShards(shards).verify() is None
    path = getattr(ShardFiles(shards, 2), name)
    flip_bit(path, -16)
    with refused(path, "damaged", "encode_imagenet.py"):
        LatentShards(shards).verify()


def test_options_that_do_not_suit_the_shards_are_refused(shards):
    def codec(scale=0.18215, shape=SHAPE):
        return SimpleNamespace(name="mse", scale=scale, latent_shape=lambda size: shape)

    dataset = LatentShards(shards)
    dataset.check(codec=codec(), image_size=64, flip=True)
    with refused("--image-size", "64", "got 128"):
        dataset.check(codec=codec(), image_size=128, flip=False)
    with refused("--vae", "ema", "0.18215", "got mse", "0.13025"):
        dataset.check(codec=codec(0.13025), image_size=64, flip=False)
    with refused("--vae", "got mse"):
        dataset.check(codec=codec(shape=(3, 64, 64)), image_size=64, flip=False)
    describe(shards, flip=False)
    with refused("--flip"):
        LatentShards(shards).check(codec=None, image_size=64, flip=True)


def test_a_data_set_of_imagenets_length_starts_within_seconds(tmp_path):
    """1,281,167 latents as encode_imagenet.py deals them; sparse files: 21 GB long, 10 MB big."""
    counts = [8192] * 156 + [3215]
    for index, count in enumerate(counts):
        files = ShardFiles(tmp_path, index)
        np.lib.format.open_memmap(files.moments, "w+", "float16", (count, 2, 4, 32, 32))
        np.lib.format.open_memmap(files.labels, "w+", "int64", (count,))
    write_json(tmp_path / "dataset.json", add_checksum({
        **INFO, "image_size": 256, "crc32": {}, "latent_shape": [4, 32, 32], "flip": False,
        "shards": counts, "count": 1281167}))
    start = time.process_time()
    dataset = LatentShards(tmp_path)
    sampler = BatchSampler(len(dataset), 256, seed=1, flip=False, start=400_000, stop=400_002,
                           world=SimpleNamespace(rank=0, size=1))
    served = list(load_batches(dataset, sampler, workers=1, device=CPU))
    assert time.process_time() - start < 5
    assert len(dataset) == 1281167 and served[0][0].shape == (256, 2, 4, 32, 32)

"""Shards of latents: what is written, served and refused."""

import contextlib
import json
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import flip_bit, refused, save_folder

from dataset.images import ImageFolder
from dataset.latents import FORMAT, LatentShards, ShardFiles, add_checksum, write_shard
from dataset.loader import BatchSampler, load_batches
from engine.files import write_json

CPU, ALONE = torch.device("cpu"), SimpleNamespace(rank=0, size=1)
SHAPE = (4, 8, 8)
COUNTS = [6, 0, 5]
INFO = {**FORMAT, "classes": ["a", "b", "c"], "image_size": 64, "latent_shape": list(SHAPE),
        "vae": "ema", "scale": 0.18215, "dtype": "float16", "flip": True, "shards": COUNTS}


def stored(mirrored=False, dtype=torch.float16):
    """The moments of the shards below, (11, 2, 4, 8, 8)."""
    generator = torch.Generator().manual_seed(int(mirrored))
    return torch.randn(sum(COUNTS), 2, *SHAPE, generator=generator).to(dtype)


def describe(path, **changes):
    """Write dataset.json as encode_imagenet.py does, with these changes."""
    sums = {file.name: zlib.crc32(np.load(file)) for file in path.glob("*.npy")}
    write_json(path / "dataset.json", add_checksum({**INFO, "crc32": sums, **changes}))


def save_shards(path, dtype="float16"):
    """A data set of 11 latents in shards of 6, 0 and 5; image i has label i % 3."""
    path.mkdir(parents=True)
    for index, rows in enumerate(torch.arange(11).split(COUNTS)):
        sides = [stored(mirrored, getattr(torch, dtype))[rows] for mirrored in (False, True)]
        write_shard(ShardFiles(path, index), [([], rows % 3, *sides)])
    describe(path, dtype=dtype)
    return path


@pytest.fixture
def shards(tmp_path):
    return save_shards(tmp_path / "shards")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("workers", [0, 2])
def test_shards_serve_any_rows_and_their_mirrors_in_order(tmp_path, dtype, workers):
    shards, kind = LatentShards(save_shards(tmp_path / "shards", dtype)), getattr(torch, dtype)
    assert len(shards) == 11 and shards.classes == ["a", "b", "c"] and shards.scale == 0.18215
    steps = list(BatchSampler(11, 4, seed=1, flip=True, world=ALONE).steps(0, 5))
    served = load_batches(shards, steps, workers=workers, device=CPU)
    for (moments, labels), (rows, mirrored) in zip(served, steps, strict=True):
        expected = torch.where(mirrored[:, None, None, None, None], stored(True, kind)[rows],
                               stored(dtype=kind)[rows])
        assert moments.dtype == kind and torch.equal(moments, expected)
        assert torch.equal(labels, rows % 3)


# What happens to a file of the shard with rows 6 to 10, by the file and its bytes
DAMAGE = {
    "missing": lambda path, data: path.unlink(),
    "truncated": lambda path, data: path.write_bytes(data[:-1]),
    "of another dtype": lambda path, data: np.save(path, stored()[6:].float().numpy()),
    "of another shape": lambda path, data: np.save(path, stored()[6:, :1].numpy()),
    "in Fortran order": lambda path, data: np.save(path, np.asfortranarray(stored()[6:].numpy())),
    "hostile": lambda path, data: path.write_bytes(data[:10] + (b"-" * 117 + b"1") + data[128:]),
}


@pytest.mark.parametrize("name, how", [
    *(("moments", how) for how in DAMAGE), ("labels", "missing"), ("flip", "missing")])
def test_a_damaged_or_foreign_shard_is_refused_by_name(shards, name, how):
    path = getattr(ShardFiles(shards, 2), name)
    DAMAGE[how](path, path.read_bytes())
    with refused(path.name):
        LatentShards(shards)


@pytest.mark.parametrize("content", [
    add_checksum(INFO | {"crc32": {}, "format_version": 2}),
    add_checksum(INFO | {"crc32": {}}) | {"classes": ["a", "b", "d"]}, "[" * 100000])
def test_a_dataset_json_that_is_not_ours_is_refused(shards, content):
    path = shards / "dataset.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with refused(path, "repeat"):
        LatentShards(shards)


def test_the_wrong_kind_of_folder_is_refused_with_the_remedy(shards, tmp_path):
    with refused("holds latent shards", "--encoded-data"):
        ImageFolder(shards, 64)
    with refused("without dataset.json", "leave out --encoded-data"):
        LatentShards(save_folder(tmp_path / "images"))


@pytest.mark.parametrize("name", ["moments", "labels", "flip"])
def test_a_flipped_bit_is_found_by_checksum(shards, name):
    assert LatentShards(shards).verify() == []
    path = getattr(ShardFiles(shards, 2), name)
    flip_bit(path, -16)
    with refused(path, "damaged", "encode_imagenet.py"):
        LatentShards(shards).verify()


def test_options_that_do_not_suit_the_shards_are_refused(shards):
    describe(shards, flip=False)
    for option, size, scale, shape, flip in (
            (None, 64, 0.18215, SHAPE, False), ("--image-size", 128, 0.18215, SHAPE, False),
            ("--vae", 64, 0.13025, SHAPE, False), ("--vae", 64, 0.18215, (3, 64, 64), False),
            ("--flip", 64, 0.18215, SHAPE, True)):
        codec = SimpleNamespace(name="mse", scale=scale, latent_shape=lambda _, shape=shape: shape)
        with refused(option) if option else contextlib.nullcontext():
            LatentShards(shards).check(codec=codec, image_size=size, flip=flip)

"""A single flipped bit in a file that is read is refused in one line, or changes nothing."""

import contextlib
import json
import random
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, call, refused, tiny
from mutations import KINDS
from soak import Child
from torch.utils._pytree import tree_flatten

from dataset.latents import LatentShards, ShardFiles
from dataset.pictures import load_png, write_pngs
from engine.checkpoint import load_checkpoint
from engine.distributed import World
from engine.errors import UserError
from metrics.extractors import extractor_of
from metrics.image_sets import NpzImages, verify_npz
from metrics.reference import Reference

WORLD = World(0, 1, torch.device("cpu"), "fp32")


@pytest.fixture(scope="module")
def shards(digits, tmp_path_factory):
    """The digits as shards of pixels, with mirror images."""
    folder = tmp_path_factory.mktemp("damage") / "shards"
    call("encode_imagenet", "--data-path", digits, "--out-path", folder, "--vae", "none",
         "--image-size", 8, "--num-workers", 0, "--shard-size", 64, "--flip")
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A reference with images, whose archive holds what np.savez writes."""
    numbers, path = np.random.default_rng(0), tmp_path_factory.mktemp("damage") / "reference.npz"
    images = numbers.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    pixels = images.transpose(0, 3, 1, 2).reshape(60, -1) / 127.5 - 1
    np.savez(path, mu=pixels.mean(0), sigma=np.cov(pixels.T), arr_0=images,
             num_images=np.array(60), protocol=np.array("pixels"))
    return path


def read_checkpoint(path):
    """What sampling and training read of a checkpoint."""
    load_checkpoint(path, verify=True)
    return plain(load_checkpoint(path))


def read_shards(folder):
    """What training reads of a data set."""
    shards = LatentShards(folder)
    shards.verify()
    rows = torch.arange(len(shards))
    moments = [shards.read((rows, torch.full((len(rows),), flip))) for flip in (False, True)]
    return plain([moments, shards.classes, shards.scale, shards.vae, shards.image_size])


def read_reference(path):
    """What evaluation reads of a reference and the images in it."""
    statistics = Reference.load(path, extractor_of("pixels"), (8, 8), WORLD)
    return plain([statistics.pool, statistics.count, *NpzImages(path).batches([range(60)])])


def plain(value):
    """A value's structure and leaves, arrays as bytes, so that == compares every bit."""
    leaves, structure = tree_flatten(value)
    return structure, [(leaf.dtype, leaf.shape, np.ascontiguousarray(leaf).tobytes())
                       if hasattr(leaf, "dtype") else leaf for leaf in leaves]


@contextlib.contextmanager
def flipped(path, position, bit):
    """One bit of a file flipped within ``with``."""
    content = path.read_bytes()
    byte = bytes([content[position] ^ 1 << bit])
    path.write_bytes(content[:position] + byte + content[position + 1:])
    try:
        yield
    finally:
        path.write_bytes(content)


@pytest.mark.slow
def test_no_flipped_bit_is_used(trained, shards, reference):
    """Each of 200 flips is refused in one line, or changes nothing that is read, as a time stamp.
    Half of those in an archive are in its last bytes, the directory."""
    numbers, refusals, harmless, files = random.Random(0), 0, 0, ShardFiles(shards, 1)
    for path, read, source, flips, tail in (
            (trained, read_checkpoint, trained, 60, 5000),
            (reference, read_reference, reference, 60, 1000),
            *((path, read_shards, shards, 20, 0)
              for path in (shards / "dataset.json", *files.arrays(True)))):
        size, whole = path.stat().st_size, read(source)
        for _ in range(flips):
            start = size - tail if tail and numbers.random() < 0.5 else 0
            position, bit = numbers.randrange(start, size), numbers.randrange(8)
            with flipped(path, position, bit):
                try:
                    assert read(source) == whole, f"{path.name}, byte {position}, bit {bit}"
                    harmless += 1
                except UserError as error:
                    refusals += 1
                    assert "\n" not in str(error) and path.name in str(error), error
    assert refusals + harmless == 200 and refusals >= 140, (refusals, harmless)


def test_an_array_that_a_flipped_bit_hides_is_missed(reference):
    """A length in the archive's directory that is too large by 256 hides the entries after it."""
    content = reference.read_bytes()
    last_but_one = content.rindex(b"PK\1\2", 0, content.rindex(b"PK\1\2"))
    with flipped(reference, last_but_one + 33, 0), refused("the list"):
        verify_npz(reference, WORLD)


def test_no_flipped_bit_of_a_sampled_image_is_used(tmp_path):
    """Every bit of one image. PIL decodes without comparing checksums, or raises other errors."""
    path, image = tmp_path / "000000.png", np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    write_pngs([path], torch.from_numpy(image.transpose(2, 0, 1))[None])
    for position in range(path.stat().st_size):
        for bit in range(8):
            with flipped(path, position, bit), contextlib.suppress(UserError):
                assert np.array_equal(load_png(path, 8), image), f"byte {position}, bit {bit}"


def test_training_names_damaged_labels_and_latents_it_did_not_compare(
        shards, tmp_path, monkeypatch, capfd):
    options = [*tiny(shards, tmp_path / "run"), "--encoded-data", "--max-steps", 1]
    labels, line = ShardFiles(shards, 1).labels, "GB of latents were not compared"
    monkeypatch.setattr("dataset.latents.VERIFIED", 0)
    with flipped(labels, labels.stat().st_size - 8, 0), refused(labels.name):
        call("train", *options)
    assert not (tmp_path / "run").exists()
    call("train", *options)
    assert capfd.readouterr().err.count(line) == 1
    assert line in (tmp_path / "run" / "log.txt").read_text()


def test_damaged_references_and_samples_are_refused(reference, trained, tmp_path):
    """The images in them are read in pieces, and NumPy compares no checksum of a piece."""
    samples, new = ["--samples", reference, "--protocol", "pixels"], tmp_path / "new.npz"
    evaluate = ["--fid-ref", reference, "--protocol", "pixels", "--no-save-images"]
    position = reference.read_bytes().index(b"arr_0.npy") + 8000
    whole = shutil.copy(reference, tmp_path / "whole.npz")
    with flipped(reference, position, 3):
        with refused("--samples ", "arr_0.npy"):
            call("evaluate_fid", *samples, "--make-ref", new)
        with refused("--ref ", "arr_0.npy"):
            call("evaluate_fid", *samples[2:], "--samples", whole, "--ref", reference)
        with refused("--fid-ref ", "arr_0.npy"):
            call("sample", "--ckpt", trained, "--num-fid-samples", 4, *evaluate)
    assert not new.exists()
    call("evaluate_fid", *samples, "--make-ref", new)


@pytest.mark.slow
def test_odd_inputs_of_every_kind_are_used_or_refused(tmp_path):
    """mutations.py makes hundreds. It forks, which the process of these tests, with what they left
    in it, must not do."""
    code, said = Child(ROOT / "tests" / "mutations.py", "--count", 24,
                       output=tmp_path / "said.txt").wait()
    counts = json.loads(said.splitlines()[-1])
    assert code == 0 and not counts.pop("failures"), said
    assert counts.pop("seed") == 0 and sum(counts.values()) == 24
    for kind in KINDS:
        assert counts[f"{kind.__name__} used"] and counts[f"{kind.__name__} refused"]

"""A single flipped bit in a file that is read is refused in one line, or changes nothing."""

import contextlib
import random
import shutil

import numpy as np
import pytest
import torch
from conftest import call, tiny

from dataset.latents import LatentShards, ShardFiles
from dataset.pictures import load_png, write_pngs
from engine.checkpoint import load_checkpoint
from engine.distributed import World
from engine.errors import UserError
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
    found = LatentShards(folder)
    found.verify()
    rows = torch.arange(len(found))
    return [plain(found.read((rows, torch.full_like(rows, mirror, dtype=torch.bool))))
            for mirror in (False, True)], found.classes, found.scale, found.vae, found.image_size


def read_reference(path):
    """What evaluation reads of a reference and the images in it."""
    found = Reference.load(path, "pixels", (8, 8), WORLD)
    return plain([*found.pool, *NpzImages(path).batches([range(60)])]), found.count


def plain(value):
    """The value with tensors and arrays as bytes, so that == compares every bit."""
    if isinstance(value, torch.Tensor):
        value = value.contiguous().numpy()
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


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


@pytest.fixture
def subjects(trained, shards, reference):
    """(file, reader, what it reads, flips, share of them in the last bytes, count of these)."""
    info, first = shards / "dataset.json", ShardFiles(shards, 1)
    return [(trained, read_checkpoint, trained, 60, 0.5, 5000),
            (reference, read_reference, reference, 60, 0.5, 1000),
            (info, read_shards, shards, 20, 0, 1),
            (first.moments, read_shards, shards, 20, 0, 1),
            (first.flip, read_shards, shards, 20, 0, 1),
            (first.labels, read_shards, shards, 20, 0, 1)]


@pytest.mark.slow
def test_no_flipped_bit_is_used(subjects):
    """Training used 18 of 20 damaged checkpoints, and shards and references likewise. Each of 200
    flips is refused in one line, or changes nothing that is read (a time stamp, say)."""
    numbers, refused, harmless = random.Random(0), 0, 0
    for path, read, subject, flips, share, tail in subjects:
        size, whole = path.stat().st_size, read(subject)
        for _ in range(flips):
            # The end of an archive, its directory, is small and has more to misread
            start = size - tail if numbers.random() < share else 0
            position, bit = numbers.randrange(start, size), numbers.randrange(8)
            with flipped(path, position, bit):
                try:
                    found = read(subject)
                except UserError as error:
                    refused += 1
                    assert "\n" not in str(error) and path.name in str(error), error
                else:
                    harmless += 1
                    assert found == whole, f"{path.name}, byte {position}, bit {bit}"
    assert refused + harmless == 200 and refused >= 140, (refused, harmless)


def test_an_array_that_a_flipped_bit_hides_is_missed(reference):
    """A length in the archive's directory that is too large by 256 hides the entries after it, and
    their arrays were taken for never written. No checksum is compared for what is hidden."""
    content = reference.read_bytes()
    last_but_one = content.rindex(b"PK\1\2", 0, content.rindex(b"PK\1\2"))
    with flipped(reference, last_but_one + 33, 0), pytest.raises(UserError, match="the list"):
        verify_npz(reference, WORLD)


def test_no_flipped_bit_of_a_sampled_image_is_used(tmp_path):
    """Every bit of one image. PIL decodes without comparing checksums, or raises other errors."""
    path, image = tmp_path / "000000.png", np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    write_pngs([path], torch.from_numpy(image.transpose(2, 0, 1))[None])
    for position in range(path.stat().st_size):
        for bit in range(8):
            with flipped(path, position, bit), contextlib.suppress(UserError):
                assert np.array_equal(load_png(path), image), f"byte {position}, bit {bit}"


def test_training_names_damaged_labels_and_latents_it_did_not_compare(shards, tmp_path, monkeypatch,
                                                                     capfd):
    options = [*tiny(shards, tmp_path / "run"), "--encoded-data", "--max-steps", 1]
    labels = ShardFiles(shards, 1).labels
    with flipped(labels, labels.stat().st_size - 8, 0), pytest.raises(UserError, match=labels.name):
        call("train", *options)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr("dataset.latents.VERIFIED", 0)
    call("train", *options)
    line = "GB of latents were not: repeat the encode_imagenet.py command"
    with flipped(labels, labels.stat().st_size - 8, 0), pytest.raises(UserError, match=labels.name):
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
        with pytest.raises(UserError, match="--samples .*arr_0.npy"):
            call("evaluate_fid", *samples, "--make-ref", new)
        with pytest.raises(UserError, match="--ref .*arr_0.npy"):
            call("evaluate_fid", *samples[2:], "--samples", whole, "--ref", reference)
        with pytest.raises(UserError, match="--fid-ref .*arr_0.npy"):
            call("sample", "--ckpt", trained, "--num-fid-samples", 4, *evaluate)
    assert not new.exists()
    call("evaluate_fid", *samples, "--make-ref", new)

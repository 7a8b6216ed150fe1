"""Encoding: the numbers, the bytes after a kill, bad images, and folders that are not ours."""

import json
import multiprocessing
import os
import shutil
import signal
import zlib

import numpy as np
import pytest
import torch
from conftest import PHOTO, flip_bit, refused, run_ranks, save_odd_files, save_small_vae

import encode_imagenet
from dataset.images import ImageFolder
from dataset.latents import LatentShards, ShardFiles, write_shard
from dataset.vae import Pixels, load_codec, posterior_sample
from engine.files import FolderLock, list_folder, write_json


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A VAE of random weights and 26 images of three classes: photographs and odd files."""
    root = tmp_path_factory.mktemp("encode")
    save_small_vae(root / "vae")
    save_odd_files(root / "images" / "odd")
    for name, offset, count in (("china", 0, 8), ("temple", 50, 8)):
        (root / "images" / name).mkdir()
        for i in range(count):
            box = (30 * i, offset, 30 * i + 64 + 9 * i, offset + 70)
            PHOTO.crop(box).save(root / "images" / name / f"{i}.jpg")
    return root


def options(world, out, *more, images=None):
    return ["--data-path", str(images or world / "images"), "--out-path", str(out),
            "--vae", str(world / "vae"), "--image-size", "32", "--shard-size", "7",
            "--batch-size", "3", "--num-workers", "0", *more]


def encode(world, out, *more, images=None):
    """Run the script within this process; what the folder then holds."""
    args = encode_imagenet.parse_args(options(world, out, *more, images=images))
    encode_imagenet.main(args)
    return read(out)


def read(folder):
    """{file name: bytes} of the files that are not hidden."""
    return {path.name: path.read_bytes() for path in list_folder(folder)}


@pytest.fixture(scope="module")
def whole(world):
    """The folder of an uninterrupted run of one process, with mirror images."""
    encode(world, world / "whole", "--flip")
    return world / "whole"


@pytest.fixture(scope="module")
def killed(world):
    """The folder of the same run in a process that is killed at the last of four shards."""
    def write_or_die(files, batches):
        if files.moments.name == "shard-00003.npy":
            os.kill(os.getpid(), signal.SIGKILL)
        write_shard(files, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode_imagenet, "write_shard", write_or_die)
        child = multiprocessing.get_context("fork").Process(
            target=encode, args=(world, world / "killed", "--flip"))
        child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    return world / "killed"


@pytest.fixture
def spoilt(world, tmp_path):
    """The images with three of them unreadable, the whole of shard 2's first batch; their names."""
    images = shutil.copytree(world / "images", tmp_path / "spoilt")
    names = [ImageFolder(images, 32).name(row) for row in (14, 15, 16)]
    for name in names:
        (images / name).write_bytes((images / name).read_bytes()[:30])
    return images, names


def test_the_folder_holds_what_the_contract_says(whole):
    names = {f"shard-{i:05d}{kind}.npy" for i in range(4) for kind in ("", ".flip", ".labels")}
    assert set(read(whole)) == {"dataset.json", *names}
    info = json.loads((whole / "dataset.json").read_text())
    assert info == info | {
        "count": 26, "shards": [7, 7, 7, 5], "skipped": [], "classes": ["china", "odd", "temple"],
        "image_size": 32, "latent_shape": [4, 4, 4], "scale": 0.18215, "dtype": "float16",
        "crc32": {name: zlib.crc32(np.load(whole / name)) for name in names}}
    assert (np.load(whole / "shard-00001.npy")[:, 1] > 0).all()  # the std, not its logarithm


def all_of(folder, mirrored=False):
    """All moments of a folder of shards, in order, and their labels."""
    shards = LatentShards(folder)
    return shards.read((torch.arange(len(shards)), torch.full((len(shards),), mirrored)))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_raw_images_and_shards_give_the_same_latents(world, tmp_path, dtype):
    """As docs/data.md says of the rounding to float16, and of float32."""
    encode(world, tmp_path / "out", "--dtype", dtype, "--flip", "--batch-size", "26",
           "--num-workers", "2")
    images, codec = ImageFolder(world / "images", 32), load_codec(str(world / "vae"))
    noise = torch.randn(26, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    for mirrored in (False, True):
        stored, stored_labels = all_of(tmp_path / "out", mirrored)
        (pixels, labels), = images.batches([(torch.arange(26), torch.full((26,), mirrored))], 0)
        raw = codec.encode(pixels)
        assert torch.equal(labels, stored_labels) and stored.dtype == getattr(torch, dtype)
        if dtype == "float16":
            assert ((raw - stored.float()).abs() <= raw.abs() * 2**-11 + 1e-6).all()
        else:
            raw, stored = (posterior_sample(part, noise, 0.18215) for part in (raw, stored))
            assert (raw - stored).abs().max() < 1e-5


def test_moments_beyond_float16_are_refused(world, tmp_path, monkeypatch):
    monkeypatch.setattr(Pixels, "encode", lambda self, images: torch.full((3, 2, 3, 32, 32), 1e5))
    with refused("--dtype", "float16", "--dtype float32"):
        encode(world, tmp_path / "out", "--vae", "none")
    assert not (tmp_path / "out" / "shard-00000.npy").exists()


@pytest.mark.slow
def test_a_killed_run_continues_with_two_processes(world, whole, killed, tmp_path):
    """Damage to a shard that was complete is found too, by its checksum."""
    out = shutil.copytree(killed, tmp_path / "out")
    flip_bit(out / "shard-00000.flip.npy", -20)
    before = (out / "shard-00001.npy").stat().st_mtime_ns
    said, other = run_ranks("encode_imagenet", *options(world, out, "--flip"), processes=2,
                            output=tmp_path / "said")
    assert said.splitlines()[-1] == str(out) and str(out) not in other.splitlines()
    assert (said + other).count("is damaged") == 1 and read(out) == read(whole)
    assert (out / "shard-00001.npy").stat().st_mtime_ns == before


@pytest.mark.parametrize("state, shards", [
    ("only temporary files", range(3)), ("nothing of a shard", [0]), ("no moments", [2]),
    ("dataset.json too", []), ("a flipped bit", []), ("a note that is none", [])])
def test_whatever_a_kill_leaves_is_completed_to_the_same_bytes(
        world, whole, killed, tmp_path, state, shards):
    """A kill may fall between any two of: notes, labels, moments, mirrors, the end."""
    out = shutil.copytree(killed, tmp_path / "out")
    for files in (ShardFiles(out, index) for index in shards):
        files.moments.rename(out / f".{files.moments.name}.1234.tmp")
        for path in (files.note, files.labels, files.flip) if state != "no moments" else ():
            path.unlink()
    if state == "only temporary files":
        (out / "encoding.json").rename(out / ".encoding.json.77.tmp")
    elif state == "dataset.json too":
        shutil.copy(whole / "dataset.json", out)
    elif state == "a flipped bit":
        flip_bit(out / "shard-00001.npy", -8)
    elif state == "a note that is none":
        (out / "shard-00001.json").write_text("[" * 10**5)
    before = {path: path.stat().st_mtime_ns for path in out.glob("shard*[0-9].npy")
              if "00001" not in path.name}
    assert encode(world, out, "--flip") == read(whole)
    assert all(path.stat().st_mtime_ns == before[path] for path in before)
    assert not list(out.glob(".*.tmp"))


@pytest.mark.parametrize("name, how", [
    *((name, "flipped bit") for name in ("moments", "labels", "flip")), ("moments", "truncated"),
    ("moments", "too long"), ("labels", "foreign"), ("flip", "removed")])
def test_a_damaged_shard_is_encoded_again(world, whole, tmp_path, name, how, capsys):
    out = shutil.copytree(whole, tmp_path / "out")
    path = getattr(ShardFiles(out, 1), name)
    {"flipped bit": lambda: flip_bit(path, -8),
     "truncated": lambda: path.write_bytes(path.read_bytes()[:-5]),
     "too long": lambda: path.write_bytes(path.read_bytes() + b"0"),
     "foreign": lambda: np.save(path, np.zeros(7)),
     "removed": path.unlink}[how]()
    untouched = (out / "shard-00002.npy").stat().st_mtime_ns
    assert encode(world, out, "--flip") == read(whole)
    line = f"{path} is damaged: its shard is encoded again"
    assert capsys.readouterr().err.count(line) == (how != "removed")
    assert (out / "shard-00002.npy").stat().st_mtime_ns == untouched


def test_a_damaged_dataset_json_is_written_again(world, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    info = json.loads((out / "dataset.json").read_text())
    del info["crc32"]
    write_json(out / "dataset.json", info | {"classes": ["other"]})
    assert encode(world, out, "--flip") == read(whole)


def test_one_command_encodes_into_a_folder_at_a_time(world, tmp_path):
    with FolderLock(tmp_path / "out"), refused("--out-path", "process", "since"):
        encode(world, tmp_path / "out", "--flip")
    assert not read(tmp_path / "out")


def test_bad_images_are_named_and_the_rest_is_encoded(world, whole, spoilt, tmp_path, capsys):
    """What is encoded stays when they are repaired."""
    (images, names), out = spoilt, tmp_path / "out"
    with refused("3 of 26 unreadable", "--skip-bad-images"):
        encode(world, out, "--flip", images=images)
    met, listed = capsys.readouterr().err.split("unreadable images:")
    assert listed.split() == names and not (out / "dataset.json").exists()
    for name in names:
        assert f"--data-path must hold readable images, got {images}/{name}" in met
        assert "remove the file" not in met  # what is encoded would be of another list of images
        shutil.copy(world / "images" / name, images / name)
    before = {path: path.stat().st_mtime_ns for path in out.glob("shard*.npy")}
    assert encode(world, out, "--flip", images=images) == read(whole)
    changed = {path for path in before if path.stat().st_mtime_ns != before[path]}
    assert changed == set(ShardFiles(out, 2).arrays(True))


def test_skipped_images_are_recorded(world, whole, spoilt, tmp_path):
    (images, names), out, skip = spoilt, tmp_path / "out", ("--flip", "--skip-bad-images")
    before = encode(world, out, *skip, images=images)
    info = json.loads((out / "dataset.json").read_text())
    assert info["skipped"] == names and info["count"] == 23 and info["shards"] == [7, 7, 4, 5]
    kept = torch.tensor([row for row in range(26) if row not in (14, 15, 16)])
    torch.testing.assert_close(all_of(out), tuple(part[kept] for part in all_of(whole)))
    time = (out / "shard-00002.npy").stat().st_mtime_ns
    encode(world, out, *skip, images=images)
    assert (out / "shard-00002.npy").stat().st_mtime_ns == time
    with refused("3 of 26 unreadable"):
        encode(world, out, "--flip", images=images)
    for damage in (lambda: flip_bit(out / "shard-00002.npy", -8),
                   lambda: (out / "shard-00002.json").write_text('"names"')):
        damage()
        assert encode(world, out, *skip, images=images) == before


@pytest.mark.parametrize("option, word", [
    ("--flip --image-size 64", "image_size"), ("--flip --dtype float32", "dtype"),
    ("--flip --shard-size 8", "shard_size"), ("--flip --vae none", "encoder"),
    ("--flip --precision bf16", "precision"), ("", "flip True, now False"), ("--flip", "files")])
def test_a_folder_of_another_configuration_is_refused(world, whole, tmp_path, option, word):
    before, images = read(whole), world / "images"
    if word == "files":
        images = shutil.copytree(world / "images", tmp_path / "images")
        shutil.copy(images / "china" / "0.jpg", images / "china" / "new.jpg")
    with refused("--out-path", word, "choose another"):
        encode(world, whole, *option.split(), images=images)
    assert read(whole) == before


@pytest.mark.parametrize("name, text", [
    ("thesis.txt", "years of work"), ("dataset.json", "{}"), ("encoding.json", "[" * 99999)])
def test_a_folder_of_something_else_is_refused_and_kept(world, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with refused("--out-path", name, "choose another folder"):
        encode(world, tmp_path)
    assert read(tmp_path) == {name: text.encode()}


def test_shards_among_the_images_are_refused(world):
    with refused("--out-path", "--data-path"):
        encode_imagenet.parse_args(options(world, world / "images" / "new"))

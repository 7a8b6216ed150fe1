"""Encoding: the numbers, the bytes after a kill, bad images, and folders that are not ours."""

import json
import multiprocessing
import os
import shutil
import signal
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PHOTO, flip_bit, refused, run_ranks, save_odd_files, save_small_vae

import encode_imagenet
from dataset.images import ImageFolder
from dataset.latents import LatentShards, ShardFiles, checksum, write_shard
from dataset.vae import Pixels, load_codec, posterior_sample
from engine.files import FolderLock, list_folder, write_json


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A VAE of random weights and 26 images of three classes: photographs and odd files."""
    root = tmp_path_factory.mktemp("encode")
    save_small_vae(root / "vae")
    save_odd_files(root / "images" / "odd")  # of its ten, torchvision's ImageFolder leaves a GIF
    for name, offset, count in (("china", 0, 8), ("temple", 50, 9)):
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
def unfinished(world):
    """The same folder if that run is killed before it writes dataset.json."""
    def interrupted(*_):  # not by a signal: a shell's background jobs ignore SIGINT
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(encode_imagenet.OutputFolder, "finish", interrupted)
        encode(world, world / "unfinished", "--flip")
    return world / "unfinished"


@pytest.fixture
def spoilt(world, tmp_path):
    """The images with three of them unreadable, the whole of shard 2's first batch."""
    images = shutil.copytree(world / "images", tmp_path / "spoilt")
    names = [ImageFolder(images, 32).name(row) for row in (14, 15, 16)]
    for name in names:
        (images / name).write_bytes((images / name).read_bytes()[:30])
    return SimpleNamespace(images=images, names=names)


# ---- numbers ---------------------------------------------------------------------------------


def test_the_folder_holds_what_the_contract_says(whole):
    names = {f"shard-{i:05d}{kind}.npy" for i in range(4) for kind in ("", ".flip", ".labels")}
    assert set(read(whole)) == {"dataset.json", *names}
    info = json.loads((whole / "dataset.json").read_text())
    assert info["count"] == 26 and info["shards"] == [7, 7, 7, 5] and info["skipped"] == []
    assert info["classes"] == ["china", "odd", "temple"] and info["format_version"] == 1
    assert info["image_size"] == 32 and info["latent_shape"] == [4, 4, 4]
    assert info["scale"] == 0.18215 and info["flip"] is True and info["dtype"] == "float16"
    shard = np.load(whole / "shard-00001.npy", allow_pickle=False)
    assert shard.shape == (7, 2, 4, 4, 4) and shard.dtype == np.float16
    assert (shard[:, 1] > 0).all()  # the std, not its logarithm


def raw_and_stored(world, folder, mirror):
    """The same 26 moments, (26, 2, 4, 4, 4): of the VAE on raw images, and of the shards."""
    images, shards = ImageFolder(world / "images", 32), LatentShards(folder)
    batch = (torch.randperm(26, generator=torch.Generator().manual_seed(0)),
             torch.full((26,), mirror))
    (pixels, labels), = images.batches([batch], 0)
    stored, stored_labels = shards.read(batch)
    assert torch.equal(labels, stored_labels)
    return load_codec(str(world / "vae")).encode(pixels), stored


def all_of(folder):
    """All moments of a folder of shards, in order."""
    shards = LatentShards(folder)
    return shards.read((torch.arange(len(shards)), torch.zeros(len(shards), dtype=torch.bool)))


def test_raw_images_and_float32_shards_give_the_same_latents(world, tmp_path):
    encode(world, tmp_path / "out", "--dtype", "float32", "--flip")
    noise = torch.randn(26, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    for mirror in (False, True):
        raw, stored = (posterior_sample(moments, noise, 0.18215)
                       for moments in raw_and_stored(world, tmp_path / "out", mirror))
        assert (raw - stored).abs().max() < 1e-5


def test_float16_shards_round_each_moment_by_half_a_unit_at_most(world, whole):
    for mirror in (False, True):
        raw, stored = raw_and_stored(world, whole, mirror)
        assert ((raw - stored.float()).abs() <= raw.abs() * 2**-11 + 1e-6).all()
        assert not torch.equal(raw, stored.float())


def test_mirror_moments_add_files_and_change_none(world, whole, tmp_path):
    plain, flipped = encode(world, tmp_path / "plain"), read(whole)
    assert {name for name in flipped if name not in plain} == {
        f"shard-{i:05d}.flip.npy" for i in range(4)}
    assert all(flipped[name] == plain[name] for name in plain if name != "dataset.json")


def test_pixels_can_be_stored_too(world, tmp_path):
    encode(world, tmp_path / "out", "--vae", "none", "--dtype", "float32")
    shards, images = LatentShards(tmp_path / "out"), ImageFolder(world / "images", 32)
    assert shards.latent_shape == (3, 32, 32) and shards.scale == 1
    pixels = Pixels().decode(all_of(tmp_path / "out")[0][:, 0])
    assert torch.equal(pixels, torch.stack([images.read((row, False)) for row in range(26)]))


def test_moments_beyond_float16_are_refused(world, tmp_path):
    save_small_vae(tmp_path / "vae")
    from safetensors.torch import load_file, save_file

    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["quant_conv.bias"][0] = 1e5
    save_file(weights, path, {"format": "pt"})
    with refused("--dtype", "float16", "--dtype float32"):
        encode(world, tmp_path / "out", "--vae", str(tmp_path / "vae"))
    assert not (tmp_path / "out" / "shard-00000.npy").exists()


# ---- kill and resume -------------------------------------------------------------------------


def encode_and_die(world, out):
    """Encode in a process of its own, which is killed at the last of four shards."""
    def die_at_the_last(files, batches):
        if files.moments.name == "shard-00003.npy":
            os.kill(os.getpid(), signal.SIGKILL)
        write_shard(files, batches)

    def work():
        encode_imagenet.write_shard = die_at_the_last
        encode(world, out, "--flip", "--vae", "none")

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_bytes_with_two_processes(world, tmp_path):
    """Damage to a shard that was complete is found too, by its checksum."""
    out = tmp_path / "out"
    encode_and_die(world, out)
    assert (out / "shard-00002.npy").exists() and not (out / "dataset.json").exists()
    flip_bit(out / "shard-00000.flip.npy", -20)
    before = (out / "shard-00001.npy").stat().st_mtime_ns
    said, other = run_ranks("encode_imagenet", *options(world, out, "--flip", "--vae", "none"),
                            processes=2, output=tmp_path / "said")
    assert said.splitlines()[-1] == str(out) and str(out) not in other.splitlines()
    assert (said + other).count("is damaged") == 1
    assert read(out) == encode(world, tmp_path / "whole", "--flip", "--vae", "none")
    assert (out / "shard-00001.npy").stat().st_mtime_ns == before


@pytest.mark.parametrize("state, shards", [
    ("only a temporary file", range(4)), ("nothing of some shards", [0, 3]), ("no moments", [2]),
    ("dataset.json too", [])])
def test_whatever_a_kill_leaves_is_completed_to_the_same_bytes(
        world, whole, unfinished, tmp_path, state, shards):
    """A kill may fall between any two of: notes, labels, mirrors, moments, the end."""
    out = shutil.copytree(unfinished, tmp_path / "out")
    for files in (ShardFiles(out, index) for index in shards):
        files.moments.rename(out / f".{files.moments.name}.1234.tmp")
        for path in (files.note, files.labels, files.flip) if state != "no moments" else ():
            path.unlink()
    if state == "only a temporary file":
        (out / "encoding.json").rename(out / ".encoding.json.77.tmp")
    if state == "dataset.json too":
        shutil.copy(whole / "dataset.json", out)
    before = {path: path.stat().st_mtime_ns for path in out.glob("shard*[0-9].npy")}
    assert encode(world, out, "--flip") == read(whole)
    assert all(path.stat().st_mtime_ns == before[path] for path in before)
    assert not list(out.glob(".*.tmp"))


def test_a_finished_folder_is_left_as_it_is(world, whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.glob("shard*")}
    assert encode(world, whole, "--flip")
    assert capsys.readouterr().out.strip() == str(whole)
    assert before == {path: path.stat().st_mtime_ns for path in whole.glob("shard*")}


def test_another_batch_size_changes_the_rounding_only(world, whole, tmp_path):
    encode(world, tmp_path / "out", "--flip", "--batch-size", "26", "--num-workers", "2")
    torch.testing.assert_close(all_of(tmp_path / "out"), all_of(whole))


# ---- damage and locks ------------------------------------------------------------------------


def test_checksums_are_those_of_the_numbers(whole):
    sums = json.loads((whole / "dataset.json").read_text())["crc32"]
    assert sums.keys() == {"dataset.json", *(path.name for path in whole.glob("*.npy"))}
    for path in whole.glob("*.npy"):
        assert sums[path.name] == zlib.crc32(np.load(path)) == checksum(path)
    assert LatentShards(whole).verify() is None


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


@pytest.mark.parametrize("damage", ["a flipped bit", "a note that is none"])
def test_an_interrupted_encoding_has_checksums(
        world, whole, unfinished, tmp_path, damage, capsys):
    out = shutil.copytree(unfinished, tmp_path / "out")
    if damage == "a flipped bit":
        flip_bit(out / "shard-00001.npy", -8)
    else:
        (out / "shard-00001.json").write_text("[" * 10**5)
    assert encode(world, out, "--flip") == read(whole)
    assert "shard-00001" in capsys.readouterr().err


def test_a_damaged_dataset_json_is_written_again(world, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    info = json.loads((out / "dataset.json").read_text())
    del info["crc32"]
    write_json(out / "dataset.json", info | {"classes": ["other"]})
    with refused(out, "repeat"):
        LatentShards(out)
    assert encode(world, out, "--flip") == read(whole)


def test_one_command_encodes_into_a_folder_at_a_time(world, tmp_path):
    with FolderLock(tmp_path / "out"), refused("--out-path", "process", "since"):
        encode(world, tmp_path / "out", "--flip")
    assert not read(tmp_path / "out")


# ---- bad images ------------------------------------------------------------------------------


def test_bad_images_are_named_and_the_rest_is_encoded(world, spoilt, tmp_path, capsys):
    out = tmp_path / "out"
    with refused("3 of 26 unreadable", "--skip-bad-images"):
        encode(world, out, images=spoilt.images)
    said = capsys.readouterr().err
    met, listed = said.split("unreadable images:")
    assert listed.split() == spoilt.names
    for name in spoilt.names:
        assert f"--data-path must hold readable images, got {spoilt.images}/{name}" in met
    assert not (out / "dataset.json").exists() and len(list(out.glob("*[0-9].npy"))) == 4
    with refused("cut short"):
        LatentShards(out)


def test_skipped_images_are_recorded(world, whole, spoilt, tmp_path):
    out = tmp_path / "out"
    before = encode(world, out, "--skip-bad-images", images=spoilt.images)
    info = json.loads((out / "dataset.json").read_text())
    assert info["skipped"] == spoilt.names
    assert info["count"] == 23 and info["shards"] == [7, 7, 4, 5]
    kept = torch.tensor([row for row in range(26) if row not in (14, 15, 16)])
    torch.testing.assert_close(all_of(out), tuple(part[kept] for part in all_of(whole)))
    with refused("--skip-bad-images and 3 images left out"):
        encode(world, out, images=spoilt.images)
    assert read(out) == before
    flip_bit(out / "shard-00002.npy", -8)
    (out / "shard-00002.json").write_text('"names"')
    assert encode(world, out, "--skip-bad-images", images=spoilt.images) == before


def test_what_is_encoded_stays_once_bad_images_are_skipped_or_repaired(world, whole, spoilt,
                                                                       tmp_path):
    direct = encode(world, tmp_path / "direct", "--flip", "--skip-bad-images",
                    images=spoilt.images)
    with refused("unreadable"):
        encode(world, tmp_path / "late", "--flip", images=spoilt.images)
    repaired = shutil.copytree(tmp_path / "late", tmp_path / "repaired")
    before = {path: path.stat().st_mtime_ns for folder in (tmp_path / "late", repaired)
              for path in folder.glob("shard*.npy")}
    assert direct == encode(world, tmp_path / "late", "--flip", "--skip-bad-images",
                            images=spoilt.images)
    for name in spoilt.names:
        shutil.copy(world / "images" / name, spoilt.images / name)
    assert encode(world, repaired, "--flip", images=spoilt.images) == read(whole)
    changed = {path.name for path in before if path.stat().st_mtime_ns != before[path]}
    assert changed == {path.name for path in ShardFiles(repaired, 2).arrays(True)}


def test_a_folder_of_bad_images_alone_is_refused(world, tmp_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "0.jpg").write_text("no image")
    with refused("--data-path must hold readable images, got 1 of 1"):
        encode(world, tmp_path / "out", "--skip-bad-images", images=tmp_path / "images")


# ---- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("change, word", [
    (["--image-size", "64"], "image_size"), (["--dtype", "float32"], "dtype"),
    (["--shard-size", "8"], "shard_size"), (["--precision", "bf16"], "precision"),
    (["--vae", "none"], "encoder"), (None, "flip True, now False"), ("another image", "files")])
def test_a_folder_of_another_configuration_is_refused(world, whole, tmp_path, change, word):
    before, images = read(whole), world / "images"
    if change == "another image":
        images = shutil.copytree(world / "images", tmp_path / "images")
        shutil.copy(images / "china" / "0.jpg", images / "china" / "new.jpg")
        change = []
    with refused("--out-path", word, "choose another"):
        encode(world, whole, *(["--flip", *change] if change is not None else []), images=images)
    assert read(whole) == before


@pytest.mark.parametrize("name, text", [
    ("thesis.txt", "years of work"), ("dataset.json", "{}"), ("encoding.json", "[" * 99999)])
def test_a_folder_of_something_else_is_refused_and_kept(world, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with refused("--out-path", name, "choose another folder"):
        encode(world, tmp_path)
    assert read(tmp_path) == {name: text.encode()}


@pytest.mark.parametrize("option", [
    ["--image-size", "36"], ["--vae", "/missing"], ["--data-path", "/missing"],
    ["--out-path", "{world}/vae/config.json"]])
def test_paths_and_options_that_do_not_suit_each_other_are_refused(world, tmp_path, option):
    with refused(option[0]):
        encode(world, tmp_path / "out", *(text.format(world=world) for text in option))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["{images}/new", "{images}"])
def test_a_folder_for_shards_among_the_images_is_refused(world, out):
    with refused("--out-path", "--data-path"):
        encode_imagenet.parse_args(options(world, out.format(images=world / "images")))

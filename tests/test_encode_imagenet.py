"""Encoding: the numbers, the bytes after a kill, bad images, and folders that are not ours."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import save_small_vae
from test_data import PHOTO, save_odd_files

import encode_imagenet
from dataset.images import ImageFolder
from dataset.latents import LatentShards, ShardFiles, checksum
from dataset.vae import Pixels, load_vae, posterior_sample
from engine.distributed import run_main
from engine.files import lock_folder, write_json
from engine.options import UserError

SCRIPT = Path(encode_imagenet.__file__)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


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
    """Run the script within this process; the folder as {file name: bytes}."""
    args = encode_imagenet.parse_args(options(world, out, *more, images=images))
    encode_imagenet.main(args)
    return read(out)


def read(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flip_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def whole(world):
    """The folder of an uninterrupted run of one process, with mirror images."""
    encode(world, world / "whole", "--flip")
    return world / "whole"


@pytest.fixture
def spoilt(world, tmp_path):
    """The images with three of them unreadable, the whole of shard 2's first batch."""
    images = shutil.copytree(world / "images", tmp_path / "spoilt")
    names = [ImageFolder(images, 32).name(row) for row in (14, 15, 16)]
    for name in names:
        (images / name).write_bytes((images / name).read_bytes()[:30])
    return SimpleNamespace(images=images, names=names)


def refused(*words):
    return pytest.raises(UserError, match="(?s)" + ".*".join(words))


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
    rows = torch.randperm(26, generator=torch.Generator().manual_seed(0))
    mirrored = torch.full((26,), mirror)
    pixels, labels = images[rows, mirrored]
    stored, stored_labels = shards[rows, mirrored]
    assert torch.equal(labels, stored_labels)
    return load_vae(str(world / "vae")).encode(pixels), stored


@pytest.mark.parametrize("mirror", [False, True])
def test_raw_images_and_float32_shards_give_the_same_latents(world, tmp_path, mirror):
    encode(world, tmp_path / "out", "--dtype", "float32", "--flip")
    noise = torch.randn(26, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    raw, stored = (posterior_sample(moments, noise, 0.18215)
                   for moments in raw_and_stored(world, tmp_path / "out", mirror))
    assert (raw - stored).abs().max() < 1e-5


@pytest.mark.parametrize("mirror", [False, True])
def test_float16_shards_round_each_moment_by_half_a_unit_at_most(world, whole, mirror):
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
    shards, images = (LatentShards(tmp_path / "out"), ImageFolder(world / "images", 32))
    rows, straight = torch.arange(26), torch.zeros(26, dtype=torch.bool)
    assert shards.latent_shape == (3, 32, 32) and shards.scale == 1
    pixels = Pixels().decode(shards[rows, straight][0][:, 0])
    assert torch.equal(pixels, images[rows, straight][0])


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


def test_a_killed_run_continues_to_the_same_bytes_with_two_processes(world, whole, tmp_path):
    out = tmp_path / "out"
    killed = subprocess.Popen([sys.executable, SCRIPT, *options(world, out, "--flip")],
                              env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / "shard-00001.npy").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert (out / "shard-00001.npy").exists() and not (out / "dataset.json").exists()
    before = (out / "shard-00001.npy").stat().st_mtime_ns
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         SCRIPT, *options(world, out, "--flip")],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out)  # the result, from one process
    assert read(out) == read(whole)
    assert (out / "shard-00001.npy").stat().st_mtime_ns == before


@pytest.mark.parametrize("state", ["no shard", "labels only", "gaps", "all but the end"])
def test_whatever_a_kill_leaves_is_completed_to_the_same_bytes(world, whole, tmp_path, state):
    """A kill may fall between any two of: temporary files, mirrors, labels, moments, the end."""
    out = shutil.copytree(whole, tmp_path / "out")
    info = json.loads((out / "dataset.json").read_text())
    for key in ("count", "shards", "skipped", "crc32"):
        del info[key]
    write_json(out / "encoding.json", info)
    if state != "all but the end":
        (out / "dataset.json").unlink()
    for index in {"no shard": range(4), "labels only": [2], "gaps": [0, 3]}.get(state, []):
        files = ShardFiles(out, index)
        files.moments.rename(out / f".{files.moments.name}.1234.tmp")
        if state != "labels only":
            files.flip.unlink()
            files.labels.unlink()
    assert encode(world, out, "--flip") == read(whole)


def test_a_kill_before_the_first_file_leaves_a_usable_folder(world, whole, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".encoding.json.77.tmp").write_text("{")
    assert encode(world, tmp_path / "out", "--flip") == read(whole)


def test_a_finished_folder_is_left_as_it_is(world, whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.glob("shard*")}
    assert encode(world, whole, "--flip")
    assert capsys.readouterr().out.strip() == str(whole)
    assert before == {path: path.stat().st_mtime_ns for path in whole.glob("shard*")}


@pytest.mark.parametrize("batch", ["1", "26"])
def test_another_batch_size_changes_the_rounding_only(world, whole, tmp_path, batch):
    encode(world, tmp_path / "out", "--flip", "--batch-size", batch, "--num-workers", "2")
    ours, theirs = LatentShards(tmp_path / "out"), LatentShards(whole)
    rows, straight = torch.arange(26), torch.zeros(26, dtype=torch.bool)
    torch.testing.assert_close(ours[rows, straight][0], theirs[rows, straight][0])


# ---- damage and locks ------------------------------------------------------------------------


def test_checksums_are_those_of_the_numbers(whole):
    sums = json.loads((whole / "dataset.json").read_text())["crc32"]
    assert sums.keys() == {"dataset.json", *(path.name for path in whole.glob("*.npy"))}
    for path in whole.glob("*.npy"):
        assert sums[path.name] == zlib.crc32(np.load(path)) == checksum(path)
    assert LatentShards(whole).verify() is None


@pytest.mark.parametrize("name", ["moments", "labels", "flip"])
@pytest.mark.parametrize("finished", [True, False])
def test_a_shard_with_a_flipped_bit_is_encoded_again(world, whole, tmp_path, name, finished,
                                                     monkeypatch, capsys):
    """It was trained on without a word. An encoding that was cut short has checksums, too."""
    out = tmp_path / "out"
    if finished:
        shutil.copytree(whole, out)
    else:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(encode_imagenet, "finish", lambda *_: signal.raise_signal(signal.SIGINT))
            encode(world, out, "--flip")
        (out / ".lock").write_text("process 1")  # as SIGKILL leaves it
    path = getattr(ShardFiles(out, 1), name)
    flip_bit(path, -8)
    untouched = (out / "shard-00002.npy").stat().st_mtime_ns
    if finished:
        with refused(path.name, "must be as it was written", "repeat the encode_imagenet.py"):
            LatentShards(out).verify()
    capsys.readouterr()
    assert encode(world, out, "--flip") == read(whole)
    said = capsys.readouterr().err
    assert said.count("is damaged") == 1 and f"{path} is damaged: its shard is enc" in said
    assert (out / "shard-00002.npy").stat().st_mtime_ns == untouched


@pytest.mark.slow
def test_two_processes_find_what_is_damaged(world, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    for name in ("shard-00000.npy", "shard-00003.flip.npy"):
        flip_bit(out / name, -20)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         SCRIPT, *options(world, out, "--flip")],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stderr.count("is damaged") == 2, done.stderr
    assert read(out) == read(whole)


def test_a_large_set_is_verified_by_its_labels_alone(whole, tmp_path, monkeypatch):
    """All of ImageNet would take minutes at each start: the log says how to do it."""
    monkeypatch.setattr("dataset.latents.VERIFIED", 0)
    out = shutil.copytree(whole, tmp_path / "out")
    flip_bit(out / "shard-00001.npy", -20)
    note = LatentShards(out).verify()
    assert "latents were not: repeat the encode_imagenet.py" in note and "\n" not in note
    flip_bit(out / "shard-00001.labels.npy", -8)
    with refused("shard-00001.labels.npy"):
        LatentShards(out).verify()


def test_a_set_of_an_earlier_version_gets_checksums_from_a_repeated_command(world, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    info = json.loads((out / "dataset.json").read_text())
    del info["crc32"]
    write_json(out / "dataset.json", info)
    assert "repeat the encode_imagenet.py command to add" in LatentShards(out).verify()
    assert encode(world, out, "--flip") == read(whole)


@pytest.mark.parametrize("change", [{"classes": ["chinb", "odd", "temple"]}, {"scale": 0.18315},
                                    {"crc32": {}}, {"crc32": 5}])
def test_a_damaged_dataset_json_is_refused(whole, tmp_path, change):
    out = shutil.copytree(whole, tmp_path / "out")
    info = json.loads((out / "dataset.json").read_text())
    write_json(out / "dataset.json", info | change)
    with refused("dataset.json must be as encode_imagenet.py writes it", "encode again"):
        LatentShards(out)


def test_one_command_encodes_into_a_folder_at_a_time(world, whole, tmp_path):
    with (lock_folder("--out-path", tmp_path / "out"),
          refused("--out-path must be of one run at a time", "process .* since")):
        encode(world, tmp_path / "out", "--flip")
    (tmp_path / "out" / ".lock").write_text("process 1")  # as SIGKILL leaves it
    assert encode(world, tmp_path / "out", "--flip") == read(whole)


def test_the_folder_is_examined_again_once_it_is_held(world, whole, tmp_path, monkeypatch):
    """What another command had encoded meanwhile was removed, or taken for this one's."""
    alone = lock_folder

    def wait_for_another_command(option, folder):
        shutil.copytree(whole, folder)
        return alone(option, folder)

    monkeypatch.setattr("encode_imagenet.lock_folder", wait_for_another_command)
    with refused("--out-path", "--dtype was float16 and is float32"):
        encode(world, tmp_path / "out", "--flip", "--dtype", "float32")
    shutil.rmtree(tmp_path / "out")
    encode(world, tmp_path / "out", "--flip")
    assert read(tmp_path / "out") == read(whole)
    for path in whole.glob("shard*"):
        assert (tmp_path / "out" / path.name).stat().st_mtime_ns == path.stat().st_mtime_ns


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


def test_skipping_bad_images_records_them(world, whole, spoilt, tmp_path):
    out = tmp_path / "out"
    encode(world, out, "--skip-bad-images", images=spoilt.images)
    info = json.loads((out / "dataset.json").read_text())
    assert info["skipped"] == spoilt.names
    assert info["count"] == 23 and info["shards"] == [7, 7, 4, 5]
    found, theirs = LatentShards(out), LatentShards(whole)
    kept = torch.tensor([row for row in range(26) if row not in (14, 15, 16)])
    straight = torch.zeros(23, dtype=torch.bool)
    moments, labels = found[torch.arange(23), straight]
    expected, expected_labels = theirs[kept, straight]
    torch.testing.assert_close(moments, expected)
    assert torch.equal(labels, expected_labels)


def test_skipping_as_an_afterthought_encodes_nothing_again(world, spoilt, tmp_path):
    encode(world, tmp_path / "direct", "--skip-bad-images", images=spoilt.images)
    with refused("unreadable"):
        encode(world, tmp_path / "late", images=spoilt.images)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "late").glob("shard*")
              if not path.name.endswith(".crc32.json")}
    late = encode(world, tmp_path / "late", "--skip-bad-images", images=spoilt.images)
    assert late == read(tmp_path / "direct")
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())


def test_repaired_images_are_all_that_is_encoded_again(world, whole, spoilt, tmp_path):
    out = tmp_path / "out"
    with refused("unreadable"):
        encode(world, out, "--flip", images=spoilt.images)
    before = (out / "shard-00001.npy").stat().st_mtime_ns
    for name in spoilt.names:
        shutil.copy(world / "images" / name, spoilt.images / name)
    assert encode(world, out, "--flip", images=spoilt.images) == read(whole)
    assert (out / "shard-00001.npy").stat().st_mtime_ns == before


def test_a_finished_set_with_gaps_is_not_taken_for_a_whole_one(world, spoilt, tmp_path):
    before = encode(world, tmp_path / "out", "--skip-bad-images", images=spoilt.images)
    with refused("--skip-bad-images and 3 images left out"):
        encode(world, tmp_path / "out", images=spoilt.images)
    assert read(tmp_path / "out") == before


def test_a_folder_of_bad_images_alone_is_refused(world, tmp_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "0.jpg").write_text("no image")
    with refused("--data-path must hold a readable image"):
        encode(world, tmp_path / "out", "--skip-bad-images", images=tmp_path / "images")


# ---- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("change, words", [
    (["--image-size", "64"], ["--image-size was 32 and is 64"]),
    (["--dtype", "float32"], ["--dtype was float16 and is float32"]),
    (["--shard-size", "8"], ["--shard-size was 7 and is 8"]),
    (["--precision", "bf16"], ["--precision was fp32 and is bf16"]),
    (["--vae", "none"], ["--vae was", "and is none"])])
def test_a_folder_of_another_configuration_is_refused(world, whole, change, words):
    before = read(whole)
    with refused("--out-path", *words, "choose another"):
        encode(world, whole, "--flip", *change)
    with refused("--flip was True and is False"):
        encode(world, whole)
    assert read(whole) == before


def test_another_list_of_images_is_refused(world, whole, tmp_path):
    images = shutil.copytree(world / "images", tmp_path / "images")
    shutil.copy(images / "china" / "0.jpg", images / "china" / "new.jpg")
    with refused("--out-path", "--data-path", "26", "27"):
        encode(world, whole, "--flip", images=images)


@pytest.mark.parametrize("name, text", [
    ("thesis.txt", "years of work"), ("dataset.json", "{}"), ("encoding.json", "[" * 99999)])
def test_a_folder_of_something_else_is_refused_and_kept(world, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with refused("--out-path", name, "choose another folder"):
        encode(world, tmp_path)
    assert read(tmp_path) == {name: text.encode()}


@pytest.mark.parametrize("how", ["truncated", "foreign", "labels truncated"])
def test_a_damaged_shard_is_refused_and_kept(world, whole, tmp_path, how):
    out = shutil.copytree(whole, tmp_path / "out")
    files = ShardFiles(out, 1)
    if how == "truncated":
        files.moments.write_bytes(files.moments.read_bytes()[:-5])
    elif how == "foreign":
        np.save(files.moments, np.zeros(7))
    else:
        files.labels.write_bytes(files.labels.read_bytes()[:-5])
    before = read(out)
    with refused("shard-00001", "remove it and repeat"):
        encode(world, out, "--flip")
    assert read(out) == before


@pytest.mark.parametrize("name", ["moments", "labels", "flip"])
def test_a_shard_of_which_a_file_was_removed_is_encoded_again(world, whole, tmp_path, name):
    out = shutil.copytree(whole, tmp_path / "out")
    getattr(ShardFiles(out, 1), name).unlink()
    encode(world, out, "--flip")
    assert read(out) == read(whole)


def test_too_little_disk_is_said_before_anything_is_written(world, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with refused("--out-path must have", "GB free", "choose another folder"):
        encode(world, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_help_does_without_diffusers():
    code = ("import atexit, sys; import encode_imagenet; "
            "atexit.register(lambda: print('diffusers' in sys.modules)); "
            "encode_imagenet.parse_args(['--help'])")
    done = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, env=ENVIRONMENT,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "False"
    assert "--skip-bad-images" in done.stdout


@pytest.mark.parametrize("change, words", [
    (["--image-size", "0"], "--image-size"), (["--dtype", "int8"], "--dtype"),
    (["--batch-size", "many"], "--batch-size"), (["--flop"], "unrecognized arguments: --flop"),
    (["--out-path", "{images}/new"], "--out-path must lie outside --data-path"),
    (["--out-path", "{images}"], "--out-path must lie outside --data-path")])
def test_wrong_options_are_one_line_and_exit_code_2(world, tmp_path, capsys, change, words):
    change = [text.format(images=world / "images") for text in change]
    with pytest.raises((SystemExit, UserError)) as caught:
        encode_imagenet.parse_args(options(world, tmp_path / "out", *change))
    said = capsys.readouterr().err or str(caught.value)
    assert words in said and len(said.splitlines()) == 1
    assert getattr(caught.value, "code", 2) == 2


@pytest.mark.parametrize("change, words", [
    (["--image-size", "36"], "--image-size must be a multiple of 8"),
    (["--vae", "/missing"], "--vae must be ema, mse, none or a folder"),
    (["--data-path", "/missing"], "--data-path must be a folder with one folder of images per"),
    (["--out-path", "{world}/vae/config.json"], "which is a file; choose a folder")])
def test_paths_and_options_that_do_not_suit_each_other_are_refused(world, tmp_path, change, words):
    with refused(words):
        encode(world, tmp_path / "out", *(text.format(world=world) for text in change))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [["--image-size", "36"], ["--out-path", "{world}"]])
def test_a_refusal_ends_the_script_with_one_line_and_exit_code_2(world, tmp_path, capsys, change):
    change = [text.format(world=world) for text in change]

    def parse_args():
        return encode_imagenet.parse_args(options(world, tmp_path / "out", *change))

    with pytest.raises(SystemExit) as caught:
        run_main(encode_imagenet.main, parse_args)
    said = capsys.readouterr()
    assert caught.value.code == 2 and len(said.err.splitlines()) == 1 and not said.out

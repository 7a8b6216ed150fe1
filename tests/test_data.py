"""Crops, odd files, the order of training data, and latent shards."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.datasets.folder import pil_loader

from dataset.images import ImageFolder, center_crop, read_image
from dataset.latents import DTYPES, LatentShards, ShardFiles, write_shard
from dataset.loader import Batches, load_batches, read_images
from dataset.vae import Pixels
from engine.files import write_json
from engine.options import UserError

ALONE = SimpleNamespace(rank=0, size=1)
CPU = torch.device("cpu")
PHOTO = Image.fromarray(load_sample_images().images[0])  # a real photograph, 640 x 427


def refused(*words):
    """Raises a UserError of one line with these words."""
    return pytest.raises(UserError, match="(?s)" + ".*".join(words))


# ---- the crop --------------------------------------------------------------------------------


@pytest.mark.parametrize("width, height, size, halvings, resized, left, top", [
    # worked out by hand from ADM's recipe: halve (floor) while min >= 2 size, scale, round, centre
    (640, 427, 256, [], (384, 256), 64, 0),  # 640 * 256 / 427 = 383.7
    (640, 427, 64, [(320, 213), (160, 106)], (97, 64), 16, 0),  # 160 * 64 / 106 = 96.6
    (513, 512, 256, [(256, 256)], (256, 256), 0, 0),  # 513 // 2
    (511, 900, 256, [], (256, 451), 0, 97),  # tall: 450.9, and 195 // 2
    (301, 75, 64, [], (257, 64), 96, 0),  # wide: 256.9, and 193 // 2
    (37, 20, 32, [], (59, 32), 13, 0),  # smaller than the crop: 59.2, and 27 // 2
    (1, 1, 8, [], (8, 8), 0, 0),
    (5, 2, 5, [], (12, 5), 3, 0),  # 12.5 rounds to the even 12, and 7 // 2
    (7, 2, 5, [], (18, 5), 6, 0),  # 17.5 rounds to the even 18, and 13 // 2
])
def test_the_crop_is_adms(width, height, size, halvings, resized, left, top):
    image = PHOTO.crop((100, 50, 100 + width, 50 + height))
    expected = image
    for shape in halvings:
        expected = expected.resize(shape, Image.Resampling.BOX)
    expected = np.array(expected.resize(resized, Image.Resampling.BICUBIC))
    expected = expected[top:top + size, left:left + size]
    assert np.array_equal(np.array(center_crop(image, size)), expected)


def test_halving_takes_means_of_two_by_two_pixels():
    means = np.arange(16, dtype=np.uint8).reshape(4, 4) * 10 + 20
    pixels = means.repeat(2, 0).repeat(2, 1)
    pixels[::2] += 8
    pixels[1::2] -= 8  # the mean of each four stays
    assert np.array_equal(np.array(center_crop(Image.fromarray(pixels), 4)), means)


# ---- files -----------------------------------------------------------------------------------


def save_odd_files(folder):
    """Photographs in every mode that ImageNet holds, and some that it does not."""
    square = PHOTO.crop((0, 0, 32, 32))
    folder.mkdir(parents=True, exist_ok=True)
    square.convert("L").save(folder / "grey.jpg")
    square.convert("CMYK").save(folder / "cmyk.jpg")
    square.convert("P").save(folder / "palette.png")
    square.convert("P").save(folder / "transparent.gif", transparency=3)
    square.convert("1").save(folder / "bits.png")
    square.convert("LA").save(folder / "grey-alpha.png")
    alpha = Image.linear_gradient("L").resize((32, 32))
    Image.merge("RGBA", (*square.split(), alpha)).save(folder / "alpha.png")
    deep = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64
    Image.fromarray(deep).save(folder / "sixteen.png")
    Image.fromarray(deep).save(folder / "sixteen.tiff")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated
    square.save(folder / "rotated.jpg", exif=exif, quality=95)
    return sorted(folder.iterdir())


def test_odd_files_become_the_rgb_that_torchvision_reads(tmp_path):
    files = save_odd_files(tmp_path)
    assert len(files) == 10
    for file in files:
        expected = np.array(pil_loader(str(file)))  # (32, 32, 3): the crop leaves it alone
        found = read_image(file, 32)
        assert found.dtype == torch.uint8 and found.shape == (3, 32, 32)
        assert np.array_equal(found.permute(1, 2, 0).numpy(), expected), file.name


def test_an_exif_rotation_is_not_applied(tmp_path):
    save_odd_files(tmp_path)
    found = read_image(tmp_path / "rotated.jpg", 32).permute(1, 2, 0).numpy().astype(int)
    upright = np.array(PHOTO.crop((0, 0, 32, 32))).astype(int)
    assert np.abs(found - upright).mean() < np.abs(found - np.rot90(upright)).mean() / 2


def save_folder(path, per_class=5, size=32):
    """A class folder each of 'b' and 'a' with real photographs."""
    for offset, name in enumerate("ba"):
        (path / name).mkdir(parents=True)
        for i in range(per_class):
            x, y = 40 * i, 60 * offset
            PHOTO.crop((x, y, x + size + i, y + size)).save(path / name / f"{i}.png")
    return path


def spoil(path, how):
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[:len(whole) // 2], "empty": b"", "text": b"no image",
                      "header only": whole[:40]}[how])


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "header only"])
@pytest.mark.parametrize("name", ["0.png", "grey.jpg", "sixteen.tiff", "transparent.gif"])
def test_an_unreadable_image_is_named(tmp_path, how, name):
    PHOTO.crop((0, 0, 32, 32)).save(tmp_path / "0.png")
    save_odd_files(tmp_path)
    spoil(tmp_path / name, how)
    with refused("--data-path", str(tmp_path / name), "repair the file"):
        read_image(tmp_path / name, 32)


def test_an_image_folder_serves_images_mirrors_and_labels(tmp_path):
    folder = ImageFolder(save_folder(tmp_path / "images"), 32)
    assert folder.classes == ["a", "b"] and len(folder) == 10
    assert folder.labels.tolist() == [0] * 5 + [1] * 5
    assert folder.name(7) == "b/2.png"
    images, labels = folder[torch.tensor([7, 0, 7]), torch.tensor([False, False, True])]
    assert images.shape == (3, 3, 32, 32) and labels.tolist() == [1, 0, 1]
    expected = np.array(center_crop(Image.open(tmp_path / "images/b/2.png"), 32))
    assert np.array_equal(images[0].permute(1, 2, 0).numpy(), expected)
    assert torch.equal(images[2], images[0].flip(2))


def test_one_process_lists_the_folder_for_all(tmp_path):
    """On a file system of a network, eight that list a million files take eight times as long."""
    said = []
    first = SimpleNamespace(main=True, agree=lambda value: said.append(value) or value)
    other = SimpleNamespace(main=False, agree=lambda value: said[-1])
    path = save_folder(tmp_path / "images")
    expected = ImageFolder(path, 32, first)
    for file in path.glob("*/*"):
        file.unlink()  # a second listing would find nothing
    found = ImageFolder(path, 32, other)
    assert found.fingerprint() == expected.fingerprint() and found.classes == ["a", "b"]
    assert torch.equal(found.labels, expected.labels)
    for world in (first, other):
        with refused("--data-path must be a folder", str(path)):
            ImageFolder(path, 32, world)


def test_its_fingerprint_tells_lists_of_files_apart(tmp_path):
    save_folder(tmp_path / "images")
    before = ImageFolder(tmp_path / "images", 32).fingerprint()
    assert ImageFolder(f"{tmp_path}/images/", 16).fingerprint() == before
    (tmp_path / "images/a/4.png").rename(tmp_path / "images/b/5.png")
    assert ImageFolder(tmp_path / "images", 32).fingerprint() != before


@pytest.mark.parametrize("workers", [0, 1])
def test_a_worker_hands_on_the_unreadable_image(tmp_path, workers):
    folder = ImageFolder(save_folder(tmp_path / "images"), 32)
    spoil(tmp_path / "images/a/0.png", "truncated")
    order = Batches(10, 10, seed=0, start=0, stop=1, flip=False, world=ALONE)
    with refused("a/0.png"):
        list(load_batches(folder, order, workers=workers, device=CPU))


def test_readers_need_no_shared_memory(tmp_path):
    """Docker gives 64 MB, in which eight readers had two batches of 6 MB each: feeding them failed
    with a traceback, and the run hung. Here 1 MB has to do for batches of 6 MB.
    """
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs a mount namespace, which this user may not make")
    save_folder(tmp_path / "images", per_class=32)
    encode = [sys.executable, ROOT / "encode_imagenet.py", "--data-path", tmp_path / "images",
              "--out-path", tmp_path / "out", "--vae", "none", "--num-workers", "2"]
    small = "mount -t tmpfs -o size=1m tmpfs /dev/shm && exec \"$@\""
    done = subprocess.run(["unshare", "-m", "sh", "-c", small, "sh", *encode], timeout=60,
                          capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "out" / "dataset.json").exists(), done.stderr


def test_readers_end_with_a_process_that_is_killed(tmp_path):
    """They hung on the pipe that it emptied no more, and held the lock of its folder."""
    save_folder(tmp_path / "images", per_class=20)
    script = tmp_path / "killed.py"
    script.write_text(
        "import multiprocessing, os, sys, time\n"
        "from dataset.images import ImageFolder\n"
        "from dataset.loader import read_images\n"
        "images = ImageFolder(sys.argv[1], 256)\n"
        "served = read_images(images.image, [range(40)] * 9, workers=2)\n"
        "next(served)\n"
        "time.sleep(2)  # the readers fill the pipe\n"
        "print(*[child.pid for child in multiprocessing.active_children()], flush=True)\n"
        "os.kill(os.getpid(), 9)\n")
    with open(tmp_path / "out", "w") as out:
        subprocess.run([sys.executable, script, tmp_path / "images"], stdout=out, timeout=60,
                       env={**os.environ, "PYTHONPATH": str(ROOT)})
    readers = [Path("/proc", pid) for pid in (tmp_path / "out").read_text().split()]
    end = time.monotonic() + 10
    while any(map(Path.exists, readers)) and time.monotonic() < end:
        time.sleep(0.1)
    alive = [path.name for path in readers if path.exists()]
    for pid in alive:
        os.kill(int(pid), 9)
    assert len(readers) == 2 and not alive


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_readers_serve_batches_of_any_length_in_order(tmp_path, workers):
    images = ImageFolder(save_folder(tmp_path / "images"), 32)
    spoil(tmp_path / "images/a/3.png", "truncated")
    batches = [[0], list(range(10)), [9, 8, 7], [3, 1]]
    served = list(read_images(images.image, batches, workers=workers))
    assert [batch for batch, _ in served] == batches
    for batch, found in served:
        for row, image in zip(batch, found, strict=True):
            if row == 3:
                assert isinstance(image, UserError) and "a/3.png" in str(image)
            else:
                assert np.array_equal(image, images.image(row).numpy())


def test_folders_that_hold_no_images_are_refused(tmp_path):
    for path in (tmp_path / "missing", tmp_path):
        with refused("--data-path must be a folder", str(path)):
            ImageFolder(path, 32)
    (tmp_path / "a").mkdir()
    with refused("--data-path must be a folder", str(tmp_path), "a"):
        ImageFolder(tmp_path, 32)


# ---- the order -------------------------------------------------------------------------------


def order(**changes):
    return Batches(**{"count": 103, "global_batch": 20, "seed": 1, "start": 0, "stop": 10,
                           "flip": True, "world": ALONE, **changes})


def test_an_epoch_covers_the_set_once_and_the_next_is_another():
    steps = [rows.tolist() for rows, _ in order()]
    first, second = sum(steps[:5], []), sum(steps[5:], [])
    assert len(set(first)) == len(set(second)) == 100 and first != second
    assert max(first + second) == 102


def test_processes_are_disjoint_and_make_up_the_global_batch():
    whole = list(order())
    parts = [list(order(world=SimpleNamespace(rank=rank, size=4))) for rank in range(4)]
    for step, (rows, mirrored) in enumerate(whole):
        for rank in range(4):
            assert torch.equal(parts[rank][step][0], rows[rank::4])
            assert torch.equal(parts[rank][step][1], mirrored[rank::4])


def test_the_order_starts_at_any_step():
    for ours, theirs in zip(list(order())[7:], order(start=7), strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_half_of_the_images_are_mirrored_if_asked():
    flips = torch.cat([mirrored for _, mirrored in order(stop=100)])
    assert 900 < flips.sum() < 1100  # 2000 coins: false alarm 1e-5
    assert not any(mirrored.any() for _, mirrored in order(flip=False))


def test_fewer_images_than_a_batch_are_refused():
    with refused("--global-batch-size must be at most the number of images, 19, got 20"):
        order(count=19)


# ---- shards ----------------------------------------------------------------------------------

SHAPE = (4, 8, 8)
COUNTS = [6, 0, 5]
INFO = {"format_version": 1, "classes": ["a", "b", "c"], "image_size": 64, "crop": "adm-center",
        "latent_shape": list(SHAPE), "vae": "ema", "scale": 0.18215, "dtype": "float16",
        "flip": True, "shards": COUNTS, "count": 11}


def stored(mirrored=False, dtype=torch.float16):
    """The moments of the shards below, (11, 2, 4, 8, 8)."""
    generator = torch.Generator().manual_seed(int(mirrored))
    return torch.randn(sum(COUNTS), 2, *SHAPE, generator=generator).to(dtype)


def save_shards(path, dtype="float16"):
    """A data set of 11 latents in shards of 6, 0 and 5; image i has label i % 3."""
    path.mkdir(parents=True)
    kind, starts = DTYPES[dtype], np.cumsum([0, *COUNTS])
    for index, (start, stop) in enumerate(zip(starts, starts[1:])):
        parts = [(torch.arange(a, b) % 3, stored(dtype=kind)[a:b], stored(True, kind)[a:b], [])
                 for a, b in ((start, start + 2), (start + 2, stop)) if stop > start]
        parts = parts or [(torch.arange(0), stored(dtype=kind)[:0], stored(dtype=kind)[:0], [])]
        write_shard(ShardFiles(path, index), parts, latent_shape=SHAPE,
                            dtype=dtype, flip=True)
    write_json(path / "dataset.json", {**INFO, "dtype": dtype})
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
    found = LatentShards(save_shards(tmp_path / "shards", dtype))
    assert len(found) == 11 and found.classes == ["a", "b", "c"] and found.flip
    assert (found.image_size, found.latent_shape, found.scale) == (64, SHAPE, 0.18215)
    rows = torch.tensor([10, 0, 6, 5, 5, 10])
    mirrored = torch.tensor([True, False, True, False, True, False])
    moments, labels = found[rows, mirrored]
    kind = DTYPES[dtype]
    assert moments.dtype == kind and moments.shape == (6, 2, *SHAPE)
    expected = torch.where(mirrored[:, None, None, None, None], stored(True, kind)[rows],
                           stored(dtype=kind)[rows])
    assert torch.equal(moments, expected) and labels.tolist() == (rows % 3).tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_serves_shards_in_order(shards, workers):
    found = LatentShards(shards)
    batches = order(count=11, global_batch=4, stop=5)
    served = list(load_batches(found, batches, workers=workers, device=CPU))
    assert len(served) == 5
    for (moments, labels), (rows, mirrored) in zip(served, batches, strict=True):
        assert torch.equal(moments, found[rows, mirrored][0])
        assert torch.equal(labels, rows % 3)


def test_a_process_that_is_not_forked_gets_the_images(digits):
    """As on Python 3.14, which no longer forks by default."""
    images = ImageFolder(digits, 8)
    batch = torch.arange(4), torch.zeros(4, dtype=torch.bool)
    expected, _ = images[batch]
    assert torch.equal(pickle.loads(pickle.dumps(images))[batch][0], expected)


def test_a_process_that_is_not_forked_opens_the_shards_itself(shards):
    message = pickle.dumps(LatentShards(shards))
    assert len(message) < 1000
    assert torch.equal(pickle.loads(message).labels, LatentShards(shards).labels)


def test_serving_batches_leaves_the_files_alone(shards):
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    moments, _ = LatentShards(shards)[torch.arange(11), torch.zeros(11, dtype=torch.bool)]
    moments.zero_()
    assert before == {path.name: path.read_bytes() for path in shards.iterdir()}


def damage(shards, how):
    """Damage a data set; returns a word that the message must hold."""
    files = ShardFiles(shards, 2)
    whole = files.moments.read_bytes()
    if how == "missing":
        files.moments.unlink()
    elif how == "truncated":
        files.moments.write_bytes(whole[:-1])
    elif how == "too long":
        files.moments.write_bytes(whole + b"0")
    elif how == "of another dtype":
        np.save(files.moments, stored()[6:].float().numpy())
    elif how == "of another shape":
        np.save(files.moments, stored()[6:, :1].numpy())
    elif how == "in Fortran order":
        np.save(files.moments, np.asfortranarray(stored()[6:].numpy()))
    elif how == "pickled":
        np.save(files.moments, np.array([print] * 5), allow_pickle=True)
    elif how == "no array":
        files.moments.write_bytes(b"PK\x03\x04 something else")
    elif how == "hostile":
        files.moments.write_bytes(whole[:10] + (b"-" * 117 + b"1") + whole[128:])
    elif how == "huge":
        header = whole[:128].replace(b"(5, ", b"(5" + b"0" * 17 + b", ")
        files.moments.write_bytes(header[:127] + b"\n" + whole[128:])
    elif how == "a folder":
        files.moments.unlink()
        files.moments.mkdir()
    elif how == "without mirrors":
        files.flip.unlink()
        return files.flip.name
    elif how == "without labels":
        files.labels.unlink()
        return files.labels.name
    elif how in ("labels too high", "labels below 0"):
        np.save(files.labels, np.array([0, 1, 2, 0, 3 if "high" in how else -1]))
        return files.labels.name
    return files.moments.name


@pytest.mark.parametrize("how", [
    "missing", "truncated", "too long", "of another dtype", "of another shape", "in Fortran order",
    "pickled", "no array", "hostile", "huge", "a folder", "without mirrors", "without labels",
    "labels too high", "labels below 0"])
def test_a_damaged_or_foreign_shard_is_refused_by_name(shards, how):
    name = damage(shards, how)
    with refused(name, "must hold", "got"):
        LatentShards(shards)


@pytest.mark.parametrize("field, value", [
    ("format_version", 2), ("classes", []), ("classes", [1, 2, 3]), ("image_size", "64"),
    ("latent_shape", [4, 8]), ("latent_shape", [4, 8, -8]), ("scale", "0.18"), ("scale", 0.0),
    ("dtype", "float64"), ("dtype", "../../x"), ("flip", 1), ("crop", "random"),
    ("shards", [6, -1, 6]), ("shards", ["../shard", 11]), ("shards", 3), ("count", 12),
    ("count", True), ("vae", None), (None, None)])
def test_a_dataset_json_with_a_wrong_field_is_refused(shards, field, value):
    info = {**INFO, field: value} if field else []
    (shards / "dataset.json").write_text(json.dumps(info))
    with refused("dataset.json must be as encode_imagenet.py writes it", "encode again"):
        LatentShards(shards)


@pytest.mark.parametrize("field", sorted(INFO))
def test_a_dataset_json_without_a_field_is_refused(shards, field):
    write_json(shards / "dataset.json", {k: v for k, v in INFO.items() if k != field})
    with refused("dataset.json", field, "encode again"):
        LatentShards(shards)


@pytest.mark.parametrize("text", ["", "{", "[" * 100000, "\xff", '{"count": NaN}'])
def test_a_dataset_json_that_is_none_is_refused(shards, text):
    (shards / "dataset.json").write_bytes(text.encode("latin-1"))
    with refused("dataset.json must be as encode_imagenet.py writes it"):
        LatentShards(shards)


def test_shards_and_images_are_not_mistaken_for_each_other(shards, tmp_path):
    with refused("holds latent shards", "--encoded-data"):
        ImageFolder(shards, 64)
    with refused("without dataset.json", "leave out --encoded-data"):
        LatentShards(save_folder(tmp_path / "images"))


def test_an_unfinished_encoding_is_refused(shards):
    (shards / "dataset.json").rename(shards / "encoding.json")
    with refused("cut short", "repeat the encode_imagenet.py command"):
        LatentShards(shards)


def test_options_that_do_not_suit_the_shards_are_refused(shards):
    def space(scale=0.18215, shape=SHAPE):
        return SimpleNamespace(name="mse", scale=scale, latent_shape=lambda size: shape)

    found = LatentShards(shards)
    found.check(space=space(), image_size=64, flip=True)
    with refused("--image-size", "64", "got 128"):
        found.check(space=space(), image_size=128, flip=False)
    with refused("--vae", "ema", "0.18215", "got mse", "0.13025"):
        found.check(space=space(0.13025), image_size=64, flip=False)
    with refused("--vae", "got none"):
        found.check(space=Pixels(), image_size=64, flip=False)
    write_json(shards / "dataset.json", {**INFO, "flip": False})
    with refused("--flip"):
        LatentShards(shards).check(space=space(), image_size=64, flip=True)


def test_a_data_set_of_imagenets_length_starts_within_seconds(tmp_path):
    """1 281 167 latents as encode_imagenet.py deals them; sparse files: 21 GB long, 10 MB big."""
    counts = [8192] * 156 + [3215]
    path = tmp_path / "long"
    path.mkdir()
    for index, count in enumerate(counts):
        files = ShardFiles(path, index)
        for file, dtype, row in ((files.moments, "float16", (2, 4, 32, 32)),
                                 (files.labels, "int64", ())):
            with open(file, "wb") as stream:
                np.lib.format.write_array_header_1_0(stream, {
                    "shape": (count, *row), "fortran_order": False,
                    "descr": np.lib.format.dtype_to_descr(np.dtype(dtype))})
                size = count * int(np.prod(row)) * np.dtype(dtype).itemsize
                stream.truncate(stream.tell() + size)
    write_json(path / "dataset.json", {
        **INFO, "classes": [f"{i:04d}" for i in range(1000)], "image_size": 256,
        "latent_shape": [4, 32, 32], "flip": False, "shards": counts, "count": 1281167})
    try:
        start = time.monotonic()
        found = LatentShards(path)
        batches = order(count=len(found), global_batch=256, start=400_000, stop=400_002, flip=False)
        served = list(load_batches(found, batches, workers=1, device=CPU))
        assert time.monotonic() - start < 5
        assert len(found) == 1281167 and served[0][0].shape == (256, 2, 4, 32, 32)
    finally:
        shutil.rmtree(path)

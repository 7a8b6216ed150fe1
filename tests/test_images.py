"""The crop, odd and broken files, training folders, and images of .npz files."""

import os
import pickle
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PHOTO, refused, save_folder, save_odd_files
from PIL import Image, ImageFont
from torchvision.datasets.folder import pil_loader

import sample
from dataset.images import ImageFolder, center_crop, read_image
from dataset.pictures import break_lines, drawable, save_grid, write_captions
from engine.checkpoint import load_checkpoint
from engine.distributed import World
from engine.errors import UserError
from metrics.image_sets import FolderImages, NpzImages
from metrics.reference import Reference

ALONE = World(0, 1, torch.device("cpu"), "fp32")


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
    with refused("--data-path", tmp_path / name):
        read_image(tmp_path / name, 32)


def test_an_image_folder_serves_images_mirrors_and_labels(tmp_path):
    folder = ImageFolder(save_folder(tmp_path / "images"), 32)
    assert folder.classes == ["a", "b"] and len(folder) == 10
    assert folder.labels.tolist() == [0] * 5 + [1] * 5
    assert folder.name(7) == "b/2.png"
    sampler = [(torch.tensor([7, 0, 7]), torch.tensor([False, False, True]))]
    (images, labels), = folder.batches(sampler, 0)
    assert images.shape == (3, 3, 32, 32) and labels.tolist() == [1, 0, 1]
    expected = np.array(center_crop(Image.open(tmp_path / "images/b/2.png"), 32))
    assert np.array_equal(images[0].permute(1, 2, 0).numpy(), expected)
    assert torch.equal(images[2], images[0].flip(2))


def test_rank_0_lists_the_folder_for_all(tmp_path):
    """Eight ranks that list a million files on a network file system take eight times as long."""
    results = []

    def on_rank_0(work):
        results.append(work())
        return results[-1]

    path = save_folder(tmp_path / "images")
    expected = ImageFolder(path, 32, SimpleNamespace(on_main=on_rank_0))
    for file in path.glob("*/*"):
        file.unlink()  # a second listing would find nothing
    found = ImageFolder(path, 32, SimpleNamespace(on_main=lambda work: results[-1]))
    assert found.fingerprint() == expected.fingerprint() and found.classes == ["a", "b"]
    assert torch.equal(found.labels, expected.labels)


def test_its_fingerprint_tells_lists_of_files_apart(tmp_path):
    save_folder(tmp_path / "images")
    before = ImageFolder(tmp_path / "images", 32).fingerprint()
    assert ImageFolder(f"{tmp_path}/images/", 16).fingerprint() == before
    (tmp_path / "images/a/4.png").rename(tmp_path / "images/b/5.png")
    assert ImageFolder(tmp_path / "images", 32).fingerprint() != before


def test_a_process_that_is_not_forked_can_read_the_images(digits):
    """As on Python 3.14, which no longer forks by default."""
    images = ImageFolder(digits, 8)
    assert torch.equal(pickle.loads(pickle.dumps(images)).read((3, True)), images.read((3, True)))


def test_folders_that_hold_no_images_are_refused(tmp_path):
    for path in (tmp_path / "missing", tmp_path):
        with refused("--data-path must be a folder", path):
            ImageFolder(path, 32)
    (tmp_path / "a").mkdir()
    with refused("--data-path must be a folder", tmp_path, "a"):
        ImageFolder(tmp_path, 32)


# ---- image sets for evaluation ---------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_images_are_dealt_in_whole_batches(save, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (11, 4, 5, 3), dtype=np.uint8)
    save(tmp_path / "x.npz", arr_0=images, labels=np.zeros(11))
    stored = NpzImages(tmp_path / "x.npz")
    assert len(stored) == 11 and stored.image_size == (4, 5)
    seen = torch.zeros(11, dtype=torch.int64)
    for rank in range(3):
        for first, batch in stored.numbered_batches(2, SimpleNamespace(rank=rank, size=3)):
            assert first // 2 % 3 == rank
            seen[first:first + len(batch)] += 1
            expected = torch.from_numpy(images[first:first + 2]).permute(0, 3, 1, 2)
            assert torch.equal(batch, expected)
    assert torch.equal(seen, torch.ones_like(seen))


@pytest.mark.parametrize("array", [np.zeros((3, 4, 4, 3)), np.zeros((3, 4, 4), np.uint8),
                                   np.zeros((3, 4, 4, 4), np.uint8)])
def test_images_that_are_not_uint8_rgb_are_refused(array, tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=array)
    with pytest.raises(UserError, match="--samples must hold arr_0 of shape"):
        NpzImages(tmp_path / "x.npz")


@pytest.fixture
def fifo(tmp_path):
    """A path that nobody writes to: whoever opened it would wait, here for a minute."""
    def give_up(*_):
        raise RuntimeError("opened")

    os.mkfifo(tmp_path / "fifo.png")
    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield tmp_path / "fifo.png"
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("read", [
    lambda path: Reference.load(path, "pixels", (2, 2)),
    lambda path: NpzImages(path), lambda path: read_image(path, 8),
    lambda path: FolderImages(path.parent, None, 0),
    sample.read_image, lambda path: load_checkpoint(path)])
def test_a_fifo_is_refused_and_not_waited_for(read, fifo):
    with pytest.raises(UserError, match="fifo.png .*(not a regular|no such) file"):
        read(fifo)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04", "torn"])
def test_a_file_that_is_no_npz_is_refused(content, tmp_path):
    path = tmp_path / "ref.npz"
    np.savez(path, mu=np.zeros(12), sigma=np.eye(12))
    path.write_bytes(path.read_bytes()[:-40] if content == "torn" else content)
    with refused("--ref", path):
        Reference.load(path, "pixels", (2, 2))
    with refused("--samples", path):
        NpzImages(path)


# ---- captions ------------------------------------------------------------------------------------


def test_captions_stand_above_each_column_or_each_image(tmp_path):
    images = torch.zeros(6, 3, 64, 64, dtype=torch.uint8)
    pixels = {}
    for name, captions in (("columns", ["a", "b", "c"] * 2), ("images", list("abcdef")),
                           ("none", None)):
        save_grid(tmp_path / f"{name}.png", images, 3, captions)
        pixels[name] = np.asarray(Image.open(tmp_path / f"{name}.png"))
    heights = {name: len(value) for name, value in pixels.items()}
    bar = heights["columns"] - heights["none"]
    assert heights["none"] == 2 * 66 + 2 and bar > 11
    assert heights["images"] - heights["none"] == 2 * (bar - 2)
    assert (pixels["columns"][:bar] < 100).any(axis=(0, 2))[2:66].sum() > 3  # there is a text


@pytest.mark.parametrize("captions", [None, ["a", "a", "a"], ["a", "b", "c"]])
def test_one_column_is_the_first_of_several(captions, tmp_path):
    """Of a single image torchvision makes no grid with a frame: one class ended in a traceback."""
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 64, 64) * 40
    for rows in (1, 3):
        pixels = []
        for columns in (1, 2):
            shown = images[:2 * rows:2] if columns == 1 else images[:2 * rows]
            names = captions and [name for name in captions[:rows] for _ in range(columns)]
            save_grid(tmp_path / "picture.png", shown, columns, names)
            pixels.append(np.asarray(Image.open(tmp_path / "picture.png")))
        assert pixels[0].shape[1] == 68 and np.array_equal(pixels[0], pixels[1][:, :68])


def test_long_captions_are_broken_and_cut():
    font = ImageFont.load_default(11)
    lines = break_lines("a very very long name of a class with many words\n2 steps", font, 64)
    assert len(lines) == 4 and lines[-1] == "2 steps"
    assert lines[2].endswith("\u2026")  # words were left out
    lines += break_lines("Donaudampfschifffahrtsgesellschaft", font, 64)
    assert lines[-1].endswith("\u2026") and all(font.getlength(line) <= 64 for line in lines)
    assert break_lines("a very very long name", font, 64) == ["a very very", "long name"]


def test_captions_of_neighbours_do_not_touch():
    """A line of just the width of its image ran into the next image's."""
    bars = write_captions(["i" * count for count in range(1, 40)], 64)
    assert (bars[:, :, :, :2] == 255).all() and (bars[:, :, :, -2:] == 255).all()


@pytest.mark.parametrize("text, shown", [
    ("\u00dcn\u00efcode", "Unicode"), ("U\u0308ni\u0308code", "Unicode"), ("\ufb01sh", "\ufb01sh"),
    ("\u2018a\u2019\u2026", "\u2018a\u2019\u2026"), ("\u65e5\u672c", "??"), ("n\udcff", "n?"),
    ("a b\nc", "a b\nc")])
def test_captions_are_drawn_without_boxes(text, shown):
    """Pillow's font has no accents, and draws a box for what it lacks."""
    assert drawable(text, ImageFont.load_default(11)) == shown
    assert torch.equal(write_captions([text], 64), write_captions([shown], 64))

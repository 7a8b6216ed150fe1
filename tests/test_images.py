"""The crop, odd and broken files, and training folders."""

import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PHOTO, ROOT, refused, save_folder, save_odd_files
from PIL import Image
from torchvision import datasets
from torchvision.datasets.folder import pil_loader

from dataset.images import SUFFIXES, ImageFolder, center_crop, list_images, read_image
from metrics.image_sets import FolderImages

ALONE = SimpleNamespace(on_main=lambda work: work())


@pytest.mark.parametrize("width, height, size, halvings, resized, left, top", [
    # worked out by hand from ADM's recipe: halve (floor) while min >= 2 size, scale, round, centre
    (640, 427, 64, [(320, 213), (160, 106)], (97, 64), 16, 0),  # 160 * 64 / 106 = 96.6
    (513, 512, 256, [(256, 256)], (256, 256), 0, 0),  # 513 // 2
    (511, 900, 256, [], (256, 451), 0, 97),  # tall: 450.9, and 195 // 2
    (37, 20, 32, [], (59, 32), 13, 0),  # smaller than the crop: 59.2, and 27 // 2
    (5, 2, 5, [], (12, 5), 3, 0),  # 12.5 rounds to the even 12, and 7 // 2
])
def test_the_crop_is_adms(width, height, size, halvings, resized, left, top):
    image = PHOTO.crop((100, 50, 100 + width, 50 + height))
    expected = image
    for shape in halvings:
        expected = expected.resize(shape, Image.Resampling.BOX)
    expected = np.array(expected.resize(resized, Image.Resampling.BICUBIC))
    expected = expected[top:top + size, left:left + size]
    assert np.array_equal(np.array(center_crop(image, size)), expected)


@pytest.mark.parametrize("long", [250, 301])
def test_a_long_strip_is_cropped_before_it_is_enlarged(long, monkeypatch):
    """1 x 6000 pixels to 256 took 13 s and 2.2 GB."""
    strip = PHOTO.resize((2, long), Image.Resampling.BICUBIC)
    ours = [np.array(center_crop(image, 16)).astype(int)
            for image in (strip, strip.transpose(Image.Transpose.TRANSPOSE))]
    whole = strip.resize((16, 8 * long), Image.Resampling.BICUBIC)
    top = (whole.height - 16) // 2
    whole = np.array(whole.crop((0, top, 16, top + 16)))
    assert abs(ours[0] - whole).max() <= 2 and abs(ours[1].transpose(1, 0, 2) - whole).max() <= 2
    monkeypatch.setattr(Image.Image, "resize", lambda image, size, *_: Image.new("RGB", size)
                        if size[0] * size[1] < 1e7 else pytest.fail(f"enlarged to {size}"))
    assert center_crop(Image.new("RGB", (6000, 1)), 256).size == (256, 256)


def test_odd_files_become_the_rgb_that_torchvision_reads(tmp_path):
    files = save_odd_files(tmp_path)
    assert len(files) == 10
    for file in files:
        expected = np.array(pil_loader(str(file)))  # (32, 32, 3): the crop leaves it alone
        image = read_image(file, 32)
        assert image.dtype == torch.uint8 and image.shape == (3, 32, 32)
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected), file.name


@pytest.mark.parametrize("share", [0, 0.1, 0.5])
@pytest.mark.parametrize("name", ["rotated.jpg", "alpha.png", "sixteen.png", "transparent.gif"])
def test_an_unreadable_image_is_named(share, name, tmp_path):
    path = next(path for path in save_odd_files(tmp_path) if path.name == name)
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    with refused("must hold readable images", path):
        read_image(path, 32)


@pytest.mark.parametrize("mode, name", [
    ("I;16", "grey.png"), ("I;16", "grey.tiff"), ("I", "grey.pgm"), ("I", "whole.tiff"),
    ("F", "float.tiff")])
def test_more_than_8_bits_are_refused_by_mode(mode, name, tmp_path):
    """They became white or black squares, and discs and crosses the same image."""
    Image.fromarray(np.full((8, 8), 999, {"F": np.float32, "I": np.int32}.get(mode, np.uint16))
                    ).save(tmp_path / name)
    for read in (lambda: read_image(tmp_path / name, 8),
                 lambda: FolderImages(tmp_path, ALONE),
                 lambda: FolderImages(tmp_path, ALONE, crop=8).read(0)):
        with refused("must hold images of 8 bits", tmp_path / name, "of mode I" if mode != "F"
                     else "of mode F", "convert it"):
            read()


def test_a_sound_image_of_too_many_pixels_is_not_called_damaged(tmp_path, monkeypatch):
    PHOTO.save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    with refused("200,000 pixels at most", tmp_path / "large.png", "make it smaller"):
        read_image(tmp_path / "large.png", 8)
    monkeypatch.setattr(Image, "open", lambda _: bytearray(2**62))
    with pytest.raises(MemoryError):
        read_image(tmp_path / "large.png", 8)


# ---- folders -------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    """A folder of classes in which other programs and people have left things."""
    root = tmp_path / "data"
    for path in ("b/0.png", "b/._0.png", "b/.ipynb_checkpoints/0-checkpoint.png", "b-1/é.jfif",
                 "b/c/2.AVIF", "b/c-1/x.gif", "a/1.pgm", "a/10.JPG", "a/2.webp", "a/Thumbs.db",
                 "a/@eaDir/1.png", "__MACOSX/a/1.png", ".thumbnails/1.png", "a/notes.txt",
                 "b/more.txt", "b/LICENSE", "../store/d/3.png", "../store/e/4.png"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        PHOTO.crop((0, 0, 8, 8)).save(root / path, "PNG")
    for path, target in (("d", "../../store/d"), ("b/up", ".."), ("b/above", "../../.."),
                         ("a/again", "../b"), ("b/e", "../../store/e"), ("b/loop", "loop"),
                         ("a/lost", "nowhere"), ("b/1.png", "../a/1.pgm")):
        (root / path).symlink_to(root / "b" / target if "/" not in path else target)
    return root


FOUND = ["a/1.pgm", "a/10.JPG", "a/2.webp", "b/0.png", "b/1.png", "b/c/2.AVIF", "b/c-1/x.gif",
         "b/e/4.png", "b-1/é.jfif", "d/3.png"]


def test_a_folder_is_walked_by_one_rule_and_what_is_left_out_is_counted(tree, capsys):
    """Hidden files and folders were images and classes, formats that Pillow reads were dropped,
    links led round in circles, or were not followed, without a word."""
    folder = ImageFolder(tree, 8)
    assert sorted(folder.name(row) for row in range(len(folder))) == sorted(FOUND)
    assert folder.classes == ["a", "b", "b-1", "d"]
    assert folder.labels.tolist() == [0] * 3 + [1] * 5 + [2, 3]
    note, = folder.notes
    for count in ("5 hidden", "3 link to a folder read already", "2 broken link", "2 .txt", "1 .db",
                  "1 of other names"):
        assert count in note, note
    images = FolderImages(tree, ALONE, crop=8)
    assert [path[len(str(tree)) + 1:] for path in images.paths] == [
        folder.name(row) for row in range(10)]
    assert images.read(3).shape == (3, 8, 8)
    assert note.split(": ")[1] in capsys.readouterr().err


def test_the_order_is_that_of_torchvision(tmp_path):
    for path in ("a/z", "a/b/x", "a/b-1/x", "a-1/x", "a/b.c/x", "A/10", "A/9", "é/x", "a b/x"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{path}.png").touch()
    ours, theirs = ImageFolder(tmp_path, 8), datasets.ImageFolder(tmp_path)
    assert [ours.root + ours.name(row) for row in range(len(ours))] == [
        path for path, _ in theirs.samples]
    assert ours.labels.tolist() == theirs.targets and ours.classes == theirs.classes
    assert not ours.notes and set(SUFFIXES) > set(datasets.folder.IMG_EXTENSIONS)


def test_the_names_of_classes_do_not_depend_on_the_locale(tmp_path):
    """A run that was begun under the C locale was another one elsewhere."""
    save_folder(tmp_path / "data")
    (tmp_path / "data" / "a").rename(tmp_path / "data" / "é日")
    script = tmp_path / "script.py"
    script.write_text("import sys; from dataset.images import ImageFolder\n"
                      "def main(path): print(ascii(ImageFolder(path, 8).classes))\n"
                      "from engine.errors import run_main; run_main(main, lambda: sys.argv[1])\n")
    for encoding in ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
                     {"PYTHONUTF8": "1"}):
        done = subprocess.run([sys.executable, script, tmp_path / "data"], text=True,
                              capture_output=True,
                              env=os.environ | encoding | {"PYTHONPATH": str(ROOT)})
        assert done.stdout == ascii(["b", "é日"]) + "\n", done.stderr


def test_links_win_no_image_from_the_folder_that_holds_it(tmp_path):
    for name in ("a", "z"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.png").touch()
    (tmp_path / "z" / "of a").symlink_to(tmp_path / "a")
    assert list_images(tmp_path)[0] == {"": [], "a": ["a.png"], "z": ["z.png"]}


def test_classes_that_hold_folders_alone_are_told(tmp_path):
    """Above train/ and val/ those two were the classes."""
    for split in ("train", "val"):
        save_folder(tmp_path / "data" / split)
    (tmp_path / "data" / "0.png").touch()
    folder = ImageFolder(tmp_path / "data", 32)
    assert folder.classes == ["train", "val"]
    assert "1 images that lie in no class folder" in folder.notes[0]
    assert "hold folders and no images: train, val" in folder.notes[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_another_image_of_the_class_takes_the_place_of_a_bad_one(workers, tmp_path, capfd):
    save_folder(tmp_path / "images")
    for row in (3, 4, 5, 6, 7, 8, 9):
        path = tmp_path / "images" / f"{'ab'[row // 5]}" / f"{row % 5}.png"
        path.write_bytes(path.read_bytes()[:60])
    folder = ImageFolder(tmp_path / "images", 32, skip_bad_images=True)
    steps = [(torch.tensor([3, 0, 4, 4]), torch.tensor([False, False, False, True]))] * 2
    for images, labels in folder.batches(steps, workers):
        assert torch.equal(images[:3], folder.read((0, False)).expand(3, 3, 32, 32))
        assert torch.equal(images[3], images[0].flip(2)) and labels.tolist() == [0] * 4
    assert capfd.readouterr().err.count("skipped") == 2
    with refused("--data-path must hold readable images", "b/2.png"):
        next(folder.batches([(torch.tensor([7]), torch.tensor([False]))], workers))


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
    listed = (["a"], np.array([b"a/0.png"]), torch.tensor([0]), [])
    folder = ImageFolder(tmp_path, 32, SimpleNamespace(on_main=lambda work: listed))
    assert folder.classes == ["a"] and folder.name(0) == "a/0.png" and len(folder) == 1


def test_its_fingerprint_tells_lists_of_files_apart(tmp_path):
    before = ImageFolder(save_folder(tmp_path / "images"), 32).fingerprint()
    assert ImageFolder(f"{tmp_path}/images/", 16).fingerprint() == before
    (tmp_path / "images/a/4.png").rename(tmp_path / "images/b/5.png")
    assert ImageFolder(tmp_path / "images", 32).fingerprint() != before


def test_a_process_that_is_not_forked_can_read_the_images(digits):
    """As on Python 3.14, which no longer forks by default."""
    images = ImageFolder(digits, 8)
    assert torch.equal(pickle.loads(pickle.dumps(images)).read((3, True)), images.read((3, True)))


def test_folders_that_hold_no_images_are_refused(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "dataset.json").write_text("{}")
    (tmp_path / "classes" / "a").mkdir(parents=True)
    (tmp_path / "none").mkdir()
    for name, word in (("shards", "--encoded-data"), ("classes", "no images in a"),
                       ("none", "no folders"), ("missing", "No such file")):
        with refused("--data-path must be a folder", tmp_path / name, word):
            ImageFolder(tmp_path / name, 32)

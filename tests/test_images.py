"""The crop, odd and broken files, and training folders."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PHOTO, refused, save_folder, save_odd_files
from PIL import Image
from torchvision.datasets.folder import pil_loader

from dataset.images import ImageFolder, center_crop, read_image


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


def test_odd_files_become_the_rgb_that_torchvision_reads(tmp_path):
    files = save_odd_files(tmp_path)
    assert len(files) == 10
    for file in files:
        expected = np.array(pil_loader(str(file)))  # (32, 32, 3): the crop leaves it alone
        image = read_image(file, 32)
        assert image.dtype == torch.uint8 and image.shape == (3, 32, 32)
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected), file.name


@pytest.mark.parametrize("share", [0, 0.1, 0.5])
@pytest.mark.parametrize("name", ["rotated.jpg", "alpha.png", "sixteen.tiff", "transparent.gif"])
def test_an_unreadable_image_is_named(share, name, tmp_path):
    path = next(path for path in save_odd_files(tmp_path) if path.name == name)
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    with refused("must hold readable images", path):
        read_image(path, 32)


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
    listed = (["a"], np.array([b"a/0.png"]), torch.tensor([0]))
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
    for name, word in (("shards", "--encoded-data"), ("classes", "a"), ("none", "class"),
                       ("missing", "No such file")):
        with refused("--data-path must be a folder", tmp_path / name, word):
            ImageFolder(tmp_path / name, 32)

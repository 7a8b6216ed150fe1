"""Images of folders and of .npz files for evaluation."""

import io
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import pictures, refused
from PIL import Image

from dataset.images import center_crop
from metrics.extractors import extractor_of
from metrics.image_sets import NpzImages, open_images
from metrics.reference import Reference
from metrics.statistics import rank_batches

ALONE = SimpleNamespace(on_main=lambda work: work())


@pytest.mark.parametrize("kind", [np.savez, np.savez_compressed, "folder"])
@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_dealt_in_whole_batches(kind, workers, tmp_path):
    images = pictures(11, 6, seed=0)
    path = tmp_path / "images"
    if kind == "folder":
        for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
            (path / "more").mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path / "more" / f"{i:02d}.png")
    else:
        path = tmp_path / "x.npz"
        kind(path, arr_0=images.permute(0, 2, 3, 1).numpy(), labels=np.zeros(11))
    stored = open_images(path, ALONE, workers=workers)
    assert len(stored) == 11 and stored.image_size == (6, 6)
    for rank, firsts in enumerate([[0, 6], [2, 8], [4, 10]]):
        parts = rank_batches(11, 2, SimpleNamespace(rank=rank, size=3))
        assert [rows.start for rows in parts] == firsts
        batches = list(stored.batches(parts))
        assert all(torch.equal(batch, images[list(rows)]) for batch, rows in zip(batches, parts))
        assert len(batches) == 2
    batch, = stored.batches([[3, 0, 10]])
    assert torch.equal(batch, images[[3, 0, 10]])
    cropped = open_images(path, ALONE, crop=4, workers=workers)  # an .npz was left as it was
    batch, = cropped.batches([[3, 0]])
    expected = [np.array(center_crop(Image.fromarray(image), 4))
                for image in images[[3, 0]].permute(0, 2, 3, 1).numpy()]
    assert cropped.image_size == (4, 4)
    assert np.array_equal(batch.permute(0, 2, 3, 1).numpy(), expected)


@pytest.mark.parametrize("array", [np.zeros((3, 4, 4, 3)), np.zeros((3, 4, 4), np.uint8),
                                   np.zeros((3, 4, 4, 4), np.uint8),
                                   np.zeros((3, 4, 4, 3), np.uint8, order="F")])
def test_images_that_are_not_uint8_rgb_are_refused(array, tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=array)
    with refused("must hold arr_0 of shape"):
        NpzImages(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", images=array, labels=array)
    with refused("must hold images as arr_0, got", tmp_path, "with images, labels"):
        NpzImages(tmp_path / "x.npz")


def test_a_shape_that_the_bytes_do_not_fill_is_refused(tmp_path):
    """Before anything is made for so many images."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False,
                                                  "shape": (10**15, 8, 8, 3)})
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + bytes(192))
    with refused("must be a whole .npz file", "192 bytes"):
        NpzImages(tmp_path / "x.npz")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", "torn"])
def test_a_file_that_is_no_npz_is_refused(content, tmp_path):
    path = tmp_path / "ref.npz"
    np.savez(path, mu=np.zeros(12), sigma=np.eye(12))
    path.write_bytes(path.read_bytes()[:-40] if content == "torn" else content)
    pixels = extractor_of("pixels")
    for read in (NpzImages, lambda path: Reference.load(path, pixels, (2, 2), ALONE)):
        with refused("must be a whole .npz file", path):
            read(path)

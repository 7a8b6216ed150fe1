"""Pictures: the grid to the pixel, and captions in any script."""

import unicodedata
import warnings

import matplotlib.figure  # noqa: F401 - old versions warn when they are imported
import numpy as np
import pytest
import torch
from conftest import pictures
from PIL import Image

from dataset.pictures import find_fonts, save_grid


def picture(path, images, columns, captions=()):
    """The picture (H, W, 3), drawn without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_grid(path / "picture.png", images, columns, captions)
    return np.asarray(Image.open(path / "picture.png"))


def texts(path, captions, width=64):
    """What is above the images (H, W), of black images in one row, each with its caption."""
    pixels = picture(path, torch.zeros(len(captions), 3, 64, width, dtype=torch.uint8),
                     len(captions), captions)
    return pixels[:-66].min(axis=2)


@pytest.mark.parametrize("captions", [(), ["a", "b", "c"] * 2 + ["a"], list("abcdefg")])
@pytest.mark.parametrize("size, shown", [(8, 64), (70, 70)])
def test_the_grid_is_exact_to_the_pixel(captions, size, shown, tmp_path):
    """Images are enlarged by repeating pixels, have two white pixels around, and are else as they
    were; captions stand above each image, or above the columns if all of a column are alike."""
    images = pictures(7, size, seed=1)
    pixels = picture(tmp_path, images, 3, captions)
    each = len(set(captions)) == 7
    bars = 3 if each else 1
    above = (len(pixels) - 3 * (shown + 2) - 2) // bars
    assert pixels.shape == (bars * above + 3 * (shown + 2) + 2, 3 * (shown + 2) + 2, 3)
    assert bool(above) == bool(captions) and above < 20
    left_over = np.array(pixels)
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        top = 2 + above + i // 3 * (shown + 2 + above * each)
        left = 2 + i % 3 * (shown + 2)
        place = np.s_[top:top + shown, left:left + shown]
        expected = image.repeat(shown // size, 0).repeat(shown // size, 1)
        assert np.array_equal(pixels[place], expected)
        left_over[place] = 255
        if captions and (each or i < 3):
            bar = left_over[top - above:top, left:left + shown]
            assert (bar < 100).any()
            bar[:] = 255
    assert (left_over == 255).all()


@pytest.mark.parametrize("long", ["W" * 40, "a very long name of a class, many words\n2 steps"])
@pytest.mark.parametrize("width", [64, 256])
def test_long_captions_stay_above_their_image(long, width, tmp_path):
    pixels = texts(tmp_path, ["a", long, "b"], width)
    for gap in (2 + width, 4 + 2 * width):
        assert (pixels[:, gap:gap + 2] > 200).all()
    assert (pixels[0] == 255).all() and (pixels[-2:] == 255).all()  # nor does it leave the top


@pytest.mark.parametrize("letters", ["\u00e9e", "\u0414A", "\u03b3y"])
def test_letters_of_other_scripts_are_drawn(letters, tmp_path):
    drawn = [texts(tmp_path, [letter]).tobytes() for letter in (*letters, "?", "\uffff")]
    assert len(set(drawn)) == 4
    decomposed = unicodedata.normalize("NFD", letters[0])  # as macOS names files
    assert texts(tmp_path, [decomposed]).tobytes() == drawn[0]


def test_what_no_font_has_is_drawn_without_a_word(tmp_path, capfd):
    """As is a name that is no Unicode, an empty one, and what as a formula is an error. U+1D84 is
    not in the first font."""
    assert find_fonts("a \n") == ["DejaVu Sans"] and len(find_fonts("a\u1d84")) == 2
    assert (texts(tmp_path, ["\U000e0fff", "n\udcff", " ", "$\\frac$"]) < 100).any()
    assert capfd.readouterr() == ("", "")

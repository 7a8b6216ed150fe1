"""Files of images: PNG files, an .npz of them, and pictures with captions."""

import functools
import os
import textwrap
import unicodedata
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from engine.errors import BadValue
from engine.files import atomic_file

GAP = 2  # pixels of white around images
DPI = 64  # a power of two: sizes in inches are exact
THREADS = min(16, os.cpu_count())  # that read or write image files


def write_pngs(paths, images):
    """Write uint8 images (B, 3, H, W), on any device, as PNG files."""
    for path, image in zip(paths, images.permute(0, 2, 3, 1).cpu().numpy()):
        with atomic_file(path, durable=False) as temporary:
            Image.fromarray(image).save(temporary, "PNG")


def load_png(path, size):
    """A PNG file as uint8 (size, size, 3). Raises BadValue if it is damaged or another image, as a
    program leaves it that saves a palette, say, where write_pngs wrote."""
    try:
        with Image.open(path) as image:
            kind = f"{image.format}, {image.tile[0][3]}, {image.width} x {image.height}"
            if kind != f"PNG, RGB, {size} x {size}":  # of 16 bits it would be RGB;16B
                raise ValueError(kind)
            image.verify()  # compares checksums, unlike decoding; then the file must be reopened
        with Image.open(path) as image:
            return np.array(image)
    except Exception as error:  # PIL's decoders raise errors of any kind on a broken file
        raise BadValue(f"must hold whole images, PNG, RGB, {size} x {size}, got {path} ({error}); "
                       f"remove that file") from error


def load_pngs(paths, size):
    """PNG files as uint8 (B, 3, size, size). Raises BadValue as load_png does."""
    return torch.from_numpy(np.stack([load_png(path, size) for path in paths])).permute(0, 3, 1, 2)


def write_npz(path, paths, size, world):
    """Write the images (size, size, 3) at paths, in order, as arr_0 of an .npz file, without
    holding them all. Raises BadValue as load_png does."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), size, size, 3)}
    load = functools.partial(load_png, size=size)
    with (world.progress(len(paths), desc=path.name, unit="image") as bar,
          atomic_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive,
          archive.open("arr_0.npy", "w", force_zip64=True) as file,
          ThreadPoolExecutor(THREADS) as pool):
        np.lib.format.write_array_header_1_0(file, header)
        for first in range(0, len(paths), 1000):
            for image in pool.map(load, paths[first:first + 1000]):
                file.write(image.tobytes())
                bar.update()


def save_grid(path, images, columns, captions=()):
    """Write uint8 images (B, 3, H, W) as one picture; tiny ones are enlarged.

    captions: a text for each image, above it, or above the columns where all of a column are alike.
    Long ones are broken, cut and made smaller, to fit.
    """
    enlarge = max(1, 64 // images.shape[3])
    images = images.permute(0, 2, 3, 1).cpu().numpy().repeat(enlarge, 1).repeat(enlarge, 2)
    count, height, width, _ = images.shape
    columns = min(columns, count)
    heading = list(captions) == [captions[i % columns] for i in range(len(captions))]
    size = min(max(width // 8, 11), 28)  # of the letters
    texts = [_fill(caption, int(width / (0.6 * size)))
             for caption in captions[:columns if heading else count]]
    bar = max((text.count("\n") + 1 for text in texts), default=0) * round(1.3 * size) + GAP
    row_height = height + (GAP if heading else bar)
    corners = [(bar + i // columns * row_height, GAP + i % columns * (width + GAP))
               for i in range(count)]  # top, left
    canvas = draw_texts(texts, corners, width, size, (corners[-1][0] + height + GAP,
                                                      GAP + columns * (width + GAP)))
    for image, (top, left) in zip(images, corners):
        canvas[top:top + height, left:left + width] = image
    with atomic_file(path) as temporary:
        Image.fromarray(canvas).save(temporary, "PNG")


def _fill(caption, width):
    """Each line of the caption in at most three of so many characters."""
    text = unicodedata.normalize("NFC", caption).encode(errors="replace").decode()  # no surrogates
    return "\n".join(textwrap.fill(line, width, max_lines=3, placeholder="\u2026")
                     for line in text.split("\n"))


def draw_texts(texts, corners, width, size, shape):
    """A white canvas (H, W, 3), uint8, of shape (H, W). corners: (top, left) of what is below each
    text, of this width; size: of the letters."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes half a second to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(shape[1] / DPI, shape[0] / DPI), dpi=DPI)
    canvas, families = FigureCanvasAgg(figure), find_fonts("".join(texts))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a character that no font has is drawn as a box
        for text, (top, left) in zip(texts, corners):
            drawn = figure.text(left + width / 2, shape[0] - top + GAP, text, transform=None,
                                ha="center", va="bottom", family=families,
                                fontsize=size * 72 / DPI, parse_math=False)
            space, extent = width - 2 * GAP, drawn.get_window_extent(canvas.get_renderer())
            drawn.set_fontsize(drawn.get_fontsize() * space / max(space, extent.width))
        canvas.draw()
    return np.array(canvas.buffer_rgba())[:, :, :3]


@functools.cache
def find_fonts(text):
    """Families of installed fonts: Matplotlib's default, and for what it lacks the first others."""
    from matplotlib.font_manager import fontManager, get_font

    families, missing = ["DejaVu Sans"], {ord(letter) for letter in text if not letter.isspace()}
    for font in sorted(fontManager.ttflist, key=lambda font: font.name != "DejaVu Sans"):
        if not missing:
            break
        if os.path.exists(font.fname) and not font.name.startswith("Last Resort"):  # only boxes
            letters = missing & get_font(font.fname).get_charmap().keys()
            missing -= letters
            families += [font.name] if letters else []
    return list(dict.fromkeys(families))

"""Pictures: images in a grid, with captions."""

import unicodedata

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from engine.files import atomic_file


def save_grid(path, images, columns, captions=None):
    """Write uint8 images (B, 3, H, W) as one picture; tiny ones are enlarged.

    captions: a text for each image, above it; above the columns only where all of a column are
    alike.
    """
    enlarge = max(1, 64 // images.shape[3])
    images = images.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    images, header = images.cpu(), None
    if captions:
        bars = write_captions(captions, images.shape[3])  # (B, 3, h, W)
        if captions == [captions[i % columns] for i in range(len(captions))]:
            header = make_tiles(bars[:columns], columns)[:, :-2]
        else:
            images = torch.cat([bars, images], dim=2)
    grid = make_tiles(images, columns)
    if header is not None:
        grid = torch.cat([header, grid], dim=1)
    with atomic_file(path) as temporary:
        Image.fromarray(grid.permute(1, 2, 0).numpy()).save(temporary, "PNG")


def make_tiles(images, columns):
    """Images (B, 3, H, W) in rows of so many, with white around each: (3, H', W')."""
    from torchvision.utils import make_grid  # see ImageFolder._list

    if len(images) == 1:  # make_grid would leave out the white
        return F.pad(images[0], (2, 2, 2, 2), value=255)
    return make_grid(images, nrow=columns, padding=2, pad_value=255)


def write_captions(captions, width):
    """Bars (B, 3, h, width), uint8, with black texts, each broken into lines that fit the width and
    leave a gap to the neighbours'."""
    size = min(max(width // 8, 11), 28)
    font = ImageFont.load_default(size)
    texts = [break_lines(drawable(caption, font), font, width - 4) for caption in captions]
    height = (size + 3) * max(map(len, texts)) + 4
    bars = []
    for lines in texts:
        bar = Image.new("RGB", (width, height), "white")
        text = "\n".join(lines)
        ImageDraw.Draw(bar).multiline_text((width / 2, height - 3), text, "black", font, "md",
                                           align="center", spacing=2)
        bars.append(torch.from_numpy(np.array(bar)).permute(2, 0, 1))
    return torch.stack(bars)


def drawable(text, font):
    """The text in characters that the font can draw; of a letter with an accent that it lacks the
    letter, of all others a question mark."""
    box = bytes(font.getmask("\uffff"))  # what it draws for all that it lacks

    def has(character):
        return character.isspace() or bytes(font.getmask(character)) != box

    letters = "".join(character if has(character) else unicodedata.normalize("NFKD", character)
                      for character in unicodedata.normalize("NFC", text))
    return "".join(character if has(character) else "?" for character in letters
                   if unicodedata.category(character)[0] != "M")  # accents


def break_lines(caption, font, width):
    """The lines of a caption, broken at spaces, three at most of each paragraph; what does not fit
    is cut."""
    lines = []
    for paragraph in caption.split("\n"):
        broken = [""]
        for word in paragraph.split():
            wider = f"{broken[-1]} {word}".strip()
            if broken[-1] and font.getlength(wider) > width:
                broken.append(word)
            else:
                broken[-1] = wider
        broken[2:] = [" ".join(broken[2:])] if broken[2:] else []
        lines += [cut(line, font, width) for line in broken]
    return lines


def cut(line, font, width):
    """The line, shortened with an ellipsis where it is wider than width."""
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "\u2026") > width:
        line = line[:-1]
    return line.rstrip() + "\u2026"

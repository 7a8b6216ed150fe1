"""Resizes equal those of the programs that they name."""

import numpy as np
import pytest
import torch
from conftest import pictures
from PIL import Image

from metrics.resize import resize_like_pillow, resize_like_tensorflow


def test_resize_puts_pixel_i_at_i_times_the_ratio_as_tensorflow_1_did():
    larger = resize_like_tensorflow(torch.tensor([0.0, 10.0]).expand(1, 3, 2, 2), size=4)
    assert larger[0, 0].tolist() == [[0, 5, 10, 10]] * 4
    ramp = torch.arange(4.0).expand(1, 3, 4, 4).transpose(2, 3)
    assert resize_like_tensorflow(ramp, size=2)[0, 0, :, 1].tolist() == [0, 2]


@pytest.mark.parametrize("kernel", ["bilinear", "bicubic"])
@pytest.mark.parametrize("old, new", [(256, 224), (20, 56), (64, 64), (300, 37), (6, 5)])
def test_bytes_are_those_of_pillow(kernel, old, new):
    """Rounded once, at the end, some would differ by 1; without antialias most do."""
    images = torch.cat([pictures(2, old, seed=3), torch.randint(
        256, (2, 3, old, old), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))])
    resized = resize_like_pillow(images, (new, new), kernel)
    for image, ours in zip(images, resized):
        theirs = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(
            (new, new), Image.Resampling[kernel.upper()])
        np.testing.assert_array_equal(ours.permute(1, 2, 0).numpy(), np.asarray(theirs))
    assert resized.dtype == torch.float32

"""Features: a protocol's resize, then Inception with random weights."""

import torch
from conftest import pictures, refused

from engine.distributed import World
from metrics.extractors import extractor_of

ALONE = World(0, 1, torch.device("cpu"), "fp32")


def test_spatial_features_are_seven_channels_in_tensorflows_order(inception_weights):
    extractor = extractor_of("adm").load(ALONE, inception_weights)
    spatial = extractor(pictures(2, 20, seed=9)).spatial.view(2, 17, 17, 7)  # (B, H, W, C)
    maps = extractor.map
    assert maps.shape == (2, 192, 17, 17)
    assert torch.equal(spatial[1, 3, 5], maps[1, :7, 3, 5])
    assert maps.min() == 0 < maps.max()  # after the ReLU


def test_evaluation_leaves_random_numbers_and_precision_as_they_were(inception_weights):
    before = torch.get_rng_state()
    extractor = extractor_of("pytorch-fid").load(ALONE, inception_weights)
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            mixed = extractor(pictures(1, 20, seed=9)).pool
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(mixed, extractor(pictures(1, 20, seed=9)).pool)


def test_pixels_are_for_tiny_images():
    assert extractor_of("pixels").dimension((32, 32)) == 3072
    with refused("--protocol pixels", "at most 32 x 32, got 64 x 32", "--protocol pytorch-fid"):
        extractor_of("pixels").dimension((64, 32))

"""Features: a protocol's resize, then Inception with random weights."""

import torch
from conftest import pictures, refused

from engine.distributed import World
from metrics.inception import Extractor, dimension, resize_like_tensorflow

ALONE = World(0, 1, torch.device("cpu"), "fp32")


def test_resize_puts_pixel_i_at_i_times_the_ratio_as_tensorflow_1_did():
    larger = resize_like_tensorflow(torch.tensor([0.0, 10.0]).expand(1, 3, 2, 2), size=4)
    assert larger[0, 0].tolist() == [[0, 5, 10, 10]] * 4
    ramp = torch.arange(4.0).expand(1, 3, 4, 4).transpose(2, 3)
    assert resize_like_tensorflow(ramp, size=2)[0, 0, :, 1].tolist() == [0, 2]


def test_spatial_features_are_seven_channels_in_tensorflows_order(inception_weights):
    extractor = Extractor("adm", ALONE, inception=inception_weights)
    spatial = extractor(pictures(2, 20, seed=9)).spatial.view(2, 17, 17, 7)  # (B, H, W, C)
    maps = extractor.map
    assert maps.shape == (2, 192, 17, 17)
    assert torch.equal(spatial[1, 3, 5], maps[1, :7, 3, 5])
    assert maps.min() == 0 < maps.max()  # after the ReLU


def test_evaluation_leaves_random_numbers_and_precision_as_they_were(inception_weights):
    before = torch.get_rng_state()
    extractor = Extractor("pytorch-fid", ALONE, inception=inception_weights)
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            mixed = extractor(pictures(1, 20, seed=9)).pool
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(mixed, extractor(pictures(1, 20, seed=9)).pool)


def test_a_weight_file_that_does_not_serve_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    (tmp_path / "torn.pth").write_bytes(b"PK\x03\x04 torn")
    for name in ("other.pth", "torn.pth", "missing.pth"):
        with refused("--inception", name):
            Extractor("adm", ALONE, inception=tmp_path / name)


def test_a_word_comes_before_weights_are_downloaded_and_the_cause_if_they_are_not(
        tmp_path, monkeypatch, capsys):
    def fail(url, path):
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    with refused("no network", "pt_inception-2015-12-05-6726825d.pth", "https://",
                 tmp_path, "--inception"):
        Extractor("adm", ALONE)
    assert capsys.readouterr().err.startswith("downloading https://")


def test_pixels_are_for_tiny_images():
    assert dimension("pixels", (32, 32)) == 3072
    with refused("--protocol pixels", "at most 32 x 32, got 64 x 32", "--protocol pytorch-fid"):
        dimension("pixels", (64, 32))

"""The codecs: a small AutoencoderKL of random weights, and pixels."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import refused, save_small_vae
from safetensors.torch import load_file, save_file

from dataset.vae import load_codec, posterior_sample, to_uint8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_small_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def codec(folder):
    return load_codec(str(folder), chunk=2)


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def images(count, size=32):
    shape = (count, 3, size, size)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1)).byte()


def test_moments_are_mean_and_std_of_the_posterior_unscaled(codec):
    x = images(5)
    moments = codec.encode(x)
    assert moments.shape == (5, 2, 4, 4, 4) and moments.dtype == torch.float32
    assert not moments.requires_grad
    encoder_out = codec.model.quant_conv(codec.model.encoder(x.float() / 127.5 - 1))
    mean, logvar = encoder_out.chunk(2, dim=1)  # (B, 4, 4, 4) each
    torch.testing.assert_close(moments[:, 0], mean)
    torch.testing.assert_close(moments[:, 1], (logvar / 2).exp())


def test_weights_with_the_names_of_the_published_files_are_read(codec, copy):
    """The Stable Diffusion VAEs are older than diffusers' present names for attention's layers."""
    path = copy / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    for now, then in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"),
                      ("to_out.0", "proj_attn")):
        state = {name.replace(now, then): value for name, value in state.items()}
    save_file(state, path, metadata={"format": "pt"})
    assert any("query" in name for name in state)
    assert torch.equal(load_codec(str(copy), chunk=2).encode(images(2)), codec.encode(images(2)))


def test_an_image_encodes_and_decodes_alike_in_any_chunk(codec, folder):
    whole = load_codec(str(folder), chunk=100)
    x = images(5)
    torch.testing.assert_close(codec.encode(x), whole.encode(x), rtol=1e-5, atol=1e-6)
    latent = codec.encode(x)[:, 0]
    difference = codec.decode(latent).int() - whole.decode(latent).int()
    assert difference.abs().max() <= 1  # at an edge of truncation


@pytest.mark.parametrize("size, parts", [(16, [4, 3]), (32, [2, 2, 2, 1]), (64, [1] * 7)])
def test_a_pass_holds_fewer_images_where_they_are_larger(folder, size, parts, monkeypatch):
    """32 images of 512 px at once took 8 GiB for one activation of the decoder."""
    monkeypatch.setattr("dataset.vae.PIXELS", 2 * 32**2)
    codec, lengths = load_codec(str(folder), chunk=4), []
    for module in (codec.model.encoder, codec.model.decoder):
        module.register_forward_pre_hook(lambda module, inputs: lengths.append(len(inputs[0])))
    latent = codec.encode(images(7, size))[:, 0]
    assert codec.decode(latent).shape == (7, 3, size, size) and lengths == parts * 2


def test_decoding_undoes_the_scale_and_truncates(codec):
    latent = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        picture = codec.model.decode(latent).sample.numpy()
    expected = np.floor(np.clip(127.5 * picture + 128, 0, 255)).astype(int)
    decoded = codec.decode(latent * 0.18215)
    assert decoded.dtype == torch.uint8 and decoded.shape == (3, 3, 32, 32)
    difference = np.abs(decoded.numpy() - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01  # latent / scale * scale


def test_uint8_is_clipped_and_truncated():
    x = torch.tensor([-9.0, -1, 0, 0.99 / 127.5, 1.01 / 127.5, 1, 9])
    assert to_uint8(x).tolist() == [0, 0, 128, 128, 129, 255, 255]


def test_posterior_sample_is_mean_plus_std_times_noise_scaled():
    moments = torch.tensor([2.0, 3.0]).reshape(1, 2, 1, 1, 1).half()
    x = posterior_sample(moments, torch.full((1, 1, 1, 1), 0.5), 0.1)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, torch.full((1, 1, 1, 1), 0.35))


def test_pixels_come_back_as_they_were():
    codec, x = load_codec("none"), images(2)
    moments = codec.encode(x)
    sample = posterior_sample(moments, torch.randn(x.shape), codec.scale)
    assert sample.min() >= -1 and sample.max() <= 1
    assert torch.equal(codec.decode(sample), x)


def test_scale_channels_and_factor_come_from_the_config(tmp_path):
    folder = save_small_vae(
        tmp_path, scaling_factor=0.5, latent_channels=2, block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    codec = load_codec(str(folder))
    assert (codec.scale, codec.channels, codec.factor) == (0.5, 2, 2)
    assert codec.latent_shape(32) == (2, 16, 16)
    assert codec.encode(images(1)).shape == (1, 2, 2, 16, 16)


def test_autocast_around_it_changes_nothing(codec):
    x = images(2)
    plain = codec.encode(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codec.encode(x), plain)
        assert torch.equal(codec.decode(plain[:, 0]), codec.decode(plain[:, 0]))


def test_bf16_is_near_fp32_and_returns_float32(codec, folder):
    coarse = load_codec(str(folder), precision="bf16").encode(images(2))
    assert coarse.dtype == torch.float32
    assert 0 < (coarse - codec.encode(images(2))).abs().max() < 0.1


def test_the_fingerprint_is_that_of_the_encoder_alone(codec, copy):
    path = copy / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    for part, same in (("decoder", True), ("encoder", False)):
        weights[f"{part}.conv_in.weight"] += 1
        save_file(weights, path, {"format": "pt"})
        assert (load_codec(str(copy)).fingerprint() == codec.fingerprint()) == same


def test_a_vae_neither_cached_nor_downloadable_is_refused(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with refused("--vae ema", "stabilityai/sd-vae-ft-ema", "connect once", "--vae FOLDER"):
        load_codec("ema")


def test_pickled_weights_are_not_opened(copy):
    weights = load_file(copy / "diffusion_pytorch_model.safetensors")
    torch.save(weights, copy / "diffusion_pytorch_model.bin")
    (copy / "diffusion_pytorch_model.safetensors").unlink()
    with refused("--vae", copy, "safetensors"):
        load_codec(str(copy))


@pytest.mark.parametrize("how", ["empty", "of another class", "a weight is missing", "torn"])
def test_a_folder_without_a_whole_vae_is_refused(copy, how):
    """diffusers words it, differently in each version, or fills in random weights."""
    path = copy / "diffusion_pytorch_model.safetensors"
    if how == "empty":
        (copy / "config.json").unlink()
    elif how == "of another class":
        text = (copy / "config.json").read_text()
        (copy / "config.json").write_text(text.replace("AutoencoderKL", "AsymmetricAutoencoderKL"))
    elif how == "torn":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        weights = load_file(path)
        del weights["encoder.conv_in.weight"]
        save_file(weights, path, {"format": "pt"})
    with refused("--vae", copy):
        load_codec(str(copy))


def test_a_vae_that_does_not_suit_is_refused(codec, copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "shift_factor": 0.1}))
    with refused("--vae", copy, "shift"):
        load_codec(str(copy))
    with refused("--vae", "emma"):
        load_codec("emma")
    with refused("--image-size must be a multiple of 8", "got 36"):
        codec.latent_shape(36)

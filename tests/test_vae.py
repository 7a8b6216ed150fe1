"""The codecs: a small AutoencoderKL of random weights, and pixels."""

import json
import math
import shutil

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
    return load_codec(str(folder))


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def images(count, size=32):
    shape = (count, 3, size, size)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1)).byte()


def test_moments_are_mean_and_std_of_the_posterior_unscaled(codec):
    x = images(5)
    encoder_out = codec.model.quant_conv(codec.model.encoder(x.float() / 127.5 - 1))
    mean, logvar = encoder_out.chunk(2, dim=1)  # (B, 4, 4, 4) each
    torch.testing.assert_close(codec.encode(x), torch.stack([mean, (logvar / 2).exp()], 1))


def test_weights_with_the_names_of_the_published_files_are_read(codec, copy):
    """The Stable Diffusion VAEs are older than diffusers' present names for attention's layers."""
    path = copy / "diffusion_pytorch_model.safetensors"
    state = {name.replace("to_q", "query").replace("to_k", "key").replace("to_v", "value")
             .replace("to_out.0", "proj_attn"): value for name, value in load_file(path).items()}
    assert any("query" in name for name in state)
    save_file(state, path, metadata={"format": "pt"})
    assert torch.equal(load_codec(str(copy)).encode(images(2)), codec.encode(images(2)))


@pytest.mark.parametrize("size, parts", [(16, [8]), (32, [2, 2, 2, 2]), (64, [1] * 8)])
def test_a_pass_holds_fewer_images_where_they_are_larger(folder, size, parts, monkeypatch):
    """32 images of 512 px at once took 8 GiB for one activation of the decoder."""
    codec, x, lengths = load_codec(str(folder)), images(8, size), []
    whole = codec.encode(x)
    monkeypatch.setattr("dataset.vae.PIXELS", 2 * 32**2)
    for module in (codec.model.encoder, codec.model.decoder):
        module.register_forward_pre_hook(lambda module, inputs: lengths.append(len(inputs[0])))
    torch.testing.assert_close(codec.encode(x), whole, rtol=1e-5, atol=1e-6)
    assert codec.decode(whole[:, 0]).shape == (8, 3, size, size) and lengths == parts * 2


def test_decoding_undoes_the_scale(codec):
    latent = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    expected, decoded = to_uint8(codec.model.decode(latent).sample), codec.decode(latent * 0.18215)
    assert decoded.dtype == torch.uint8 and decoded.shape == (3, 3, 32, 32)
    difference = (decoded.int() - expected.int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.01


def test_uint8_is_clipped_and_truncated():
    x = torch.tensor([-9.0, -1, 0, 0.99 / 127.5, 1.01 / 127.5, 1, 9])
    assert to_uint8(x).tolist() == [0, 0, 128, 128, 129, 255, 255]


def test_posterior_sample_is_mean_plus_std_times_noise_scaled():
    moments = torch.tensor([2.0, 3.0]).reshape(1, 2, 1, 1, 1).half()
    x = posterior_sample(moments, torch.full((1, 1, 1, 1), 0.5), 0.1)
    torch.testing.assert_close(x, torch.full((1, 1, 1, 1), 0.35))


def test_pixels_come_back_as_they_were():
    codec, x = load_codec("none"), images(2)
    sample = posterior_sample(codec.encode(x), torch.randn(x.shape), codec.scale)
    assert sample.abs().max() <= 1 and torch.equal(codec.decode(sample), x)


def test_scale_and_shape_come_from_the_config(tmp_path):
    folder = save_small_vae(
        tmp_path, scaling_factor=0.5, latent_channels=2, block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    codec = load_codec(str(folder))
    assert codec.scale == 0.5 and codec.latent_shape(32) == (2, 16, 16)
    assert codec.encode(images(1)).shape == (1, 2, 2, 16, 16)


def test_autocast_changes_nothing_and_bf16_is_near_fp32(codec, folder):
    x = images(2)
    plain, coarse = codec.encode(x), load_codec(str(folder), precision="bf16").encode(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codec.encode(x), plain)
    assert coarse.dtype == torch.float32 and 0 < (coarse - plain).abs().max() < 0.1


def test_the_fingerprint_is_that_of_the_encoder_alone(codec, copy):
    path = copy / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    for part, same in (("decoder", True), ("encoder", False)):
        weights[f"{part}.conv_in.weight"] += 1
        save_file(weights, path, {"format": "pt"})
        assert (load_codec(str(copy)).fingerprint() == codec.fingerprint()) == same


def test_a_vae_neither_cached_nor_downloadable_is_refused(tmp_path, monkeypatch, capsys):
    """A word comes first: without a network the client tries for half a minute."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with refused("--vae", "ema", "connect once"):
        load_codec("ema")
    assert "downloading stabilityai/sd-vae-ft-ema" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["pickled", "a weight is missing", "shifted", "scaled", "NaN"])
def test_a_folder_without_a_vae_that_suits_is_refused(copy, how):
    """diffusers fills in random weights, with a warning."""
    path, config = copy / "diffusion_pytorch_model.safetensors", copy / "config.json"
    weights = load_file(path)
    if how == "pickled":
        torch.save(weights, copy / "diffusion_pytorch_model.bin")
        path.unlink()
    elif how in ("shifted", "scaled"):
        change = {"shift_factor": 0.1} if how == "shifted" else {"scaling_factor": 0.0}
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
    else:
        weights["decoder.conv_in.bias"][0] = math.nan
        if how != "NaN":
            del weights["encoder.conv_in.weight"]
        save_file(weights, path, {"format": "pt"})
    with refused("--vae", copy):
        load_codec(str(copy))


def test_an_unknown_name_and_an_odd_size_are_refused(codec):
    with refused("--vae", "emma"):
        load_codec("emma")
    with refused("--image-size must be a multiple of 8", "got 36"):
        codec.latent_shape(36)

"""convert_checkpoint.py: one command from a file of others to images, and back."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import call, golden_improved_network, save_small_vae, tiny
from safetensors.torch import load_file

from engine.checkpoint import load_checkpoint, load_network
from models import DiT_models
from weights.convert import export


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A file of the layout of improved MeanFlow's released ones, of a small network."""
    net = golden_improved_network(torch.float32, v_head=False)
    config = {"model": "iMF", "latent_shape": [4, 8, 8], "num_classes": 10,
              "sizes": {"patch_size": 2, "hidden_size": 64, "depth": 4, "head_depth": 2,
                        "num_heads": 4, "v_head": False}}
    path = tmp_path_factory.mktemp("released") / "iMF.pth"
    torch.save(export({"ema": net.state_dict(), "config": config}, "imeanflow"), path)
    return path


def test_two_commands_make_images_of_a_released_file(released, hub, tmp_path, capfd):
    """As in the README: from the hub to a picture of chosen classes, with a local VAE."""
    folder = hub.folder / "ann" / "iMF"
    folder.mkdir(parents=True)
    shutil.copy(released, folder / "iMF.pth")
    vae = tmp_path / "vae"
    save_small_vae(vae, block_out_channels=[8, 8, 8, 8], norm_num_groups=2,
                   down_block_types=["DownEncoderBlock2D"] * 4,
                   up_block_types=["UpDecoderBlock2D"] * 4)
    ours = tmp_path / "ours.pt"
    call("convert_checkpoint", "--in", "hf://ann/iMF/iMF.pth", "--out", ours, "--image-size", 64)
    out, err = capfd.readouterr()
    assert out == f"{ours}\n" and "recognised: Lyy-iiis/imeanflow" in err
    assert "per channel" in err and "left out: v_final_layer" in err
    call("sample", "--ckpt", ours, "--vae", vae, "--num-fid-samples", 6, "--classes", 7, 2,
         "--cfg", 4, "--cfg-interval", 0.4, 0.65, "--sample-dir", tmp_path / "samples")
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (6, 64, 64, 3)
    assert (tmp_path / "samples.png").exists()
    config = load_network(ours)[1]
    assert len(config["latent_mean"]) == 4 and config["vae"] == "mse"


def test_a_flow_model_of_others_starts_a_run(digits, tmp_path, capfd):
    """A bare SiT file of ten classes, in pixel space: its table of labels is kept."""
    weights = DiT_models["DiT-T/4"](input_size=8, in_channels=3, num_classes=10).state_dict()
    weights = {name: value for name, value in weights.items() if "r_embedder" not in name}
    for kind, size in (("weight", (96, 96)), ("bias", (96,))):
        weights[f"final_layer.linear.{kind}"] = torch.randn(size)  # 6 channels for 3
    torch.save(weights, tmp_path / "sit.pt")
    start = tmp_path / "start.safetensors"
    call("convert_checkpoint", "--in", tmp_path / "sit.pt", "--out", start, "--source", "sit")
    assert "recognised: willisma/SiT" in capfd.readouterr().err
    run = tmp_path / "run"
    options = tiny(digits, run)
    model = options.index("--model")
    options[model:model + 2] = "--init", start
    call("train", *options, "--max-steps", 2, "--lr", 1e-9)
    ours, theirs = load_checkpoint(run / "checkpoints" / "0000002.pt"), load_checkpoint(start)
    assert ours["config"]["model"] == "DiT-T/4" and ours["step"] == 2
    for name, value in theirs["ema"].items():
        torch.testing.assert_close(ours["model"][name], value, atol=1e-6, rtol=0)


def test_ours_to_safetensors_and_back_is_bit_equal(trained, tmp_path, capfd):
    """And the images are the same bytes."""
    there, back = tmp_path / "model.safetensors", tmp_path / "back.pt"
    call("convert_checkpoint", "--in", trained, "--out", there)
    call("convert_checkpoint", "--in", there, "--out", back)
    assert there.stat().st_mode == back.stat().st_mode  # others may read both or neither
    state, mine, original = (load_checkpoint(path) for path in (there, back, trained))
    assert state["config"] == mine["config"] == original["config"]
    assert mine["step"] == 0 and mine["opt"] is None
    for found in (state["ema"], mine["ema"], mine["model"], load_file(there)):
        assert found.keys() == original["ema"].keys()
        assert all(torch.equal(found[name], original["ema"][name]) for name in found)
    for path in (trained, there, back):
        call("sample", "--ckpt", path, "--num-fid-samples", 10, "--sample-dir",
             tmp_path / path.stem)
    images = [(tmp_path / f"{path.stem}.npz").read_bytes() for path in (trained, there, back)]
    assert images[0] == images[1] == images[2]


def test_raw_takes_the_weights_of_the_last_step(trained, tmp_path):
    call("convert_checkpoint", "--in", trained, "--out", tmp_path / "raw.pt", "--raw")
    ours, original = load_checkpoint(tmp_path / "raw.pt"), load_checkpoint(trained)
    assert all(torch.equal(ours["ema"][name], original["model"][name]) for name in ours["ema"])


@pytest.mark.parametrize("kind", ["noamelata", "zhuyu", "haoyizhu"])
def test_ours_for_another_port(trained, tmp_path, kind):
    call("convert_checkpoint", "--in", trained, "--out", tmp_path / "theirs.pt", "--format", kind)
    theirs = torch.load(tmp_path / "theirs.pt", weights_only=True)
    call("convert_checkpoint", "--in", tmp_path / "theirs.pt", "--out", tmp_path / "back.pt")
    back, original = load_checkpoint(tmp_path / "back.pt"), load_checkpoint(trained)
    assert theirs["ema"].keys() - original["ema"].keys() == ({
        f"h_embedder.mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
        if kind == "haoyizhu" else set())
    assert all(torch.equal(back["ema"][name], original["ema"][name]) for name in back["ema"])
    assert back["config"]["model"] == "DiT-T/4" and back["config"]["image_size"] == 8


def test_only_the_average_of_a_large_file_is_read(tmp_path):
    """The other tensors of a memory-mapped file stay on disk: the report needs seconds."""
    net = DiT_models["DiT-T/4"](input_size=32, in_channels=4, num_classes=1000).state_dict()
    torch.save({"model": None, "ema": net, "opt": {}, "args": None}, tmp_path / "their.pt")
    call("convert_checkpoint", "--in", tmp_path / "their.pt", "--out", tmp_path / "ours.pt")
    size = (tmp_path / "ours.pt").stat().st_size
    assert size < 1.1 * sum(4 * value.numel() for value in net.values())  # model is ema


# ---- refusals ----------------------------------------------------------------------------------


def test_an_existing_file_is_never_replaced(trained, tmp_path, refusal):
    (tmp_path / "out.pt").write_text("mine")
    refusal("convert_checkpoint", ["--in", trained, "--out", tmp_path / "out.pt"], "--out")


@pytest.mark.parametrize("options, named", [
    (["--out", "out.bin"], "--out"), (["--out", "out.pt", "--heads", "0"], "--heads"),
    (["--out", "out.pt", "--heads", "3"], "--heads"),
    (["--out", "out.pt", "--image-size", "8"], "--image-size"),
    (["--out", "out.pt", "--source", "sit"], "--source"),
    (["--out", "out.pt", "--source", "dit"], "--source"),
    (["--out", "out.safetensors", "--format", "zhuyu"], "--out"),
    (["--out", "out.pt", "--format", "imeanflow"], "--format"),
    (["--out", "/proc/nowhere/out.pt"], "--out")])
def test_options_that_do_not_fit_are_refused(trained, refusal, tmp_path, monkeypatch, options,
                                             named):
    monkeypatch.chdir(tmp_path)
    refusal("convert_checkpoint", ["--in", trained, *options], named)


def test_what_is_no_checkpoint_is_refused(tmp_path, refusal, improved_config):
    (tmp_path / "notes.txt").write_text("no checkpoint")
    (tmp_path / "folder").mkdir()
    torch.save(improved_config, tmp_path / "wrong.pt")
    for name in ("notes.txt", "folder", "wrong.pt", "nowhere.pt", "hf://ann"):
        path = name if "hf" in name else tmp_path / name
        refusal("convert_checkpoint", ["--in", path, "--out", tmp_path / "out.pt"], "--in")


@pytest.fixture
def improved_config(trained):
    """Our checkpoint whose config is of another network."""
    state = load_checkpoint(trained)
    return {**state, "config": json.loads(json.dumps(state["config"] | {"model": "iMF-T/4"}))}

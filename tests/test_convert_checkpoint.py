"""convert_checkpoint.py: one command from a file of others to images, and back."""

import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN, call, golden_improved_network, save_small_vae, tiny
from safetensors.torch import load_file

from engine.checkpoint import load_checkpoint, load_network
from models import DiT_models
from weights.convert import export


@pytest.mark.parametrize("v_head", [False, True])
def test_two_commands_make_images_of_a_released_file(hub, tmp_path, capfd, v_head):
    """As in the README: from the hub to a picture of chosen classes, with a local VAE."""
    net = golden_improved_network(torch.float32, v_head=v_head)
    config = {"model": "iMF", "latent_shape": [4, 8, 8], "num_classes": 10,
              "sizes": {"patch_size": 2, "hidden_size": 64, "depth": 4, "head_depth": 2,
                        "num_heads": 4, "v_head": v_head}}
    theirs = export({"ema": net.state_dict(), "config": config}, "imeanflow")
    table = json.loads((GOLDEN / "imf" / "mapping.json").read_text())["table"]
    assert theirs.keys() == {entry["official_torch_branch"] for entry in table
                             if v_head or not entry["training_only"]}
    torch.save(theirs, hub.folder / "ann" / "digits" / "iMF.pth")
    vae = save_small_vae(tmp_path / "vae")
    ours = tmp_path / "ours.pt"
    call("convert_checkpoint", "--in", "hf://ann/digits/iMF.pth", "--out", ours, "--image-size", 64)
    out, err = capfd.readouterr()
    assert out == f"{ours}\n" and "recognised: Lyy-iiis/imeanflow" in err and "SHA-256" in err
    assert "per channel" in err and ("left out: v_final_layer" in err) is not v_head
    call("sample", "--ckpt", ours, "--vae", vae, "--num-fid-samples", 6, "--classes", 7, 2,
         "--cfg", 4, "--cfg-interval", 0.4, 0.65, "--sample-dir", tmp_path / "samples")
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (6, 64, 64, 3)
    back, config = load_network(ours)
    assert_same(back.state_dict(), net.state_dict())
    assert len(config["latent_mean"]) == 4 and config["vae"] == "mse"


def test_a_flow_model_of_others_starts_a_run(digits, tmp_path):
    """A bare SiT file of ten classes, in pixel space: its table of labels is kept."""
    weights = DiT_models["DiT-T/4"](input_size=8, in_channels=3, num_classes=10).state_dict()
    weights = {name: value for name, value in weights.items() if "r_embedder" not in name}
    weights |= {"final_layer.linear.weight": torch.randn(96, 96),  # 6 channels for 3
                "final_layer.linear.bias": torch.randn(96)}
    torch.save(weights, tmp_path / "sit.pt")
    start = tmp_path / "start.safetensors"
    call("convert_checkpoint", "--in", tmp_path / "sit.pt", "--out", start, "--source", "sit")
    call("train", *tiny(digits, tmp_path / "run"), "--init", start, "--max-steps", 2, "--lr", 1e-9)
    ours = load_checkpoint(tmp_path / "run" / "checkpoints" / "0000002.pt")
    for name, value in load_checkpoint(start)["ema"].items():
        torch.testing.assert_close(ours["model"][name], value, atol=1e-6, rtol=0)


def test_ours_to_safetensors_and_back_is_bit_equal(trained, tmp_path):
    """And the images are the same bytes."""
    there, back = tmp_path / "model.safetensors", tmp_path / "back.pt"
    call("convert_checkpoint", "--in", trained, "--out", there)
    call("convert_checkpoint", "--in", there, "--out", back)
    state, mine, original = (load_checkpoint(path) for path in (there, back, trained))
    assert state["config"] == mine["config"] == original["config"]
    for tensors in (state["ema"], mine["ema"], mine["model"], load_file(there)):
        assert_same(tensors, original["ema"])
    images = set()
    for path in (trained, there, back):
        folder = tmp_path / path.stem
        call("sample", "--ckpt", path, "--num-fid-samples", 10, "--sample-dir", folder)
        images.add(folder.with_suffix(".npz").read_bytes())
    assert len(images) == 1
    call("convert_checkpoint", "--in", trained, "--out", tmp_path / "raw.pt", "--raw")
    assert_same(load_checkpoint(tmp_path / "raw.pt")["ema"], original["model"])


@pytest.mark.parametrize("port", ["noamelata", "zhuyu", "haoyizhu"])
def test_ours_to_another_port_and_back_is_bit_equal(trained, tmp_path, port):
    there, back = tmp_path / "theirs.pt", tmp_path / "back.pt"
    call("convert_checkpoint", "--in", trained, "--out", there, "--format", port)
    call("convert_checkpoint", "--in", there, "--out", back,
         *(["--source", port] if port == "noamelata" else []))  # whose files have no step
    theirs, back, original = (torch.load(path, weights_only=True)["ema"]
                              for path in (there, back, trained))
    embedder = "h_embedder" if port == "haoyizhu" else "r_embedder"
    assert theirs.keys() == {name.replace("r_embedder", embedder) for name in original}
    assert_same(back, original)


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("out", "more", "named"), [
    ("old.pt", [], "--out"), ("/proc/nowhere/out.pt", [], "--out"),
    ("out.safetensors", ["--format", "zhuyu"], "--out"),
    ("out.pt", ["--format", "imeanflow"], "--format"), ("out.pt", ["--heads", 3], "--heads")])
def test_options_that_do_not_fit_are_refused(trained, refusal, tmp_path, out, more, named):
    (tmp_path / "old.pt").write_text("is never replaced")
    refusal("convert_checkpoint", ["--in", trained, "--out", tmp_path / out, *more], named)


def test_what_is_no_checkpoint_is_refused(trained, tmp_path, refusal):
    (tmp_path / "notes.txt").write_text("no checkpoint")
    (tmp_path / "folder").mkdir()
    state = load_checkpoint(trained)  # of another network than its config's
    torch.save(state | {"config": state["config"] | {"model": "iMF-T/4"}}, tmp_path / "wrong.pt")
    for name in ("notes.txt", "folder", "wrong.pt", "hf://ann"):
        path = name if "hf" in name else tmp_path / name
        refusal("convert_checkpoint", ["--in", path, "--out", tmp_path / "out.pt"], "--in must")

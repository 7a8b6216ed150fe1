"""train.py --init: a run starts with the weights of a file, whatever else it may then change."""

import json
import shutil

import pytest
import torch
from conftest import assert_same_training, call, load_state, load_weights, run_ranks, tiny

from engine.checkpoint import load_checkpoint, load_network, save_checkpoint
from engine.distributed import start_processes
from models import build
from train import Run, TrainingState, parse_args, resolve


def fresh(digits, folder, source, *more):
    """Options of tiny that start from a file, whose model they leave out."""
    options = tiny(digits, folder)
    at = options.index("--model")
    return [*options[:at], *options[at + 2:], "--init", source, *more]


def first(options):
    """(network, average, config, log) of a run before its first step."""
    args = parse_args([str(option) for option in options])
    with start_processes() as world:
        start = resolve(args, world)
        with Run(args, world, start) as run:
            state = TrainingState(args, run.config, run.codec, world, start)
            run.open(state)
            assert state.step == 0 and not state.optimizer.state
            return state.net, state.ema, run.config, (run.folder / "log.txt").read_text()


def equal(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key])
                                                for key in theirs)


@pytest.fixture
def drifted(trained, tmp_path):
    """A checkpoint as other repositories write it: its position table, which they average, is off
    the sine table by 1e-4, and its classes have no names."""
    state = torch.load(trained, weights_only=True)
    state["ema"]["pos_embed"] += 1e-4 * torch.rand(state["ema"]["pos_embed"].shape)
    state |= {"model": {}, "opt": None, "step": 0}
    del state["config"]["classes"]
    torch.save(state, tmp_path / "drifted.pt")
    return tmp_path / "drifted.pt"


@pytest.fixture(scope="session")
def headless(tmp_path_factory):
    """A checkpoint as of a released improved network: without the v head, but trained."""
    config = {"model": "iMF-T/4", "sizes": {"v_head": False}, "latent_shape": [3, 8, 8],
              "num_classes": 10, "image_size": 8, "vae": "none", "scale": 1.0}
    torch.manual_seed(0)
    net = build(config)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    path = tmp_path_factory.mktemp("headless") / "imf.pt"
    save_checkpoint(path, {"step": 0, "model": net.state_dict(), "ema": net.state_dict(),
                           "opt": None, "config": config})
    return path


# ---- what a run starts with --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pt", "safetensors", "hub"])
def test_a_run_starts_with_the_average_of_a_file(kind, digits, drifted, hub, tmp_path):
    source = drifted.with_suffix(f".{kind}")
    if kind == "safetensors":
        save_checkpoint(source, load_checkpoint(drifted))
    if kind == "hub":
        (hub.folder / "ann" / "digits").mkdir(parents=True)
        shutil.copy(drifted, hub.folder / "ann" / "digits" / "a.pt")
        source = "hf://ann/digits/a.pt"
    net, ema, config, log = first(fresh(digits, tmp_path / "run", source, "--max-steps", 20))
    theirs, _ = load_network(drifted)
    assert equal(net, theirs) and equal(ema, theirs)
    z, r, t, y = torch.randn(2, 3, 8, 8), torch.rand(2) / 2, torch.ones(2), torch.tensor([3, 10])
    assert torch.equal(net(z, r, t, y), theirs(z, r, t, y)) and theirs(z, r, t, y).abs().max() > 0
    assert config["init"] == str(source) and config["model"] == "DiT-T/4"
    assert f"starts from the averaged weights of {source}" in log
    assert "taken to be those of the data" in log and "latents are not" not in log
    assert "noise" not in log  # the average starts as that of the file


def test_pixels_and_image_size_come_from_the_file(digits, trained, tmp_path):
    """They had to be told again, and a VAE was looked for. Also once the file is gone."""
    shutil.copy(trained, tmp_path / "file.pt")
    options = fresh(digits, tmp_path / "run", tmp_path / "file.pt")
    at = options.index("--vae")
    del options[at:at + 4]  # and --image-size
    call("train", *options, "--max-steps", 1)
    (tmp_path / "file.pt").unlink()
    call("train", *options, "--max-steps", 2)
    config = load_weights(tmp_path / "run", 2, "config")
    assert config["vae"] == "none" and config["image_size"] == 8


def test_a_position_table_is_never_computed_anew(digits, drifted, tmp_path):
    call("train", *fresh(digits, tmp_path / "run", drifted, "--max-steps", 2))
    for kind in ("model", "ema"):
        table = load_weights(tmp_path / "run", 2, kind)["pos_embed"]
        assert torch.equal(table, load_checkpoint(drifted)["ema"]["pos_embed"])


def test_sizes_outside_the_table_come_from_the_file(digits, tmp_path):
    sizes = {"patch_size": 2, "hidden_size": 48, "depth": 2, "num_heads": 4, "mlp_ratio": 2.5}
    config = {"model": "DiT", "sizes": sizes, "latent_shape": [3, 8, 8], "num_classes": 10,
              "image_size": 8, "vae": "none", "scale": 1.0}
    weights = build(config).state_dict()
    save_checkpoint(tmp_path / "small.safetensors", {"step": 0, "ema": weights, "config": config})
    options = fresh(digits, tmp_path / "run", tmp_path / "small.safetensors")
    call("train", *options, "--max-steps", 1)
    (tmp_path / "small.safetensors").unlink()
    call("train", *options, "--max-steps", 2)
    config = load_weights(tmp_path / "run", 2, "config")
    assert config["model"] == "DiT" and config["sizes"] == sizes
    assert "DiT, patch_size 2, hidden_size 48" in (tmp_path / "run" / "log.txt").read_text()
    call("sample", "--ckpt", tmp_path / "run" / "checkpoints" / "0000002.pt", "--sample-dir",
         tmp_path / "out", "--num-fid-samples", 2)


def test_a_v_head_that_the_file_lacks_starts_as_the_u_head(digits, headless, tmp_path):
    options = fresh(digits, tmp_path / "run", headless, "--max-steps", 2)
    net, ema, config, log = first(options)
    assert equal(net, ema) and config["sizes"] is None and "copy of the u head" in log
    assert equal(net.v_heads, net.u_heads) and equal(net.v_final_layer, net.u_final_layer)
    theirs, _ = load_network(headless)
    z, y = torch.randn(2, 3, 8, 8), torch.tensor([3, 10])
    r, t, omega, low, high = torch.tensor([0.1, 0.9, 3.0, 0.2, 0.7]).unsqueeze(1).expand(5, 2)
    u, v = net(z, r, t, y, omega, low, high)
    assert torch.equal(u, theirs(z, r, t, y, omega, low, high)[0]) and torch.equal(u, v)
    call("train", *options)
    assert load_weights(tmp_path / "run", 2)["v_heads.0.attn.q_proj.weight"].isfinite().all()


# ---- other classes -----------------------------------------------------------------------------


@pytest.fixture
def named(digits, tmp_path):
    """A function that makes a data set of the digits' first so many classes, renamed."""
    def make(count, prefix=""):
        for i in range(count):
            shutil.copytree(digits / str(i), tmp_path / "data" / f"{prefix}{i}")
        return tmp_path / "data"
    return make


@pytest.mark.parametrize(("count", "prefix"), [(3, ""), (10, "digit ")])
@pytest.mark.parametrize("kind", ["trained", "headless"])
def test_other_classes_have_a_new_label_table_but_for_the_null_label(kind, count, prefix, named,
                                                                     request, tmp_path):
    source = request.getfixturevalue(kind)
    state = load_checkpoint(source)
    if kind == "headless":
        state["config"] |= {"classes": list("0123456789")}
        source = tmp_path / "named.pt"
        torch.save(state, source)
    net, ema, config, log = first(fresh(named(count, prefix), tmp_path / "run", source))
    theirs = state["ema"]["y_embedder.embedding_table.weight"]
    table = net.y_embedder.embedding_table.weight
    assert torch.equal(table[-1], theirs[-1]) and len(table) == count + 1
    std = 0.02 if kind == "trained" else 96**-0.5
    assert table[:-1].std().item() == pytest.approx(std, rel=0.2)  # 288 numbers: 5 sigma
    assert not (table[:1] == theirs[:1]).any()
    assert equal(net, ema) and torch.equal(net.x_embedder.proj.weight,
                                           state["ema"]["x_embedder.proj.weight"])
    assert "label table starts anew" in log and config["num_classes"] == count


def test_a_table_that_is_no_label_embedder_is_not_made_anew(named, digits, tmp_path, refusal,
                                                            monkeypatch):
    class Plain(torch.nn.Module):
        def __init__(self, *, input_size, in_channels, num_classes):
            super().__init__()
            self.labels = torch.nn.Embedding(num_classes, in_channels)

        def forward(self, z, r, t, y):
            return z + self.labels(y)[:, :, None, None]

    monkeypatch.setitem(__import__("models").DiT_models, "Plain", Plain)
    config = {"model": "Plain", "latent_shape": [3, 8, 8], "num_classes": 10, "image_size": 8,
              "vae": "none", "scale": 1.0}
    save_checkpoint(tmp_path / "plain.pt", {
        "step": 1, "model": {}, "opt": None, "config": config, "ema": build(config).state_dict()})
    first(fresh(digits, tmp_path / "run", tmp_path / "plain.pt"))
    data = named(3)
    refusal("train", fresh(data, tmp_path / "new", tmp_path / "plain.pt"), "--init")


# ---- the run that follows ----------------------------------------------------------------------


def test_a_run_goes_on_without_the_file_bit_for_bit(digits, drifted, tmp_path):
    for name in ("whole", "parts"):
        call("train", *fresh(digits, tmp_path / name, drifted, "--ckpt-every", 2, "--max-steps",
                             4 if name == "whole" else 2))
    drifted.unlink()
    call("train", *fresh(digits, tmp_path / "parts", drifted, "--max-steps", 4, "--ckpt-every", 2))
    for kind in ("model", "ema"):
        whole, parts = (load_weights(tmp_path / name, 4, kind) for name in ("whole", "parts"))
        assert all(torch.equal(parts[key], value) for key, value in whole.items())
    config = json.loads((tmp_path / "parts" / "config.json").read_text())
    assert config["init"] == str(drifted) and config["sizes"] is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trained", "headless"])
def test_two_processes_start_as_one(kind, digits, request, tmp_path):
    source = request.getfixturevalue(kind)
    options = fresh(digits, tmp_path / "one", source, "--max-steps", 2)
    start = first(options)[0].state_dict()
    call("train", *options)
    options[options.index(tmp_path / "one")] = tmp_path / "two"
    run_ranks("train", *options, processes=2, output=tmp_path / "said")
    assert_same_training(load_state(tmp_path / "two", 2), load_state(tmp_path / "one", 2), start)


def test_the_default_folder_is_not_that_of_a_run_from_nothing(digits, trained, tmp_path,
                                                              monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = fresh(digits, "x", trained)
    at = options.index("--run-dir")
    first(options[:at] + options[at + 2:])
    assert (tmp_path / "results" / "DiT-T-4-cfg3.0-init" / "config.json").exists()


def test_another_normalisation_is_said(digits, trained, tmp_path):
    state = load_checkpoint(trained)
    state["config"] |= {"scale": 0.5, "vae": "some"}
    torch.save(state, tmp_path / "scaled.pt")
    log = first(fresh(digits, tmp_path / "run", tmp_path / "scaled.pt"))[3]
    assert "scale 0.5, now 1.0; vae some, now none" in log


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "more", "option"), [
    ("trained", ["--model", "DiT-S/4"], "--model must be DiT-T/4"),
    ("trained", ["--model", "iMF-T/4"], "--model must be DiT-T/4"),
    ("trained", ["--omega-max", 4], "--omega-max"), ("headless", ["--cfg", 2], "--cfg"),
    ("headless", ["--model", "DiT-T/4"], "--model must be iMF-T/4"),
    ("trained", ["--image-size", 4], "--init must be a network for data of shape [3, 4, 4]"),
    ("trained", ["--kappa", 1], "--kappa"), ("digits", [], "--init"),
    ("trained", ["--run-dir", "DATA/run"], "--run-dir")])
def test_what_does_not_fit_the_file_is_refused(kind, more, option, digits, request, tmp_path,
                                               refusal):
    more = [str(digits / "run") if word == "DATA/run" else word for word in more]
    refusal("train", fresh(digits, tmp_path / "run", request.getfixturevalue(kind), *more), option)


def test_a_file_that_is_gone_or_hostile_is_refused(digits, trained, tmp_path, refusal):
    refusal("train", fresh(digits, tmp_path / "run", tmp_path / "gone.pt"), "--init")
    state = load_checkpoint(trained)
    state["config"] |= {"sizes": {"depth": 10**9}}
    torch.save(state, tmp_path / "hostile.pt")
    assert "depth" in refusal("train", fresh(digits, tmp_path / "run", tmp_path / "hostile.pt"),
                              "--init")


def test_a_run_from_nothing_does_not_become_one_from_a_file(digits, trained, headless, tmp_path,
                                                            refusal):
    """Nor does one from a file continue from another."""
    line = refusal("train", fresh(digits, trained.parent.parent, trained), "--run-dir")
    assert "init None, now" in line
    shutil.copy(trained, tmp_path / "a.pt")
    call("train", *fresh(digits, tmp_path / "run", tmp_path / "a.pt", "--max-steps", 1))
    line = refusal("train", fresh(digits, tmp_path / "run", trained, "--max-steps", 2),
                   "--run-dir")
    assert "init" in line

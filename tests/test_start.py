"""train.py --init: a run starts with the weights of a file, whatever else it may then change."""

import os
import shutil

import pytest
import torch
from conftest import assert_same_training, call, load_state, load_weights, run_ranks, tiny

from engine.checkpoint import load_checkpoint, load_network, save_checkpoint
from engine.distributed import start_processes
from models import build
from train import Run, TrainingState, parse_args, resolve

PIXELS = {"latent_shape": [3, 8, 8], "num_classes": 10, "image_size": 8, "vae": "none",
          "scale": 1.0}


def options_from(source, digits, folder, *more):
    """Options of tiny that start from a file, without those that the file tells."""
    options = tiny(digits, folder)
    for option in "--model", "--vae", "--image-size":
        at = options.index(option)
        del options[at:at + 2]
    return [*options, "--init", source, *more]


def begin(options):
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
    pairs = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


@pytest.fixture
def drifted(trained, tmp_path):
    """A checkpoint as of other repositories: with its own position table, and nameless classes."""
    state = load_checkpoint(trained)
    state["ema"]["pos_embed"] += 1e-4 * torch.rand(state["ema"]["pos_embed"].shape)
    state |= {"model": {}, "opt": None, "step": 0}
    del state["config"]["classes"]
    torch.save(state, tmp_path / "drifted.pt")
    return tmp_path / "drifted.pt"


@pytest.fixture(scope="session")
def headless(tmp_path_factory):
    """A checkpoint as of a released improved network: without the v head, but trained."""
    config = {"model": "iMF-T/4", "sizes": {"v_head": False}, **PIXELS}
    torch.manual_seed(0)
    net = build(config)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    path = tmp_path_factory.mktemp("headless") / "imf.pt"
    save_checkpoint(path, {"step": 0, "model": net.state_dict(), "ema": net.state_dict(),
                           "opt": None, "config": config})
    return path


# ---- what a run starts with --------------------------------------------------------------------


def test_a_run_starts_with_the_average_of_a_file(digits, drifted, hub, tmp_path):
    os.link(drifted, hub.folder / "ann" / "digits" / "a.pt")
    source = "hf://ann/digits/a.pt"
    net, ema, config, log = begin(options_from(source, digits, tmp_path / "run", "--max-steps", 20))
    theirs, _ = load_network(drifted)
    assert equal(net, theirs) and equal(ema, theirs)
    assert config["init"] == source and config["model"] == "DiT-T/4"
    assert f"starts from the averaged weights of {source}" in log
    assert "taken to be those of the data" in log and "latents are not" not in log


def test_a_run_goes_on_without_the_file_bit_for_bit(digits, drifted, tmp_path):
    """The position table was computed anew."""
    table = load_checkpoint(drifted)["ema"]["pos_embed"].clone()
    for name, steps in ("whole", 4), ("parts", 2), ("parts", 4):
        if (name, steps) == ("parts", 4):
            drifted.unlink()
        call("train", *options_from(drifted, digits, tmp_path / name, "--max-steps", steps))
    for kind in ("model", "ema"):
        whole, parts = (load_weights(tmp_path / name, 4, kind) for name in ("whole", "parts"))
        assert all(torch.equal(parts[key], value) for key, value in whole.items())
        assert torch.equal(whole["pos_embed"], table)


def test_sizes_outside_the_table_come_from_the_file(digits, tmp_path):
    sizes = {"patch_size": 2, "hidden_size": 48, "depth": 2, "num_heads": 4, "mlp_ratio": 2.5}
    config, source = {"model": "DiT", "sizes": sizes, **PIXELS}, tmp_path / "small.safetensors"
    save_checkpoint(source, {"step": 0, "ema": build(config).state_dict(), "config": config})
    options = options_from(source, digits, tmp_path / "run")
    call("train", *options, "--max-steps", 1)
    source.unlink()
    call("train", *options, "--max-steps", 2)
    config = load_weights(tmp_path / "run", 2, "config")
    assert config["model"] == "DiT" and config["sizes"] == sizes
    call("sample", "--ckpt", tmp_path / "run" / "checkpoints" / "0000002.pt", "--sample-dir",
         tmp_path / "out", "--num-fid-samples", 2)


def test_a_v_head_that_the_file_lacks_starts_as_the_u_head(digits, headless, tmp_path):
    options = options_from(headless, digits, tmp_path / "run", "--max-steps", 2)
    net, ema, config, log = begin(options)
    assert equal(net, ema) and config["sizes"] is None and "copy of the u head" in log
    theirs, _ = load_network(headless)
    z, y = torch.randn(2, 3, 8, 8), torch.tensor([3, 10])
    r, t, *guidance = torch.tensor([0.1, 0.9, 3.0, 0.2, 0.7]).unsqueeze(1).expand(5, 2)
    u, v = net(z, r, t, y, *guidance)  # of omega, t_min, t_max
    assert torch.equal(u, theirs(z, r, t, y, *guidance)[0]) and torch.equal(u, v)
    call("train", *options)
    assert load_weights(tmp_path / "run", 2)["v_heads.0.attn.q_proj.weight"].isfinite().all()


def test_another_normalisation_is_said(digits, trained, tmp_path):
    state = load_checkpoint(trained)
    state["config"] |= {"scale": 0.5}
    torch.save(state, tmp_path / "scaled.pt")
    log = begin(options_from(tmp_path / "scaled.pt", digits, tmp_path / "run"))[3]
    assert "scale 0.5, now 1.0" in log


@pytest.mark.slow
def test_two_processes_start_as_one(digits, headless, tmp_path):
    one, two = (options_from(headless, digits, tmp_path / name, "--max-steps", 2)
                for name in ("one", "two"))
    start = begin(one)[0].state_dict()
    call("train", *one)
    run_ranks("train", *two, processes=2, output=tmp_path / "said")
    assert_same_training(load_state(tmp_path / "two", 2), load_state(tmp_path / "one", 2), start)


@pytest.mark.parametrize(("kind", "count", "prefix", "std"), [
    ("trained", 3, "", 0.02), ("trained", 10, "digit ", 0.02), ("headless", 10, "a ", 96**-0.5)])
def test_other_classes_have_a_new_label_table_but_for_the_null_label(
        kind, count, prefix, std, digits, request, tmp_path):
    state = load_checkpoint(request.getfixturevalue(kind))
    state["config"] |= {"classes": list("0123456789")}
    torch.save(state, tmp_path / "named.pt")
    for i in range(count):
        shutil.copytree(digits / str(i), tmp_path / "data" / f"{prefix}{i}")
    options = options_from(tmp_path / "named.pt", tmp_path / "data", tmp_path / "run")
    net, ema, config, log = begin(options)
    theirs = state["ema"]["y_embedder.embedding_table.weight"]
    table = net.y_embedder.embedding_table.weight
    assert torch.equal(table[-1], theirs[-1]) and len(table) == count + 1
    assert table[:-1].std().item() == pytest.approx(std, rel=0.2)  # 288 numbers: 5 sigma
    assert not (table[:1] == theirs[:1]).any()
    bias = "x_embedder.proj.bias"
    assert equal(net, ema) and torch.equal(net.state_dict()[bias], state["ema"][bias])
    assert "label table starts anew" in log and config["num_classes"] == count


def test_a_table_that_is_no_label_embedder_is_not_made_anew(digits, tmp_path, refusal, monkeypatch):
    class Plain(torch.nn.Module):
        def __init__(self, *, input_size, in_channels, num_classes):
            super().__init__()
            self.labels = torch.nn.Embedding(num_classes, in_channels)

    monkeypatch.setitem(__import__("models").DiT_models, "Plain", Plain)
    config, source = {"model": "Plain", **PIXELS}, tmp_path / "plain.safetensors"
    save_checkpoint(source, {"step": 1, "config": config, "ema": build(config).state_dict()})
    begin(options_from(source, digits, tmp_path / "run"))
    shutil.copytree(digits / "3", tmp_path / "data" / "3")
    refusal("train", options_from(source, tmp_path / "data", tmp_path / "new"), "--init")


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("more", "option"), [
    (["--model", "DiT-S/4"], "--model must be DiT-T/4"), (["--omega-max", 4], "--omega-max"),
    (["--image-size", 4], "--init must be a network for data of shape [3, 4, 4]")])
def test_what_does_not_fit_the_file_is_refused(more, option, digits, trained, tmp_path, refusal):
    refusal("train", options_from(trained, digits, tmp_path / "run", *more), option)


def test_a_file_that_is_gone_or_hostile_is_refused(digits, trained, tmp_path, refusal):
    state = load_checkpoint(trained)
    state["config"] |= {"sizes": {"depth": 10**9}}
    torch.save(state, tmp_path / "hostile.pt")
    state["config"] |= {"sizes": None}
    state["ema"]["pos_embed"][0, 0, 0] = float("nan")
    torch.save(state, tmp_path / "black.pt")
    for name, reason in (("gone.pt", "must be"), ("hostile.pt", "depth"), ("black.pt", "finite")):
        options = options_from(tmp_path / name, digits, tmp_path / "run")
        assert "--init must" in refusal("train", options, reason)
        sample = ["--ckpt", tmp_path / name, "--sample-dir", tmp_path / "out"]
        assert "--ckpt must" in refusal("sample", sample, reason)


def test_a_run_continues_from_its_own_file_only(digits, trained, tmp_path, refusal):
    line = refusal("train", options_from(trained, digits, trained.parent.parent), "--run-dir")
    assert "init None, now" in line

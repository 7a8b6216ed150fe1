"""Checkpoints: whole, found again, opened as data, enough to rebuild the network."""

import pickle
import time
from concurrent.futures import wait
from pathlib import Path

import pytest
import torch
from conftest import refused
from safetensors.torch import save_file

from engine.checkpoint import (
    KEYS,
    Saver,
    check_config,
    list_checkpoints,
    load_checkpoint,
    load_network,
    newest_checkpoint,
    restore_checkpoint,
    save_checkpoint,
)
from engine.errors import BadValue, UserError
from engine.files import write_json
from models import build

CONFIG = {"model": "DiT-T/4", "latent_shape": [3, 8, 8], "num_classes": 10, "image_size": 8,
          "vae": "none", "scale": 1.0, "lr": 0.1}


def state(step):
    net = build(CONFIG)
    return {"step": step, "model": net.state_dict(), "ema": net.state_dict(), "opt": {},
            "config": CONFIG}


@pytest.fixture
def folder(tmp_path):
    for step in (2, 10, 9):
        save_checkpoint(tmp_path / f"{step:07d}.pt", state(step))
    return tmp_path


def flip(path, content, offset=0, bit=0):
    """Flip one bit of these bytes in a file."""
    data = bytearray(path.read_bytes())
    data[data.index(content) + offset] ^= 1 << bit
    path.write_bytes(data)


def test_torn_and_damaged_newest_files_are_reported_and_the_one_before_them_used(folder, capsys):
    """torch.load compares no checksum: a flipped bit in an average made FID 180.13 of 120.77."""
    damaged, torn = folder / "0000010.pt", folder / "0000009.pt"
    flip(damaged, state(10)["ema"]["pos_embed"].numpy().tobytes(), 100, bit=6)
    assert load_checkpoint(damaged)["step"] == 10  # nothing to see so far
    torn.write_bytes(torn.read_bytes()[:5000])
    assert newest_checkpoint(folder) == folder / "0000002.pt"
    err = capsys.readouterr().err
    assert damaged.name in err and torn.name in err


def test_only_the_last_are_kept(folder):
    """0000010-best.pt once was the newest, and gone after the next save. A torn file of a later
    step was kept in place of the only good one, after a run that went on from an older one."""
    others = ["0000010-best.pt", "9999999 (copy).pt", "best.pt", "9.pt.bak", "10000000.pt"]
    for name in others:
        (folder / name).write_bytes(b"torn or not ours")
    save_checkpoint(folder / "9999999.pt", state(9999999), keep_last=2)
    assert {path.name for path in folder.iterdir()} == {*others, "9999999.pt", "0000010.pt"}
    assert [path.stem for path in list_checkpoints(folder)] == ["10000000", "9999999", "0000010"]
    assert newest_checkpoint(folder).stem == "9999999"


@pytest.fixture
def slow_disk(monkeypatch):
    save = save_checkpoint
    monkeypatch.setattr("engine.checkpoint.save_checkpoint", lambda *words, **more: (
        time.sleep(0.2), save(*words, **more)))


def test_what_is_being_written_when_a_run_fails_is_written_to_its_end(tmp_path, slow_disk):
    with pytest.raises(KeyError), Saver(tmp_path, keep_last=0) as saver:
        saver.save(state(1))
        raise KeyError
    assert load_checkpoint(tmp_path / "0000001.pt")["step"] == 1


def test_what_is_written_is_the_state_of_its_step(tmp_path, slow_disk):
    weight = torch.ones(3)
    with Saver(tmp_path, keep_last=0) as saver:
        saver.save({**state(1), "opt": {"state": {0: [weight]}}})
        weight.zero_()  # training goes on
        saver.raise_errors(wait=True)
    assert torch.equal(load_checkpoint(tmp_path / "0000001.pt")["opt"]["state"][0][0],
                       torch.ones(3))


def test_a_checkpoint_that_could_not_be_written_is_known_before_the_next(tmp_path):
    with Saver(tmp_path / "missing", keep_last=0) as saver:
        saver.save(state(1))
        wait([saver.job])
        with pytest.raises(UserError, match="cannot write .*0000001.pt"):
            saver.raise_errors()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="a file of Linux")
def test_nothing_that_was_read_keeps_its_file(tmp_path):
    """The optimiser's state was a part of the file, which took its disk until the run's end."""
    net, path = build(CONFIG), tmp_path / "0000005.pt"
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    stored = {**state(5), "opt": optimizer.state_dict()}
    save_checkpoint(path, stored)
    assert restore_checkpoint(path, net, build(CONFIG), optimizer) == 5
    kept = load_network(path), newest_checkpoint(tmp_path)
    assert str(path) not in Path("/proc/self/maps").read_text(), kept
    moments = {i: state["exp_avg"] for i, state in optimizer.state_dict()["state"].items()}
    assert all(torch.equal(stored["opt"]["state"][i]["exp_avg"], m) for i, m in moments.items())


def test_the_network_is_rebuilt_from_the_file_alone(folder):
    stored = state(3)
    stored["ema"] = {key: torch.full_like(p, 0.5) for key, p in stored["ema"].items()}
    save_checkpoint(folder / "0000003.pt", stored)
    net, config = load_network(folder / "0000003.pt")
    assert config == CONFIG and not net.training
    assert all((p == 0.5).all() and not p.requires_grad for p in net.parameters())


class Hostile:
    def __reduce__(self):
        return print, ("a pickle ran code",)


def test_files_that_are_no_checkpoints_are_refused_in_one_line(folder, capsys):
    torch.save({"state_dict": {}}, folder / "foreign.pt")
    torch.save({key: Hostile() for key in KEYS}, folder / "hostile.pt")
    for name, content in (("pickle.pt", pickle.dumps(Hostile())), ("text.pt", b"no checkpoint"),
                          ("torn.pt", (folder / "0000010.pt").read_bytes()[:-100])):
        (folder / name).write_bytes(content)
    for name in ("foreign.pt", "hostile.pt", "pickle.pt", "text.pt", "torn.pt", "missing.pt", "."):
        with pytest.raises(BadValue) as error:
            load_checkpoint(folder / name)
        assert str(folder / name) in str(error.value) and "\n" not in str(error.value)
    assert "ran code" not in capsys.readouterr().out


def test_a_run_directory_is_refused_with_its_newest_checkpoint(tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    with refused("must be a checkpoint file", checkpoints, "(a folder); give a checkpoint"):
        load_checkpoint(checkpoints)
    for name in ("0000002.pt", "0000010.pt", "last.pt"):
        (checkpoints / name).touch()
    for path in (tmp_path / "run", checkpoints):
        with refused(f"got {path} (a ", f"did you mean {checkpoints / '0000010.pt'}?"):
            load_checkpoint(path)


def check(folder, may_change=(), **changes):
    check_config(folder, {**CONFIG, **changes}, defaults={}, may_change=may_change)


def test_a_run_of_other_options_is_refused_by_name(tmp_path):
    check(tmp_path)
    write_json(tmp_path / "config.json", CONFIG)
    # Without a checkpoint there is nothing to spoil: it may have failed for these very options
    check(tmp_path, lr=0.2)
    with refused("new None, now 1"):  # another program's config.json
        check(tmp_path, new=1)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "0000001.pt").touch()
    check(tmp_path)
    check(tmp_path, lr=0.2, may_change=("lr",))
    with refused("lr 0.1, now 0.2"):
        check(tmp_path, lr=0.2)
    with pytest.raises(BadValue) as error:  # an ImageNet of classes is no line
        check(tmp_path, classes=["n01440764"] * 1000)
    assert len(str(error.value)) < 500
    (tmp_path / "config.json").write_text("{")
    with refused("config.json"):
        check(tmp_path)


# ---- .safetensors ------------------------------------------------------------------------------


@pytest.fixture
def safetensors(tmp_path):
    """The path of a .safetensors file, and the state that it was written from."""
    path, saved = tmp_path / "digits.safetensors", state(7)
    save_checkpoint(path, saved)
    return path, saved


def test_a_safetensors_file_returns_every_bit(safetensors):
    path, saved = safetensors
    loaded = load_checkpoint(path, verify=True)
    assert loaded.keys() == set(KEYS) and loaded["opt"] is None and loaded["step"] == 7
    assert loaded["config"] == saved["config"]
    for kind in ("model", "ema"):
        assert loaded[kind].keys() == saved["ema"].keys()
        assert all(torch.equal(loaded[kind][key], value) for key, value in saved["ema"].items())


def test_tensors_of_a_mapped_file_and_transposed_ones_are_written(tmp_path):
    torch.save(state(1), tmp_path / "a.pt")
    saved = load_checkpoint(tmp_path / "a.pt")
    saved["ema"]["turned"] = torch.arange(6.0).view(2, 3).t()
    saved["ema"]["half"] = torch.rand(3).half()
    save_checkpoint(tmp_path / "a.safetensors", saved)
    loaded = load_checkpoint(tmp_path / "a.safetensors")["ema"]
    assert all(torch.equal(loaded[key], value) for key, value in saved["ema"].items())


@pytest.mark.parametrize("place", ["pos_embed", "DiT-T"])
def test_damaged_bytes_of_a_safetensors_file_are_found(place, safetensors):
    """The format has no checksums: weights or config would be taken as they are."""
    path, saved = safetensors
    flip(path, saved["ema"][place].numpy().tobytes() if place == "pos_embed" else place.encode(), 2)
    with refused(path.name, "damaged", "SHA-256"):
        load_checkpoint(path)


@pytest.mark.parametrize("case", ["torn", "empty", "text", "foreign", "config", "step"])
def test_a_safetensors_file_that_is_no_checkpoint_is_refused(case, safetensors):
    path, saved = safetensors
    metadata = {"foreign": None, "config": {"config": "{", "step": "1"},
                "step": {"config": "{}", "step": "x"}}
    if case in metadata:
        save_file(saved["ema"], path, metadata=metadata[case])
    else:
        path.write_bytes({"torn": path.read_bytes()[:-9], "empty": b"", "text": b"text" * 9}[case])
    with refused(path.name, "convert_checkpoint.py"):
        load_checkpoint(path, verify=True)

"""Checkpoints: whole, found again, opened as data, enough to rebuild the network."""

import math
import os
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
    plain_config,
    restore_checkpoint,
    save_checkpoint,
)
from engine.errors import BadValue, UserError
from engine.files import write_json
from models import build
from weights.convert import convert
from weights.foreign_files import read_weights

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


# ---- one set of checks --------------------------------------------------------------------------

BIAS, HEAD = "blocks.0.mlp.fc1.bias", "blocks.0.mlp.fc1.weight"
ONES = torch.ones(384)
SHARED = ["x" * 100] * 10
for _ in range(60):  # 10^62 characters, as a file of some kilobytes
    SHARED = [SHARED] * 10
WRONG = {  # what the line says: the kind and content of what is changed
    "not finite": {BIAS: ONES * math.nan}, "finite in float32": {BIAS: ONES.double() * 1e300},
    "int8": {BIAS: ONES.char()}, "bool": {BIAS: ONES.bool()}, "complex64": {BIAS: ONES.cfloat()},
    "float8": {BIAS: ONES.to(torch.float8_e5m2)}, "sparse": {BIAS: ONES.to_sparse()},
    "float32, quantised": {BIAS: ONES.to("meta")}, "NoneType": {BIAS: None}, "by name": {1: ONES},
    "more numbers": {HEAD: torch.zeros(1).expand(384, 96)},
    "numbers than the file": {HEAD: torch.zeros(1).half().expand(10**6, 10**6)},
    "size mismatch": {BIAS: torch.ones(0)},
    "scale is nan": {"scale": math.nan}, "scale is inf": {"scale": math.inf},
    "scale is 0": {"scale": 0}, "scale is -1": {"scale": -1.0},
    "scale is 1e-300": {"scale": 1e-300}, "scale is 1000": {"scale": 10**400},
    "latent_std is [1.0, 0.0": {"latent_mean": [0.0] * 3, "latent_std": [1.0, 0.0, 1.0]},
    "latent_std is [nan": {"latent_mean": [0.0] * 3, "latent_std": [math.nan] * 3},
    "latent_std is [2.0]": {"latent_mean": [0.0] * 3, "latent_std": [2.0]},
    "latent_mean is [0.0]": {"latent_mean": [0.0], "latent_std": [1.0] * 3},
    "latent_std is None": {"latent_mean": [0.0] * 3},
    "latent_mean is None": {"latent_mean": None, "latent_std": None},
    "classes is ['a', 'b']": {"classes": ["a", "b"]}, "classes is abcdefghij": {
        "classes": "abcdefghij"}, "classes is [['a']": {"classes": [["a"]] * 10},
    "classes is 10": {"classes": 10}, "num_classes is 0": {"num_classes": 0},
    "num_classes is -1": {"num_classes": -1}, "num_classes is True": {"num_classes": True},
    "image_size is 0": {"image_size": 0}, "image_size is 10000": {"image_size": 10**9},
    "omega_max is x": {"omega_max": "x"}, "vae is xxxx": {"vae": "x" * 10**5},
    "model is 3": {"model": 3}, "Tensor is not JSON": {"model": ONES},
    "depth is 36864": {"sizes": {"depth": 36864}}, "pos_embed": {"sizes": {"hidden_size": 36864}},
    "too deep or too large": {"vae": SHARED},
}


@pytest.mark.parametrize("reason", WRONG)
def test_what_no_image_can_be_made_of_is_refused_wherever_it_is_read(reason, tmp_path):
    """Sampling made black images of weights that were NaN or whole numbers, or of a scale of NaN,
    without a word, where conversion refused them. A tensor with a stride of 0, of one number in the
    file, took any amount of memory."""
    saved, path = state(5), tmp_path / "wrong.pt"
    kind = "ema" if WRONG[reason].keys() & {BIAS, HEAD, 1} else "config"
    torch.save(saved | {kind: saved[kind] | WRONG[reason]}, path)
    for read in load_network, lambda path: convert(read_weights(path)):
        with refused("must hold", reason) as error:
            read(path)
        assert len(str(error.value)) < 500


@pytest.mark.parametrize("step", [math.nan, math.inf, -1, "7", True, ONES, SHARED, 10**30])
def test_a_step_is_a_whole_number_wherever_it_is_read(step, tmp_path):
    path = tmp_path / "wrong.pt"
    torch.save(state(5) | {"step": step}, path)
    for read in load_checkpoint, read_weights:
        with refused("must", path, "step"):
            read(path)


def test_configs_that_could_not_be_printed_are_refused():
    deep, circle = [], []
    circle.append(circle)
    for _ in range(20000):
        deep = [deep]
    for value in (deep, SHARED, circle, {"a": SHARED}, "x" * 10**8):
        with pytest.raises(ValueError, match="too deep or too large"):
            plain_config({"model": value})
    for value in (b"bytes", torch.ones(3), {1}):
        with pytest.raises(TypeError, match="JSON"):
            plain_config({"model": value})
    names = {"classes": [f"class {i}" for i in range(100_000)], "latent_shape": (3, 8, 8)}
    assert plain_config(names) == names | {"latent_shape": [3, 8, 8]}


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64", "Parameter", "tied", "views"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_other_floats_parameters_and_shared_weights_are_read_and_written(kind, suffix, tmp_path):
    """Parameters, and weights of two names, failed at .safetensors with "free space"."""
    saved, path = state(5), tmp_path / f"odd{suffix}"
    weights = saved["ema"]
    if kind == "Parameter":
        weights = {name: torch.nn.Parameter(value) for name, value in weights.items()}
    elif kind == "tied":
        weights |= {f"blocks.{i}.mlp.fc1.weight": weights[HEAD] for i in range(4)}
    elif kind == "views":  # of one tensor, as in a file of fused weights
        flat = torch.cat([value.flatten() for value in weights.values()])
        parts = flat.split([value.numel() for value in weights.values()])
        weights = {name: part.view(value.shape)
                   for (name, value), part in zip(weights.items(), parts, strict=True)}
    else:
        weights = {name: value.to(getattr(torch, kind)) for name, value in weights.items()}
    save_checkpoint(path, saved | {"ema": weights})
    ours, converted = load_network(path)[0].state_dict(), convert(read_weights(path))[0]
    save_checkpoint(tmp_path / "new.safetensors", converted)
    for read in ours, converted["ema"], load_checkpoint(tmp_path / "new.safetensors")["ema"]:
        assert all(torch.equal(read[name], value.float()) for name, value in weights.items())


# ---- other files -------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", [b"1.pt", b"1.safetensors"])
def test_a_checkpoint_is_found_again_under_a_name_that_is_no_utf8(name, tmp_path):
    """PyTorch wrote it and did not read it: the run counted as damaged."""
    path, saved = tmp_path / os.fsdecode(b"n\xff" + name), state(1)
    save_checkpoint(path, saved)
    for loaded in (load_checkpoint(path, verify=True)["ema"], read_weights(path).tensors):
        assert all(torch.equal(saved["ema"][key], loaded[key]) for key in saved["ema"])


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


@pytest.mark.parametrize(("config", "step"), [
    ("[" * 20000 + "]" * 20000, "1"), ("[1]", "1"), ('{"scale": NaN}', "1"), ("{", "1"),
    ("{}", "nan"), ("{}", "-1"), ("{}", "9" * 30), ("{}", "9" * 5000)])
def test_odd_metadata_of_a_safetensors_file_are_refused(config, step, tmp_path, monkeypatch):
    path, saved = tmp_path / "odd.safetensors", state(7)
    monkeypatch.setattr("json.dumps", lambda value: value)
    save_checkpoint(path, saved | {"config": config, "step": step})
    monkeypatch.undo()
    for read in load_network, lambda path: convert(read_weights(path), source="zhuyu"):
        with refused("must") as error:
            read(path)
        assert len(str(error.value)) < 500


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

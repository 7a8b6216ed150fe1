"""What a user can get wrong: one line with option, rule, value and remedy, exit code 2, and no
file changed."""

import importlib
import os
import re
import sys

import pytest
import torch
from conftest import run_script, tiny

import runtime


def snapshot(folder):
    """Everything below a folder: names and, for files, content."""
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None
            for path in folder.rglob("*")}


def refusal(script, options, monkeypatch, capfd):
    """The one line on stderr of a script that refuses its options."""
    module = importlib.import_module(script)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, options)])
    with pytest.raises(SystemExit) as exit:
        runtime.run(module.main, module.parse_args)
    out, err = capfd.readouterr()
    assert exit.value.code == 2 and out == ""
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{script}.py: error: "), err
    return lines[0]


def replaced(options, changes):
    """Options with the values of some replaced; None removes an option."""
    options = list(options)
    for name, value in changes.items():
        if name in options:
            i = options.index(name)
            del options[i:i + 2]
        if value is not None:
            options += [name, *value] if isinstance(value, (list, tuple)) else [name, value]
    return options


TRAIN = [
    # option, values, what the line must say
    ({"--data-path": None}, "--data-path"),
    ({"--data-path": "missing"}, "--data-path must be a folder.*missing"),
    ({"--data-path": "file.txt"}, "--data-path must be a folder.*file.txt"),
    ({"--data-path": "empty"}, "--data-path must be a folder.*empty"),
    ({"--data-path": "empty class"}, "--data-path must be a folder.*empty class"),
    ({"--data-path": "flat"}, "--data-path must be a folder.*flat"),
    ({"--data-path": "torn"}, "--data-path must hold readable images, got .*ünread.png"),
    ({"--image-size": 9}, "--image-size must suit --model DiT-T/4, got 9.*another image size"),
    ({"--image-size": 0}, "--image-size: must be a whole number, got '0'; give 1 or more"),
    ({"--image-size": "8x8"}, "--image-size: must be a whole number, got '8x8'"),
    ({"--model": "DiT-H/14"}, "--model: invalid choice: 'DiT-H/14'.*DiT-B/4"),
    ({"--vae": "sdxl"}, "--vae"),
    ({"--global-batch-size": 0}, "--global-batch-size: must be a whole number, got '0'"),
    ({"--global-batch-size": 1000}, "--global-batch-size must be at most .*200, got 1000; lower"),
    ({"--grad-accum-steps": 3}, "--global-batch-size must divide over .*got 16; choose a multiple"),
    ({"--cfg": "nan"}, "--cfg: must be a number, got 'nan'; give one 0 or more"),
    ({"--cfg": -1}, "--cfg: must be a number, got '-1'"),
    ({"--kappa": 1}, "--kappa must be in \\[0, 1\\), got 1"),
    ({"--cfg-interval": (0.8, 0.2)}, "--cfg-interval must be two increasing times.*0.8 0.2"),
    ({"--ratio": 1.5}, "--ratio: must be a number, got '1.5'; give one from 0 to 1"),
    ({"--label-drop": -0.1}, "--label-drop: must be a number, got '-0.1'"),
    ({"--lr": 0}, "--lr: must be a number, got '0'; give one above 0"),
    ({"--lr": "inf"}, "--lr: must be a number, got 'inf'"),
    ({"--ema-decay": 2}, "--ema-decay: must be a number, got '2'"),
    ({"--max-steps": -5}, "--max-steps: must be a whole number, got '-5'"),
    ({"--max-steps": "1e5"}, "--max-steps: must be a whole number, got '1e5'"),
    ({"--epochs": 2, "--max-steps": 5}, "not allowed with"),
    ({"--seed": "9" * 40}, "--seed: must be a whole number"),
    ({"--precision": "fp16"}, "--precision: invalid choice: 'fp16'.*bf16"),
    ({"--log-every": 0}, "--log-every: must be a whole number"),
    ({"--resume": "latest.pt"}, "unrecognized arguments: --resume latest.pt; --help"),
    ({"--batch-size": 32}, "unrecognized arguments: --batch-size 32"),
    ({"--run-dir": "file.txt"}, "--run-dir must be a folder.*file.txt"),
    ({"--run-dir": "file.txt/run"}, "--run-dir must be a folder.*file.txt"),
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with the things that users point scripts at by mistake."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("not a folder")
    for folder in ("empty", "empty class/a", "flat", "torn/ä b"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "flat" / "image.png").write_bytes(b"")
    for i in range(20):
        (tmp_path / "torn" / "ä b" / f"{i} ünread.png").write_bytes(b"\x89PNG\r\n\x1a\nno image")
    return tmp_path


@pytest.mark.parametrize(("changes", "line"), TRAIN)
def test_train_refuses(changes, line, place, digits, monkeypatch, capfd):
    before = snapshot(place)
    options = replaced(tiny(digits, "run"), changes)
    if "--data-path" in changes and "readable" in line:  # met while training
        monkeypatch.setattr(runtime.Log, "say", lambda self, line: None)
        monkeypatch.setattr(runtime.World, "progress", lambda self, *a, **k: open(os.devnull))
    assert re.search(line, refusal("train", options, monkeypatch, capfd))
    after = snapshot(place)
    if "readable" not in line:
        assert after == before
    assert all(after[path] == content for path, content in before.items())


def test_train_refuses_a_run_of_other_options(trained, digits, tmp_path, monkeypatch, capfd):
    folder = trained.parent.parent
    before = snapshot(folder)
    options = replaced([*tiny(digits, folder), "--max-steps", 20], {"--lr": 0.5, "--cfg": 1.5})
    line = refusal("train", options, monkeypatch, capfd)
    assert "--run-dir" in line and "lr 0.001 there, 0.5 here" in line
    assert "cfg 3.0 there, 1.5 here" in line
    assert snapshot(folder) == before


def test_train_refuses_a_batch_that_does_not_divide(digits, tmp_path):
    done = run_script("train.py", *replaced(tiny(digits, tmp_path / "run"),
                                            {"--global-batch-size": 15}), processes=2)
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    lines = [line for line in done.stderr.splitlines() if line.startswith("train.py: error")]
    assert len(lines) == 1 and "2 process(es)" in lines[0] and "got 15" in lines[0]
    assert done.stderr.count("Traceback") <= 1  # torchrun's own report, not ours


SAMPLE = [
    ({"--ckpt": None}, "--ckpt"),
    ({"--ckpt": "missing.pt"}, "--ckpt must be a checkpoint file, got missing.pt .no such file"),
    ({"--ckpt": "."}, "--ckpt must be a checkpoint file"),
    ({"--ckpt": "file.txt"}, "--ckpt must be a checkpoint file, got file.txt"),
    ({"--ckpt": "torn.pt"}, "--ckpt must be a checkpoint file, got torn.pt .torn"),
    ({"--ckpt": "foreign.pt"}, "--ckpt must hold step, model.*foreign"),
    ({"--num-fid-samples": 0}, "--num-fid-samples: must be a whole number, got '0'; give 1"),
    ({"--num-fid-samples": "5e4"}, "--num-fid-samples: must be a whole number, got '5e4'"),
    ({"--num-sampling-steps": 0}, "--num-sampling-steps: must be a whole number, got '0'"),
    ({"--per-proc-batch-size": -1}, "--per-proc-batch-size: must be a whole number, got '-1'"),
    ({"--labels": "all"}, "--labels: invalid choice: 'all'.*balanced"),
    ({"--seed": -1}, "--seed: must be a whole number, got '-1'; give 0 or more"),
    ({"--sample-dir": "file.txt"}, "--sample-dir must be a folder, got the file file.txt"),
    ({"--sample-dir": "torn"}, "--sample-dir must be new.*torn.*choose another"),
    ({"--vae": "nowhere"}, "--vae"),
    ({"--cfg-scale": 4}, "unrecognized arguments: --cfg-scale 4"),
]


@pytest.mark.parametrize(("changes", "line"), SAMPLE)
def test_sample_refuses(changes, line, place, trained, monkeypatch, capfd):
    torch.save({"model": {}}, place / "foreign.pt")
    (place / "torn.pt").write_bytes(trained.read_bytes()[:9999])
    before = snapshot(place)
    options = ["--ckpt", trained, "--num-fid-samples", 4, "--sample-dir", "out"]
    assert re.search(line, refusal("sample", replaced(options, changes), monkeypatch, capfd))
    assert snapshot(place) == before

"""What a user can get wrong: one line with option, rule, value and remedy, exit code 2, and no
file changed."""

import contextlib
import importlib
import io
import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import call, tiny
from PIL import Image
from soak import Child, ranks

from engine.checkpoint import newest_checkpoint
from engine.distributed import World, run_main
from engine.log import Log
from metrics.reference import Reference


def snapshot(folder):
    """Everything below a folder: names and, for files, content."""
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None
            for path in folder.rglob("*") if not path.is_symlink()}


def refusal(script, options, monkeypatch, capfd):
    """The one line on stderr of a script that refuses its options."""
    module = importlib.import_module(script)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, options)])
    with pytest.raises(SystemExit) as exit:
        run_main(module.main, module.parse_args)
    out, err = capfd.readouterr()
    assert exit.value.code == 2 and out == ""
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{script}.py: error: "), err
    # option, rule, value and remedy; choices are a remedy
    assert re.search("--[a-z]|must be|cannot write", err) and re.search("; |choose from", err), err
    assert re.search("got|invalid choice|required|unrecognized|not allowed|cannot write", err), err
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
    ({"--run-dir": "digits"}, "--run-dir must lie outside --data-path.*got digits; choose another"),
    ({"--run-dir": "digits/ä run"}, "--run-dir must lie outside --data-path.*got digits/ä run"),
    ({"--run-dir": "nested"}, "--run-dir must hold a readable config.json, got nested/config.json"),
    ({"--run-dir": "listed"}, "--run-dir must hold a readable config.json, got listed/config.json"),
    ({"--run-dir": "only checkpoints"}, "--run-dir must hold config.json beside its checkpoints"),
    ({"--encoded-data": ()}, "--data-path .* --encoded-data, got digits without dataset.json"),
    ({"--data-path": "latents"}, "--data-path .* holds latent shards; add --encoded-data"),
    ({"--data-path": "latents", "--encoded-data": (), "--image-size": 16},
     "--image-size must be that of the latents in latents, 8, got 16; give --image-size 8"),
    ({"--data-path": "latents", "--encoded-data": (), "--flip": ()},
     "--flip needs mirror images among the latents, got latents without; leave it out"),
    ({"--data-path": "astray", "--encoded-data": ()},
     "astray/dataset.json must be as encode_imagenet.py writes it, .*; repeat"),
    ({"--image-size": 10**9}, "--image-size must suit --model DiT-T/4, got 1000000000"),
    ({"--num-workers": 10**6}, "--num-workers: must be .*got '1000000'; give one from 0 to 1024"),
    ({"--global-batch-size": 10**15}, "--global-batch-size must be at most .*got 1000000000000000"),
    ({"--max-steps": "inf"}, "--max-steps: must be a whole number, got 'inf'"),
    ({"--eval-every": 5}, "--eval-every must come with --fid-ref, got 5 without; name"),
    ({"--eval-every": 5, "--fid-ref": "objects.npz", "--protocol": "pixels"},
     "--fid-ref must .*objects.npz"),
    ({"--compile": "yes"}, "unrecognized arguments: yes"),
    ({"--results-dir": "run"}, "unrecognized arguments: --results-dir run"),
]


@pytest.fixture(scope="module")
def latents(digits, tmp_path_factory):
    """The digits as shards of pixels."""
    folder = tmp_path_factory.mktemp("encoded") / "latents"
    call("encode_imagenet", "--data-path", digits, "--out-path", folder, "--vae", "none",
         "--image-size", 8, "--num-workers", 0)
    return folder


@pytest.fixture
def place(tmp_path, digits, latents, monkeypatch):
    """A working folder with the things that users point scripts at by mistake."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("not a folder")
    for folder in ("empty", "empty class/a", "flat", "torn/ä b"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "flat" / "image.png").write_bytes(b"")
    for i in range(20):
        (tmp_path / "torn" / "ä b" / f"{i} ünread.png").write_bytes(b"\x89PNG\r\n\x1a\nno image")
    (tmp_path / "digits").symlink_to(digits)
    (tmp_path / "latents").symlink_to(latents)
    for folder, name, text in (
            ("nested", "config.json", "[" * 10**5), ("listed", "config.json", "[1, 2]"),
            ("only checkpoints", "checkpoints/0000001.pt", "x"),
            ("astray", "dataset.json", json.dumps(
                json.loads((latents / "dataset.json").read_text())
                | {"shards": ["../../etc/passwd"]})),
            ("nested samples", "samples.json", "[" * 10**5),
            ("nested encoding", "encoding.json", "[" * 10**5),
            ("foreign encoding", "dataset.json", '{"format_version": NaN}')):
        (tmp_path / folder / name).parent.mkdir(parents=True)
        (tmp_path / folder / name).write_text(text)
    np.savez(tmp_path / "objects.npz", arr_0=np.array([print] * 3), mu=np.array([print]),
             sigma=np.array([print]))
    np.savez(tmp_path / "nan.npz", mu=np.full(192, np.nan), sigma=np.eye(192))
    np.savez(tmp_path / "ref.npz", mu=np.zeros(192), sigma=np.eye(192))
    (tmp_path / "images").mkdir()
    for i in range(4):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "images" / f"bild {i} ü.png")
    return tmp_path


@pytest.mark.parametrize(("changes", "line"), TRAIN)
def test_train_refuses(changes, line, place, monkeypatch, capfd):
    before = snapshot(place)
    options = replaced(tiny("digits", "run"), changes)
    if "--data-path" in changes and "readable" in line:  # met while training
        monkeypatch.setattr(Log, "say", lambda self, line: None)
        monkeypatch.setattr(World, "progress", lambda self, *a, **k: open(os.devnull))
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
    """Two processes without torchrun, which would end the one that waits: each says it once."""
    options = replaced(tiny(digits, tmp_path / "run"), {"--global-batch-size": 15})
    pair = [Child("train", *options, output=tmp_path / "out", **place) for place in ranks(2)]
    codes = [child.wait()[0] for child in pair]
    said = (tmp_path / "out").read_text()
    assert codes == [2, 2] and not (tmp_path / "run").exists()
    first, second = said.splitlines()
    assert "2 process(es)" in first and "got 15" in first
    assert second == first.replace("error: ", "error: rank 1: ")


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
    ({"--model": "DiT-B/4"}, "unrecognized arguments: --model DiT-B/4"),
    ({"--sample-dir": "nested samples"}, "--sample-dir must be new.*nested samples.*another"),
    ({"--sample-dir": "digits"}, "--sample-dir must be new.*got digits .*choose another"),
    ({"--fid-ref": "objects.npz", "--protocol": "pixels"}, "--fid-ref must .*objects.npz"),
    ({"--no-save-images": ()}, "--no-save-images must come with --fid-ref, .*; give one"),
]


@pytest.mark.parametrize(("changes", "line"), SAMPLE)
def test_sample_refuses(changes, line, place, trained, monkeypatch, capfd):
    torch.save({"model": {}}, place / "foreign.pt")
    (place / "torn.pt").write_bytes(trained.read_bytes()[:9999])
    before = snapshot(place)
    options = ["--ckpt", trained, "--num-fid-samples", 4, "--sample-dir", "out"]
    assert re.search(line, refusal("sample", replaced(options, changes), monkeypatch, capfd))
    assert snapshot(place) == before


HOSTILE = [
    # what a stranger's checkpoint may say, what the line must say
    ({"latent_shape": [10**9, 8, 8]}, "the tensors are not those of DiT-T/4"),
    ({"latent_shape": [3, 10**8, 10**8]}, "--ckpt must hold weights that fit its config"),
    ({"latent_shape": [3, 8, -8]}, "latent_shape is"),
    ({"latent_shape": [3, 8, float("nan")]}, "latent_shape is"),
    ({"latent_shape": None}, "NoneType"),
    ({"num_classes": "x"}, "num_classes is x"),
    ({"num_classes": 10**30}, "num_classes is 1000"),
    ({"num_classes": 2 * 10**9}, "the tensors are not those"),
    ({"model": ["DiT-T/4"]}, "model is"),
    ({"model": "DiT-S/4"}, "the tensors are not those of DiT-S/4"),
    ({"vae": 5}, "vae is 5"),
    ({"vae": "../../../etc"}, "--vae must be"),
    ({"image_size": True}, "image_size is True"),
]


@pytest.mark.parametrize(("change", "line"), HOSTILE)
def test_sample_refuses_a_checkpoint_that_lies(change, line, trained, tmp_path, monkeypatch, capfd):
    """Before it takes the memory, or opens the file, that a stranger's file asks for."""
    state = torch.load(trained, weights_only=True)
    path = tmp_path / "hostile.pt"
    torch.save(state | {"model": {}, "opt": {}, "config": state["config"] | change}, path)
    said = refusal("sample", ["--ckpt", path, "--sample-dir", tmp_path / "out"], monkeypatch, capfd)
    assert re.search(line, said) and ("hostile.pt" in said or "--vae" in said)
    assert list(tmp_path.iterdir()) == [path]


def test_train_refuses_a_checkpoint_of_another_run(trained, digits, tmp_path, monkeypatch, capfd):
    shutil.copytree(trained.parent.parent, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / trained.name
    state = torch.load(path, weights_only=True)
    model = {key: value[..., :1] for key, value in state["model"].items()}
    moments = {i: dict(value, exp_avg=value["exp_avg"][:1])
               for i, value in state["opt"]["state"].items()}
    for change in ({"step": "12"}, {"step": -1}, {"step": float("nan")}, {"model": 3},
                   {"model": model}, {"ema": {}}, {"opt": []}, {"opt": {"state": {}}},
                   {"opt": {"state": moments, "param_groups": []}}):
        torch.save(state | change, path)
        before = path.read_bytes()
        line = refusal("train", [*tiny(digits, tmp_path / "run"), "--max-steps", 20], monkeypatch,
                       capfd)
        assert "--run-dir must hold weights that fit" in line and path.name in line, change
        assert path.read_bytes() == before


ENCODE = [
    ({"--data-path": None}, "--data-path"),
    ({"--out-path": None}, "--out-path"),
    ({"--data-path": "missing"}, "--data-path must be a folder.*missing"),
    ({"--data-path": "out", "--out-path": "digits"}, "--out-path must be new.*got digits"),
    ({"--data-path": "file.txt"}, "--data-path must be a folder.*file.txt"),
    ({"--data-path": "empty class"}, "--data-path must be a folder.*empty class"),
    ({"--data-path": "latents"}, "--data-path must be a folder of images.*latent shards"),
    ({"--out-path": "file.txt/out"}, "--out-path must be a folder.*file.txt/out"),
    ({"--out-path": "digits"}, "--out-path must lie outside --data-path"),
    ({"--out-path": "torn"}, "--out-path must be new, empty or .*torn with ä b in it; choose"),
    ({"--out-path": "nested encoding"}, "--out-path must be new.*encoding.json that is not of"),
    ({"--out-path": "foreign encoding"}, "--out-path must be new.*dataset.json that is not of"),
    ({"--out-path": "latents", "--image-size": 16}, "image_size 8 there, 16 here.*; repeat"),
    ({"--image-size": "8 px"}, "--image-size: must be a whole number, got '8 px'"),
    ({"--shard-size": 0}, "--shard-size: must be a whole number, got '0'; give 1 or more"),
    ({"--batch-size": 1.5}, "--batch-size: must be a whole number, got '1.5'"),
    ({"--num-workers": -1}, "--num-workers: must be a whole number, got '-1'"),
    ({"--dtype": "bfloat16"}, "--dtype: invalid choice: 'bfloat16'.*float32"),
    ({"--vae": "stabilityai/sd-vae-ft-ema"}, "--vae must be ema, mse, none or a folder"),
    ({"--overwrite": ()}, "unrecognized arguments: --overwrite; --help"),
]


@pytest.mark.parametrize(("changes", "line"), ENCODE)
def test_encode_refuses(changes, line, place, latents, monkeypatch, capfd):
    before = snapshot(place) | snapshot(latents)
    options = ["--data-path", "digits", "--out-path", "out ü", "--vae", "none", "--image-size", 8,
               "--num-workers", 0]
    said = refusal("encode_imagenet", replaced(options, changes), monkeypatch, capfd)
    assert re.search(line, said), said
    assert snapshot(place) | snapshot(latents) == before


@pytest.mark.parametrize("text", ["{", "[" * 10**5, "5", '"names"'])
def test_encode_refuses_a_list_of_skipped_images_that_is_none(text, latents, digits, tmp_path,
                                                              monkeypatch, capfd):
    out = shutil.copytree(latents, tmp_path / "out")
    (out / "shard-00000.skipped.json").write_text(text)
    said = refusal("encode_imagenet", [
        "--data-path", digits, "--out-path", out, "--vae", "none", "--image-size", 8,
        "--skip-bad-images"], monkeypatch, capfd)
    assert "skipped.json" in said and "repeat" in said


EVALUATE = [
    ({"--samples": None}, "--samples"),
    ({"--ref": None}, "--ref or --make-ref must be given, and not both, got neither; name"),
    ({"--samples": "missing"}, "--samples must be a folder or an .npz file, got missing"),
    ({"--samples": "file.txt"}, "--samples must .*file.txt"),
    ({"--samples": "empty"}, "--samples must hold 2 images or more.*got 0 in empty; add some"),
    ({"--samples": "torn"}, "--samples must hold readable images, got .*ünread.png"),
    ({"--samples": "objects.npz"}, "--samples must .*objects.npz"),
    ({"--samples": "ref.npz", "--ref": "images"}, "--samples must .*ref.npz"),
    ({"--ref": "missing.npz"}, "--ref must be a whole .npz file.*missing.npz"),
    ({"--ref": "file.txt"}, "--ref must be a whole .npz file.*file.txt"),
    ({"--ref": "objects.npz"}, "--ref must .*objects.npz"),
    ({"--ref": "nan.npz"}, "--ref must have mu .192,. .*finite.*nan.npz; name a reference"),
    ({"--make-ref": "new.npz"}, "--ref or --make-ref must be given, and not both"),
    ({"--ref": None, "--make-ref": "file.txt"}, "--make-ref must be a new file.*got file.txt"),
    ({"--ref": None, "--make-ref": "ref.npz"}, "--make-ref must be a new file.*got ref.npz"),
    ({"--protocol": "clean-fid"}, "--protocol: invalid choice: 'clean-fid'.*adm"),
    ({"--batch-size": 0}, "--batch-size: must be a whole number, got '0'; give 1 or more"),
    ({"--num-workers": "four"}, "--num-workers: must be a whole number, got 'four'"),
    ({"--image-size": "nan"}, "--image-size: must be a whole number, got 'nan'"),
    ({"--fid-ref": "ref.npz"}, "unrecognized arguments: --fid-ref ref.npz"),
]


@pytest.mark.parametrize(("changes", "line"), EVALUATE)
def test_evaluate_refuses(changes, line, place, monkeypatch, capfd):
    before = snapshot(place)
    options = ["--samples", "images", "--ref", "ref.npz", "--protocol", "pixels"]
    said = refusal("evaluate_fid", replaced(options, changes), monkeypatch, capfd)
    assert re.search(line, said), said
    assert snapshot(place) == before


# ---- permissions and names -----------------------------------------------------------------


@pytest.fixture
def nobody(place, digits):
    """A working folder in which files and folders can be locked; root would pass every lock."""
    (place / "digits").unlink()
    shutil.copytree(digits, place / "digits")
    (place / "locked").mkdir()
    (place / "closed").mkdir()
    for folder in (place, place / "digits"):
        folder.chmod(0o777)

    @contextlib.contextmanager
    def somebody():
        (place / "locked").chmod(0o555)
        (place / "closed").chmod(0)
        root = os.getuid() == 0
        if root:
            os.setresuid(65534, 65534, 0)
        try:
            yield
        finally:
            if root:
                os.setresuid(0, 0, 0)
            (place / "locked").chmod(0o755)
            (place / "closed").chmod(0o755)
    return somebody


FORBIDDEN = [
    ("train", {"--run-dir": "locked"}, "--run-dir must be a folder that can be written"),
    ("train", {"--run-dir": "locked/run"}, "--run-dir must be a folder that can be written"),
    ("train", {"--data-path": "closed", "--run-dir": "r"}, "--data-path must be a folder.*closed"),
    ("sample", {"--ckpt": "locked.pt"}, "--ckpt must be a checkpoint file, got locked.pt"),
    ("sample", {"--sample-dir": "locked/out"}, "--sample-dir must be a folder that can be written"),
    ("encode_imagenet", {"--out-path": "locked/out"}, "--out-path must be a folder that can be"),
    ("evaluate_fid", {"--ref": "locked.pt"}, "--ref must .*locked.pt"),
    ("evaluate_fid", {"--ref": None, "--make-ref": "locked/x.npz"}, "--make-ref must be a folder"),
    ("sample", {"--ckpt": "closed/x.pt"}, "closed/x.pt must be open to this user, got: .*; change"),
    ("encode_imagenet", {"--out-path": "closed/out"}, "closed/out must be open to this user"),
]


@pytest.mark.parametrize(("script", "changes", "line"), FORBIDDEN)
def test_what_may_not_be_read_or_written_is_named(script, changes, line, nobody, place, trained,
                                                  monkeypatch, capfd):
    shutil.copy(trained, place / "ok.pt")
    shutil.copy(trained, place / "locked.pt")
    options = {
        "train": tiny("digits", "run"), "sample": ["--ckpt", "ok.pt", "--sample-dir", "out"],
        "encode_imagenet": ["--data-path", "digits", "--out-path", "out", "--vae", "none"],
        "evaluate_fid": ["--samples", "images", "--ref", "ref.npz", "--protocol", "pixels"]}[script]
    (place / "locked.pt").chmod(0)
    before = snapshot(place)
    with nobody():
        assert re.search(line, refusal(script, replaced(options, changes), monkeypatch, capfd))
    assert snapshot(place) == before


LONG = "x" * 300  # of 255 bytes that a name may have
PATHS = [
    ("train", "--data-path"), ("train", "--run-dir"), ("train", "--vae"), ("train", "--fid-ref"),
    ("sample", "--ckpt"), ("sample", "--sample-dir"), ("sample", "--vae"), ("sample", "--fid-ref"),
    ("encode_imagenet", "--data-path"), ("encode_imagenet", "--out-path"),
    ("encode_imagenet", "--vae"), ("evaluate_fid", "--samples"), ("evaluate_fid", "--ref"),
    ("evaluate_fid", "--make-ref"), ("evaluate_fid", "--inception"),
]


def commands(trained):
    """Options of each script that would do, in place, but for what a test changes."""
    pixels = ["--protocol", "pixels"]
    return {
        "train": tiny("digits", "run"),
        "sample": ["--ckpt", trained, "--sample-dir", "out", "--num-fid-samples", 4, *pixels],
        "encode_imagenet": ["--data-path", "digits", "--out-path", "out", "--vae", "none"],
        "evaluate_fid": ["--samples", "images", "--ref", "ref.npz"]}


@pytest.mark.parametrize(("script", "option"), PATHS)
def test_paths_that_are_too_long_are_refused(script, option, place, trained, monkeypatch, capfd):
    """Seven options ended in a traceback."""
    changes = {option: LONG}
    if option == "--make-ref":
        changes = {"--ref": None, option: f"{LONG}.npz"}
    if (script, option) == ("train", "--fid-ref"):
        changes |= {"--eval-every": 1, "--protocol": "pixels"}
    if option == "--inception":
        monkeypatch.setattr(Reference, "load", lambda *_, **__: None)  # another protocol's
    before = snapshot(place)
    line = refusal(script, replaced(commands(trained)[script], changes), monkeypatch, capfd)
    assert LONG in line and snapshot(place) == before


def test_a_name_beside_the_sample_folder_that_is_too_long_is_refused(place, trained, monkeypatch,
                                                                     capfd):
    options = replaced(commands(trained)["sample"], {"--sample-dir": "y" * 253})  # and .npz
    assert "yyyy.npz" in refusal("sample", options, monkeypatch, capfd)


BYTES = os.fsdecode(b"n\xff")


@pytest.mark.parametrize(("script", "option"), [("train", "--run-dir"), ("sample", "--ckpt")])
def test_names_that_pytorch_cannot_open_are_refused(script, option, place, trained, monkeypatch,
                                                    capfd):
    before = snapshot(place)
    shutil.copy(trained, place / BYTES)
    options = replaced(commands(trained)[script], {option: BYTES})
    line = refusal(script, options, monkeypatch, capfd)
    assert f"{option}: must be a name in UTF-8" in line and "choose another" in line
    (place / BYTES).unlink()
    assert snapshot(place) == before


def test_results_are_printed_whatever_their_names(monkeypatch):
    """sample.py and encode_imagenet.py ended with a traceback after all work was done."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
    monkeypatch.setattr(sys, "stdout", out)
    run_main(lambda args: print(BYTES), lambda: None)
    assert out.buffer.getvalue() == os.fsencode(BYTES) + b"\n"


def test_names_with_blanks_and_other_alphabets_work(place, digits):
    run, out = place / "mein Lauf ☃" / "日本", place / "Bilder ü" / "a b"
    shutil.copytree(digits, place / "Ziffern é")
    call("train", *tiny("Ziffern é", run), "--max-steps", 2)
    call("sample", "--ckpt", newest_checkpoint(run / "checkpoints"), "--sample-dir", out,
         "--num-fid-samples", 4)
    assert len(list(out.glob("*.png"))) == 4 and (out.parent / "a b.npz").exists()

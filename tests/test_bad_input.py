"""What a user can get wrong ends in one line that names the option, exit code 2, and no change to
any file. The ``refusal`` of conftest.py checks that."""

import contextlib
import io
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import call, snapshot, tiny
from PIL import Image

from engine.checkpoint import newest_checkpoint
from engine.errors import run_main
from metrics.reference import Reference


@pytest.fixture(scope="module")
def latents(digits, tmp_path_factory):
    """The digits as shards of pixels."""
    folder = tmp_path_factory.mktemp("encoded") / "latents"
    call("encode_imagenet", "--data-path", digits, "--out-path", folder, "--vae", "none",
         "--image-size", 8, "--num-workers", 0)
    return folder


@pytest.fixture
def place(tmp_path, digits, latents, trained, monkeypatch):
    """A working folder with the things that users point scripts at by mistake."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("not a folder")
    for folder in ("empty", "empty class/a", "flat", "torn/ä b", "images"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "flat" / "image.png").write_bytes(b"")
    for i in range(4):
        (tmp_path / "torn" / "ä b" / f"{i} ünread.png").write_bytes(b"\x89PNG\r\n\x1a\nno image")
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "images" / f"bild {i} ü.png")
    for name, target in (("digits", digits), ("latents", latents), ("ok.pt", trained)):
        (tmp_path / name).symlink_to(target)
    dataset = json.loads((latents / "dataset.json").read_text())
    for folder, name, text in (
            ("nested", "config.json", "[" * 10**5), ("listed", "config.json", "[1, 2]"),
            ("only checkpoints", "checkpoints/0000001.pt", "x"),
            ("astray", "dataset.json", json.dumps(dataset | {"shards": ["../../etc/passwd"]})),
            ("nested samples", "samples.json", "[" * 10**5),
            ("nested encoding", "encoding.json", "[" * 10**5),
            ("foreign encoding", "dataset.json", '{"format_version": NaN}')):
        (tmp_path / folder / name).parent.mkdir(parents=True)
        (tmp_path / folder / name).write_text(text)
    np.savez(tmp_path / "objects.npz", arr_0=np.array([print] * 3), mu=np.array([print]),
             sigma=np.array([print]))
    np.savez(tmp_path / "nan.npz", mu=np.full(192, np.nan), sigma=np.eye(192))
    np.savez(tmp_path / "ref.npz", mu=np.zeros(192), sigma=np.eye(192))
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    (tmp_path / "torn.pt").write_bytes(trained.read_bytes()[:9999])
    return tmp_path


def good(script, **changes):
    """Options with which a script would work in place, but for changes; None removes an option.

    An underscore in a name stands for a dash; a tuple is several values or none.
    """
    pixels = ["--protocol", "pixels"]
    options = {
        "train": tiny("digits", "run"),
        "sample": ["--ckpt", "ok.pt", "--sample-dir", "out", "--num-fid-samples", 4, *pixels],
        "encode_imagenet": ["--data-path", "digits", "--out-path", "out ü", "--vae", "none",
                            "--image-size", 8, "--num-workers", 0],
        "evaluate_fid": ["--samples", "images", "--ref", "ref.npz", *pixels]}[script]
    for name, value in changes.items():
        name = option(name)
        if name in options:
            i = options.index(name)
            del options[i:i + 2]
        if value is not None:
            options += [name, *value] if isinstance(value, tuple) else [name, value]
    return options


def option(name):
    return "--" + name.replace("_", "-")


# Changes to good options, the first of which is the one that the line must name
REFUSED = {
    "train": [
        dict(data_path=None), dict(data_path="missing"), dict(data_path="empty"),
        dict(data_path="empty class"), dict(data_path="flat"),
        dict(image_size=9),  # not a multiple of the patch size
        dict(image_size=10**9), dict(image_size=0), dict(image_size="8x8"), dict(seed="9" * 40),
        dict(cfg="nan"), dict(lr="inf"), dict(lr=0), dict(ratio=1.5), dict(model="DiT-H/14"),
        dict(kappa=1), dict(cfg_interval=(0.8, 0.2)),  # rules of MeanFlow's, as options
        dict(vae="sdxl"), dict(resume="latest.pt"), dict(epochs=2, max_steps=5),
        dict(max_step=5),  # no abbreviations: the next option would change their meaning
        dict(global_batch_size=1000), dict(grad_accum_steps=3),
        dict(run_dir="file.txt"), dict(run_dir="file.txt/run"), dict(run_dir="digits/ä run"),
        dict(run_dir="nested"), dict(run_dir="listed"), dict(run_dir="only checkpoints"),
        dict(encoded_data=()), dict(data_path="latents"),
        dict(image_size=16, data_path="latents", encoded_data=()),
        dict(flip=(), data_path="latents", encoded_data=()),
        dict(eval_every=5), dict(fid_ref="objects.npz", eval_every=5, protocol="pixels"),
        dict(omega_max=4), dict(beta=1), dict(tangent="v_g"), dict(clip_grad=-1),
        dict(weight_decay="nan"), dict(warmup_steps=-1), dict(omega_max=0.5, model="iMF-T/4"),
        dict(model="iMF-B/4"), dict(image_size=9, model="iMF-T/4"),
        *(dict([(name, value), ("model", "iMF-T/4")]) for name, value in (
            ("cfg", 2), ("kappa", 0.5), ("cfg_interval", (0, 1)), ("tangent", "network"),
            ("time_sampler", "uniform")))],
    "sample": [
        dict(ckpt="missing.pt"), dict(ckpt="."), dict(ckpt="file.txt"), dict(ckpt="torn.pt"),
        dict(ckpt="foreign.pt"), dict(sample_dir="file.txt"), dict(sample_dir="torn"),
        dict(sample_dir="nested samples"), dict(vae="nowhere"), dict(fid_ref="objects.npz"),
        dict(no_save_images=()), dict(cfg=2), dict(cfg_interval=(0.2, 0.8)), dict(cfg=0.5),
        dict(cfg_interval=(0.8, 0.2)), dict(cfg_interval=(0, 2))],
    "encode_imagenet": [
        dict(out_path=None), dict(out_path="digits", data_path="out"), dict(data_path="latents"),
        dict(out_path="file.txt/out"), dict(out_path="digits"), dict(out_path="torn"),
        dict(out_path="nested encoding"), dict(out_path="foreign encoding"),
        dict(out_path="latents", image_size=16), dict(vae="stabilityai/sd-vae-ft-ema")],
    "evaluate_fid": [
        dict(ref=None), dict(make_ref="new.npz"), dict(samples="missing"), dict(samples="empty"),
        dict(samples="torn"), dict(samples="objects.npz"), dict(samples="ref.npz"),
        dict(ref="missing.npz"), dict(ref="file.txt"), dict(ref="objects.npz"), dict(ref="nan.npz"),
        dict(make_ref="ref.npz", ref=None)]}


@pytest.mark.parametrize(("script", "changes"), [
    pytest.param(script, changes, id=f"{script} {' '.join(f'{k}={v:.40}' for k, v in shown)}")
    for script, rows in REFUSED.items() for changes in rows
    for shown in [[(key, str(value)) for key, value in changes.items()]]])
def test_a_mistake_is_one_line_that_names_the_option(script, changes, place, latents, refusal):
    before = snapshot(latents)
    refusal(script, good(script, **changes), option(next(iter(changes))))
    assert snapshot(latents) == before


def test_a_folder_of_another_run_names_the_options_that_differ(trained, digits, refusal):
    folder = trained.parent.parent
    before = snapshot(folder)
    options = [*tiny(digits, folder), "--max-steps", 20, "--lr", 0.5, "--cfg", 1.5]
    line = refusal("train", options, "--run-dir")
    assert "lr 0.001, now 0.5" in line and "cfg 3.0, now 1.5" in line
    assert "max_steps" not in line and snapshot(folder) == before


# ---- files that a stranger made ----------------------------------------------------------------


@pytest.mark.parametrize(("option", "change"), [
    ("--ckpt", {"latent_shape": [10**9, 8, 8]}), ("--ckpt", {"latent_shape": [3, 10**8, 10**8]}),
    ("--ckpt", {"latent_shape": [3, 8, -8]}), ("--ckpt", {"latent_shape": [3, 8, float("nan")]}),
    ("--ckpt", {"latent_shape": None}), ("--ckpt", {"num_classes": "x"}),
    ("--ckpt", {"num_classes": 10**30}), ("--ckpt", {"num_classes": 2 * 10**9}),
    ("--ckpt", {"model": ["DiT-T/4"]}), ("--ckpt", {"model": "DiT-S/4"}), ("--ckpt", {"vae": 5}),
    ("--ckpt", {"sizes": [1]}), ("--ckpt", {"sizes": {"depth": "4"}}),
    ("--ckpt", {"sizes": {"depth": 10**9}}), ("--ckpt", {"sizes": {"hidden_size": 2**40}}),
    ("--ckpt", {"sizes": {"depth": -4}}), ("--ckpt", {"sizes": {"mlp_ratio": float("inf")}}),
    ("--ckpt", {"sizes": {"patch_size": 0}}), ("--ckpt", {"sizes": {"depth": True}}),
    ("--ckpt", {"sizes": {"input_size": 8}}), ("--ckpt", {"sizes": {"device": "cuda"}}),
    ("--ckpt", {"sizes": {4: 4}}), ("--ckpt", {"sizes": {"depth": 5}}),
    ("--ckpt", {"model": "DiT"}), ("--ckpt", {"image_size": True}),
    ("--vae", {"vae": "../../../etc"})])
def test_a_checkpoint_that_lies_is_refused(option, change, trained, tmp_path, refusal):
    """Before sampling takes the memory, or opens the file, that a stranger's file asks for."""
    state = torch.load(trained, weights_only=True)
    path = tmp_path / "hostile.pt"
    torch.save(state | {"model": {}, "opt": {}, "config": state["config"] | change}, path)
    line = refusal("sample", ["--ckpt", path, "--sample-dir", tmp_path / "out"], option)
    assert "hostile.pt" in line or option == "--vae"


def test_a_checkpoint_that_does_not_fit_its_run_is_refused(trained, digits, tmp_path, refusal):
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
        options = [*tiny(digits, tmp_path / "run"), "--max-steps", 20]
        assert path.name in refusal("train", options, "--run-dir", folder=path.parent), change


def test_shards_outside_their_folder_are_refused(place, refusal):
    options = good("train", data_path="astray", encoded_data=())
    refusal("train", options, "astray/dataset.json")


# ---- permissions and names ---------------------------------------------------------------------


@pytest.fixture
def as_nobody(place, digits):
    """A context in which files and folders of place are locked; root would pass every lock."""
    (place / "digits").unlink()
    shutil.copytree(digits, place / "digits")
    (place / "ok.pt").unlink()
    for name in ("locked", "closed"):
        (place / name).mkdir()
    for folder in (place, place / "digits"):
        folder.chmod(0o777)

    @contextlib.contextmanager
    def locked():
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
            for name in ("locked", "closed"):
                (place / name).chmod(0o755)
    return locked


@pytest.mark.parametrize(("script", "named", "changes"), [
    ("train", "--run-dir", dict(run_dir="locked")),
    ("train", "--run-dir", dict(run_dir="locked/run")),
    ("train", "--data-path", dict(data_path="closed")),
    ("sample", "--ckpt", dict(ckpt="locked.pt")),
    ("sample", "--sample-dir", dict(sample_dir="locked/out")),
    ("encode_imagenet", "--out-path", dict(out_path="locked/out")),
    ("evaluate_fid", "--ref", dict(ref="locked.pt")),
    ("evaluate_fid", "--make-ref", dict(ref=None, make_ref="locked/x.npz")),
    ("sample", "closed/x.pt", dict(ckpt="closed/x.pt")),  # not even whether it exists can be seen
    ("encode_imagenet", "closed/out", dict(out_path="closed/out"))])
def test_what_may_not_be_read_or_written_is_named(script, named, changes, as_nobody, place, trained,
                                                  refusal, monkeypatch):
    for name, mode in (("ok.pt", 0o644), ("locked.pt", 0)):
        shutil.copy(trained, place / name)
        (place / name).chmod(mode)
    before = snapshot(place)
    monkeypatch.setattr("conftest.snapshot", lambda folder: None)  # nobody cannot read it
    with as_nobody():
        refusal(script, good(script, **changes), named)
    assert snapshot(place) == before


LONG = "x" * 300  # of 255 bytes that a name may have


@pytest.mark.parametrize(("script", "option"), [
    ("train", "data_path"), ("train", "run_dir"), ("train", "vae"), ("train", "fid_ref"),
    ("sample", "ckpt"), ("sample", "sample_dir"), ("sample", "vae"), ("sample", "fid_ref"),
    ("encode_imagenet", "data_path"), ("encode_imagenet", "out_path"), ("encode_imagenet", "vae"),
    ("evaluate_fid", "samples"), ("evaluate_fid", "ref"), ("evaluate_fid", "make_ref"),
    ("evaluate_fid", "inception")])
def test_paths_that_are_too_long_are_refused(script, option, place, refusal, monkeypatch):
    """Seven options ended in a traceback."""
    changes = {option: LONG}
    if option == "make_ref":
        changes = {"ref": None, option: f"{LONG}.npz"}
    if (script, option) == ("train", "fid_ref"):
        changes |= {"eval_every": 1, "protocol": "pixels"}
    if option == "inception":
        changes["protocol"] = None
        monkeypatch.setattr(Reference, "load", lambda *_, **__: None)  # of another protocol
    refusal(script, good(script, **changes), LONG)


def test_a_file_beside_the_sample_folder_with_too_long_a_name_is_refused(place, refusal):
    refusal("sample", good("sample", sample_dir="y" * 253), "yyyy.npz")


def test_a_run_directory_in_place_of_a_checkpoint_suggests_its_newest(trained, refusal):
    line = refusal("sample", ["--ckpt", trained.parent.parent], "--ckpt")
    assert line.endswith(f"(a run directory); did you mean {trained}?\n")


BYTES = os.fsdecode(b"n\xff")


def test_results_are_printed_whatever_their_names(monkeypatch):
    """sample.py and encode_imagenet.py ended with a traceback after all the work was done."""
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

"""What a user can get wrong ends in one line that names the option, exit code 2, and no change to
any file. The ``refusal`` of conftest.py checks that."""

import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from conftest import call, snapshot, tiny
from PIL import Image

from engine.checkpoint import newest_checkpoint


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
    for folder in ("empty", "empty class/a", "flat", "torn/ä b", "images", "larger", "three"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "flat" / "image.png").write_bytes(b"")
    for i in range(4):
        (tmp_path / "torn" / "ä b" / f"{i} ünread.png").write_bytes(b"\x89PNG\r\n\x1a\nno image")
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "images" / f"bild {i} ü.png")
        Image.new("RGB", (9, 9), (i, 0, 0)).save(tmp_path / "larger" / f"{i}.png")
        if i:
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "three" / f"{i}.png")
    for name, target in (("digits", digits), ("latents", latents), ("ok.pt", trained),
                         ("linked images", tmp_path / "images")):
        (tmp_path / name).symlink_to(target)
    for folder, name, text in (
            ("nested", "config.json", "[" * 10**5), ("listed", "config.json", "[1, 2]"),
            ("only checkpoints", "checkpoints/0000001.pt", "x"),
            ("nested samples", "samples.json", "[" * 10**5),
            ("nested encoding", "encoding.json", "[" * 10**5),
            ("foreign encoding", "dataset.json", '{"format_version": NaN}')):
        (tmp_path / folder / name).parent.mkdir(parents=True)
        (tmp_path / folder / name).write_text(text)
    np.savez(tmp_path / "objects.npz", arr_0=np.array([print] * 3), mu=np.array([print]),
             sigma=np.array([print]))
    np.savez(tmp_path / "nan.npz", mu=np.full(192, np.nan), sigma=np.eye(192))
    np.savez(tmp_path / "ref.npz", mu=np.zeros(192), sigma=np.eye(192))
    (tmp_path / "code.pkl").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    (tmp_path / "torn.pkl").write_bytes(pickle.dumps({"fid": np.zeros(192)})[:-99])
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    (tmp_path / "torn.pt").write_bytes(trained.read_bytes()[:9999])
    return tmp_path


GOOD = {  # options with which a script would work in the folder of the fixture place
    "train": tiny("digits", "run"),
    "sample": ["--ckpt", "ok.pt", "--sample-dir", "out", "--num-fid-samples", 4, "--protocol",
               "pixels"],
    "encode_imagenet": ["--data-path", "digits", "--out-path", "out ü", "--vae", "none",
                        "--image-size", 8, "--num-workers", 0],
    "evaluate_fid": ["--samples", "images", "--ref", "ref.npz", "--protocol", "pixels"]}


def option(name):
    return "--" + name.replace("_", "-")


def change(script, changes):
    """The good options of a script but for these changes, by names without dashes: None removes an
    option; a tuple is several values or none."""
    words = dict(zip(GOOD[script][::2], GOOD[script][1::2]))
    words |= {option(name): value for name, value in changes.items()}
    return [word for name, value in words.items() if value is not None
            for word in (name, *(value if isinstance(value, tuple) else [value]))]


LONG = "x" * 300  # of 255 bytes that a name may have; seven options ended in a traceback

# Changes to good options, the first of which is the one that the line must name
REFUSED = {
    "train": [
        dict(data_path=None), dict(data_path="missing"), dict(data_path="empty class"),
        dict(data_path="flat"), dict(data_path=LONG),
        dict(image_size=9),  # not a multiple of the patch size
        dict(image_size=10**9), dict(image_size=0), dict(cfg=-1), dict(lr=0), dict(ratio=1.5),
        dict(clip_grad=-1), dict(weight_decay=-1), dict(warmup_steps=-1), dict(model="DiT-H/14"),
        dict(cfg_interval=(0.8, 0.2)),  # a rule of MeanFlow's, as an option
        dict(vae="sdxl"), dict(vae=LONG), dict(epochs=2, max_steps=5),
        dict(global_batch_size=1000), dict(grad_accum_steps=3),
        dict(run_dir="file.txt/run"), dict(run_dir="digits/ä run"), dict(run_dir="nested"),
        dict(run_dir="listed"), dict(run_dir="only checkpoints"), dict(run_dir=LONG),
        dict(encoded_data=()), dict(data_path="latents"),
        dict(skip_bad_images=(), data_path="latents", encoded_data=()),
        dict(image_size=16, data_path="latents", encoded_data=()),
        dict(flip=(), data_path="latents", encoded_data=()),
        dict(eval_every=5), dict(fid_ref="objects.npz", eval_every=5, protocol="pixels"),
        dict(fid_ref=LONG, eval_every=5, protocol="pixels"),
        dict(omega_max=4), dict(omega_max=0.5, model="iMF-T/4"), dict(cfg=2, model="iMF-T/4"),
        dict(method="rectified"), dict(method="improved-meanflow"), dict(gap_end=0.1),
        dict(method="meanflow", model="iMF-T/4"), dict(tangent="network", method="soflow"),
        dict(gap_end=0, method="soflow"), dict(precision="bf16", method="soflow"),
        dict(cooldown_steps=99, max_steps=9), dict(optimizer="sgd"),
        dict(optimizer="muon", shard=()), dict(allow_change="rate"),
        dict(allow_change="lr", run_dir=None), dict(allow_change="model")],
    "sample": [
        dict(ckpt="missing.pt"), dict(ckpt="."), dict(ckpt=LONG), dict(sample_dir="file.txt"),
        dict(sample_dir="torn"), dict(sample_dir="nested samples"), dict(sample_dir=LONG),
        dict(sample_dir="y" * 253),  # with which the name of the .npz is too long
        dict(vae="nowhere"), dict(vae=LONG), dict(fid_ref="objects.npz"), dict(fid_ref=LONG),
        dict(no_save_images=()), dict(cfg=2), dict(cfg_interval=(0.2, 0.8)), dict(cfg=0.5),
        dict(cfg_interval=(0.8, 0.2)), dict(cfg_interval=(0, 2)),
        dict(per_class=2, labels="random", num_fid_samples=None),
        dict(seeds=(0, 1), seed=2), dict(seed=0, seeds=(1, 2)), dict(seeds=(0, -1)),
        dict(seeds=()), dict(seeds=(1,)), dict(seeds=(0, 5, 5)),
        dict(num_fid_samples=1, fid_ref="ref.npz")],
    "encode_imagenet": [
        dict(out_path=None), dict(out_path="digits", data_path="out"), dict(data_path="latents"),
        dict(data_path=LONG), dict(out_path="file.txt/out"), dict(out_path="digits"),
        dict(out_path="torn"), dict(out_path="nested encoding"), dict(out_path="foreign encoding"),
        dict(out_path="latents", image_size=16), dict(out_path=LONG), dict(vae=LONG),
        dict(vae="stabilityai/sd-vae-ft-ema")],
    "evaluate_fid": [
        dict(ref=None), dict(make_ref="new.npz"), dict(samples="missing"), dict(samples="empty"),
        dict(samples="torn"), dict(samples="objects.npz"), dict(samples="ref.npz"),
        dict(samples=LONG), dict(ref="missing.npz"), dict(ref="file.txt"), dict(ref="objects.npz"),
        dict(ref="nan.npz"), dict(ref=LONG), dict(make_ref="ref.npz", ref=None),
        dict(make_ref=f"{LONG}.npz", ref=None),
        dict(weights=LONG, protocol=None, ref=None, make_ref="new.npz"),
        dict(weights="foreign.pt", protocol="timm:test_vit", ref=None, make_ref="new.npz"),
        dict(make_ref="new.npz", ref=None, samples=("images", "images")),
        dict(samples=("images", "larger"), ref="images"), dict(samples=("images", "missing")),
        dict(samples=("images", "three")), dict(samples=("images", "linked images")),
        dict(weights="ok.pt"),  # of pixels, which have no network
        dict(protocol="dinov3"), dict(protocol="timm:resnet5o"),
        dict(ref="code.pkl"), dict(ref="torn.pkl"), dict(ref="missing.pkl")]}


@pytest.mark.parametrize(("script", "changes"), [
    pytest.param(script, changes, id=f"{script} {' '.join(f'{k}={v:.40}' for k, v in shown)}")
    for script, rows in REFUSED.items() for changes in rows
    for shown in [[(key, str(value)) for key, value in changes.items()]]])
def test_a_mistake_is_one_line_that_names_the_option(script, changes, place, latents, refusal):
    """Or the path, where that is too long."""
    before, (name, value) = snapshot(latents), next(iter(changes.items()))
    refusal(script, change(script, changes), value if len(str(value)) > 99 else option(name))
    assert snapshot(latents) == before


NESTED = []  # lists in lists, and lists of which each holds the one before twice
for _ in range(300):
    NESTED = [NESTED]
SHARED = "shared"
for _ in range(60):
    SHARED = [SHARED, SHARED]


# ---- files that a stranger made ----------------------------------------------------------------


@pytest.mark.parametrize("lie", [
    {"latent_shape": [10**9, 8, 8]}, {"latent_shape": [3, 10**8, 10**8]},
    {"latent_shape": [3, 8, -8]}, {"latent_shape": None}, {"num_classes": 2 * 10**9},
    {"num_classes": True}, {"model": ["DiT-T/4"]}, {"model": "DiT-Q/4"}, {"model": "DiT"},
    {"method": "improved-meanflow"}, {"method": "theirs"}, {"method": ["soflow"]}, {"kappa": "nan"},
    {"cfg_interval": [0.5]}, {"scale": None}, {"vae": 5}, {"vae": "../../../etc"}, {"sizes": [1]},
    {"sizes": {"depth": "4"}}, {"sizes": {"depth": 10**9}}, {"sizes": {"depth": -4}},
    {"sizes": {"depth": 5}}, {"sizes": {"mlp_ratio": float("inf")}}, {"sizes": {"patch_size": 0}},
    {"sizes": {"input_size": 8}}, {"sizes": {4: 4}}, {"sizes": {"depth": 10**5}},
    {"scale": float("nan")}, {"scale": 0}, {"scale": -1.0}, {"latent_mean": [0.0] * 3},
    {"latent_mean": [0.0] * 3, "latent_std": [1.0, 0.0, 1.0]},
    {"latent_mean": [0.0] * 3, "latent_std": [float("nan")] * 3},
    {"latent_mean": [float("inf")] * 3, "latent_std": [1.0] * 3},
    {"latent_mean": [0.0] * 4, "latent_std": [1.0] * 4}, {"omega_max": "8"},
    {"classes": ["a", "b"]}, {"classes": NESTED}, {"more": SHARED}])
def test_a_checkpoint_that_lies_is_refused(lie, trained, tmp_path, refusal):
    """Before sampling takes the memory, or opens the file, that a stranger's file asks for. scale
    NaN made black images."""
    state = torch.load(trained, weights_only=True)
    path = tmp_path / "hostile.pt"
    torch.save(state | {"model": {}, "opt": {}, "config": state["config"] | lie}, path)
    option = "--vae" if "../../../etc" in lie.values() else "--ckpt"
    refusal("sample", ["--ckpt", path, "--sample-dir", tmp_path / "out"], option)
    if option == "--ckpt":
        torch.save(torch.load(path, weights_only=True) | {"model": state["model"]}, path)
        refusal("convert_checkpoint", ["--in", path, "--out", tmp_path / "out.pt"], "--in")


def test_a_checkpoint_that_does_not_fit_its_run_is_refused(trained, digits, tmp_path, refusal):
    """PyTorch takes moments of any shapes, and fails at the next step."""
    shutil.copytree(trained.parent.parent, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / trained.name
    state = torch.load(path, weights_only=True)
    model = {key: value[..., :1] for key, value in state["model"].items()}
    moments = {i: dict(value, exp_avg=value["exp_avg"][:1])
               for i, value in state["opt"]["state"].items()}
    for change in ({"step": "12"}, {"step": -1}, {"step": 0}, {"model": 3}, {"model": model},
                   {"ema": {}}, {"opt": []}, {"opt": {"state": moments, "param_groups": []}}):
        torch.save(state | change, path)
        options = [*tiny(digits, tmp_path / "run"), "--max-steps", 20]
        assert path.name in refusal("train", options, "--run-dir", folder=path.parent), change


# ---- permissions and names ---------------------------------------------------------------------


@pytest.mark.parametrize(("script", "named", "changes"), [
    ("train", "--run-dir", dict(run_dir="locked/run")),
    ("train", "--data-path", dict(data_path="closed")),
    ("sample", "--ckpt", dict(ckpt="locked.pt")),
    ("sample", "--sample-dir", dict(sample_dir="locked/out")),
    ("encode_imagenet", "--out-path", dict(out_path="locked/out")),
    ("evaluate_fid", "--ref", dict(ref="locked.pt")),
    ("evaluate_fid", "--make-ref", dict(ref=None, make_ref="locked/x.npz")),
    ("sample", "closed/x.pt", dict(ckpt="closed/x.pt")),  # not even whether it exists can be seen
    ("encode_imagenet", "closed/out", dict(out_path="closed/out"))])
def test_what_may_not_be_read_or_written_is_named(script, named, changes, place, digits, trained,
                                                  refusal, monkeypatch):
    """To nobody, as root would pass every lock."""
    for name in ("digits", "ok.pt"):
        (place / name).unlink()
    shutil.copytree(digits, place / "digits")
    for name in ("ok.pt", "locked.pt"):
        shutil.copy(trained, place / name)
    (place / "locked").mkdir()
    (place / "closed").mkdir()
    before, root = snapshot(place), os.getuid() == 0
    for name, mode in ((".", 0o777), ("digits", 0o777), ("ok.pt", 0o644), ("locked.pt", 0),
                       ("locked", 0o555), ("closed", 0)):
        (place / name).chmod(mode)
    monkeypatch.setattr("conftest.snapshot", lambda folder: None)  # nobody cannot read it
    if root:
        os.setresuid(65534, 65534, 0)
    try:
        refusal(script, change(script, changes), named)
    finally:
        if root:
            os.setresuid(0, 0, 0)
        for name in ("locked", "closed", "locked.pt"):
            (place / name).chmod(0o755)
    assert snapshot(place) == before


def test_names_with_blanks_and_other_alphabets_work(place, digits):
    run, out = place / "mein Lauf ☃" / "日本", place / "Bilder ü" / "a b"
    shutil.copytree(digits, place / "Ziffern é")
    call("train", *tiny("Ziffern é", run), "--max-steps", 2)
    call("sample", "--ckpt", newest_checkpoint(run / "checkpoints"), "--sample-dir", out,
         "--num-fid-samples", 4)
    assert len(list(out.glob("*.png"))) == 4 and (out.parent / "a b.npz").exists()

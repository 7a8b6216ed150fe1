"""A folder for diffusers: opened by a process that cannot see this repository, and back."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import create_autospec

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import call, save_random, save_small_vae
from safetensors import safe_open
from torch import nn

import models
from engine.checkpoint import load_checkpoint
from weights.pipeline import ImprovedMeanFlowPipeline, MeanFlowPipeline, SoFlowPipeline

LABELS, STEPS = [3, 7, 3, 7], 3
# Opens each folder as a stranger does; prints nothing of its own
STRANGER = """
import json, sys
import numpy as np
sys.modules["timm"] = None  # what else this environment has
import torch
from diffusers import DiffusionPipeline
for module in ("models", "meanflow", "dataset"):
    try:
        __import__(module)
        sys.exit(f"{module} is in sight")
    except ImportError:
        pass
for case in json.loads(sys.argv[1]):
    pipe = DiffusionPipeline.from_pretrained(case["folder"], trust_remote_code=True)
    options = {"class_labels": case["labels"], "num_inference_steps": case["steps"], "seed": 5}
    options |= case["options"]
    kinds = {kind: np.stack(pipe(**options, output_type=kind).images) for kind in ("pil", "np")}
    half = DiffusionPipeline.from_pretrained(case["folder"], trust_remote_code=True,
                                             torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    kinds["half"] = half(**options, output_type="np").images
    half.save_pretrained(case["out"][:-4])
    again = DiffusionPipeline.from_pretrained(case["out"][:-4], trust_remote_code=True,
                                              torch_dtype=torch.bfloat16)
    assert np.array_equal(again(**options, output_type="np").images, kinds["half"])
    np.savez(case["out"], **kinds)
"""


LATENTS = {"image_size": 64, "latent_shape": [4, 8, 8]}
PER_CHANNEL = {"latent_mean": [0.1, 0, -0.1, 0.2], "latent_std": [4.0, 5.0, 4.0, 3.0]}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A home of Hugging Face's cache: as if a VAE and a folder had been downloaded once."""
    return tmp_path_factory.mktemp("cache")


def put_into_cache(cache, repository, folder):
    """Put a folder into the cache as the client does: a snapshot of a commit, and its name."""
    place = cache / "hub" / f"models--{repository.replace('/', '--')}"
    commit = hashlib.sha1(repository.encode()).hexdigest()
    shutil.copytree(folder, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)


@pytest.fixture(scope="module")
def cases(tmp_path_factory, cache):
    """Folders for diffusers, and what sample.py makes of their checkpoints."""
    folder = tmp_path_factory.mktemp("folders")
    vae = save_small_vae(folder / "local-vae")
    put_into_cache(cache, "stabilityai/sd-vae-ft-ema", vae)
    soflow = save_random(folder / "soflow.pt", "DiT-T/4", "soflow")
    found = []
    for name, checkpoint, more, options in (
            ("pixels", save_random(folder / "meanflow.pt", "DiT-T/4", "meanflow"), [], {}),
            ("flow", save_random(folder / "flow.pt", "DiT-T/4", None, ratio=0.0), [], {}),
            ("noise", soflow, [], {}),
            ("inside", save_random(folder / "imf.pt", "iMF-T/4", "improved-meanflow", vae=str(vae),
                            **LATENTS, **PER_CHANNEL), [],
             {"guidance_scale": 3.0, "guidance_interval": [0.2, 0.9]}),
            ("reference", save_random(folder / "latents.pt", "DiT-T/4", "meanflow", vae="ema",
                                      scale=0.3, **LATENTS), ["--vae", "ema"], {})):
        out, samples = folder / name, folder / f"{name}-samples"
        call("convert_checkpoint", "--in", checkpoint, "--out", out, "--format", "diffusers", *more)
        guidance = ["--cfg", 3, "--cfg-interval", 0.2, 0.9] if options else []
        call("sample", "--ckpt", checkpoint, "--sample-dir", samples, "--num-fid-samples", 4,
             "--classes", 3, 7, "--seed", 5, "--num-sampling-steps", STEPS, *guidance,
             *(["--vae", vae] if name == "reference" else []))
        found.append({"folder": str(out), "labels": LABELS, "steps": STEPS, "options": options,
                      "samples": f"{samples}.npz", "out": str(folder / f"{name}-stranger.npz"),
                      "checkpoint": str(checkpoint)})
    put_into_cache(cache, "ann/digits", folder / "pixels")
    found.append(found[0] | {"folder": "ann/digits", "out": str(folder / "hub-stranger.npz"),
                             "labels": ["3", 7, "3", "7"]})
    return found


def test_a_process_without_the_repository_makes_the_images_of_sample_py(cases, cache, tmp_path):
    """Without a network, too. One grey level is what the rounding of another batch may move."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, json.dumps(cases)], cwd=tmp_path, capture_output=True,
        text=True, timeout=600,
        env=environment | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "3/3" in done.stderr  # the bar
    for case in cases:
        expected = np.load(case["samples"])["arr_0"].astype(float)
        assert expected.std() > 20 and np.abs(expected[0] - expected[2]).max() > 20
        images = np.load(case["out"])
        assert images["pil"].dtype == np.uint8
        assert np.abs(images["pil"] - expected).max() <= 1, case["folder"]
        assert images["np"].min() >= 0 and images["np"].max() <= 1
        assert np.abs(images["np"] * 255 - expected).max() <= 1, case["folder"]
        # Three evaluations of bfloat16, whose numbers have 8 bits: some levels of 256
        assert np.abs(images["half"] * 255 - expected).mean() < 6, case["folder"]


def test_a_folder_is_a_checkpoint_and_tells_nothing_of_this_machine(cases, tmp_path):
    for number, case in enumerate(cases[:-1]):
        back, original = tmp_path / f"{number}.pt", load_checkpoint(case["checkpoint"])
        call("convert_checkpoint", "--in", case["folder"], "--out", back)
        back = load_checkpoint(back)
        assert back["ema"].keys() == original["ema"].keys()
        assert all(torch.equal(value, original["ema"][name]) for name, value in back["ema"].items())
        assert back["config"]["classes"] == original["config"]["classes"]
        assert back["config"].keys() < original["config"].keys()
        for path in (path for path in Path(case["folder"]).rglob("*") if path.is_file()):
            text = path.read_bytes()
            if path.suffix == ".safetensors":
                with safe_open(path, "pt") as file:
                    text = json.dumps(file.metadata()).encode()
            assert str(tmp_path.parent).encode() not in text and b"run_dir" not in text, path


def test_the_checkpoint_in_a_folder_is_suggested(cases, refusal):
    err = refusal("sample", ["--ckpt", cases[0]["folder"]], "--ckpt must")
    assert f"did you mean {cases[0]['folder']}/transformer/" in err


def test_the_card_says_what_a_reader_asks(trained, tmp_path, hub):
    figures = tmp_path / "figures.txt"
    figures.write_text(json.dumps({"protocol": "adm", "num_samples": 50000, "fid": 15.5,
                                   "ref": "/home/ann/REF.npz", "ckpt": "/home/ann/a.pt"}) + "\n")
    api = create_autospec(huggingface_hub.HfApi)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.HfApi", api)
        call("convert_checkpoint", "--in", trained, "--out", tmp_path / "model", "--format",
             "diffusers", "--license", "mit", "--figures", figures, "--push", "ann/digits")
    api.return_value.create_repo.assert_called_once_with("ann/digits", exist_ok=True)
    api.return_value.upload_folder.assert_called_once_with(repo_id="ann/digits",
                                                           folder_path=tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\nlibrary_name: diffusers\n")
    for text in ('from_pretrained("ann/digits", trust_remote_code=True)', "abs/2505.13447",
                 "10 classes, such as 0, 1, 2", "fid 15.5", "ref REF.npz", "step 12"):
        assert text in card, card
    assert "/home/ann" not in card
    assert "MIT License" in (tmp_path / "model" / "CODE_LICENSE.txt").read_text()


def test_a_folder_that_cannot_be_uploaded_is_whole(trained, tmp_path, refusal, capfd, monkeypatch):
    def fail(*args, **options):
        raise OSError("401 Client Error.\nInvalid credentials")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", fail)
    with pytest.raises(ValueError, match="--push must.*ann/digits.*401.*hf upload ann/digits"):
        call("convert_checkpoint", "--in", trained, "--out", tmp_path / "model", "--format",
             "diffusers", "--push", "ann/digits")
    assert (tmp_path / "model" / "model_index.json").exists()


@pytest.mark.parametrize(("more", "named"), [
    (["--vae", "ema"], "--vae"), (["--figures", "nothing.txt"], "--figures"),
    (["--format", "ours", "--push", "ann/digits"], "--push"), (["--push", "digits"], "--push"),
    (["--license", "mit\nfoo"], "--license"),
    (["--format", "ours", "--vae", "ema"], "--vae")])
def test_options_that_do_not_fit_are_refused(trained, tmp_path, refusal, more, named):
    refusal("convert_checkpoint", ["--in", trained, "--out", tmp_path / "model", "--format",
                                   "diffusers", *more], named)


def test_what_is_no_rgb_image_is_refused(tmp_path, refusal):
    checkpoint = save_random(tmp_path / "a.pt", "DiT-T/4", "meanflow", latent_shape=[1, 8, 8])
    refusal("convert_checkpoint", ["--in", checkpoint, "--out", tmp_path / "model", "--format",
                                   "diffusers"], "[1, 8, 8]")


def test_a_vae_that_is_not_there_or_does_not_fit_is_refused(tmp_path, refusal):
    checkpoint = save_random(tmp_path / "a.pt", "DiT-T/4", "meanflow", vae="/nowhere/vae",
                             **LATENTS)
    wide = save_small_vae(tmp_path / "wide", latent_channels=8)
    for more in [], ["--vae", "emma"], ["--vae", wide]:
        refusal("convert_checkpoint", ["--in", checkpoint, "--out", tmp_path / "model", "--format",
                                       "diffusers", *more], "--vae must")


OWN_NETWORK = """
import torch
from torch import nn
from models import TimestepEmbedder as Times
import models

WIDTHS = 8, 16
FACTOR = 1.0
if torch.__version__:
    FACTOR = 3.0


class Own(nn.Module):
    def __init__(self, *, input_size, in_channels, num_classes, width=WIDTHS[0]):
        super().__init__()
        self.times, self.labels = Times(width), models.LabelEmbedder(num_classes, width)
        self.last = nn.Conv2d(in_channels + width, in_channels, 3, padding=1)

    def forward(self, z, r, t, y):
        c = self.times(t) + self.times(t - r) + self.labels(y)
        c = c[:, :, None, None].expand(-1, -1, *z.shape[2:])
        return self.last(torch.cat([z, c], 1){rest})
"""


@pytest.mark.parametrize(("rest", "fault"), [
    ("", None), (" * torch.tensor(helper())", "has no helper"),
    (" * FACTOR", "alone it computes something else"),
    (" * __import__('own_network').FACTOR", "No module named 'own_network'")])
def test_a_network_of_ones_own_file_goes_along(tmp_path, monkeypatch, refusal, rest, fault):
    """With what it takes from models.py; and one that would be another one alone is refused."""
    (tmp_path / "own_network.py").write_text(OWN_NETWORK.format(rest=rest))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_network", raising=False)
    monkeypatch.setitem(models.DiT_models, "Own", __import__("own_network").Own)
    checkpoint, out = save_random(tmp_path / "own.pt", "Own", "meanflow"), tmp_path / "folder"
    options = ["--in", checkpoint, "--out", out, "--format", "diffusers"]
    if fault:
        assert fault in refusal("convert_checkpoint", options, "--format")
    else:
        call("convert_checkpoint", *options)
        source = next(out.glob("transformer/own_model_*.py")).read_text()
        assert "from models" not in source and "class TimestepEmbedder" in source


# ---- the pipeline's arguments ------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe():
    return pipeline(MeanFlowPipeline)


class Transformer(nn.Module):
    """u of three numbers: of the noise, the label and, as they come, of what guides."""

    dtype, device = torch.float32, torch.device("cpu")

    def forward(self, z, r, t, y, *guidance, heads=None):
        u = z * 0.5 + (y + sum(guidance)).reshape(-1, 1, 1, 1) / 100
        return u if heads is None else (u, None)


def pipeline(kind, **changes):
    made = kind(Transformer(), None, {
        "image_size": 4, "latent_shape": [3, 4, 4], "scale": 1.0, "num_classes": 3, "vae": None,
        "classes": [["crane", "n1"], ["crane", "n2"], ["Tabby cat"]], "velocity_only": False,
        "guidance": {}, **changes})
    made.set_progress_bar_config(disable=True)
    return made


def test_noise_comes_from_seed_generator_or_latents(pipe):
    def latents(**options):
        return pipe([0, 2], output_type="latent", **options).images

    assert torch.equal(latents(seed=1), latents(seed=1))
    assert not torch.equal(latents(seed=1), latents(seed=2))
    one, two = (latents(generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two) and not torch.equal(latents(), latents())
    several = latents(generator=[torch.Generator().manual_seed(3), torch.Generator()])
    assert several.shape == one.shape and torch.equal(several[0], one[0])
    noise = torch.ones(2, 3, 4, 4)
    assert torch.allclose(latents(latents=noise)[1], noise[1] * 0.5 - 0.02)


def test_images_come_as_one_asks(pipe):
    assert pipe("tabby_CAT", seed=0).images[0].size == (4, 4)
    for labels in (torch.tensor([1, 2]), np.array([1, 2]), range(1, 3)):
        assert pipe(labels, seed=0, output_type="pt").images.shape == (2, 3, 4, 4)
    assert len(pipe(np.int64(1), np.int64(2), latents=np.zeros((1, 3, 4, 4))).images) == 1
    images, = pipe(["n2", 2], seed=0, output_type="np", return_dict=False)
    assert images.shape == (2, 4, 4, 3) and images.dtype == np.float32


@pytest.mark.parametrize(("options", "message"), [
    ({"class_labels": 3}, "class_labels must be from 0 to 2, got 3"),
    ({"class_labels": [-1]}, "class_labels must be from 0"),
    ({"class_labels": "crane"}, r"class_labels must each name one class, got crane, which is 0 "),
    ({"class_labels": ["tabby"]}, "class_labels must.*did you mean tabby cat"),
    ({"class_labels": 0, "guidance_scale": 2}, "guidance_scale.*fixed in training"),
    ({"class_labels": 0, "output_type": "png"}, "output_type must be pil, np, pt or latent"),
    ({"class_labels": 0, "num_inference_steps": 0}, "steps must be at least 1"),
    ({"class_labels": 0, "num_inference_steps": 2.0}, "num_inference_steps must be a whole number"),
    ({"class_labels": 0, "num_inference_steps": [0.8, 0]}, "num_inference_steps.* from 1 to 0"),
    ({"class_labels": []}, "class_labels must have one"),
    ({"class_labels": 1.0}, "class_labels must be a whole number, got 1.0"),
    ({"class_labels": 0, "seed": 0.5}, "seed must be a whole number"),
    ({"class_labels": 0, "generator": [torch.Generator()] * 2}, "generator must.*list of 1, got 2"),
    ({"class_labels": 0, "seed": 1, "generator": torch.Generator()}, "generator and seed"),
    ({"class_labels": 0, "latents": torch.zeros(3, 4, 4)}, "latents must have the shape")])
def test_a_wrong_argument_is_named(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(**options)


def test_guidance_of_improved_meanflow_is_an_argument():
    """By default that of the folder; of scale 1 at all times."""
    pipe = pipeline(ImprovedMeanFlowPipeline, guidance={"omega": 8.0, "interval": [0.4, 0.65]})
    noise = torch.zeros(1, 3, 4, 4)

    def sums(**options):
        x = pipe(0, latents=noise, output_type="latent", **options).images
        return -100 * float(x.mean())

    assert sums() == pytest.approx(8 + 0.4 + 0.65)
    assert sums(guidance_scale=2.0) == pytest.approx(2 + 0.4 + 0.65)
    assert sums(guidance_interval=(0.1, 0.2)) == pytest.approx(8 + 0.1 + 0.2)
    assert sums(guidance_scale=1) == pytest.approx(1 + 0 + 1)
    with pytest.raises(ValueError, match="omega must be 1 or more"):
        pipe(0, guidance_scale=0.5)


def test_soflow_takes_new_noise_for_each_later_step():
    pipe = pipeline(SoFlowPipeline)
    first = torch.zeros(1, 3, 4, 4)
    images = [pipe(0, latents=first, seed=seed, num_inference_steps=2, output_type="latent").images
              for seed in (0, 0, 1)]
    assert torch.equal(*images[:2]) and not torch.equal(*images[1:])

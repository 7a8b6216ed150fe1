"""What docs/extend.md and README's "Change it" promise: methods, conditions, networks and data by
public names alone."""

import json
import re
import subprocess
import sys
from functools import partial
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, call, load_state, refused, run_ranks, tiny
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import models
import train
from dataset.images import ImageFolder
from dataset.vae import Pixels
from engine.checkpoint import load_network
from meanflow import MeanFlow, Method, setting
from methods import METHODS, make_method
from models import DiT, DiT_models


def blocks(page):
    """The Python code blocks of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)


def block(number):
    """The names that a block of docs/extend.md defines, run as a module."""
    module = ModuleType("extension")
    exec(blocks("docs/extend.md")[number], vars(module))
    return module


@pytest.fixture
def rows(monkeypatch):
    """A function that adds a method and networks to the tables until the test ends. One block
    compiles in a quarter of the time of four."""
    monkeypatch.setitem(DiT_models["DiT-T/4"].keywords, "depth", 1)

    def add(method, **networks):
        if method:
            monkeypatch.setitem(METHODS, "mine", method)
        for name, network in networks.items():
            monkeypatch.setitem(DiT_models, name, network)
    return add


def options(folder, *more, model="DiT-T/4", method="mine"):
    """Options of a run that takes seconds, without --data-path's digits."""
    words = tiny("unused", folder)
    words[words.index("--model") + 1] = model
    return [*words, *(["--method", method] if method else []), *more]


def assert_resumes(folder, run):
    """Six steps at once have the bits of four and then two; run(folder, steps) makes them."""
    run(folder / "whole", 6)
    run(folder / "parts", 4)
    run(folder / "parts", 6)
    one, two = (load_state(folder / name, 6) for name in ("whole", "parts"))
    for kind in ("model", "ema"):
        assert all(torch.equal(value, two[kind][name]) for name, value in one[kind].items())


def test_what_a_reader_adds_passes_the_linter():
    """run_tests.sh runs it over all files: an import that a block did not need made it fail."""
    additions = {"added.py": blocks("docs/extend.md"), "models.py": [
        (ROOT / "models.py").read_text() + "\n\n" + blocks("README.md")[-1]]}
    for name, texts in additions.items():
        for text in texts:
            ruff = subprocess.run([sys.executable, "-m", "ruff", "check", "--stdin-filename", name,
                                   "-"], input=text, text=True, capture_output=True, cwd=ROOT)
            assert not ruff.returncode, ruff.stdout


# ---- methods -------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiler", ["--no-compile", pytest.param(
    "--compile", marks=pytest.mark.slow)])
def test_the_method_of_the_page_trains_resumes_compiles_and_samples(compiler, rows, digits,
                                                                    tmp_path):
    rows(block(0).Shortcut)

    def run(folder, steps):
        call("train", *options(folder, "--data-path", digits, "--max-steps", steps, "--split", 0.4,
                               "--grad-accum-steps", 2, compiler, "--log-every", 2))

    assert_resumes(tmp_path, run)
    config = load_state(tmp_path / "parts", 6)["config"]
    assert (config["method"], config["split"], config["ratio"]) == ("mine", 0.4, 0.5)
    records = (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
    # A third, in half of the rows
    assert all(0.05 < json.loads(line)["interval"] < 0.4 for line in records)
    assert "interval 0." in (tmp_path / "parts" / "log.txt").read_text()
    call("sample", "--ckpt", tmp_path / "parts" / "checkpoints" / "0000006.pt", "--sample-dir",
         tmp_path / "samples", "--num-fid-samples", 3, "--num-sampling-steps", 1, 2)
    call("plot", tmp_path / "parts", "--out", tmp_path / "curves.png")


class Own(MeanFlow):
    cfg: float = 2.0  # and so in train.py, whose default of MeanFlow is that of its recipe
    parts: int = setting(3, "[1, 9]", "a whole number")
    ends: tuple = setting((0.1, 0.2, 0.3), "[0, 1]", "three numbers")
    tangent: str = setting("middle", ("middle", "velocity"), "a word of its own")


def test_settings_of_every_kind_are_options_of_their_method(rows):
    rows(Own)

    def resolved(*words):
        args = train.parse_args(["--data-path", "x", "--model", "DiT-T/4", *words])
        train.resolve(args, world=None)
        return args

    args = resolved("--method", "mine", "--parts", "4", "--ends", "0", ".5", "1")
    assert (args.cfg, args.parts, args.ends, args.tangent) == (2.0, 4, (0, 0.5, 1), "middle")
    assert args.run_dir.name == "DiT-T-4-mine-cfg2.0-parts=4-ends=0.0-0.5-1.0"
    assert resolved("--tangent", "network").cfg == 3.0
    for words, named in ((["--parts", "0"], "--parts"), (["--parts", "2.5"], "--parts"),
                         (["--ends", "0", "1", ".5"], "--ends"),
                         (["--tangent", "network"], "--tangent must be middle or velocity")):
        with refused(named):
            resolved("--method", "mine", *words)
    with refused("--parts must come with --method mine"):
        resolved("--parts", "4")


def test_extra_is_a_mean_over_rows_ranks_and_micro_batches(rows, digits, tmp_path):
    """Of each row's number in the global batch, which is 7.5 on average."""
    script = tmp_path / "numbered.py"
    script.write_text("""
import torch, train
from meanflow import MeanFlow
from methods import METHODS
class Numbered(MeanFlow):
    def draw(self, shape, **options):
        draws = super().draw(shape, **options)
        draws.eps[:, 0, 0, 0] = torch.arange(len(draws.eps))
        return draws
    def loss(self, net, x, y, draws, **options):
        out = super().loss(net, x, y, draws, **options)
        return out._replace(extra={"number": draws.eps[:, 0, 0, 0]})
METHODS["mine"] = Numbered
train.main(train.parse_args())
""")
    words = options(tmp_path / "run", "--data-path", digits, "--max-steps", 4, "--cfg", 1,
                    "--grad-accum-steps", 2)
    run_ranks(script, *words, processes=2, output=tmp_path / "said")
    record, = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert record["number"] == pytest.approx(7.5)


@pytest.mark.parametrize("name", ["lr", "scale", "kappa"])
def test_a_setting_with_the_name_of_something_else_is_refused(name, rows):
    """`scale` was silently that of the latents."""
    rows(type("Wrong", (Method,), {"__annotations__": {name: str}, name: setting(
        "a", ("a", "b"), "in 100 % of the cases")}))
    with refused("METHODS", name, "mine"):
        train.parse_args(["--data-path", "x"])


@pytest.mark.parametrize(("extra", "named"), [
    (lambda out: {"protocol": out.error}, "protocol"), (lambda out: {"a b": out.error}, "a b"),
    (lambda out: {"number": 1.0}, "number"), (lambda out: {"loss": out.error}, "loss"),
    (lambda out: {"mean": out.error.mean()}, "mean"),
    (lambda out: {"graph": out.error + out.loss}, "graph")])
def test_what_is_no_extra_is_refused(extra, named, rows, digits, tmp_path):
    class Wrong(MeanFlow):
        def loss(self, *rows, **options):
            out = super().loss(*rows, **options)
            return out._replace(extra=extra(out))

    rows(Wrong)
    with refused("--method", "extra", named):
        call("train", *options(tmp_path, "--data-path", digits, "--max-steps", 1))


# ---- conditions ----------------------------------------------------------------------------------


@pytest.fixture
def texts(rows, monkeypatch):
    """The example of the page: digits whose captions' vectors are one-hot codes of the labels."""
    page, source = block(1), load_digits()
    images = torch.tensor(source.images[:64] * 15).to(torch.uint8)[:, None].expand(-1, 3, -1, -1)
    captions = page.Captions(images.contiguous(), F.one_hot(torch.tensor(source.target[:64]), 16)
                             .float())
    monkeypatch.setattr(train, "open_data", lambda args, world: (captions, Pixels()))
    network = DiT_models.pop("TextDiT-T/4")
    network.keywords["depth"] = 1
    rows(page.TextMeanFlow, **{"TextDiT-T/4": network})
    return captions


@pytest.mark.parametrize("compiler", ["--no-compile", pytest.param(
    "--compile", marks=pytest.mark.slow)])
def test_texts_train_with_guidance_resume_and_sample(compiler, texts, reference, tmp_path):
    def run(folder, steps):
        call("train", *options(folder, "--max-steps", steps, "--cfg", 2, "--kappa", 0.5, compiler,
                               "--grad-accum-steps", 2, "--sample-every", 4, "--eval-every", 6,
                               "--fid-ref", reference, "--protocol", "pixels", "--eval-samples", 8,
                               model="TextDiT-T/4"))

    assert_resumes(tmp_path, run)
    assert (tmp_path / "whole" / "samples" / "0000006.png").exists()
    assert '"fid"' in (tmp_path / "whole" / "metrics.jsonl").read_text()
    path = tmp_path / "whole" / "checkpoints" / "0000006.pt"
    with refused("--ckpt", "labels", "Python"):
        call("sample", "--ckpt", path, "--sample-dir", tmp_path / "samples")
    exec(blocks("docs/extend.md")[2].replace(
        "results/texts/checkpoints/0000008.pt", str(path)), shown := {})
    assert shown["x"].shape == (4, 3, 8, 8) and shown["x"].isfinite().all()
    z1 = torch.randn(4, 3, 8, 8)
    one, two = (make_method(shown["config"]).sample(shown["net"], z1, {"text": texts.texts[rows]})
                for rows in (slice(0, 4), slice(4, 8)))
    assert one.shape == z1.shape and not torch.equal(one, two)


def test_a_condition_without_its_own_drop_is_refused(texts, tmp_path):
    """Text vectors (B, D) with B = D lost columns in place of rows, without a word."""
    with pytest.raises(ValueError, match="its own drop"):
        MeanFlow(num_classes=3).drop(torch.randn(4, 4), torch.ones(4, dtype=torch.bool))
    with refused("--method", "got a dict", "its own drop"):
        call("train", *options(tmp_path, "--max-steps", 1, model="TextDiT-T/4", method="meanflow"))


def test_samples_without_conditions_are_refused_before_the_first_step(texts, tmp_path, monkeypatch):
    monkeypatch.delattr(type(texts), "conditions")
    with refused("--data-path", "conditions(rows)", "--sample-every 0"):
        call("train", *options(tmp_path, "--max-steps", 9, "--sample-every", 9,
                               model="TextDiT-T/4"))


def test_conditions_of_another_number_of_rows_are_refused(texts, tmp_path, monkeypatch):
    def batches(steps, workers):
        for rows, _ in steps:
            yield texts.images[rows], {"text": texts.texts[rows][1:]}

    monkeypatch.setattr(texts, "batches", batches)
    with refused("--data-path", "16 rows", "(15, 16)", "['text']"):
        call("train", *options(tmp_path, "--max-steps", 1, model="TextDiT-T/4"))


class AlignedDiT(DiT):
    """Returns u, and with a gradient also projections (B, 6) of the first block's tokens."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.project = nn.Linear(sizes["hidden_size"], 6)
        self.blocks[0].register_forward_hook(lambda block, inputs, x: setattr(self, "tokens", x))

    def forward(self, z, r, t, y):
        u = super().forward(z, r, t, y["label"])
        return (u, self.project(self.tokens.mean(1))) if torch.is_grad_enabled() else u


class Aligned(MeanFlow):
    def drop(self, y, dropped):
        return {**y, "label": super().drop(y["label"], dropped)}

    def loss(self, net, x, y, draws, *, forward):
        def keeping(*inputs):
            u, self.projected = forward(*inputs)
            return u
        out = super().loss(net, x, y, draws, forward=keeping)
        near = F.cosine_similarity(self.projected, y["features"])
        return out._replace(loss=out.loss - near.mean(), extra={"similarity": near.detach()})


def test_stored_features_align_a_network(rows, digits, tmp_path, monkeypatch):
    rows(Aligned, Aligned=partial(AlignedDiT, depth=2, hidden_size=32, num_heads=2, patch_size=4))

    class WithFeatures(ImageFolder):
        def batches(self, steps, workers):
            for x, y in super().batches(steps, workers):
                yield x, {"label": y, "features": torch.eye(10)[y, :6] + 0.1}

    monkeypatch.setattr(train, "ImageFolder", WithFeatures)
    call("train", *options(tmp_path, "--data-path", digits, "--max-steps", 40, "--cfg", 2,
                           model="Aligned"))
    records = [*map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())]
    assert records[-1]["similarity"] > records[0]["similarity"] + 0.1


# ---- networks and data ---------------------------------------------------------------------------


def test_a_class_and_a_row_are_another_network(digits, tmp_path, monkeypatch):
    """README's network, as if it stood at the end of models.py, where a reader may have put it
    already. sample.py once reached into the last layer of a DiT, train.py into its blocks."""
    monkeypatch.setitem(DiT_models, "Conv-64", None)  # takes it back in the end
    exec(blocks("README.md")[-1], vars(models))
    words = options(tmp_path / "run", "--data-path", digits, "--cfg", 2, "--kappa", 0.5,
                    "--sample-every", 4, model="Conv-64", method=None)
    for steps in (4, 6):
        call("train", *words, "--max-steps", steps)
    call("sample", "--ckpt", tmp_path / "run" / "checkpoints" / "0000006.pt", "--sample-dir",
         tmp_path / "samples", "--num-fid-samples", 3, "--num-sampling-steps", 2)
    assert Image.open(tmp_path / "samples" / "000002.png").size == (8, 8)


class UNet(nn.Module):
    """One level down and up, with dropout: (B, C, 8, 8), (B,), (B,), (B,) -> (B, C, 8, 8)."""

    norm, wrap = partial(nn.GroupNorm, 4), staticmethod(lambda layer: layer)

    def __init__(self, *, input_size, in_channels, num_classes):
        super().__init__()
        self.labels, self.times = nn.Embedding(num_classes + 1, 16), nn.Linear(2, 16)
        self.down = nn.Sequential(nn.Conv2d(in_channels, 16, 3, 2, 1), self.norm(16),
                                  nn.Dropout(0.5))
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(16, 16, 3, padding=1))
        self.last = self.wrap(nn.Conv2d(16 + in_channels, in_channels, 3, padding=1))

    def forward(self, z, r, t, y):
        c = self.times(torch.stack([t, t - r], dim=1)) + self.labels(y)
        x = self.up(F.silu(self.down(z) + c[:, :, None, None]))
        return self.last(torch.cat([x, z], dim=1))


class TwoHeads(nn.Module):
    """u and v for improved MeanFlow, of a class that knows nothing of ours."""

    def __init__(self, *, input_size, in_channels, num_classes):
        super().__init__()
        self.label = nn.Embedding(num_classes + 1, in_channels)
        self.u, self.v = (nn.Conv2d(in_channels, in_channels, 3, padding=1) for _ in range(2))

    def forward(self, z, r, t, y, omega, t_min, t_max, heads="uv"):
        x = z * (t - r + omega)[:, None, None, None] + self.label(y)[:, :, None, None]
        return self.u(x) if "u" in heads else None, self.v(x) if "v" in heads else None


def test_a_network_chooses_its_method_by_what_it_takes(rows, digits, tmp_path, refusal):
    """Improved MeanFlow once took subclasses of ImprovedDiT alone."""
    rows(None, TwoHeads=TwoHeads)
    words = options(tmp_path / "run", "--data-path", digits, "--max-steps", 2, model="TwoHeads",
                    method=None)
    refusal("train", [*words, "--method", "meanflow"], "--method")
    call("train", *words, "--sample-every", 2)
    assert load_state(tmp_path / "run", 2)["config"]["method"] == "improved-meanflow"
    call("sample", "--ckpt", tmp_path / "run" / "checkpoints" / "0000002.pt", "--sample-dir",
         tmp_path / "samples", "--num-fid-samples", 2, "--cfg", 3)


def test_a_unet_with_dropout_resumes_bit_for_bit(rows, digits, tmp_path):
    rows(None, UNet=UNet)
    assert_resumes(tmp_path, lambda folder, steps: call("train", *options(
        folder, "--data-path", digits, "--max-steps", steps, model="UNet", method="meanflow")))


def test_buffers_that_change_are_those_of_the_average_too(rows, digits, tmp_path):
    """Spectral norm divides by the buffers' estimate: those of the random first weights, kept by
    the average, made samples of another network."""
    rows(None, UNet=type("Spectral", (UNet,), {"wrap": staticmethod(spectral_norm)}))
    assert_resumes(tmp_path, lambda folder, steps: call("train", *options(
        folder, "--data-path", digits, "--max-steps", steps, model="UNet", method="meanflow")))
    state = load_state(tmp_path / "whole", 6)
    names = [name for name in state["ema"] if "parametrizations.weight.0" in name]
    assert len(names) == 2 and all(
        torch.equal(state["ema"][name], state["model"][name]) for name in names)


def test_ranks_and_steps_have_masks_of_their_own(digits, tmp_path):
    script = tmp_path / "masks.py"
    script.write_text("""
import torch, train
from models import DiT, DiT_models
class Dropping(DiT):
    def forward(self, z, r, t, y):
        if torch.is_grad_enabled():
            print("mask", torch.nn.functional.dropout(torch.ones(64)).nonzero().flatten().tolist())
        return super().forward(z, r, t, y)
DiT_models["D"] = lambda **sizes: Dropping(hidden_size=16, depth=1, num_heads=2, **sizes)
train.main(train.parse_args())
""")
    words = options(tmp_path / "run", "--data-path", digits, model="D", method="meanflow")
    said = ["".join(texts) for texts in zip(*(
        run_ranks(script, *words, "--max-steps", steps, processes=2, output=tmp_path / f"{steps}")
        for steps in (2, 3)))]
    masks = [re.findall("mask .*", text) for text in said]
    # With several ranks a first backward settles their buckets, before step 0 and after a resume
    steps = [[lines[i] for i in (1, 2, 4)] for lines in masks]
    assert [len(lines) for lines in masks] == [5, 5] and len({*steps[0], *steps[1]}) == 6


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, partial(nn.InstanceNorm2d,
                                                           track_running_stats=True)])
def test_batchnorm_and_running_statistics_are_refused(norm, rows, digits, tmp_path, refusal):
    rows(None, Batch=type("Batch", (UNet,), {"norm": staticmethod(norm)}))
    line = refusal("train", options(tmp_path / "run", "--data-path", digits, "--max-steps", 1,
                                    model="Batch", method="meanflow"), "--model")
    assert "down.1" in line and "GroupNorm" in line


class Signals:
    """Sines (N, 2, 12) of two frequencies and random phases, as floats, and their codec."""

    classes, notes, scale = ["low", "high"], [], 1.0

    def __len__(self):
        return 64

    def batches(self, steps, workers):
        for rows, _ in steps:
            phase = rows[:, None, None] + torch.arange(12) * (1 + rows % 2)[:, None, None] / 3
            yield torch.cat([phase.sin(), phase.cos()], dim=1), rows % 2

    def latent_shape(self, image_size):
        return 2, 12

    def encode(self, x):
        return torch.stack([x, torch.zeros_like(x)], dim=1)


class Conv1d(nn.Module):
    def __init__(self, *, input_size, in_channels, num_classes):
        super().__init__()
        self.c, self.first = nn.Embedding(num_classes + 1, 16), nn.Conv1d(4, 16, 3, padding=1)
        self.last = nn.Conv1d(16, in_channels, 3, padding=1)

    def forward(self, z, r, t, y):
        times = torch.stack([t, t - r], dim=1)[:, :, None].expand(-1, -1, z.shape[2])
        return self.last(F.silu(self.first(torch.cat([z, times], 1)) + self.c(y)[:, :, None]))


def test_signals_of_one_dimension_train_and_sample(rows, tmp_path, monkeypatch):
    rows(None, Conv1d=Conv1d)
    monkeypatch.setattr(train, "open_data", lambda args, world: (Signals(), Signals()))
    call("train", *options(tmp_path, "--max-steps", 300, model="Conv1d", method="meanflow"))
    net, config = load_network(tmp_path / "checkpoints" / "0000300.pt")
    x = make_method(config).sample(net, torch.randn(8, 2, 12), torch.arange(8) % 2)
    assert config["latent_shape"] == [2, 12] and x.shape == (8, 2, 12) and x.isfinite().all()

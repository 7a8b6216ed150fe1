"""What several test files share: data, scripts run as users run them, the official numbers."""

import importlib
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from soak import THREADS, Child, ranks
from torch import nn

from engine.checkpoint import load_checkpoint
from engine.errors import UserError, run_main
from engine.files import LOCK
from engine.sharding import SHARDING_SINCE
from improved_meanflow import ImprovedDraws, ImprovedMeanFlow
from meanflow import Draws, MeanFlow
from metrics.inception import build_inception
from models import DiT, ImprovedDiT, build

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def few_threads():
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session", autouse=True)
def own_cache_of_compiled_code(tmp_path_factory):
    """The one in /tmp is shared, and a program takes from it what another compiled for other
    vector instructions (ATEN_CPU_CAPABILITY), which then does not compile."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("inductor"))


def pytest_configure(config):
    """Hide GPUs, unless -m gpu asks for the tests that need one. Else pairs of runs, in this
    process and in children on the CPU, would compare two devices."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def no_compiled_code():
    """Of other tests: a function may have eight graphs, and a pass that needs more is refused."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


sharding = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < SHARDING_SINCE,
    reason="--shard needs torch " + ".".join(map(str, SHARDING_SINCE)))


# ---- scripts -----------------------------------------------------------------------------------


def torchrun(*words, output, **env):
    """A torchrun with these options; its workers are new Pythons, as a user's are.

    The agent is forked, which saves the seconds that its imports take.
    """
    script = output.with_suffix(".py")
    script.write_text("from torch.distributed.run import main\nmain()")
    return Child(script, *words, output=output, **env)


def run_ranks(script, *options, processes, output, **env):
    """Run a script to its end in so many processes of one group; what each rank printed.

    They are forked, which saves the seconds that torchrun and every import of PyTorch take. output:
    a path without suffix for their output files.
    """
    env = {name: str(value) for name, value in env.items()}
    group = [Child(script, *options, output=f"{output}.{rank}.txt", **place, **env)
             for rank, place in enumerate(ranks(processes))]
    ends = [child.wait() for child in group]
    assert not any(code for code, _ in ends), ends
    return [said for _, said in ends]


def call(script, *options):
    """Run a script in this process, without the seconds that importing PyTorch takes."""
    module = importlib.import_module(script)
    module.main(module.parse_args([str(option) for option in options]))


@pytest.fixture
def refusal(tmp_path, monkeypatch, capfd):
    """A function that runs a script which must refuse its options; returns the line on stderr.

    It checks exit code 2, one line that names the option, and that nothing in the folder changed,
    which is tmp_path if none is given.
    """
    def run(script, options, option, folder=tmp_path):
        module, before = importlib.import_module(script), snapshot(folder)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, options)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            run_main(module.main, module.parse_args)
        out, err = capfd.readouterr()
        assert exit.value.code == 2 and out == "", err
        assert err.startswith(f"{script}.py: error: ") and err.count("\n") == 1, err
        assert option in err, err
        assert snapshot(folder) == before
        return err
    return run


def snapshot(folder):
    """What a folder holds but links and locks: names and, for files, content."""
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None
            for path in folder.rglob("*") if not path.is_symlink() and path.name != LOCK}


# ---- data and runs -----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """200 real handwritten digits, 8 x 8, in ten class folders."""
    folder = tmp_path_factory.mktemp("digits")
    source = load_digits()
    for i in range(200):
        path = folder / str(source.target[i]) / f"{i:04d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((source.images[i] * 15).astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="session")
def reference(digits, tmp_path_factory):
    """Pixel statistics of the digits, as evaluate_fid.py writes them."""
    path = tmp_path_factory.mktemp("reference") / "ref.npz"
    call("evaluate_fid", "--samples", digits, "--make-ref", path, "--protocol", "pixels",
         "--image-size", 8, "--num-workers", 0)
    return path


def tiny(digits, run_dir):
    """Options of a run that takes seconds."""
    return ["--data-path", digits, "--run-dir", run_dir, "--vae", "none", "--image-size", 8,
            "--model", "DiT-T/4", "--global-batch-size", 16, "--num-workers", 0, "--lr", 1e-3,
            "--ema-decay", 0.9, "--log-every", 4, "--sample-every", 0, "--ckpt-every", 10]


@pytest.fixture(scope="session")
def guided():
    """Options, beside those of tiny, of a run of eight steps with all passes of guidance."""
    return ["--max-steps", 8, "--cfg", 2, "--kappa", 0.5]


@pytest.fixture(scope="session")
def improved():
    """The same of improved MeanFlow, with all that its recipe adds."""
    return ["--model", "iMF-T/4", "--max-steps", 8, "--omega-max", 4, "--warmup-steps", 3,
            "--clip-grad", 0.5, "--weight-decay", 0.01]


@pytest.fixture(scope="session")
def trained(tmp_path_factory, digits):
    """The checkpoint of a tiny run: 12 steps in pixel space."""
    folder = tmp_path_factory.mktemp("trained")
    call("train", *tiny(digits, folder), "--max-steps", 12)
    return folder / "checkpoints" / "0000012.pt"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the Hugging Face Hub: hf://OWNER/REPO/FILE is hub.folder / OWNER / REPO / FILE
    of revision main or v1. hub.asked lists the downloads. The real client has an empty cache."""
    from huggingface_hub import constants, errors, hf_hub_download

    hub = SimpleNamespace(folder=tmp_path / "hub", asked=[])

    def download(repo_id, filename, *, revision=None, local_files_only=False, **more):
        if more:  # by diffusers, which keeps this function if it is imported now
            return hf_hub_download(repo_id, filename, revision=revision,
                                   local_files_only=local_files_only, **more)
        path, asked = hub.folder / repo_id / filename, (repo_id, filename, revision)
        if local_files_only and asked not in hub.asked:
            raise errors.LocalEntryNotFoundError("not cached")
        if revision not in (None, "v1") or not path.exists():
            raise OSError("404 Client Error.\nEntry Not Found")
        if not local_files_only:
            hub.asked.append(asked)
        return str(path)

    (hub.folder / "ann" / "digits").mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return hub


# ---- images, a VAE and Inception weights -----------------------------------------------------

PHOTO = Image.fromarray(load_sample_images().images[0])  # a real photograph, 640 x 427


def refused(*words):
    """Raises a UserError with these words, in this order."""
    return pytest.raises(UserError, match="(?s)" + ".*".join(map(re.escape, map(str, words))))


def flip_bit(path, position):
    """Flip the lowest bit of one byte of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def save_folder(path, per_class=5, size=32):
    """A class folder each of 'b' and 'a' with pieces of the photograph."""
    for offset, name in enumerate("ba"):
        (path / name).mkdir(parents=True)
        for i in range(per_class):
            x, y = 40 * i, 60 * offset
            PHOTO.crop((x, y, x + size + i, y + size)).save(path / name / f"{i}.png")
    return path


def save_odd_files(folder):
    """Photographs in every mode that ImageNet holds, and some that it does not."""
    square = PHOTO.crop((0, 0, 32, 32))
    folder.mkdir(parents=True, exist_ok=True)
    square.convert("L").save(folder / "grey.jpg")
    square.convert("CMYK").save(folder / "cmyk.jpg")
    square.convert("P").save(folder / "palette.png")
    square.convert("P").save(folder / "transparent.gif", transparency=3)
    square.convert("1").save(folder / "bits.png")
    square.convert("LA").save(folder / "grey-alpha.png")
    alpha = Image.linear_gradient("L").resize((32, 32))
    Image.merge("RGBA", (*square.split(), alpha)).save(folder / "alpha.png")
    deep = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64
    Image.fromarray(deep).save(folder / "sixteen.png")
    Image.fromarray(deep).save(folder / "sixteen.tiff")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated
    square.save(folder / "rotated.jpg", exif=exif, quality=95)
    return sorted(folder.iterdir())


def load_state(folder, step):
    """A run's checkpoint."""
    return load_checkpoint(folder / "checkpoints" / f"{step:07d}.pt")


def load_weights(folder, step, kind="model"):
    """The weights of a run's checkpoint, or its averages (kind "ema")."""
    return load_state(folder, step)[kind]


GRADIENT_ROUNDING = 1e-4


def assert_same_training(ours, theirs, start=None):
    """Two checkpoints of one run, whose steps were computed in another order.

    What rounding moves by a small share is the gradient, so AdamW's moments are compared, which are
    averages of the gradients of all steps and of their squares: max |a-b| <= GRADIENT_ROUNDING max
    |b| of each tensor. A gradient is the end of some 50 sums of up to 400 products, each rounded by
    2^-24: sqrt(50 * 400) 2^-24 = 8e-6 if roundings are independent, 50 * 400 * 2^-24 = 1e-3 if all
    add up. Measured: 5e-6, and 2e-5 between instruction sets. A wrong label in one of four rows
    moves it by 3e-3 or more.

    No such bound holds for single weights. AdamW moves one by the rate times m / sqrt(v), whatever
    the size of its gradient, so a gradient that is smaller than the rounding, as that of the biases
    of attention keys, moves it anywhere. If gradients lie about evenly around zero, a share d / |g|
    of them is below d, and the squares of the differences add up to about d: in the 2-norm weights
    and averages differ by sqrt(GRADIENT_ROUNDING) of the way that they have come. start: the
    weights at its beginning, by default the initial ones of the config's network and seed.
    """
    for index, moments in theirs["opt"]["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            a, b = ours["opt"]["state"][index][name], moments[name]
            difference, size = float((a - b).abs().max()), float(b.abs().max())
            assert difference <= GRADIENT_ROUNDING * size, (index, name)
    if start is None:
        torch.manual_seed(theirs["config"]["seed"])
        start = build(theirs["config"]).state_dict()
    for kind in ("model", "ema"):
        a, b, c = (torch.cat([weights[key].flatten() for key in start])
                   for weights in (ours[kind], theirs[kind], start))
        difference, way = float((a - b).norm()), float((b - c).norm())
        assert difference <= GRADIENT_ROUNDING ** 0.5 * way, kind


def save_small_vae(path, **changes):
    """A folder with an AutoencoderKL of 67 thousand random weights, with SD's factor of 8."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(**{
        "block_out_channels": (8, 8, 16, 16), "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 1, "latent_channels": 4,
        "norm_num_groups": 4, **changes}).save_pretrained(path)
    return path


def pictures(count, size, seed):
    """Images (count, 3, size, size), uint8, of different colour and coarseness."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for _ in range(count):
        cells = int(torch.randint(2, size // 2, (), generator=generator))
        colour = 0.2 + 0.8 * torch.rand(1, 3, 1, 1, generator=generator)
        noise = torch.rand(1, 3, cells, cells, generator=generator)
        images.append(F.interpolate(noise, (size, size), mode="bilinear") * colour * 255)
    return torch.cat(images).to(torch.uint8)


@pytest.fixture(scope="session")
def torch_home(tmp_path_factory):
    """A TORCH_HOME with random weights where pytorch-fid and torch-fidelity look for theirs.

    The published ones cannot be had without a network. Filters have no mean and batch norms hold
    the statistics of a few pictures, so that features and classes differ between pictures.
    """
    from pytorch_fid.inception import FID_WEIGHTS_URL

    generator = torch.Generator().manual_seed(0)
    net = build_inception().to_empty(device="cpu").train()
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = torch.randn(module.weight.shape, generator=generator)
            weight -= weight.flatten(1).mean(1).view(-1, *[1] * (weight.ndim - 1))
            module.weight.data = weight * (2 / weight[0].numel()) ** 0.5
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.data.normal_(1, 0.1, generator=generator)
            module.bias.data.normal_(0, 0.1, generator=generator)
            module.reset_running_stats()
            module.momentum = 1.0  # the running statistics become the batch's
    net.fc.weight.data.mul_(4)
    net.fc.bias.data.normal_(0, 1, generator=generator)
    with torch.no_grad():
        net(pictures(8, 150, seed=0).float() / 127.5 - 1)
    home = tmp_path_factory.mktemp("torch")
    folder = home / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    path = folder / FID_WEIGHTS_URL.rsplit("/", 1)[1]
    torch.save(net.state_dict(), path)
    os.link(path, folder / path.name.replace("pt_inception", "weights-inception"))
    return home


@pytest.fixture(scope="session")
def inception_weights(torch_home):
    return next(torch_home.glob("hub/checkpoints/pt_inception*"))


# ---- numbers of the official implementation ----------------------------------------------------

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_SIZES = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=64, depth=3, num_heads=4,
                    num_classes=10)
precisions = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def golden_network(dtype):
    """The small network with the weights that the golden numbers were computed with."""
    net = DiT(**GOLDEN_SIZES)
    params = np.load(GOLDEN / "params.npz")
    missing, unexpected = net.load_state_dict(
        {key: torch.from_numpy(params[key]) for key in params}, strict=False)
    assert missing == ["pos_embed"] and not unexpected
    return net.to(dtype)


def golden_improved_network(dtype, v_head=True):
    """The same for improved MeanFlow, as released checkpoints are if without the v head."""
    net = ImprovedDiT(**{**GOLDEN_SIZES, "depth": 4}, head_depth=2, v_head=v_head)
    params = np.load(GOLDEN / "imf" / "params.npz")
    net.load_state_dict({key: torch.from_numpy(params[key]) for key in params
                         if v_head or not key.startswith("v_")})
    return net.to(dtype)


def golden(name, dtype):
    """A golden file as tensors: floats in dtype, labels int64."""
    arrays = np.load(GOLDEN / f"{name}.npz")
    convert = {"f": lambda a: torch.from_numpy(a).to(dtype), "b": torch.from_numpy, "U": str,
               "i": lambda a: torch.from_numpy(a).long()}
    return {key: convert[arrays[key].dtype.kind](arrays[key]) for key in arrays}


def golden_method(numbers, **options):
    """(method, draws) of a golden file of a loss, on the device of its numbers; options of MeanFlow
    that the file does not tell."""
    s = json.loads(numbers["settings"])
    rows = [numbers[name] for name in ("r", "t", "e", "drop_mask")]
    equal = int(numbers["equal"] if "equal" in numbers else s["batch"] * s["data_proportion"])
    if "omega" not in numbers:
        method = MeanFlow(
            num_classes=s["num_classes"], kappa=s["kappa"], cfg=s["omega"] / (1 - s["kappa"]),
            c=s["norm_eps"], p=s["norm_p"], cfg_interval=(s["t_start"], s["t_end"]), **options)
        return method, Draws(*rows, equal)
    method = ImprovedMeanFlow(
        num_classes=s["num_classes"], ratio=1 - s["data_proportion"], omega_max=1 + s["s_max"],
        beta=s["cfg_beta"], label_drop=s["class_dropout_prob"], p=s["norm_p"], c=s["norm_eps"])
    return method, ImprovedDraws(*rows, equal, *(numbers[name] for name in
                                                 ("omega", "t_min", "t_max")))


def official_error(ours, theirs):
    """The measure of the golden numbers: max |a-b| / max |b|."""
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


def assert_official(ours, theirs):
    """Equal to the tolerance of the golden numbers."""
    error = official_error(ours, theirs)
    assert error <= (3e-7 if ours.dtype == torch.float64 else 1e-5), f"relative error {error:.2e}"


def official_gradients(net, numbers, stride):
    """(ours, theirs) for all gradients of net: golden files hold grad.KEY, or every stride-th value
    as gradsub.KEY."""
    gradients = {key: p.grad for key, p in net.named_parameters()}
    stored = {key for key in numbers if key.startswith(("grad.", "gradsub."))}
    assert {key.split(".", 1)[1] for key in stored} == gradients.keys()
    for key in stored:
        kind, name = key.split(".", 1)
        found = gradients[name] if kind == "grad" else gradients[name].flatten()[::stride]
        yield found, numbers[key]


def assert_official_gradients(net, numbers, stride):
    for ours, theirs in official_gradients(net, numbers, stride):
        assert_official(ours, theirs)

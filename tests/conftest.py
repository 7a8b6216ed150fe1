"""What several test files share: data, scripts run as users run them, the official numbers."""

import importlib
import json
import os
import re
import sys
import zlib
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

from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.errors import UserError, run_main
from engine.files import LOCK
from engine.sharding import SHARDING_SINCE
from improved_meanflow import ImprovedDraws, ImprovedMeanFlow
from meanflow import Draws, MeanFlow
from metrics.inception import build_inception
from models import DiT, ImprovedDiT, build

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def few_threads_and_own_compiled_code(tmp_path_factory):
    """The cache in /tmp may hold code for other vector instructions."""
    torch.set_num_threads(THREADS)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("inductor"))


def pytest_configure(config):
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE",
                 "PMI_SIZE"):  # these tests are one process
        os.environ.pop(name, None)
    if config.option.markexpr != "gpu":  # else a run here and one in a child differ in the device
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def no_compiled_code():
    """Of other tests: a function may have eight graphs, and a pass that needs more is refused."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


sharding = pytest.mark.skipif(torch.__version__ < SHARDING_SINCE,
                              reason="torch is too old for --shard")


# ---- scripts -----------------------------------------------------------------------------------


def torchrun(*words, output, **env):
    """A torchrun, forked to save the time of imports; its workers are new Pythons as a user's."""
    script = output.with_suffix(".py")
    script.write_text("from torch.distributed.run import main\nmain()")
    return Child(script, *words, output=output, **env)


def run_ranks(script, *options, processes, output, **env):
    """Run a script in so many forked processes; what each printed, and wrote to output.RANK.txt."""
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
    """A function that runs a script which must refuse its options: with exit code 2, one line on
    stderr that names the option, which it returns, and an unchanged folder."""
    def run(script, options, option, folder=tmp_path):
        module, before = importlib.import_module(script), snapshot(folder)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, options)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            run_main(module.main, module.parse_args)
        out, err = capfd.readouterr()
        assert exit.value.code == 2 and out == "", err
        assert err.startswith(f"{script}.py: error: ") and err.count("\n") == 1, err
        assert option in err and "error: must" not in err, err
        assert snapshot(folder) == before
        return err
    return run


def snapshot(folder):
    """What a folder holds but links and locks: names and, for files, content."""
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None
            for path in folder.rglob("*") if not path.is_symlink() and path.name != LOCK}


# ---- data, runs and networks -------------------------------------------------------------------


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
    """Options, beside those of tiny, of a run with all passes of guidance."""
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

    def download(repo_id, filename, *, revision=None, local_files_only=False, force_download=False,
                 **more):
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


def save_random(path, model, method=None, **config):
    """A checkpoint with random weights, in pixel space by default, whose images differ by label,
    noise and guidance: a new network's output is zero. Returns its path."""
    torch.manual_seed(0)
    config = {"model": model, "method": method, "sizes": None, "num_classes": 10, "image_size": 8,
              "latent_shape": [3, 8, 8], "vae": "none", "scale": 1.0, "run_dir": "results/run",
              "data_path": str(Path(path).parent), "classes": ["b 0", *map(str, range(1, 10))],
              **config}
    net = build(config)
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.7 / module.in_features ** 0.5)
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.3)
    weights = net.state_dict()
    save_checkpoint(path, {"step": 40, "model": weights, "ema": weights, "opt": None,
                           "config": config})
    return path


PHOTO = Image.fromarray(load_sample_images().images[0])  # a real photograph, 640 x 427


def refused(*words):
    """Expects a UserError with these words, in this order."""
    return pytest.raises(UserError, match="(?s)" + ".*".join(map(re.escape, map(str, words))))


def flip_bit(path, position):
    """Flip the lowest bit of one byte of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def save_folder(path, per_class=5):
    """A class folder each of 'b' and 'a' with pieces of the photograph."""
    for y, name in (0, "b"), (60, "a"):
        (path / name).mkdir(parents=True)
        for i in range(per_class):
            PHOTO.crop((40 * i, y, 41 * i + 32, y + 32)).save(path / name / f"{i}.png")
    return path


def png_of_16_bits(size):
    """The bytes of an RGB image of noise; Pillow writes none."""
    deep = np.random.default_rng(0).integers(0, 2**16, (size, size, 3)).astype(">u2")
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in deep))
    shape = size.to_bytes(4, "big") * 2
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        for kind, data in ((b"IHDR", shape + bytes([16, 2, 0, 0, 0])), (b"IDAT", rows),
                           (b"IEND", b"")))


def save_odd_files(folder):
    """Photographs in every mode that ImageNet holds, and some that it does not."""
    square = PHOTO.crop((0, 0, 32, 32))
    folder.mkdir(parents=True, exist_ok=True)
    for mode, name in (("L", "grey.jpg"), ("CMYK", "cmyk.jpg"), ("P", "palette.png"),
                       ("1", "bits.png"), ("LA", "grey-alpha.png")):
        square.convert(mode).save(folder / name)
    square.convert("P").save(folder / "transparent.gif", transparency=3)
    alpha = Image.linear_gradient("L").resize((32, 32))
    Image.merge("RGBA", (*square.split(), alpha)).save(folder / "alpha.png")
    (folder / "sixteen.png").write_bytes(png_of_16_bits(32))
    square.save(folder / "pages.tiff", save_all=True, append_images=[square.rotate(90)])
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

    AdamW's moments, averages of gradients, are compared: some 50 sums of 400 products round by
    sqrt(50 * 400) 2^-24 = 8e-6 (measured: up to 2e-5), a wrong label moves them by 3e-3 or more.
    Weights whose gradient is mere rounding move anywhere. They are about that share of all, so the
    2-norm differs by its root of the way from start (default: the config's network and seed).
    """
    for index, moments in theirs["opt"]["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            a, b = ours["opt"]["state"][index][name], moments[name]
            assert (a - b).abs().max() <= GRADIENT_ROUNDING * b.abs().max(), (index, name)
    if start is None:
        torch.manual_seed(theirs["config"]["seed"])
        start = build(theirs["config"]).state_dict()
    for kind in ("model", "ema"):
        a, b, c = (torch.cat([weights[key].flatten() for key in start])
                   for weights in (ours[kind], theirs[kind], start))
        assert (a - b).norm() <= GRADIENT_ROUNDING ** 0.5 * (b - c).norm(), kind


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
    """A TORCH_HOME with random weights where pytorch-fid and torch-fidelity look for theirs, such
    that features and classes differ between pictures."""
    from pytorch_fid.inception import FID_WEIGHTS_URL

    torch.manual_seed(0)
    net = build_inception().to_empty(device="cpu").train().requires_grad_(False)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = torch.randn(module.weight.shape) * (2 / module.weight[0].numel()) ** 0.5
            module.weight.copy_(weight - weight.mean([*range(1, weight.ndim)], keepdim=True))
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.normal_(1, 0.1)
            module.bias.normal_(0, 0.1)
            module.reset_running_stats()
            module.momentum = 1.0  # the running statistics become the batch's
    net.fc.weight.mul_(4)
    net.fc.bias.normal_()
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
    net.load_state_dict({"pos_embed": net.pos_embed, **golden("params", torch.float32)})
    return net.to(dtype)


def golden_improved_network(dtype, v_head=True):
    """The same for improved MeanFlow, as released checkpoints are if without the v head."""
    net = ImprovedDiT(**{**GOLDEN_SIZES, "depth": 4}, head_depth=2, v_head=v_head)
    params = golden("imf/params", torch.float32)
    net.load_state_dict({key: params[key] for key in params if v_head or key[:2] != "v_"})
    return net.to(dtype)


def golden(name, dtype):
    """A golden file as tensors: floats in dtype, labels int64."""
    arrays = np.load(GOLDEN / f"{name}.npz")
    convert = {"f": lambda a: torch.from_numpy(a).to(dtype), "b": torch.from_numpy, "U": str,
               "i": lambda a: torch.from_numpy(a).long()}
    return {key: convert[arrays[key].dtype.kind](arrays[key]) for key in arrays}


def golden_step(name, dtype=torch.float32):
    """(network, method, (x, labels, draws), numbers) of a golden file of a loss."""
    numbers = golden(name, dtype)
    method, draws = golden_method(numbers)
    net = (golden_improved_network if "omega" in numbers else golden_network)(dtype)
    return net, method, (numbers["x"], numbers["labels"], draws), numbers


def golden_method(numbers):
    """(method, draws) of a golden file of a loss."""
    s = json.loads(numbers["settings"])
    rows = [numbers[name] for name in ("r", "t", "e", "drop_mask")]
    equal = int(numbers["equal"] if "equal" in numbers else s["batch"] * s["data_proportion"])
    options = {"num_classes": s["num_classes"], "c": s["norm_eps"], "p": s["norm_p"]}
    if "omega" not in numbers:
        method = MeanFlow(kappa=s["kappa"], cfg=s["omega"] / (1 - s["kappa"]),
                          cfg_interval=(s["t_start"], s["t_end"]),
                          tangent="network" if "variant" in s else "velocity", **options)
        return method, Draws(*rows, equal)
    method = ImprovedMeanFlow(omega_max=1 + s["s_max"], beta=s["cfg_beta"],
                              ratio=1 - s["data_proportion"],
                              label_drop=s["class_dropout_prob"], **options)
    guidance = (numbers[name] for name in ("omega", "t_min", "t_max"))
    return method, ImprovedDraws(*rows, equal, *guidance)


def official_error(ours, theirs):
    """The measure of the golden numbers: max |a-b| / max |b|."""
    ours, theirs = ours.detach().double(), theirs.double()
    return float((ours - theirs).abs().max() / theirs.abs().max())


def assert_official(ours, theirs, *, float32=1e-5):
    """Equal to the tolerance of the golden numbers, in float64 and in float32."""
    error = official_error(ours, theirs)
    tolerance = 3e-7 if ours.dtype == torch.float64 else float32
    assert error <= tolerance, f"relative error {error:.2e}"


def official_gradients(net, numbers, stride):
    """(ours, theirs) of all gradients; files may hold each stride-th value, as gradsub.KEY."""
    stored = {key.split(".", 1)[1]: key for key in numbers if key.startswith(("grad.", "gradsub."))}
    for name, p in net.named_parameters():
        step = stride if stored[name].startswith("gradsub.") else 1
        yield p.grad.flatten()[::step], numbers[stored[name]].flatten()


def assert_official_gradients(net, numbers, stride, **tolerance):
    for ours, theirs in official_gradients(net, numbers, stride):
        assert_official(ours, theirs, **tolerance)

"""Count the FLOPs of the papers' runs, and their GPU hours at an assumed share of a GPU's peak.

    python benchmarks/gpu_hours.py --share 0.4        # a minute, without computing anything

It prints a table with a row per run: hours = images * FLOPs / (GPUs * share * peak * 3600), and the
hours of the updates, steps * 44 bytes * parameters / (.9 * bandwidth * 3600), which every GPU makes
of all parameters. FLOPs are those of matrix products, convolutions and attention in one step's
forward and backward; a multiply-add is two. An update is the gradient norm, AdamW and the average.
Epochs and images per epoch are from MeanFlow's Table 4 and from the published configurations of
improved MeanFlow, peaks of dense bfloat16 products and of memory from the data sheets.
"""

import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[1]))
from loading import stable_diffusion_vae  # noqa: E402
from train_step import FlopCounter  # noqa: E402

from engine.errors import run_main  # noqa: E402
from engine.options import Parser, float_range, int_range  # noqa: E402
from improved_meanflow import ImprovedMeanFlow  # noqa: E402
from meanflow import MeanFlow  # noqa: E402
from models import DiT_models  # noqa: E402

RUNS = [  # name, model, epochs, guidance in training
    ("B/4", "DiT-B/4", 80, {"cfg": 3.0}),
    ("B/2", "DiT-B/2", 240, {"cfg": 2.0, "kappa": 0.5}),
    ("M/2", "DiT-M/2", 240, {"cfg": 2.0, "kappa": 0.5}),
    ("L/2", "DiT-L/2", 240, {"cfg": 2.5, "kappa": 0.92}),
    ("XL/2", "DiT-XL/2", 240, {"cfg": 2.5, "kappa": 0.92}),
    ("XL/2+", "DiT-XL/2", 1000, {"cfg": 2.0, "kappa": 0.5}),
    ("iMF-B/2", "iMF-B/2", 640, {"omega_max": 8.0}),
    ("iMF-M/2", "iMF-M/2", 640, {"omega_max": 8.0}),
    ("iMF-L/2", "iMF-L/2", 640, {"omega_max": 8.0}),
    ("iMF-XL/2", "iMF-XL/2", 800, {"omega_max": 8.0})]
IMAGES_PER_EPOCH = 5004 * 256  # or 1251 * 1024, the batch of improved MeanFlow
PEAKS = {"A100": 312e12, "H100": 989e12}  # FLOP/s; H100 SXM
BANDWIDTHS = {"A100": 2.04e12, "H100": 3.35e12}  # bytes/s; with 80 GB
REACHED = 0.9  # share of the bandwidth, assumed
UPDATE_BYTES = 44  # read and written for a parameter: norm 4, AdamW 28, average 12
BATCH = 4  # of which one row has r < t, or two (improved MeanFlow)


def parse_args(argv=None):
    parser = Parser(__doc__.split("\n", 1)[0])
    parser.add_argument("--share", type=float_range(0, 1, above=True), default=0.4,
                        help="share of the GPU's peak that a whole step reaches")
    parser.add_argument("--gpus", type=int_range(1), default=8, help="GPUs per run")
    return parser.parse_args(argv)


def main(args):
    # Plain attention: not every version of PyTorch counts the FLOPs of fused attention
    with sdpa_kernel(SDPBackend.MATH):
        report(args)


def report(args):
    """Print the table."""
    print("| | epochs | guidance | F, GFLOP | step, GFLOP | in F | to flow matching | EFLOP |"
          + "".join(f" {args.gpus} {gpu}, hours (updates) |" for gpu in PEAKS))
    print("|---" * (8 + len(PEAKS)) + "|")
    for name, model, epochs, guidance in RUNS:
        unguided = {"omega_max": 1} if model.startswith("iMF") else {}
        forward, flow = flops(model, ratio=0, **unguided)
        _, step = flops(model, **guidance)
        run = step * epochs * IMAGES_PER_EPOCH
        steps = epochs * IMAGES_PER_EPOCH / (1024 if model.startswith("iMF") else 256)
        hours = []
        for gpu, peak in PEAKS.items():
            updates = steps * update_seconds(model, gpu) / 3600
            passes = run / (args.gpus * args.share * peak * 3600)
            hours.append(f"{passes + updates:.1f} ({updates:.1f})")
        guidance = ", ".join(f"{key} {value:g}" for key, value in guidance.items())
        print(f"| {name} | {epochs} | {guidance} | {forward / 1e9:.1f} | {step / 1e9:.1f} | "
              f"{step / forward:.2f} | {step / flow:.2f} | {run / 1e18:.1f} | "
              f"{' | '.join(hours)} |", flush=True)
    encoder, (_, step) = encoder_flops(), flops("DiT-B/4", cfg=3.0)
    print(f"\nVAE's encoder, 256 px: {encoder / 1e9:.0f} GFLOP an image, {encoder / step:.1f} of "
          f"B/4's step")


def update_seconds(model, gpu):
    """Seconds in which a GPU updates all parameters of a network: the time of their memory."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in DiT_models[model]().parameters())
    return UPDATE_BYTES * parameters / (REACHED * BANDWIDTHS[gpu])


def fake_method(model, **settings):
    """The loss of the model's method, which takes tensors without data, too."""
    make = ImprovedMeanFlow if model.startswith("iMF") else MeanFlow
    method = make(num_classes=1000, **settings)
    derivative = method.time_derivative
    # PyTorch differentiates no views of fake tensors in forward mode: pass copies of the rows
    method.time_derivative = lambda net, *rows: derivative(net, *[a.clone() for a in rows])
    return method


def flops(model, **settings):
    """(FLOPs of one forward, FLOPs of one step), per image; of an improved model with both
    heads."""
    method = fake_method(model, **settings)
    with FakeTensorMode():  # tensors with a shape and no data
        net = DiT_models[model]()
        x, y = torch.empty(BATCH, 4, 32, 32), torch.zeros(BATCH, dtype=torch.int64)
        draws = method.draw(x.shape)
        given = (draws.omega, draws.t_min, draws.t_max) if model.startswith("iMF") else ()
        with FlopCounter() as forward:
            net(x, draws.r, draws.t, y, *given)
        with FlopCounter() as step:
            method.loss(net, x, y, draws).loss.backward()
    return forward.total / BATCH, step.total / BATCH


def encoder_flops():
    """FLOPs of the Stable Diffusion VAE's encoder on one image of 256 px."""
    with FakeTensorMode():
        model = stable_diffusion_vae()
        with FlopCounter() as counter, torch.no_grad():
            model.encode(torch.empty(1, 3, 256, 256))
    return counter.total


if __name__ == "__main__":
    run_main(main, parse_args)

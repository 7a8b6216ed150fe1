"""Count the FLOPs of the paper's runs, and their GPU hours at an assumed share of a GPU's peak.

    python benchmarks/gpu_hours.py --share 0.4        # a minute, without computing anything

It prints a table with a row per run: hours = images * FLOPs / (GPUs * share * peak * 3600). FLOPs
are those of matrix products, convolutions and attention in one step's forward and backward; a
multiply-add is two. Epochs, batch and steps per epoch are from the paper's Table 4, peaks of dense
bfloat16 products from the data sheets.
"""

import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[1]))
from loading import stable_diffusion_vae  # noqa: E402
from train_step import FlopCounter  # noqa: E402

from engine.distributed import run_main  # noqa: E402
from engine.options import Parser, float_range, int_range  # noqa: E402
from meanflow import MeanFlow  # noqa: E402
from models import DiT_models  # noqa: E402

RUNS = [  # name, model, epochs, omega', kappa
    ("B/4", "DiT-B/4", 80, 3.0, 0.0), ("B/2", "DiT-B/2", 240, 2.0, 0.5),
    ("M/2", "DiT-M/2", 240, 2.0, 0.5), ("L/2", "DiT-L/2", 240, 2.5, 0.92),
    ("XL/2", "DiT-XL/2", 240, 2.5, 0.92), ("XL/2+", "DiT-XL/2", 1000, 2.0, 0.5)]
IMAGES_PER_EPOCH = 5004 * 256
PEAKS = {"A100": 312e12, "H100": 989e12}  # FLOP/s; H100 SXM
BATCH = 4  # of which one row has r < t


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
          + "".join(f" {args.gpus} {gpu}, hours |" for gpu in PEAKS))
    print("|---" * (8 + len(PEAKS)) + "|")
    for name, model, epochs, omega, kappa in RUNS:
        forward, flow = flops(model, ratio=0)
        _, step = flops(model, cfg=omega, kappa=kappa)
        run = step * epochs * IMAGES_PER_EPOCH
        hours = [f"{run / (args.gpus * args.share * peak * 3600):.1f}" for peak in PEAKS.values()]
        print(f"| {name} | {epochs} | omega' {omega:g}, kappa {kappa:g} | {forward / 1e9:.1f} | "
              f"{step / 1e9:.1f} | {step / forward:.2f} | {step / flow:.2f} | {run / 1e18:.1f} | "
              f"{' | '.join(hours)} |")
    encoder, (_, step) = encoder_flops(), flops("DiT-B/4", cfg=3.0)
    print(f"\nVAE's encoder, 256 px: {encoder / 1e9:.0f} GFLOP an image, {encoder / step:.1f} of "
          f"B/4's step")


def flops(model, **settings):
    """(FLOPs of one forward, FLOPs of one step), per image."""
    method = MeanFlow(num_classes=1000, **settings)
    derivative = method.time_derivative
    # PyTorch differentiates no views of fake tensors in forward mode: pass copies of the rows
    method.time_derivative = lambda net, *rows: derivative(net, *[a.clone() for a in rows])
    with FakeTensorMode():  # tensors with a shape and no data
        net = DiT_models[model]()
        x, y = torch.empty(BATCH, 4, 32, 32), torch.zeros(BATCH, dtype=torch.int64)
        draws = method.draw(x.shape)
        with FlopCounter() as forward:
            net(x, draws.r, draws.t, y)
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

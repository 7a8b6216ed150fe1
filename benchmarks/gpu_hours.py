"""GPU hours of the paper's runs, from counted FLOPs and an assumed share of a GPU's peak.

    python benchmarks/gpu_hours.py --share 0.4

hours = images * FLOPs / (GPUs * share * peak * 3600). FLOPs are those of matrix products,
convolutions and attention, a multiply-add being two, of one step's forward and backward, counted
without computing anything. Epochs, batch and steps are of the paper's Table 4; peaks are the data
sheets' of dense bfloat16 products.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[1]))
from train_step import FlopCounter  # noqa: E402

from meanflow import MeanFlow  # noqa: E402
from models import DiT_models  # noqa: E402

RUNS = [  # name, model, epochs, omega', kappa
    ("B/4", "DiT-B/4", 80, 3.0, 0.0), ("B/2", "DiT-B/2", 240, 2.0, 0.5),
    ("M/2", "DiT-M/2", 240, 2.0, 0.5), ("L/2", "DiT-L/2", 240, 2.5, 0.92),
    ("XL/2", "DiT-XL/2", 240, 2.5, 0.92), ("XL/2+", "DiT-XL/2", 1000, 2.0, 0.5)]
IMAGES_PER_EPOCH = 5004 * 256
PEAKS = {"A100": 312e12, "H100": 989e12}  # FLOP/s; of the SXM H100
BATCH = 4  # of which one row has r < t


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="GPU hours of the paper's runs.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--share", type=float, default=0.4,
                        help="share of the peak that a whole step reaches")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of a run")
    return parser.parse_args(argv)


def main(args):
    # Not every version of PyTorch counts the products of fused attention; it counts these
    with sdpa_kernel(SDPBackend.MATH):
        report(args)


def report(args):
    """The table on stdout."""
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
    """FLOPs per image of one forward pass and of one step."""
    method = MeanFlow(num_classes=1000, **settings)
    derivative = method.time_derivative
    # PyTorch differentiates no views of fake tensors in forward mode: pass copies of the rows
    method.time_derivative = lambda net, *rows: derivative(net, *[a.clone() for a in rows])
    with FakeTensorMode():  # tensors with a shape and nothing in it
        net = DiT_models[model]()
        x, y = torch.empty(BATCH, 4, 32, 32), torch.zeros(BATCH, dtype=torch.int64)
        draws = method.draw(x.shape)
        with FlopCounter() as forward:
            net(x, draws.r, draws.t, y)
        with FlopCounter() as step:
            method.loss(net, x, y, draws).loss.backward()
    return forward.total / BATCH, step.total / BATCH


def encoder_flops():
    """FLOPs per image of 256 px that the Stable Diffusion VAE's encoder takes."""
    from diffusers import AutoencoderKL

    with FakeTensorMode():
        model = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2,
                              latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 4,
                              up_block_types=("UpDecoderBlock2D",) * 4)
        with FlopCounter() as counter, torch.no_grad():
            model.encode(torch.empty(1, 3, 256, 256))
    return counter.total


if __name__ == "__main__":
    main(parse_args())

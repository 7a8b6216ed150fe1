"""Images per second of sample.py, PNG files included, beside the bare network and decoder.

    python benchmarks/sampling.py
    python benchmarks/sampling.py --model DiT-B/4 --image-size 256 --vae ema --batches 40

Both make the same images from random weights, in turns within one run; medians are printed, and
their ratio, which 0.9 should not fall below. On a CPU, making PNG files takes time from the
network; on a GPU it runs beside it.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).parent.parent)

import sample  # noqa: E402
from dataset.vae import load_vae  # noqa: E402
from engine.distributed import start_processes  # noqa: E402
from engine.log import describe_environment  # noqa: E402
from models import build  # noqa: E402
from sample import ImageSampler  # noqa: E402


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Compare sample.py with the bare networks.")
    parser.add_argument("--model", default="DiT-S/4", help="network")
    parser.add_argument("--image-size", type=int, default=64, help="pixels")
    parser.add_argument("--vae", default="none", help="none, ema, mse or a folder")
    parser.add_argument("--precision", default="tf32", choices=("fp32", "tf32", "bf16"),
                        help="as for sample.py")
    parser.add_argument("--batch-size", type=int, default=25, help="images per batch")
    parser.add_argument("--batches", type=int, default=2, help="batches per turn")
    parser.add_argument("--turns", type=int, default=5, help="turns of each")
    return parser.parse_args(argv)


def main(args):
    with start_processes(args.precision) as world, tempfile.TemporaryDirectory() as folder:
        space = load_vae(args.vae, world.device, precision=args.precision)
        config = {"model": args.model, "latent_shape": space.latent_shape(args.image_size),
                  "num_classes": 1000, "image_size": args.image_size}
        net = build(config).to(world.device).eval().requires_grad_(False)
        torch.nn.init.normal_(net.final_layer.linear.weight, std=0.1)  # else every image is noise
        sampler = ImageSampler(net, space, config, world)
        count = args.batches * args.batch_size
        rates = {"bare": [], "sample.py": []}
        bare(sampler, count, args.batch_size)  # warm-up
        for turn in range(args.turns):
            for name, work in (("bare", bare), ("sample.py", full(Path(folder, str(turn))))):
                began = time.perf_counter()
                work(sampler, count, args.batch_size)
                rates[name].append(count / (time.perf_counter() - began))
        medians = {name: statistics.median(values) for name, values in rates.items()}
        for line in describe_environment(world)[1:]:
            print(line)
        print(f"{args.model}, {args.image_size} px, VAE {args.vae}, batches of {args.batch_size}")
        for name, median in medians.items():
            print(f"{name:<10}{median:9.1f} images/s   all turns: "
                  f"{' '.join(f'{rate:.1f}' for rate in rates[name])}")
        print(f"ratio {medians['sample.py'] / medians['bare']:.3f}")


def bare(sampler, count, batch_size):
    """Noise, network and decoder alone."""
    for rows in sampler.batches(count, batch_size):
        sampler.images(rows)
    if sampler.world.device.type == "cuda":
        torch.cuda.synchronize()


def full(folder):
    """The loop of sample.py, into a new folder."""
    def work(sampler, count, batch_size):
        args = sample.parse_args(["--ckpt", "-", "--num-fid-samples", str(count), "--sample-dir",
                                  str(folder), "--per-proc-batch-size", str(batch_size)])
        folder.mkdir()
        sample.draw(args, sampler, None)
    return work


if __name__ == "__main__":
    main(parse_args())

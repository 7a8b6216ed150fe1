"""Compare the images per second of sample.py, PNG files included, with the bare network.

    python benchmarks/sampling.py                     # CPU, two minutes
    python benchmarks/sampling.py --model DiT-B/4 --image-size 256 --vae ema --batches 40   # a GPU

Both make the same images from random weights, in turns. It prints the rates of all turns, their
medians and the ratio, which should be .9 or more. On a CPU, compressing PNG files takes time from
the network; on a GPU it overlaps.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import sample  # noqa: E402
from dataset.vae import load_codec  # noqa: E402
from engine.distributed import start_processes  # noqa: E402
from engine.errors import run_main  # noqa: E402
from engine.log import describe_environment  # noqa: E402
from engine.options import Parser, int_range  # noqa: E402
from metrics.statistics import rank_batches  # noqa: E402
from models import build  # noqa: E402
from sample import ImageSampler  # noqa: E402


def parse_args(argv=None):
    parser = Parser(__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="DiT-S/4", help="network, such as DiT-B/4")
    parser.add_argument("--image-size", type=int_range(1), default=64,
                        help="side of an image in pixels")
    parser.add_argument("--vae", default="none", help="decoder: none, ema, mse or a folder")
    parser.add_argument("--precision", default="tf32", choices=("fp32", "tf32", "bf16"),
                        help="as in sample.py")
    parser.add_argument("--batch-size", type=int_range(1), default=25, help="images per batch")
    parser.add_argument("--batches", type=int_range(1), default=2, help="batches per turn")
    parser.add_argument("--turns", type=int_range(1), default=5, help="turns of each of the two")
    return parser.parse_args(argv)


def main(args):
    with start_processes(args.precision) as world, tempfile.TemporaryDirectory() as folder:
        codec = load_codec(args.vae, world.device, precision=args.precision)
        config = {"model": args.model, "latent_shape": codec.latent_shape(args.image_size),
                  "num_classes": 1000, "image_size": args.image_size, "scale": codec.scale}
        net = build(config).to(world.device).eval().requires_grad_(False)
        torch.nn.init.normal_(net.final_layer.linear.weight, std=0.1)  # a fresh net returns zeros
        sampler = ImageSampler(net, codec, config, world)
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
    """Make the images with noise, network and decoder alone."""
    for rows in rank_batches(count, batch_size, sampler.world):
        sampler.images(rows)
    if sampler.world.device.type == "cuda":
        torch.cuda.synchronize()


def full(folder):
    """A function like bare that runs the loop of sample.py, into a new folder."""
    def work(sampler, count, batch_size):
        args = sample.parse_args(["--ckpt", "-", "--num-fid-samples", str(count), "--sample-dir",
                                  str(folder), "--per-proc-batch-size", str(batch_size)])
        folder.mkdir()
        sample.make_images(args, sampler, None)
    return work


if __name__ == "__main__":
    run_main(main, parse_args)

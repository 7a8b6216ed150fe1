"""Estimate, on paper, how training scales to many H100: communication of a step against arithmetic.

    python benchmarks/scaling.py                      # the recipes' batches, a minute
    python benchmarks/scaling.py --per-gpu-batch 32   # the batch grows with the GPUs
    python benchmarks/scaling.py --network 50         # one network adapter a node instead of eight

It prints a Markdown table: what a step of MeanFlow (kappa > 0) or improved MeanFlow costs, and what
limits it: arithmetic if that takes 90 % of the step or more, else the larger part of communication,
latency or bandwidth. Nothing is measured. A step has five passes, in this order: forward,
conditional velocity of the rows with r < t, velocity of the null label, derivative of the rows with
r < t, backward.

Arithmetic of a pass = its FLOPs / (share * peak). FLOPs are counted, the share is assumed. The rank
with most rows counts: of one row a GPU some ranks have r < t on all of their rows.

Communication. DDP all-reduces float32 gradients, in buckets of two blocks, during the backward.
Fully sharded, each pass gathers the weights of every block that it uses, in the precision of the
products, the backward once more, and it reduce-scatters float32 gradients. The weights outside the
blocks are gathered once a step. A collective of S bytes over n GPUs takes

    ring:  start + hops * latency + rounds * (n-1)/n * S / bandwidth,   rounds: 2 of an all-reduce,
    tree:  start + 2 (7 + log2 nodes) * latency + 2 S / bandwidth       (all-reduce only)   else 1

whichever is less, of two protocols. Formulas, latencies and the bandwidth of NVLink are NCCL's own,
by which it chooses (NVIDIA/nccl, tuning.cc and its successors). A ring crosses each node once, so
its bandwidth between nodes is what all adapters of a node send together.

A pass takes max(arithmetic + one collective, all its collectives): all but one overlap. That is the
best case. Left out: the host that launches kernels, optimiser, data, in-network reduction.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[1]))
from gpu_hours import PEAKS  # noqa: E402
from train_step import FlopCounter  # noqa: E402

from engine.errors import run_main  # noqa: E402
from engine.options import Parser, float_range, int_range  # noqa: E402
from engine.sharding import bucket_mib  # noqa: E402
from improved_meanflow import ImprovedMeanFlow  # noqa: E402
from meanflow import MeanFlow  # noqa: E402
from models import DiT_models  # noqa: E402

MODELS = ("DiT-B/4", "DiT-B/2", "DiT-M/2", "DiT-L/2", "DiT-XL/2", "iMF-XL/2")
GPUS = (8, 64, 256)
NODE = 8  # GPUs
NVLINK = 360e9  # B/s that each GPU sends in a ring: NCCL's figure for Hopper, of a peak of 450
# start, latency of a hop over NVLink and over the network (s), share of the bandwidth: NCCL's
# figures for the protocols Simple and LL128
RING = ((8.4e-6, 3.4e-6, 14.0e-6, 1.0), (14.0e-6, 1.9e-6, 4.0e-6, 0.92))
TREE = ((8.4e-6, 4.0e-6, 14.0e-6, 0.92), (14.0e-6, 1.25e-6, 8.5e-6, 0.86))


@dataclass(frozen=True)
class Network:
    """What a step's cost depends on; FLOPs are of one row, and of one forward pass."""

    forward: float  # FLOPs
    velocity: float
    derivative: float
    blocks: dict  # name of a list of blocks -> parameters of each block
    rest: int  # parameters outside the blocks
    velocity_lists: tuple  # names of the lists of blocks that a pass uses
    derivative_lists: tuple
    bucket: float  # bytes of gradients that DDP sends at once

    @property
    def parameters(self):
        return self.rest + sum(map(sum, self.blocks.values()))


@dataclass(frozen=True)
class Collective:
    """Seconds of one collective: waiting for hops, and sending bytes."""

    latency: float
    transfer: float

    @property
    def seconds(self):
        return self.latency + self.transfer


def parse_args(argv=None):
    parser = Parser(__doc__.split("\n", 1)[0])
    parser.add_argument("--share", type=float_range(0, 1, above=True), default=0.4,
                        help="share of the GPU's peak that the arithmetic of a step reaches")
    parser.add_argument("--network", type=float_range(0, above=True), default=400.0,
                        help="GB/s that a node of 8 GPUs sends to others; 400 is eight adapters of "
                             "400 Gb/s (DGX H100)")
    parser.add_argument("--per-gpu-batch", type=int_range(0), default=0,
                        help="rows of each GPU; 0 = the recipe's global batch (DiT 256, iMF 1024), "
                             "divided")
    return parser.parse_args(argv)


# ---- what a step costs -----------------------------------------------------------------------


def ring(size, gpus, network, rounds=1):
    """The Collective of size bytes over gpus: all-gather, reduce-scatter, or (rounds=2) all-reduce.

    network: B/s that a node sends to others.
    """
    hops, between = rounds * (gpus - 1), rounds * (math.ceil(gpus / NODE) - 1)
    return min((Collective(start + (hops - between) * inside + between * outside,
                           hops / gpus * size / (bandwidth(gpus, network) * share))
                for start, inside, outside, share in RING), key=lambda c: c.seconds)


def all_reduce(size, gpus, network):
    """The Collective of an all-reduce of size bytes, by ring or tree."""
    local, nodes = min(gpus, NODE) - 1, math.ceil(gpus / NODE)
    trees = (Collective(start + 2 * (local * inside + math.log2(nodes) * outside),
                        2 * size / (bandwidth(gpus, network) * share))
             for start, inside, outside, share in TREE)
    return min((ring(size, gpus, network, rounds=2), *trees), key=lambda c: c.seconds)


def bandwidth(gpus, network):
    """B/s of a ring: that of NVLink, or of the node's network if that is less."""
    return NVLINK if gpus <= NODE else min(NVLINK, network)


def overlapped(arithmetic, collectives):
    """Seconds of a pass: one collective cannot be hidden, the others can."""
    if not collectives:
        return arithmetic
    times = [c.seconds for c in collectives]
    return max(arithmetic + times[-1], sum(times))


def passes(net, rows, tail):
    """(FLOPs, names of the lists of blocks it uses) of each pass, the backward last.

    rows, tail: of one GPU, in all and with r < t.
    """
    everything = tuple(net.blocks)
    return [(net.forward * rows, everything), (net.velocity * tail, net.velocity_lists),
            (net.velocity * rows, net.velocity_lists),
            (net.derivative * tail, net.derivative_lists), (2 * net.forward * rows, everything)]


def data_parallel(net, steps, gpus, network, speed):
    """(seconds of a step, its Collectives) in DistributedDataParallel; speed in FLOP/s."""
    size, count = 4 * net.parameters, math.ceil(4 * net.parameters / net.bucket)
    collectives = [all_reduce(size / count, gpus, network)] * count
    *before, (backward, _) = steps
    return (sum(flops for flops, _ in before) / speed + overlapped(backward / speed, collectives),
            collectives)


def fully_sharded(net, steps, gpus, network, speed):
    """(seconds of a step, its Collectives) with fully sharded weights; speed in FLOP/s."""
    def collectives(names, size):
        return [ring(size * count, gpus, network) for name in names for count in net.blocks[name]]

    seconds, everything = 0, []
    for i, (flops, names) in enumerate(steps):
        found = collectives(names, 2)  # bytes of a bfloat16 weight
        if i == 0:
            found.insert(0, ring(2 * net.rest, gpus, network))
        if i == len(steps) - 1:
            found += [*collectives(names, 4), ring(4 * net.rest, gpus, network)]
        seconds += overlapped(flops / speed, found)
        everything += found
    return seconds, everything


def limit(arithmetic, seconds, collectives):
    """What a step waits for."""
    if arithmetic >= 0.9 * seconds:
        return "arithmetic"
    latency = sum(c.latency for c in collectives)
    return "latency" if latency > sum(c.transfer for c in collectives) else "bandwidth"


# ---- the networks ----------------------------------------------------------------------------


def describe(model):
    """The Network of this name, counted without computing."""
    improved = model.startswith("iMF")
    method = (ImprovedMeanFlow if improved else MeanFlow)(num_classes=1000)
    with FakeTensorMode():  # tensors with a shape and no data
        net = DiT_models[model]()
        z, r, t = torch.empty(1, 4, 32, 32), torch.empty(1), torch.empty(1)
        y = torch.zeros(1, dtype=torch.int64)
        scales = (t, t, t) if improved else ()
        flops = [count(lambda: net(z, r, t, y, *scales)),
                 count(lambda: method.velocity(net, z, t, y, *scales[:1])),
                 count(lambda: method.time_derivative(net, z, r, t, y, *scales, z))]
        blocks = {name: [sum(p.numel() for p in block.parameters()) for block in module]
                  for name, module in net.named_children()
                  if isinstance(module, torch.nn.ModuleList)}
        rest = sum(p.numel() for p in net.parameters()) - sum(map(sum, blocks.values()))
        bucket = bucket_mib(net) * 2**20
    return Network(*flops, blocks=blocks, rest=rest, bucket=bucket,
                   velocity_lists=tuple(name for name in blocks if name != "u_heads"),
                   derivative_lists=tuple(name for name in blocks if name != "v_heads"))


def count(work):
    """FLOPs of work(), without gradient."""
    # Plain attention: not every version of PyTorch counts the FLOPs of fused attention
    with FlopCounter() as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.total


def row(model, net, gpus, args):
    """The cells of a model on so many GPUs."""
    improved = model.startswith("iMF")
    batch = args.per_gpu_batch * gpus or (1024 if improved else 256)
    tail = batch // 2 if improved else batch // 4
    steps = passes(net, batch / gpus, math.ceil(tail / gpus))
    speed = args.share * PEAKS["H100"]
    arithmetic = sum(flops for flops, _ in steps) / speed
    cells = [model, f"{gpus}", f"{batch / gpus:g}", f"{1e3 * arithmetic:.1f}"]
    for kind in (data_parallel, fully_sharded):
        seconds, collectives = kind(net, steps, gpus, 1e9 * args.network, speed)
        cells += [f"{1e3 * sum(c.seconds for c in collectives):.1f}", f"{1e3 * seconds:.1f}",
                  f"{arithmetic / seconds:.0%}", limit(arithmetic, seconds, collectives)]
    return cells


def main(args):
    print(f"NVLink {NVLINK / 1e9:.0f} GB/s a GPU, network {args.network:g} GB/s a node, "
          f"{args.share:.0%} of {PEAKS['H100'] / 1e12:.0f} TFLOP/s; times in ms\n")
    heads = ["", "GPUs", "rows a GPU", "arithmetic"]
    for kind in ("DDP", "sharded"):
        heads += [f"{kind}: communication", "step", "arithmetic's share", "limit"]
    print(f"| {' | '.join(heads)} |\n" + "|---" * len(heads) + "|")
    for model in MODELS:
        net = describe(model)
        for gpus in GPUS:
            print(f"| {' | '.join(row(model, net, gpus, args))} |", flush=True)


if __name__ == "__main__":
    run_main(main, parse_args)

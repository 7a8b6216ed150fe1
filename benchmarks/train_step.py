"""Compare the time and memory of a MeanFlow step with a flow-matching step of the same network.

    python benchmarks/train_step.py                   # CPU, four minutes on two cores
    python benchmarks/train_step.py --model DiT-B/2 --batch-size 128 --precision bf16   # a GPU

It prints a table of medians with a row per variant: flow matching, our step with and without
guidance, and two formulations found elsewhere, eager and compiled. A step is forward and backward,
without optimiser. The variants are timed in turn, so other load on the machine meets all of them.
It runs on the first GPU, if any; CUDA_VISIBLE_DEVICES= selects the CPU.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # hides the profiler's start and stop lines
import torch  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.flop_counter import flop_registry  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))
from engine.distributed import run_main, start_processes  # noqa: E402
from engine.log import describe_environment  # noqa: E402
from engine.options import Parser, float_range, int_range  # noqa: E402
from improved_meanflow import ImprovedMeanFlow  # noqa: E402
from meanflow import MeanFlow  # noqa: E402
from models import DiT_models, ImprovedDiT  # noqa: E402

NUM_CLASSES = 1000


@dataclass
class Variant:
    """One way to make a step, and its measurements."""

    name: str
    loss: object  # () -> scalar tensor with gradient
    compiled: bool
    seconds: list = field(default_factory=list)  # one per repetition
    flops: int = 0  # of matrix products, forward and backward; counted for eager variants
    memory: int = 0  # peak bytes


def parse_args(argv=None):
    parser = Parser(__doc__.split("\n", 1)[0])
    parser.add_argument("--model", choices=DiT_models, default="DiT-S/4", metavar="NAME",
                        help="network, such as DiT-B/4")
    parser.add_argument("--input-size", type=int_range(1), default=32,
                        help="side of the 4-channel input; 32 is the latent of 256 pixels")
    parser.add_argument("--batch-size", type=int_range(4), default=16, help="rows in the batch")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32",
                        help="as in train.py")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True,
                        help="measure the compiled variants too")
    parser.add_argument("--checkpoint-activations", action="store_true",
                        help="recompute the blocks in the backward, in every variant")
    parser.add_argument("--seconds", type=float_range(0), default=100.0,
                        help="seconds of timing in all; at least three repetitions are made")
    args = parser.parse_args(argv)
    patch = int(args.model.split("/")[1])
    if args.input_size % patch:
        parser.error(f"--input-size must be a multiple of the patch size {patch}, got "
                     f"{args.input_size}; choose another or a model with another patch size")
    return args


# ---- the variants ----------------------------------------------------------------------------


def build_variants(net, x, y, *, compile):
    """The list of Variants: x (B, C, H, W) and labels y (B,) are the batch of all."""
    improved, variants = isinstance(net, ImprovedDiT), []
    make = ImprovedMeanFlow if improved else MeanFlow
    settings = {
        "flow matching": {"ratio": 0, "omega_max": 1},
        "ours, no guidance": {"omega_max": 1},
        "ours": {},
    } if improved else {
        "flow matching": {"ratio": 0},
        "ours, no guidance": {},
        "ours, tangent = network": {"tangent": "network"},
        "ours, kappa = 0": {"cfg": 3.0},
        "ours, kappa = .5": {"cfg": 2.0, "kappa": 0.5},
    }
    for compiled in (False, True) if compile else (False,):
        forward = torch.compile(net) if compiled else net
        for name, options in settings.items():
            method = make(num_classes=NUM_CLASSES, **options)
            draws = method.draw(x.shape, device=x.device)
            if compiled:
                method.compile()
            variants.append(Variant(name, our_loss(method, net, forward, x, y, draws), compiled))
        # torch.compile cannot differentiate twice: double backward runs eager only
        rivals = {"whole-batch JVP, then forward": separate_passes,
                  "whole-batch JVP with graph": forward_mode, "double backward": double_backward}
        for name, derive in list(rivals.items())[:2 if compiled else 3] if not improved else ():
            derive = torch.compile(derive) if compiled else derive
            method = MeanFlow(num_classes=NUM_CLASSES)
            draws = method.draw(x.shape, device=x.device)
            loss = derivative_loss(method, net, derive, x, y, draws)
            variants.append(Variant(name, loss, compiled))
    return variants


def our_loss(method, net, forward, x, y, draws):
    """Our loss without arguments, as a Variant wants it."""
    return lambda: method.loss(net, x, y, draws, forward=forward).loss


def derivative_loss(method, net, derive, x, y, draws):
    """The loss without guidance if derive returns u and du/dt, both of the whole batch."""
    def loss():
        t = draws.t[:, None, None, None]
        z, v = (1 - t) * x + t * draws.eps, draws.eps - x
        labels = torch.where(draws.dropped, NUM_CLASSES, y)
        u, du_dt = derive(net, z, draws.r, draws.t, labels, v)
        interval = (draws.t - draws.r)[:, None, None, None]
        error = (u.float() - (v - interval * du_dt.float()).detach()).square().sum(dim=(1, 2, 3))
        return (method.weight(error) * error).mean()
    return loss


def separate_passes(net, z, r, t, y, v):
    """u and du/dt (B, C, H, W): torch.func.jvp without graph on all rows, then a forward for u, as
    NVIDIA's FastGen does."""
    with torch.no_grad():
        _, du_dt = forward_mode(net, z, r, t, y, v)
    return net(z, r, t, y), du_dt


def forward_mode(net, z, r, t, y, v):
    """u and du/dt (B, C, H, W) by torch.func.jvp, with a graph for the gradient of u."""
    tangents = (v, torch.zeros_like(r), torch.ones_like(t))
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(lambda z, r, t: net(z, r, t, y), (z, r, t), tangents)


def double_backward(net, z, r, t, y, v):
    """u and du/dt (B, C, H, W) by differentiating a vector-Jacobian product, as older ports do."""
    tangents = (v, torch.zeros_like(r), torch.ones_like(t))
    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.jvp(
            lambda z, r, t: net(z, r, t, y), (z, r, t), tangents, create_graph=True)


# ---- measuring -------------------------------------------------------------------------------


def step(variant, net, world):
    """Forward and backward; the new gradients replace the old."""
    net.zero_grad()
    with world.autocast():
        loss = variant.loss()
    loss.backward()


def time_step(variant, net, world):
    """Seconds of one step, from an idle GPU to an idle GPU."""
    wait = torch.cuda.synchronize if world.device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    step(variant, net, world)
    wait()
    return time.perf_counter() - start


class FlopCounter(TorchDispatchMode):
    """Counts the FLOPs of matrix products, convolutions and attention; a multiply-add is two.

    The formulas are PyTorch's. Its own counter also hooks modules, which fails in double backward.
    """

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket in flop_registry:
            formula = flop_registry[function.overloadpacket]
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def count_flops(variant, net, world):
    """FLOPs of one step, forward and backward."""
    with FlopCounter() as counter:
        step(variant, net, world)
    return counter.total


def peak_memory(variant, net, world):
    """Peak bytes of tensors alive in one step: weights, inputs, activations, gradients.

    On CUDA the allocator reports it. On a CPU it is the sum of the allocations and releases that
    the profiler lists; scratch space inside the matrix libraries is not in it.
    """
    net.zero_grad()
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step(variant, net, world)
        return torch.cuda.max_memory_allocated()
    held = sum(a.numel() * a.element_size() for a in (*net.parameters(), *net.buffers()))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as profiler:
        step(variant, net, world)
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    peak = now = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return held + peak


def product_ceiling(world):
    """FLOP/s of the fastest of some square matrix products, in the precision of the step."""
    cuda = world.device.type == "cuda"
    size = 8192 if cuda else 2048
    dtype = torch.bfloat16 if world.precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=world.device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(20 if cuda else 5):
        start = time.perf_counter()
        a @ b
        if cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def measure(variants, net, world, seconds):
    """Fill in each variant's FLOPs, memory and interleaved timings."""
    for variant in variants:
        print(f"warming up: {variant.name}{', compiled' if variant.compiled else ''}",
              file=sys.stderr, flush=True)
        if variant.compiled:
            step(variant, net, world)
        else:
            variant.flops = count_flops(variant, net, world)
        variant.memory = peak_memory(variant, net, world)
    start = time.perf_counter()
    while len(variants[0].seconds) < 3 or time.perf_counter() - start < seconds:
        for variant in variants:
            variant.seconds.append(time_step(variant, net, world))


# ---- the table -------------------------------------------------------------------------------


def table(variants, batch, ceiling):
    """The lines of a Markdown table, a row per variant."""
    heads = ["step", "", "seconds", "time", "FLOPs", "memory", "peak MiB", "images/s", "GFLOP/s",
             "of ceiling"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    flow = {v.compiled: v for v in variants if v.name == "flow matching"}
    flops = {v.name: v.flops for v in variants if not v.compiled}
    for v in variants:
        seconds, base = statistics.median(v.seconds), flow[v.compiled]
        rate = flops[v.name] / seconds
        cells = [
            v.name,
            "compiled" if v.compiled else "eager",
            f"{seconds:.4f}",
            f"{seconds / statistics.median(base.seconds):.2f}",
            f"{flops[v.name] / flops[base.name]:.2f}",
            f"{v.memory / base.memory:.2f}",
            f"{v.memory / 2**20:.0f}",
            f"{batch / seconds:.1f}",
            f"{rate / 1e9:.0f}",
            f"{rate / ceiling:.0%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(args):
    with start_processes(args.precision) as world:
        torch.manual_seed(0)
        net = DiT_models[args.model](input_size=args.input_size, num_classes=NUM_CLASSES)
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.02)  # a fresh net has zeros, which are untypical
        net.checkpoint_activations = args.checkpoint_activations
        net.to(world.device)
        x = torch.randn(args.batch_size, 4, args.input_size, args.input_size, device=world.device)
        y = torch.randint(NUM_CLASSES, (args.batch_size,), device=world.device)
        variants = build_variants(net, x, y, compile=args.compile)
        measure(variants, net, world, args.seconds)
        ceiling = product_ceiling(world)
        print(*describe_environment(world), sep="\n")
        print(f"{args.model}, input {args.input_size}, batch {args.batch_size}, medians of "
              f"{len(variants[0].seconds)} interleaved repetitions; time, FLOPs and memory are "
              f"ratios to flow matching of the same mode; product ceiling "
              f"{ceiling / 1e9:.0f} GFLOP/s\n")
        print(*table(variants, args.batch_size, ceiling), sep="\n")


if __name__ == "__main__":
    run_main(main, parse_args)

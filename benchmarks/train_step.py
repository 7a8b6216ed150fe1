"""Compare the time and memory of a MeanFlow step with a flow-matching step of the same network.

    python benchmarks/train_step.py                   # CPU, a quarter of an hour
    python benchmarks/train_step.py --model iMF-B/2 --batch-size 4        # improved MeanFlow
    python benchmarks/train_step.py --model DiT-B/2 --batch-size 128 --precision bf16   # a GPU

It prints Markdown: what was measured, a table of medians with a row per formulation of the step,
and a table of the errors of finite differences. A step is forward and backward, without optimiser.
The formulations are timed in turn. On a CPU it measures CPU time, so that other jobs hardly change
the figures; OMP_NUM_THREADS=1 keeps threads that wait for one another out of them. It runs on the
first GPU, if any; CUDA_VISIBLE_DEVICES= selects the CPU.

Modes: "eager"; "compiled" by torch.compile, but for double backward, which it cannot differentiate
twice; and on a GPU "CUDA graphs", where also the passes without gradient are replayed from CUDA
graphs (mode="reduce-overhead"); their memory is left out, because the allocator does not see it.
"""

import argparse
import copy
import datetime
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # hides the profiler's start and stop lines
import torch  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.flop_counter import flop_registry  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))
from engine.distributed import start_processes  # noqa: E402
from engine.errors import run_main  # noqa: E402
from engine.log import describe_environment  # noqa: E402
from engine.options import Parser, float_range, int_range  # noqa: E402
from improved_meanflow import ImprovedMeanFlow  # noqa: E402
from meanflow import MeanFlow, on_path, per_row  # noqa: E402
from models import DiT_models, ImprovedDiT  # noqa: E402
from soflow import SoFlow  # noqa: E402

NUM_CLASSES = 1000
MODES = ("eager", "compiled", "CUDA graphs")
# Steps of finite differences in t. 1e-4 and 5e-3: NVlabs/FastGen for MeanFlow, in its default and
# for video; 1e-3: FastGen for sCM; 5e-3: also WZDTHU/TiM
STEPS = (1e-4, 1e-3, 5e-3, 1e-2)
USUAL_STEP = 5e-3


@dataclass
class Variant:
    """One way to make a step in one mode, and its measurements."""

    name: str
    mode: str  # of MODES
    loss: object = None  # () -> scalar tensor with gradient
    seen: tuple = None  # inputs of the last derivative after the network, and du/dt itself
    seconds: list = field(default_factory=list)  # one per turn
    flops: int = 0  # of matrix products, forward and backward; counted in eager mode
    memory: int = 0  # peak bytes; 0 where not measured
    error: float = None  # of du/dt where r < t, relative to float64
    failure: str = ""  # why it cannot be made


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
                        help="measure the compiled modes too")
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


# ---- the formulations ------------------------------------------------------------------------

# Derivatives of all rows: (net, z, r, t, *given) -> (output of net with gradient, du/dt). The last
# of ``given`` is the tangent of z. The others follow z, r, t as arguments of the network: labels,
# and for an ImprovedDiT omega, t_min, t_max. z, the tangent, u and du/dt are (B, C, H, W).


def separate_passes(net, z, r, t, *given):
    """torch.func.jvp without graph, then a forward, as NVlabs/FastGen does."""
    u, *inputs = average_velocity(net, z, r, t, *given)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        _, du_dt = torch.func.jvp(u, *inputs)
    return net(z, r, t, *given[:-1]), du_dt


def separate_difference(net, z, r, t, *given):
    """A central difference without graph, then a forward: FastGen's option use_jvp_finite_diff."""
    with torch.no_grad():
        du_dt = central_difference(net, z, r, t, *given)
    return net(z, r, t, *given[:-1]), du_dt


def forward_mode(net, z, r, t, *given):
    """torch.func.jvp with a graph for the gradient of the output, as the official JAX code and
    direct ports of it."""
    _, *inputs = average_velocity(net, z, r, t, *given)
    with sdpa_kernel(SDPBackend.MATH):
        out, tangents = torch.func.jvp(lambda z, r, t: net(z, r, t, *given[:-1]), *inputs)
    return out, first(tangents)


def double_backward(net, z, r, t, *given):
    """The derivative of a vector-Jacobian product, as noamelata/MeanFlow and other ports do."""
    _, *inputs = average_velocity(net, z, r, t, *given)
    with sdpa_kernel(SDPBackend.MATH):
        out, tangents = torch.autograd.functional.jvp(
            lambda z, r, t: net(z, r, t, *given[:-1]), *inputs, create_graph=True)
    return out, first(tangents)


def central_difference(net, z, r, t, *given, step=USUAL_STEP):
    """du/dt by two evaluations at t - step and t + step along the path; r stays."""
    u, _, (tangent, *_) = average_velocity(net, z, r, t, *given)
    after = u(z + step * tangent, r, t + step).to(z.dtype)
    before = u(z - step * tangent, r, t - step).to(z.dtype)
    return (after - before) / (2 * step)


def average_velocity(net, z, r, t, *given):
    """(u(z, r, t) alone, primals, tangents of the path)."""
    *given, tangent = given
    heads = {"heads": "u"} if len(given) > 1 else {}  # of an ImprovedDiT
    return (lambda z, r, t: first(net(z, r, t, *given, **heads)), (z, r, t),
            (tangent, torch.zeros_like(r), torch.ones_like(t)))


def first(output):
    """u (B, C, H, W) of a DiT's output u or an ImprovedDiT's (u, v)."""
    return output[0] if isinstance(output, tuple) else output


RIVALS = {
    "JVP of all rows without graph, then a forward": separate_passes,
    "central difference of all rows, then a forward": separate_difference,
    "JVP of all rows, with graph": forward_mode,
    "double backward of all rows": double_backward,
}


def ours(improved):
    """Our formulations by name, the method of each, and of which du/dt is a difference."""
    make = partial(ImprovedMeanFlow if improved else MeanFlow, num_classes=NUM_CLASSES)
    plain = partial(make, omega_max=1) if improved else make
    found = {
        "flow matching": plain(ratio=0),
        "ours": plain(),
        "ours, but a central difference for the derivative": plain(),
    }
    found["ours, but a central difference for the derivative"].time_derivative = central_difference
    if improved:
        return found, {"ours, omega_max = 8": make(omega_max=8.0)}
    return found, {
        "ours, `--tangent network`": make(tangent="network"),
        "ours, kappa = 0": make(cfg=3.0),
        "ours, kappa = .5": make(cfg=2.0, kappa=0.5),
        "SoFlow, no guidance": SoFlow(num_classes=NUM_CLASSES, cfg=1.0),
        "SoFlow, kappa = 0": SoFlow(num_classes=NUM_CLASSES, kappa=0.0),
        "SoFlow, kappa = .75": SoFlow(num_classes=NUM_CLASSES)}


def build_variants(net, x, y, *, modes):
    """The list of Variants: x (B, C, H, W) and labels y (B,) are the batch of all."""
    improved, variants = isinstance(net, ImprovedDiT), []
    for mode in modes:
        forward = net if mode == "eager" else torch.compile(net, fullgraph=True)
        unguided, guided = ours(improved)
        for name, method in unguided.items():
            if mode != "CUDA graphs" or name != "flow matching":
                variants.append(our_variant(name, mode, method, net, forward, x, y))
        for name, derive in RIVALS.items() if mode != "CUDA graphs" else ():
            if mode == "eager" or derive is not double_backward:
                method = ours(improved)[0]["ours"]
                variants.append(rival_variant(name, mode, method, net, derive, x, y))
        for name, method in guided.items():
            variants.append(our_variant(name, mode, method, net, forward, x, y))
    return variants


def our_variant(name, mode, method, net, forward, x, y):
    """Our step of the batch x (B, C, H, W), y (B,), as a Variant."""
    # SoFlow at half of the training
    draws = method.draw(x.shape, device=x.device, step=1, total=2)
    variant = Variant(name, mode)
    if mode == "compiled":
        method.compile()
    if mode == "CUDA graphs":
        replay_passes(method)
    if "time_derivative" in method.passes:
        method.time_derivative = watched(method.time_derivative, variant)
    variant.loss = lambda: method.loss(net, x, y, draws, forward=forward).loss
    return variant


def replay_passes(method):
    """Compile the passes without gradient into CUDA graphs."""
    method.compile(mode="reduce-overhead")
    for name in method.passes:
        # The next replay overwrites the output of a graph
        compiled = getattr(method, name)
        setattr(method, name, lambda *rows, compiled=compiled: compiled(*rows).clone())


def rival_variant(name, mode, method, net, derive, x, y):
    """A step without guidance whose every pass is of all rows, as a Variant; derive as in RIVALS.

    For improved MeanFlow the tangent is the network's own velocity, one more pass.
    """
    variant, draws = Variant(name, mode), method.draw(x.shape, device=x.device)
    if mode == "compiled":
        method.compile()
        derive = torch.compile(derive)
    derive = watched(derive, variant)

    def loss():
        z, v = on_path(x, draws)
        given, tangent = (torch.where(draws.dropped, NUM_CLASSES, y),), v
        if isinstance(net, ImprovedDiT):
            with torch.no_grad():
                tangent = method.velocity(net, z, draws.t, y, draws.omega)
            given = (*given, draws.omega, draws.t_min, draws.t_max)
        out, du_dt = derive(net, z, draws.r, draws.t, *given, tangent)
        targets = ((v - per_row(draws.t - draws.r, x) * du_dt).detach(), v)
        outputs = out if isinstance(out, tuple) else (out,)
        errors = [(a.float() - b).square().flatten(1).sum(1) for a, b in zip(outputs, targets)]
        return sum(method.weight(error) * error for error in errors).mean()

    variant.loss = loss
    return variant


def watched(derive, variant):
    """derive, which leaves its inputs and du/dt in ``variant.seen``."""
    def derivative(net, *rows):
        out = derive(net, *rows)
        variant.seen = rows, (out[1] if isinstance(out, tuple) else out).detach()
        return out
    return derivative


# ---- measuring -------------------------------------------------------------------------------


def step(variant, net, world):
    """Forward and backward; the new gradients replace the old."""
    net.zero_grad()
    with world.autocast():
        loss = variant.loss()
    loss.backward()


def time_step(variant, net, world):
    """Seconds of one step: of a GPU from idle to idle, of a CPU those that its threads work."""
    if world.device.type == "cpu":
        start = time.process_time()  # other jobs on the machine are not in it
        step(variant, net, world)
        return (time.process_time() - start) / torch.get_num_threads()
    torch.cuda.synchronize()
    start = time.perf_counter()
    step(variant, net, world)
    torch.cuda.synchronize()
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
    """Peak bytes of tensors alive in one step: weights, activations, gradients, work space.

    On CUDA the allocator reports it. On a CPU it is the sum of the allocations and releases that
    the profiler lists; scratch space inside the matrix libraries is not in it.
    """
    net.zero_grad()
    gc.collect()
    held = sum(a.numel() * a.element_size() for a in (*net.parameters(), *net.buffers()))
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()  # also what other variants keep
        step(variant, net, world)
        return held + torch.cuda.max_memory_allocated() - before
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


def product_ceiling(world, size):
    """FLOP/s of the fastest of some products of size x size, in the precision of the step."""
    cuda = world.device.type == "cuda"
    dtype = torch.bfloat16 if world.precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=world.device, dtype=dtype) for _ in range(2))
    clock = time.perf_counter if cuda else time.process_time
    best = float("inf")
    for _ in range(20 if cuda else 5):
        start = clock()
        a @ b
        if cuda:
            torch.cuda.synchronize()
        best = min(best, clock() - start)
    threads = 1 if cuda else torch.get_num_threads()
    return 2 * size**3 / best * threads


def warm_up(variant, net, world):
    """Compile a variant, and fill in its FLOPs and memory."""
    print(f"warming up: {variant.name}, {variant.mode}", file=sys.stderr, flush=True)
    if variant.mode == "eager":
        variant.flops = count_flops(variant, net, world)
    else:  # every variant compiles the same functions anew
        with torch._dynamo.config.patch(recompile_limit=64):
            # CUDA graphs: warm up, record, replay
            for _ in range(3 if variant.mode == "CUDA graphs" else 1):
                step(variant, net, world)
    if variant.mode != "CUDA graphs":  # the allocator does not see a replay
        variant.memory = peak_memory(variant, net, world)


def measure(variants, net, world, seconds):
    """Fill in each variant's FLOPs, memory, error and timings, made in turns; or why it fails."""
    for variant in variants:
        try:
            warm_up(variant, net, world)
        # Of memory, what autograd or the compiler cannot do, or autocast where a method refuses it
        except (RuntimeError, ValueError) as error:
            variant.failure = str(error).splitlines()[0]
    variants = [v for v in variants if not v.failure]
    exact = copy.deepcopy(net).double()
    for variant in (v for v in variants if v.seen):
        rows, du_dt = variant.seen
        variant.error = relative_error(du_dt, rows, exact_derivative(exact, rows))
    del exact
    start = time.perf_counter()
    while variants and (len(variants[0].seconds) < 3 or time.perf_counter() - start < seconds):
        for variant in variants:
            variant.seconds.append(time_step(variant, net, world))


# ---- errors of the derivative ----------------------------------------------------------------


def exact_derivative(net, rows):
    """du/dt (B, C, H, W) by forward mode; net is in float64, rows as in Variant.seen."""
    u, *inputs = average_velocity(net, *(a.double() if a.is_floating_point() else a for a in rows))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(u, *inputs)[1]


def relative_error(du_dt, rows, exact):
    """|du/dt - exact| / |exact|, (B, C, H, W) both, over the rows with r < t."""
    used = rows[1] < rows[2]
    return float((du_dt[used].double() - exact[used]).norm() / exact[used].norm())


def difference_errors(net, rows, device):
    """The lines of a Markdown table: relative errors of du/dt, JVP and central differences.

    net is in float32; rows: what follows it in a derivative, as in Variant.seen.
    """
    exact = exact_derivative(copy.deepcopy(net).double(), rows)
    lines = ["| derivative | float32 | bfloat16 autocast |", "|---|---|---|"]
    forms = {"JVP": separate_passes} | {
        f"central difference, step {step:g}": partial(central_difference, step=step)
        for step in STEPS}
    for name, derive in forms.items():
        cells = [name]
        for bf16 in (False, True):
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                found = derive(net, *rows)
            du_dt = found[1] if derive is separate_passes else found
            cells.append(f"{relative_error(du_dt, rows, exact):.1e}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


# ---- the table -------------------------------------------------------------------------------


def table(variants, ceiling):
    """The lines of a Markdown table: a row per formulation, three columns per mode."""
    flow = {v.mode: v for v in variants if v.name == "flow matching"}
    flow["CUDA graphs"] = flow.get("compiled")  # it has no pass without gradient
    modes = [mode for mode in MODES if any(v.mode == mode for v in variants)]
    heads = ["step", "FLOPs", "error of du/dt"]
    for mode in modes:
        heads += [f"{mode}: time", "memory", "of product ceiling"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for eager in (v for v in variants if v.mode == "eager"):
        cells = [eager.name, f"{eager.flops / flow['eager'].flops:.2f}"]
        cells.append("" if eager.error is None else f"{eager.error:.1e}")
        for mode in modes:
            found = [v for v in variants if (v.name, v.mode) == (eager.name, mode)]
            cells += mode_cells(found[0], flow[mode], eager.flops, ceiling) if found else [""] * 3
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def mode_cells(variant, flow, flops, ceiling):
    """Time and memory relative to flow matching, and the share of the product ceiling."""
    if variant.failure:
        return ["fails", "", ""]
    seconds = statistics.median(variant.seconds)
    return [f"{seconds / statistics.median(flow.seconds):.2f}",
            f"{variant.memory / flow.memory:.2f}" if variant.memory else "",
            f"{flops / seconds / ceiling:.0%}"]


def caption(args, world, variants, ceiling, load):
    """The lines above the table: what was measured, where, and flow matching's own figures."""
    yield from describe_environment(world)
    yield (f"{datetime.date.today()}, {args.model}, input {args.input_size}, batch "
           f"{args.batch_size}, medians of {len(variants[0].seconds)} turns")
    yield (f"load of the machine before and after {load[0]:.1f} and {os.getloadavg()[0]:.1f}, "
           f"product ceiling {ceiling / 1e9:.0f} GFLOP/s")
    for v in (v for v in variants if v.name == "flow matching"):
        seconds = statistics.median(v.seconds)
        yield (f"flow matching, {v.mode}: {seconds:.4f} s, {args.batch_size / seconds:.1f} "
               f"images/s, peak {v.memory / 2**20:.0f} MiB")
    for v in (v for v in variants if v.failure):
        yield f"{v.name}, {v.mode}, fails: {v.failure}"
    if world.device.type == "cuda" and args.compile:
        skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
        yield f"CUDA graphs: PyTorch left {skipped} graphs without; 0 means that all were captured"
    else:
        yield "CUDA graphs: left out, they need a GPU and --compile"


def main(args):
    with start_processes(args.precision) as world:
        torch.manual_seed(0)
        load = os.getloadavg()
        net = DiT_models[args.model](input_size=args.input_size, num_classes=NUM_CLASSES)
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.02)  # a fresh net has zeros, which are untypical
        net.checkpoint_activations = args.checkpoint_activations
        net.to(world.device)
        x = torch.randn(args.batch_size, 4, args.input_size, args.input_size, device=world.device)
        y = torch.randint(NUM_CLASSES, (args.batch_size,), device=world.device)
        cuda = world.device.type == "cuda"
        modes = MODES[:1] if not args.compile else MODES if cuda else MODES[:2]
        variants = build_variants(net, x, y, modes=modes)
        measure(variants, net, world, args.seconds)
        ceiling = product_ceiling(world, 8192 if cuda else 2048)
        print(*caption(args, world, variants, ceiling, load), "", sep="\n")
        print(*table(variants, ceiling), "", sep="\n")
        rows = next(v.seen[0] for v in variants if v.name == "ours")
        print(*difference_errors(net, rows, world.device), sep="\n")


if __name__ == "__main__":
    run_main(main, parse_args)

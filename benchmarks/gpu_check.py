"""Does this repository work on a GPU, how fast is it there, and which batches fit?

    python benchmarks/gpu_check.py                          # one GPU, eight minutes: all but
    python benchmarks/gpu_check.py --minutes 5 --parts compiled_b2 compiled_xl2 compiled_imf \\
        host fashion --fashion DIR                          # these, which take five minutes
    python benchmarks/gpu_check.py --tiny                   # tries the program, on a CPU

Each part runs in a process and session of its own with a time limit of its own, so that an error, a
hang, a lack of memory or a broken CUDA context costs that part alone. DIR of --out grows as it
goes: results.jsonl, one line per finding; results.md, the same as tables; NAME.log, what the part
NAME printed; work/, what parts make, which the next check removes. The exit code is 1 if a check
failed or a part did not end.

Time is that of the GPU's events, warm, in medians; beside it stand FLOPs and bytes. Of a guided
step each kind of kernel has its milliseconds; the rest of the step the GPU waits for the host.
Networks have random weights. Parts that need diffusers, pytorch-fid or a download say so where
these are missing; --wheels names a folder of wheels to take the packages from. Parts run in the
order of what they tell a second: does it work, then how fast is it.
"""

import contextlib
import copy
import json
import math
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # the parent must not open the GPU
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]
from engine.distributed import counted_generator, start_processes  # noqa: E402
from engine.options import Parser, float_range  # noqa: E402
from engine.sharding import list_blocks  # noqa: E402
from models import DiT_models  # noqa: E402

PARTS = {}  # name -> (function, limit in seconds, least useful seconds, title)
SECOND_CALL = ("compiled_b2", "compiled_xl2", "compiled_imf", "host", "fashion")
# Of errors and gradients, relative to the largest official number of a tensor
TOLERANCES = {"fp64": 3e-7, "fp32": 1e-5, "tf32": 2e-2, "bf16": 2e-1}
GREY_LEVELS = {"fp32": 1, "tf32": 2, "bf16": 16}  # of 255, by which samples may differ
# Rows of train_step.py
FLOW, GUIDED, GUIDED_IMF, FASTGEN = ("flow matching", "ours, kappa = .5", "ours, omega_max = 8",
                                     "JVP of all rows without graph, then a forward")
# What the names of a GPU's kernels, or a CPU's operators, contain; the first group that fits, as
# those of compiled kernels list the operators before and after them
KERNELS = {"compiled": ("triton",),
           "attention": ("flash", "fmha", "sdpa", "attention", "softmax"),
           "matrix products": ("gemm", "nvjet", "xmma", "cutlass", "::mm", "addmm", "bmm"),
           "copies": ("memcpy", "memset", "copy"), "others": ("",)}


def part(limit, least=5):
    """Registers a part: its limit, and the seconds without which it is not begun."""
    def register(function):
        PARTS[function.__name__] = function, limit, least, function.__doc__.splitlines()[0]
        return function
    return register


def parse_args(argv=None):
    parser = Parser(__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("results/gpu-check"),
                        help="folder to write to; an earlier check in it is overwritten")
    parser.add_argument("--minutes", type=float_range(0, above=True),
                        help="minutes in all; parts for which none are left are left out (default: "
                             "8, with --tiny 60)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, metavar="PART",
                        help=f"some of {', '.join(PARTS)} (default: with --tiny all, else those "
                             f"before {SECOND_CALL[0]})")
    parser.add_argument("--tiny", action="store_true",
                        help="tiny sizes and no machine code: tries the program itself")
    parser.add_argument("--wheels", type=Path, metavar="DIR",
                        help="folder of wheels to install for these minutes, such as diffusers and "
                             "pytorch-fid")
    parser.add_argument("--fashion", type=Path, metavar="DIR",
                        help="folder of Fashion-MNIST's four .gz files (default: download them)")
    args = parser.parse_args(argv)
    args.minutes = args.minutes or (60 if args.tiny else 8)
    if args.parts is None:
        args.parts = [name for name in PARTS if args.tiny or name not in SECOND_CALL]
    return args


class Findings:
    """What a part finds: lines of results.jsonl."""

    def __init__(self, args, name):
        self.path, self.name, self.log = args.out / "results.jsonl", name, args.out / f"{name}.log"

    def add(self, what, value, *, ok=None):
        """One finding, a number, text or dict of them. ok: of a check, whether it passed."""
        row = {"part": self.name, "what": what, "value": value}
        with open(self.path, "a") as file:
            file.write(json.dumps(row | ({} if ok is None else {"ok": bool(ok)})) + "\n")

    def start(self, *words):
        """Starts a script of the repository. Its stderr goes to the log."""
        with open(self.log, "a") as log:
            return subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, text=True,
                                    stdout=subprocess.PIPE, stderr=log)

    def run(self, *words):
        """Runs one to its end; returns its stdout."""
        process = self.start(*words)
        said, _ = process.communicate()
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, words)
        return said


# ---- measuring -------------------------------------------------------------------------------


def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(work, repeats=10, warm=3):
    """Median seconds of work(), of a GPU by its events. On a CPU, where the program is only tried,
    of one call."""
    if device().type == "cpu":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    times = []
    for _ in range(warm + repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times[warm:])


def timed(work, *, flops=0, moved=0, images=0, **options):
    """{"ms", and per second the FLOPs, bytes moved and images that are given}."""
    taken = seconds(work, **options)
    found = {"ms": 1e3 * taken, "TFLOP/s": flops / taken / 1e12, "TB/s": moved / taken / 1e12,
             "images/s": images / taken}
    return {name: float(f"{value:.4g}") for name, value in found.items() if value}


def kernel_milliseconds(work):
    """{group of KERNELS: milliseconds} of work(), and how many kernels it starts."""
    profiler = torch.profiler
    kind = device().type.upper()
    work()
    with profiler.profile(activities=[getattr(profiler.ProfilerActivity, kind)]) as profile:
        work()
        if kind == "CUDA":
            torch.cuda.synchronize()
    found, count = dict.fromkeys(KERNELS, 0.0), 0
    for event in profile.key_averages():
        if event.device_type.name == kind:
            group = next(group for group, parts in KERNELS.items()
                         if any(part in event.key.lower() for part in parts))
            taken = event.self_device_time_total if kind == "CUDA" else event.self_cpu_time_total
            found[group] += taken / 1e3
            count += event.count
    return {group: round(taken, 2) for group, taken in found.items()} | {"kernels": count}


def peak_gigabytes():
    return torch.cuda.max_memory_allocated() / 1e9 if device().type == "cuda" else 0.0


def random_network(name, blocks=None, size=32):
    """A network on the device whose weights are random everywhere: fresh ones have zeros."""
    sizes = {} if blocks is None else {"depth": blocks}
    if blocks and name.startswith("iMF"):
        sizes["head_depth"] = blocks // 2
    torch.manual_seed(0)
    net = DiT_models[name](input_size=size, num_classes=1000, **sizes)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return net.to(device())


# ---- does it work ----------------------------------------------------------------------------


@part(limit=45)
def environment(args, out):
    """versions, what the card reaches, and its attention kernels"""
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        out.add("card", {"name": card.name, "GB": card.total_memory / 1e9,
                         "capability": f"{card.major}.{card.minor}",
                         "multiprocessors": card.multi_processor_count})
        with contextlib.suppress(OSError):
            query = "driver_version,clocks.sm,clocks.max.sm,power.limit,temperature.gpu"
            out.add("nvidia-smi", subprocess.run(
                ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
                capture_output=True, text=True).stdout.strip())
    out.add("versions", {"torch": torch.__version__, "CUDA": torch.version.cuda,
                         "Python": sys.version.split()[0], "cores": os.cpu_count()})
    size, n = (2**18, 256) if args.tiny else (2**28, 8192)
    a, b = torch.randn(size, device=device()), torch.empty(size, device=device())
    out.add("copy", timed(lambda: b.copy_(a), moved=8 * size))
    for precision in ("bf16", "tf32", "fp32"):
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        with start_processes(precision):
            a, b = (torch.randn(n, n, device=device(), dtype=dtype) for _ in range(2))
            out.add(f"product of {n} x {n}, {precision}",
                    timed(partial(torch.matmul, a, b), flops=2 * n**3))
    for width in (64, 72):
        for tokens in (64, 256, 276, 1024):
            out.add(f"attention forward and backward, ms: {tokens} tokens, heads of {width}",
                    attention(tokens, width, 2**8 if args.tiny else 2**16))


def attention(tokens, width, rows):
    """Milliseconds of each kernel in bfloat16 with 12 heads, and which PyTorch chooses."""
    shape = rows // tokens or 1, 12, tokens, width
    q, k, v = (torch.randn(shape, device=device(), dtype=torch.bfloat16, requires_grad=True)
               for _ in range(3))
    chosen = SDPBackend(torch._fused_sdp_choice(q, k, v)).name
    found = {"rows": shape[0], "chosen": chosen.lower()}
    for kernel in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        def both(kernel=kernel):
            with sdpa_kernel(getattr(SDPBackend, kernel)):
                F.scaled_dot_product_attention(q, k, v).sum().backward()
        try:
            found[kernel.lower()] = round(1e3 * seconds(both, 5, 2), 3)
        except RuntimeError:
            found[kernel.lower()] = "not for these"
    return found


@part(limit=60)
def golden(args, out):
    """the official implementations' numbers, in each precision"""
    for precision in TOLERANCES:
        for case in ("loss_none", "loss_cfg_w3_k0", "loss_cfg_w1_k05", "imf/loss_default",
                     "imf/loss_ratio25_beta2"):
            check_golden(out, case, precision)


@part(limit=150, least=40)
def golden_compiled(args, out):
    """the same compiled, of which every pass must be one graph"""
    for precision in ("fp32", "bf16"):
        for case in ("loss_cfg_w1_k05", "imf/loss_default"):
            check_golden(out, case, precision, compiled=True)


def check_golden(out, case, precision, *, compiled=False):
    """Add the largest difference of errors and gradients of an official step, relative to each
    tensor's largest number."""
    import conftest

    dtype = torch.float64 if precision == "fp64" else torch.float32
    improved = case.startswith("imf")
    network = conftest.golden_improved_network if improved else conftest.golden_network
    net = network(dtype).to(device())
    numbers = {name: a.to(device()) if isinstance(a, torch.Tensor) else a
               for name, a in conftest.golden(case, dtype).items()}
    method, draws = conftest.golden_method(numbers)
    forward = net
    if compiled:
        torch._dynamo.reset()
        method.compile()
        forward = torch.compile(net, fullgraph=True)
    try:
        with (start_processes("fp32" if precision == "fp64" else precision) as world,
              world.autocast()):
            loss = method.loss(net, numbers["x"], numbers["labels"], draws, forward=forward)
        loss.loss.backward()
    except Exception as error:  # of any kind; the other cases go on
        traceback.print_exc()
        out.add(f"{case}, {precision}", f"{type(error).__name__}: {error}"[:300], ok=False)
        return
    pairs = [(loss.error, numbers["err_u" if improved else "sq_err"]),
             *conftest.official_gradients(net, numbers, stride=13 if improved else 7)]
    # Not Python's max, which may pass over NaN
    worst = float(torch.tensor([conftest.official_error(*pair) for pair in pairs]).max())
    out.add(f"{case}, {precision}", float(f"{worst:.2g}"), ok=worst <= TOLERANCES[precision])


@part(limit=30)
def faults(args, out):
    """updates that are skipped on the device, and counted noise"""
    from train import update_average

    net, ema = (DiT_models["DiT-T/4"](input_size=8).to(device()) for _ in range(2))
    ema.requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, betas=(0.9, 0.95), fused=True)
    for skip in (0.0, 1.0, 0.0):
        before, averages = ([p.detach().clone() for p in a.parameters()] for a in (net, ema))
        for p in net.parameters():
            p.grad = torch.full_like(p, float("nan") if skip else 1.0)
        optimizer.found_inf = torch.tensor(skip, device=device())
        optimizer.step()
        update_average(ema, net, 0.5)
        same = all(map(torch.equal, before, net.parameters()))
        moved = not any(map(torch.equal, before, net.parameters()))
        average = all(torch.allclose(e, (a + p) / 2, atol=1e-6)
                      for e, a, p in zip(ema.parameters(), averages, net.parameters()))
        out.add(f"AdamW and average, found_inf {skip:.0f}", "unchanged" if same else "changed",
                ok=average and (same if skip else moved))
    steps = {float(state["step"]) for state in optimizer.state.values()}
    out.add("steps that AdamW has counted", sorted(steps), ok=steps == {2.0})

    def noise(step):
        return torch.randn(1000, device=device(),
                           generator=counted_generator(0, step, "method", device=device()))
    out.add("noise of one step repeats", bool(torch.equal(noise(3), noise(3))),
            ok=torch.equal(noise(3), noise(3)))
    out.add("noise of two steps differs", not torch.equal(noise(3), noise(4)),
            ok=not torch.equal(noise(3), noise(4)))
    out.add("seconds of a counted generator",
            float(f"{seconds(lambda: counted_generator(0, 1, 'x', device=device()), 50):.2g}"))


@part(limit=60)
def same_images(args, out):
    """samples on the GPU and on the CPU, again, and in another batch"""
    from dataset.vae import Pixels
    from sample import ImageSampler

    name = "DiT-T/4" if args.tiny else "DiT-S/4"
    config = {"model": name, "latent_shape": (3, 32, 32), "num_classes": 1000, "scale": 1.0}
    torch.manual_seed(0)
    net = DiT_models[name](input_size=32, in_channels=3, num_classes=1000).eval()
    for parameter in net.requires_grad_(False).parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    with start_processes("fp32") as world:
        cpu = ImageSampler(net, Pixels(), config, replace(world, device=torch.device("cpu")))
        expected = cpu.images(range(16)).int()
    net.to(device())
    for precision, allowed in GREY_LEVELS.items():
        with start_processes(precision) as world:
            sampler = ImageSampler(net, Pixels(), config, world)
            images, again, half = (sampler.images(range(n)).cpu() for n in (16, 16, 8))
        difference = (images.int() - expected).abs()
        out.add(f"{precision} against fp32 on the CPU",
                {"grey levels at most": int(difference.max()),
                 "share that differs": float((difference > 0).float().mean())},
                ok=difference.max() <= allowed)
        out.add(f"{precision}, made again: the same bytes", bool(torch.equal(again, images)),
                ok=torch.equal(again, images))
        out.add(f"{precision}, in half a batch: share of pixels that differ",
                float((half != images[:8]).float().mean()))


@part(limit=110, least=45)
def digits(args, out):
    """the quickstart: handwritten digits, trained, sampled and judged"""
    folder, steps = args.work / "digits", 40 if args.tiny else 1950
    out.run("examples/digits.py", "write", folder / "data")
    options = ["train.py", "--data-path", folder / "data", "--vae", "none", "--image-size", 8,
               "--model", "DiT-T/4", "--cfg", 1, "--label-drop", 0, "--ratio", 0.5, "--p-mean", 0.1,
               "--p-std", 1.2, "--global-batch-size", 256, "--lr", 4e-3, "--ema-decay", 0.997,
               "--max-steps", steps, "--num-workers", 0, "--no-compile", "--log-every", steps // 13,
               "--sample-every", 0, "--run-dir", folder / "run"]
    begin = time.perf_counter()
    out.run(*options)
    rates = [row["images_per_second"] for row in records(folder / "run")]
    out.add("training", {"seconds": round(time.perf_counter() - begin, 1), "steps": steps,
                         "images/s": round(statistics.median(rates), 1)})
    out.run("sample.py", "--ckpt", folder / f"run/checkpoints/{steps:07d}.pt", "--sample-dir",
            folder / "one", "--num-fid-samples", 100 if args.tiny else 1797,
            "--per-proc-batch-size", 300)
    found = json.loads(out.run("examples/digits.py", "judge", folder / "one.npz"))
    # After 40 steps a tenth is recognised by chance
    out.add("one step", found, ok=found["accuracy"] > (0.0 if args.tiny else 0.97))


@part(limit=200, least=60)
def training(args, out):
    """train.py on latents: images/s, memory, checkpoints, a kill and a resumed run"""
    model, batch, steps = ("DiT-T/4", 16, 24) if args.tiny else ("DiT-B/4", 256, 240)
    folder = made_up_latents(args)
    common = ["train.py", "--encoded-data", "--data-path", folder, "--model", model, "--cfg", 2,
              "--kappa", .5, "--global-batch-size", batch, "--precision", "bf16",
              "--sample-every", 0, "--max-steps", steps, "--log-every", steps // 24]
    for name in ("eager",) if args.tiny else ("eager", "compiled"):
        run = args.work / f"run-{name}"
        watched = watch(out, [*common, "--compile" if name == "compiled" else "--no-compile",
                              "--ckpt-every", steps // 2, "--run-dir", run])
        rates = [row["images_per_second"] for row in records(run)][2:]
        usual = statistics.median(rates)
        slowest = min(rates[9:14])  # in which the checkpoint is copied
        out.add(f"{model}, batch {batch}, {name}", {
            "images/s": round(usual, 1), "GB": records(run)[-1].get("gpu_memory_gb"),
            "seconds to the first record": round(watched["first"], 1),
            "stall of a checkpoint, s": round(steps // 24 * batch * (1 / slowest - 1 / usual), 2)})
        check_memory(out, name, watched)
    killed = [*common, "--no-compile", "--ckpt-every", steps // 2, "--run-dir",
              args.work / "run-killed"]
    watch(out, killed, kill=True)
    out.run(*killed)
    whole, resumed = (torch.load(args.work / f"run-{name}/checkpoints/{steps:07d}.pt",
                                 weights_only=True)["model"] for name in ("eager", "killed"))
    a, b = (torch.cat([p.flatten() for p in weights.values()]) for weights in (whole, resumed))
    worst = float((a - b).norm() / a.norm())
    out.add("killed at a checkpoint and resumed, against the whole run",
            {"relative difference": worst, "same bits": worst == 0}, ok=worst < 1e-3)


def watch(out, words, *, kill=False, stop_at=math.inf):
    """Runs train.py: {"first": seconds until its first record, "host", "card": GB held each half
    second from then on}. kill: SIGKILL as soon as it has a checkpoint. stop_at: the moment from
    which SIGTERM ends it, once it has a record; it then saves."""
    from growth import memory

    folder, begin = Path(words[-1]), time.perf_counter()
    found = {"first": 0.0, "host": [], "card": []}
    process = out.start(*words)
    while process.poll() is None:
        time.sleep(0.05 if kill else 0.5)
        if kill and list(folder.glob("checkpoints/[0-9]*.pt")):
            process.kill()
        if not kill and (folder / "metrics.jsonl").exists() and records(folder):
            found["first"] = found["first"] or time.perf_counter() - begin
            with contextlib.suppress(OSError, KeyError):  # it has just ended
                found["host"].append(memory(Path("/proc", str(process.pid))) / 1e9)
            if time.monotonic() > stop_at:
                stop_at = math.inf
                process.terminate()
            if device().type == "cuda":
                free, total = torch.cuda.mem_get_info()
                found["card"].append((total - free) / 1e9)
    assert kill or process.returncode == 0, f"train.py ended with {process.returncode}"
    return found


def check_memory(out, name, watched):
    """Whether the memory that a run holds in its last third is that of its second."""
    for kind in ("host", "card"):
        held = watched[kind]
        if third := len(held) // 3:
            second, last = (statistics.median(a) for a in (held[third:2 * third], held[-third:]))
            out.add(f"GB on the {kind}, {name}: second and last third",
                    [round(second, 2), round(last, 2)], ok=last < second + 0.5)


def records(folder):
    """The records of a run."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def made_up_latents(args):
    """A folder as encode_imagenet.py writes it, of random latents."""
    from loading import write_shards

    if not (args.work / "latents" / "dataset.json").exists():
        write_shards(args.work / "latents", 64 if args.tiny else 4096)
    return args.work / "latents"


# ---- how fast, and what fits -----------------------------------------------------------------


@part(limit=45)
def loading(args, out):
    """latents from the page cache to the device"""
    from dataset.latents import LatentShards
    from dataset.loader import BatchSampler, load_batches

    dataset = LatentShards(made_up_latents(args))
    batch, count = (16, 8) if args.tiny else (256, 200)
    with start_processes() as world:
        for workers in (0, 4):
            order = BatchSampler(len(dataset), batch, seed=0, flip=False, world=world)
            begin = time.perf_counter()
            for images, _ in load_batches(dataset, order.steps(0, count), workers=workers,
                                          device=world.device):
                last = images
            float(last.sum())  # waits for the device
            taken = time.perf_counter() - begin
            out.add(f"{workers} readers", {"latents/s": round(count * batch / taken)})


@part(limit=60, least=15)
def fits(args, out):
    """peak memory of whole steps, against the count of memory.py, and the largest batch"""
    import memory

    for name in ("DiT-T/4",) if args.tiny else ("DiT-XL/2", "iMF-B/2"):
        with start_processes("bf16") as world:
            peaks = peaks_of_steps(out, name, world)
        with torch.device("meta"):
            net = DiT_models[name]()
        held, fixed, slope = memory.count_process(
            net, 1, memory.fit_step(name, precision="bf16", recompute=False, shard=False), "bf16",
            shard=False)
        counted = {batch: (held + fixed + slope * batch) / 1e9 for batch in peaks}
        (small, low), (large, high) = peaks.items()
        each = (high - low) / (large - small)
        found = {f"GB at {batch} (counted)": f"{peaks[batch]:.2f} ({counted[batch]:.2f})"
                 for batch in peaks}
        out.add(f"{name}, bf16, eager", {
            **found, "MB an image (counted)": f"{1e3 * each:.1f} ({slope / 1e6:.1f})",
            "batch in 72 GB": int((72 - low) / each + small) if each else None},
            ok=abs(high / counted[large] - 1) <= 0.1 if device().type == "cuda" else None)


def peaks_of_steps(out, name, world):
    """{batch: peak GB of a whole step}. Also times what its weights cost."""
    import memory

    net = random_network(name)
    update, peaks = update_of(net), {}
    for batch in (8, 24):
        if device().type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step = memory.make_step(net, name, batch, world)
        for _ in range(2):
            # All gradients are held all the time, as in the buckets of DistributedDataParallel
            net.zero_grad(set_to_none=False)
            step()
            update()
        peaks[batch] = peak_gigabytes()
    time_weights(out, name, net, update)
    return peaks


def update_of(net):
    """() -> None: what follows the backward of a step. Gives the network gradients, zeros."""
    from train import update_average

    ema = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def update():
        torch.nn.utils.get_total_norm([p.grad for p in net.parameters()])
        optimizer.step()
        update_average(ema, net, 0.9999)
    return update


def time_weights(out, name, net, update):
    """Time the update, and the rounding of all matrices to bfloat16, which under autocast each
    pass does for itself: a copy that all passes share would save it in all but one."""
    from gpu_hours import UPDATE_BYTES

    everything = sum(p.numel() for p in net.parameters())
    out.add(f"norm, AdamW and average of {name}", timed(update, moved=UPDATE_BYTES * everything))
    matrices = [p.detach() for p in net.parameters() if p.dim() > 1]
    rounded = [torch.empty_like(matrix, dtype=torch.bfloat16) for matrix in matrices]
    moved = sum(a.nbytes + b.nbytes for a, b in zip(matrices, rounded))
    out.add(f"all matrices of {name} to bf16",
            timed(lambda: torch._foreach_copy_(rounded, matrices), moved=moved))


def table(args, out, name, batch, mode, *, blocks=None, only=None):
    """Time the formulations of train_step.py for a network, in one mode; only: these rows."""
    import train_step

    if args.tiny:
        name, batch, blocks = ("iMF-T/4" if name.startswith("iMF") else "DiT-T/4"), 4, 2
        only = only or (FLOW, "ours", FASTGEN, GUIDED, GUIDED_IMF)
    with start_processes("bf16") as world:
        net = random_network(name, blocks)
        x = torch.randn(batch, 4, 32, 32, device=device())
        y = torch.randint(1000, (batch,), device=device())
        modes = dict.fromkeys(("eager", "compiled" if mode == "CUDA graphs" else mode, mode))
        variants = [v for v in train_step.build_variants(net, x, y, modes=modes)
                    if only is None or v.name in only]
        eager = {v.name: v for v in variants if v.mode == "eager"}
        variants = [v for v in variants if mode == "eager" or v.mode != "eager"]
        train_step.measure(variants, net, world, 0.0 if args.tiny else 4.0)
        flops = {name: v.flops or train_step.count_flops(v, net, world)
                 for name, v in eager.items() if not v.failure}
        ceiling = train_step.product_ceiling(world, 128 if args.tiny else 8192)
        network = f"{name}{f', {len(list_blocks(net))} blocks' if blocks else ''}, batch {batch}"
        add_rows(out, network, batch, variants, flops, ceiling)
        for v in [v for v in variants if v.name in (GUIDED, GUIDED_IMF) and not v.failure]:
            out.add(f"{network}, {v.mode}: kernels of {v.name}, ms",
                    kernel_milliseconds(partial(train_step.step, v, net, world)))


def add_rows(out, network, batch, variants, flops, ceiling):
    """A finding for each variant; the first is flow matching."""
    flow = statistics.median(variants[0].seconds or [float("nan")])  # where it fails
    for v in variants:
        if v.failure:
            out.add(f"{network}, {v.mode}: {v.name}", f"fails: {v.failure}")
            continue
        taken = statistics.median(v.seconds)
        exact = v.error is not None and "difference" not in v.name
        out.add(f"{network}, {v.mode}: {v.name}", {
            "ms": round(1e3 * taken, 2), "of flow matching": round(taken / flow, 2),
            "images/s": round(batch / taken, 1), "GB": round(v.memory / 1e9, 2),
            "TFLOP/s": float(f"{flops[v.name] / taken / 1e12:.3g}"),
            "of product ceiling": round(flops[v.name] / taken / ceiling, 2),
            "error of du/dt": v.error and float(f"{v.error:.2g}")},
            ok=v.error < 5e-2 if exact else None)


@part(limit=60, least=20)
def step_b2(args, out):
    """a step of DiT-B/2 in every formulation, eager"""
    table(args, out, "DiT-B/2", 64, "eager")


@part(limit=60, least=15)
def images(args, out):
    """images per second: VAE, network, noise, Inception"""
    from meanflow import sample
    from sample import ImageSampler

    name = "DiT-T/4" if args.tiny else "DiT-B/2"
    size, batch, repeats = (64, 2, 1) if args.tiny else (256, 64, 5)
    again = {"repeats": repeats, "warm": 1, "images": batch}
    pixels = torch.randint(256, (batch, 3, size, size), dtype=torch.uint8, device=device())
    with start_processes("bf16") as world:
        net = random_network(name).eval().requires_grad_(False)
        x, y = torch.randn(batch, 4, 32, 32, device=device()), torch.zeros(
            batch, dtype=torch.int64, device=device())
        with world.autocast():
            out.add(f"network alone, {name}", timed(lambda: sample(net, x, y), **again))
        sampler = ImageSampler(net, None, {"latent_shape": (4, 32, 32), "num_classes": 1000,
                                           "model": name}, world)
        begin = time.perf_counter()
        sampler.inputs(range(batch))
        out.add("noise on the CPU", {"images/s": round(batch / (time.perf_counter() - begin))})
        with optional(out, "VAE"):
            from loading import stable_diffusion_vae

            from dataset.vae import VAE

            codec = VAE("random", stable_diffusion_vae(), device=device(), precision="bf16")
            latents = torch.randn(batch, 4, size // 8, size // 8, device=device())
            for what, work in (("encode", partial(codec.encode, pixels)),
                               ("decode", partial(codec.decode, latents))):
                out.add(f"VAE, {what}, {size} px, bf16", timed(work, **again))
    with optional(out, "Inception"):
        time_inception(out, pixels, again)


@contextlib.contextmanager
def optional(out, what):
    """Within ``with``, a package that is missing is a finding and no failure."""
    try:
        yield
    except ImportError as error:
        out.add(what, f"left out: {error}")


def time_inception(out, pixels, again):
    """Images per second of both protocols' networks, with random weights."""
    from metrics.extractors import extractor_of
    from metrics.inception import build_inception

    net = build_inception().to_empty(device="cpu")
    for tensor in (*net.parameters(), *net.buffers()):
        if tensor.is_floating_point():
            torch.nn.init.uniform_(tensor, 0.01, 0.05)
    with start_processes("tf32") as world, tempfile.TemporaryDirectory() as folder:
        torch.save(net.state_dict(), Path(folder, "weights.pt"))
        for protocol in ("pytorch-fid", "adm"):
            extractor = extractor_of(protocol).load(world, Path(folder, "weights.pt"))
            out.add(f"Inception, {protocol}, fp32", timed(partial(extractor, pixels), **again))


@part(limit=60, least=20)
def step_xl2(args, out):
    """the same of DiT-XL/2"""
    table(args, out, "DiT-XL/2", 24, "eager")


@part(limit=60, least=20)
def step_imf(args, out):
    """the same of iMF-B/2"""
    table(args, out, "iMF-B/2", 32, "eager")


# ---- compiled, and longer --------------------------------------------------------------------


@part(limit=150, least=50)
def compiled_b2(args, out):
    """a step of DiT-B/2 compiled"""
    table(args, out, "DiT-B/2", 64, "compiled",
          only=(FLOW, "ours", "ours, kappa = 0", GUIDED, FASTGEN))


@part(limit=90, least=40)
def compiled_xl2(args, out):
    """a step of DiT-XL/2 compiled, of 4 blocks, which compile in time"""
    table(args, out, "DiT-XL/2", 64, "compiled", blocks=4, only=(FLOW, GUIDED))


@part(limit=90, least=40)
def compiled_imf(args, out):
    """a step of iMF-B/2 compiled, of 4 blocks a path"""
    table(args, out, "iMF-B/2", 64, "compiled", blocks=4,
          only=(FLOW, GUIDED_IMF))


@part(limit=120, least=50)
def host(args, out):
    """what DiT-B/4's host and weights cost: CUDA graphs and C++ wrappers (4 blocks), rounding"""
    name, only = "DiT-T/4" if args.tiny else "DiT-B/4", (FLOW, GUIDED)
    net = random_network(name)
    time_weights(out, name, net, update_of(net))
    table(args, out, "DiT-B/4", 32, "CUDA graphs" if device().type == "cuda" else "compiled",
          blocks=4, only=only)
    if device().type == "cuda":
        import torch._inductor.config

        torch._dynamo.reset()
        torch._inductor.config.cpp_wrapper = True
        out.add("from here on", "cpp_wrapper, which needs the headers of a CUDA toolkit")
        table(args, out, "DiT-B/4", 32, "compiled", blocks=4, only=only)


@part(limit=300, least=80)
def fashion(args, out):
    """Fashion-MNIST with DiT-S/4 and guidance, trained for the time there is, judged"""
    folder, run = args.work / "fashion", args.work / "fashion-run"
    source = ["--source", args.fashion] if args.fashion else []
    try:
        out.run("examples/fashion_mnist.py", "write", folder, *source)
    except subprocess.CalledProcessError:
        out.add("left out", "no data: give --fashion DIR")
        return
    words = ["train.py", "--data-path", folder / "train", "--vae", "none", "--image-size", 28,
             "--model", "DiT-T/4" if args.tiny else "DiT-S/4", "--cfg", 2, "--ratio", 0.5,
             "--p-mean", 0.1, "--p-std", 1.2, "--global-batch-size", 64 if args.tiny else 256,
             "--lr", 1e-3, "--warmup-steps", 500, "--ema-decay", .9 if args.tiny else .999,
             "--precision", "bf16", "--no-compile", "--sample-every", 0, "--num-workers",
             min(8, os.cpu_count()), "--log-every", 10, "--max-steps", 10**6, "--run-dir", run]
    classifier = out.start("examples/fashion_mnist.py", "judge", folder)  # trains it, on the CPU
    watch(out, words, stop_at=0 if args.tiny else args.end - 60)
    classifier.communicate()
    newest = max((run / "checkpoints").glob("[0-9]*.pt"))
    out.run("sample.py", "--ckpt", newest, "--num-fid-samples", 100 if args.tiny else 1000,
            "--per-proc-batch-size", 250, "--num-sampling-steps", 1, 2, 4, "--sample-dir",
            args.work / "fashion-samples")
    samples = [args.work / f"fashion-samples-{n}-step{'s' * (n > 1)}.npz" for n in (1, 2, 4)]
    for line in out.run("examples/fashion_mnist.py", "judge", folder, *samples).splitlines()[:-1]:
        found = json.loads(line)  # the last is the mean
        out.add(f"{Path(found.pop('samples')).stem}, after {int(newest.stem)} steps", found)


# ---- running the parts -------------------------------------------------------------------------


def run_part(args, name, limit):
    """Run a part in a forked process of its own session; returns how it ended."""
    function, out = PARTS[name][0], Findings(args, name)
    args.end = time.monotonic() + limit

    def work():
        os.setsid()
        log = os.open(out.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        if args.tiny:  # machine code would take minutes
            torch.compile = partial(without_machine_code, torch.compile)
        function(args, out)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(limit)
    how = {None: f"stopped after {limit:.0f} s", 0: "done"}.get(
        process.exitcode, f"failed, see {name}.log")
    with contextlib.suppress(ProcessLookupError):  # also what the part has started and left
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return how


def without_machine_code(compile, *words, mode=None, **options):
    return compile(*words, **options, backend="eager")


def render(args, ends):
    """Write results.md, a table per part; return the findings."""
    rows = [json.loads(line) for line in (args.out / "results.jsonl").read_text().splitlines()]
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"],
                            capture_output=True, text=True).stdout.strip()
    lines = [f"# gpu_check.py, {time.strftime('%Y-%m-%d %H:%M')}, commit {commit or 'unknown'}", ""]
    for name, (how, took) in ends.items():
        lines += [f"## {name}: {PARTS[name][3]}", "", f"{how}, {took:.0f} s", "",
                  "| what | value | check |", "|---|---|---|"]
        for row in rows:
            if row["part"] == name:
                value = row["value"]
                if isinstance(value, dict):
                    value = ", ".join(f"{key} {item}" for key, item in value.items())
                check = {True: "passed", False: "**FAILED**", None: ""}[row.get("ok")]
                lines.append(f"| {row['what']} | {value} | {check} |")
        lines.append("")
    (args.out / "results.md").write_text("\n".join(lines))
    return rows


def install(wheels):
    """Install wheels into a folder of the temporary directory, for the parts and their scripts."""
    folder = tempfile.mkdtemp(prefix="gpu-check-")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps",
                    "--target", folder, *wheels.glob("*.whl")], check=True)
    sys.path.insert(0, folder)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [folder, os.environ.get("PYTHONPATH")]))


def main(args):
    args.out = args.out.resolve()
    args.work = args.out / "work"
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    (args.out / "results.jsonl").write_text("")
    end, ends, rows = time.monotonic() + 60 * args.minutes, {}, []
    if args.wheels:
        install(args.wheels)
    for name in args.parts:
        _, limit, least, title = PARTS[name]
        limit *= 10 if args.tiny else 1  # they are those of a GPU
        left, begin = end - time.monotonic(), time.monotonic()
        print(f"{name}: {title}", flush=True)
        how = "left out, no time" if left < least else run_part(args, name, min(limit, left))
        ends[name] = how, time.monotonic() - begin
        rows = render(args, ends)
        for row in rows:
            if row["part"] == name:
                check = {True: "ok    ", False: "FAILED", None: "      "}[row.get("ok")]
                print(f"  {check} {row['what']}: {json.dumps(row['value'])}")
        print(f"  {how}, {ends[name][1]:.1f} s", flush=True)
    failed = [row for row in rows if row.get("ok") is False]
    unfinished = [f"{name} ({how})" for name, (how, _) in ends.items() if how != "done"]
    print(f"{sum(row.get('ok') is True for row in rows)} checks passed, {len(failed)} failed"
          f"{', not finished: ' * bool(unfinished)}{', '.join(unfinished)}; see "
          f"{args.out / 'results.md'}")
    for row in failed:
        print(f"  FAILED {row['part']}: {row['what']}: {json.dumps(row['value'])}")
    return 1 if failed or unfinished else 0


if __name__ == "__main__":
    args = parse_args()
    sys.exit(main(args))

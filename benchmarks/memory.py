"""Count the memory that a training step takes in each process, with and without --shard.

    python benchmarks/memory.py                        # some minutes, without computing anything
    python benchmarks/memory.py --measure --model DiT-S/4 --batch-size 4     # against a real step
    torchrun --standalone --nproc_per_node=2 benchmarks/memory.py --measure --model DiT-S/4 \
        --batch-size 4

The tables say what a process holds at the peak of a step: weights, moments and averages, without
--shard the gradients, too; what else it takes, per image of its batch and apart from that; and the
largest batch that fits GPUs of 24, 40 and 80 GB (10^9 bytes) if a tenth of them is left for what is
not counted: the context, buffers of NCCL and of the matrix libraries, fragmentation.

A step is counted on tensors with a shape and no data, for batches of 8 and 256 rows. Between them
the line through both counts is an upper bound, as the peak is the maximum over moments of a step,
at each of which memory is linear in the batch. With --shard come two gathered blocks,
the gradients of one in full and in the buffer that sends them, and all that lies outside the
blocks. Sharded gradients are not counted beside activations: they take the place of those.
--measure makes a step in the processes there are and prints what the allocator reports beside the
count.
"""

import copy
import json
import os
import sys
import tempfile
import weakref
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # hides the profiler's start and stop lines
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))
from gpu_hours import fake_method  # noqa: E402

from engine.distributed import World, start_processes  # noqa: E402
from engine.errors import run_main  # noqa: E402
from engine.options import Parser, int_range  # noqa: E402
from engine.sharding import check_sharding, list_blocks, local_shard, parallelise  # noqa: E402
from models import DiT_models  # noqa: E402

GPUS = {"24 GB": 24e9, "40 GB": 40e9, "80 GB": 80e9}
USABLE = 0.9
BATCHES = 8, 256  # rows of a process
SHAPE = (4, 32, 32)  # latents of 256 px


def parse_args(argv=None):
    parser = Parser(__doc__.split("\n", 1)[0])
    parser.add_argument("--model", nargs="+", choices=DiT_models, metavar="NAME",
                        default=["DiT-XL/2", "iMF-XL/2"], help="networks, such as DiT-B/4")
    parser.add_argument("--processes", type=int_range(1), nargs="+", default=[1, 2, 8, 16],
                        help="numbers of processes in the tables")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="bf16",
                        help="as in train.py")
    parser.add_argument("--measure", action="store_true",
                        help="make real steps and compare the allocator's peak with the count")
    parser.add_argument("--batch-size", type=int_range(4), default=8,
                        help="rows per process, for --measure")
    return parser.parse_args(argv)


# ---- what is held, and what is gathered ------------------------------------------------------


def share(parameters, processes):
    """Bytes of float32 that rank 0, with the largest share, has of parameters: rows are divided."""
    return sum(4 * -(-p.shape[0] // processes) * p[0].numel() for p in parameters)


def gathered(net, precision):
    """Bytes that a step of a sharded network takes for parameters and gradients in full."""
    blocks = list_blocks(net)
    own = {p for block in blocks for p in block.parameters()}
    rest = 4 * sum(p.numel() for p in net.parameters() if p not in own)
    largest = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    size = 2 if precision == "bf16" else 4
    return rest + 2 * size * largest + (size + 4) * largest


# ---- what a step takes besides ---------------------------------------------------------------


class MemoryCounter(TorchDispatchMode):
    """The peak of the bytes of all tensors that operations make while it is active; of those that
    are there before, operations may return views."""

    def __init__(self, before):
        super().__init__()
        self.known = weakref.WeakSet(tensor.untyped_storage() for tensor in before)
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def add(self, storage):
        """Count a storage that is new, until it is freed."""
        if storage not in self.known:
            self.known.add(storage)
            self.now += storage.nbytes()
            weakref.finalize(storage, self.free, storage.nbytes())

    def free(self, size):
        self.now -= size


def make_step(net, model, batch, world, forward=None):
    """A function without arguments that makes forward and backward of a random batch."""
    method = fake_method(model, **({} if model.startswith("iMF") else {"cfg": 2.0, "kappa": 0.5}))
    x = torch.randn(batch, *SHAPE, device=world.device)
    y = torch.zeros(batch, dtype=torch.int64, device=world.device)
    draws = method.draw(x.shape, device=world.device)

    def step():
        with world.autocast():
            loss = method.loss(net, x, y, draws, forward=forward).loss
        loss.backward()
    return step


def count_step(model, batch, *, precision, recompute, shard):
    """Peak bytes of a step without weights and gradients.

    With shard and bf16 the blocks' layers hold bfloat16 weights, as gathered, and autocast makes
    no copies of them.
    """
    with FakeTensorMode():
        net = DiT_models[model]()
        net.checkpoint_activations = recompute
        layers = [m for block in list_blocks(net) for m in block.modules()
                  if isinstance(m, nn.Linear | nn.Conv2d)]
        for layer in layers if shard and precision == "bf16" else ():
            for name, p in list(layer.named_parameters()):
                setattr(layer, name, nn.Parameter(torch.empty(p.shape, dtype=torch.bfloat16)))
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        step = make_step(net, model, batch, World(0, 1, torch.device("cpu"), precision))
        held = [*net.parameters(), *net.buffers(), *(p.grad for p in net.parameters())]
        with MemoryCounter(held) as counter:
            step()
    return counter.peak


def fit_step(model, **options):
    """(bytes, bytes per image): the line through count_step at both ends of BATCHES."""
    small, large = (count_step(model, batch, **options) for batch in BATCHES)
    slope = (large - small) / (BATCHES[1] - BATCHES[0])
    return small - BATCHES[0] * slope, slope


def count_process(net, processes, step, precision, *, shard):
    """(bytes held, other bytes, bytes per image) of a process. step: as fit_step returns it."""
    parameters = list(net.parameters())
    if not shard:
        return 20 * sum(p.numel() for p in parameters), *step
    return 4 * share(parameters, processes), step[0] + gathered(net, precision), step[1]


# ---- a real step -----------------------------------------------------------------------------


def measure(model, args, world, shard):
    """Peak bytes of weights, gradients and all else in a real step, the second of two."""
    torch.manual_seed(0)
    net = DiT_models[model]().to(world.device)
    step = make_step(net, model, args.batch_size, world,
                     parallelise(net, copy.deepcopy(net), world, shard=shard))
    step()
    net.zero_grad(set_to_none=shard)  # the gradients of DistributedDataParallel stay in its buckets
    tensors = [*net.parameters(), *(p.grad for p in net.parameters() if p.grad is not None)]
    held = sum(local_shard(tensor.detach()).nbytes for tensor in tensors)
    if world.device.type == "cpu":
        return held + allocated(step)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return held + torch.cuda.max_memory_allocated() - before


def allocated(step):
    """Peak bytes that a step allocates on the CPU, as the profiler lists them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    now = peak = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak


def compare(model, args, world):
    """Print the count and the measurement of one network in the processes there are."""
    shard = world.distributed
    if shard:
        check_sharding(world)
    with torch.device("meta"):
        net = DiT_models[model]()
    step = fit_step(model, precision=args.precision, recompute=False, shard=shard)
    held, fixed, slope = count_process(net, world.size, step, args.precision, shard=shard)
    weights = held / 4 if shard else held / 5 * 2  # with the gradients
    found = measure(model, args, world, shard)
    if world.main:
        print(f"{model}, {world.size} process(es){', --shard' * shard}, batch {args.batch_size}, "
              f"{args.precision}, without moments and averages: {found / 1e6:.1f} MB, counted "
              f"{(weights + fixed + args.batch_size * slope) / 1e6:.1f}")


# ---- the tables ------------------------------------------------------------------------------


def report(model, args):
    """Print the table of a network."""
    with torch.device("meta"):
        net = DiT_models[model]()
    print(f"\n| {model}, {args.precision} | held, GB | step, GB | MB an image | "
          + " | ".join(f"{name}: images" for name in GPUS) + " |")
    print("|---" * (4 + len(GPUS)) + "|")
    for recompute in (False, True):
        for processes in [1, *(n for n in args.processes if n > 1)]:
            shard = processes > 1
            if processes < 3:  # the others' step is that of two
                step = fit_step(model, precision=args.precision, recompute=recompute, shard=shard)
            held, fixed, slope = count_process(net, processes, step, args.precision, shard=shard)
            fits = [int((USABLE * size - held - fixed) // slope) for size in GPUS.values()]
            fits = [f"{BATCHES[1]}+" if n > BATCHES[1] else max(0, n) for n in fits]
            name = f"`--shard`, {processes} processes" if shard else "any number, without"
            name += ", `--checkpoint-activations`" * recompute
            print(f"| {name} | {held / 1e9:.2f} | {fixed / 1e9:.2f} | {slope / 1e6:.1f} | "
                  f"{' | '.join(map(str, fits))} |", flush=True)


def main(args):
    with start_processes(args.precision) as world:
        for model in args.model:
            if args.measure:
                compare(model, args, world)
            elif world.main:
                report(model, args)


if __name__ == "__main__":
    run_main(main, parse_args)

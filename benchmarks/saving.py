"""Measure the shares of a run's wall time that checkpoints, records and pictures take.

    python benchmarks/saving.py                       # a GPU
    python benchmarks/saving.py --batch-size 16       # CPU, some minutes

It times training steps (train.py's work without its log): first without a save, which gives the
median time of a step, then during each save. A save costs the time of the call, which copies the
state, and the time by which the steps during the write exceed the median. A record is what train.py
does at --log-every: the means of the interval, a line, metrics.jsonl and TensorBoard. A picture is
that of --sample-every, 80 images of 256 px, of random bytes, without their sampling. It prints one
JSON line; share_percent is the mean cost of a save relative to the time of --ckpt-every steps,
logs_percent that of records and pictures, each at its own interval.
"""

import copy
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import train  # noqa: E402
from dataset.pictures import save_grid  # noqa: E402
from engine.checkpoint import Saver  # noqa: E402
from engine.distributed import start_processes  # noqa: E402
from engine.errors import run_main  # noqa: E402
from engine.log import Log, describe_environment  # noqa: E402
from engine.options import Parser, int_range  # noqa: E402
from meanflow import MeanFlow  # noqa: E402
from models import build  # noqa: E402

SHAPE = (4, 32, 32)  # latents of ImageNet at 256 px


def parse_args(argv=None):
    parser = Parser(__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="DiT-S/4", help="network, such as DiT-B/4")
    parser.add_argument("--batch-size", type=int_range(1), default=256, help="latents per step")
    parser.add_argument("--ckpt-every", type=int_range(1), default=1000,
                        help="steps between checkpoints")
    parser.add_argument("--log-every", type=int_range(1), default=100, help="steps between records")
    parser.add_argument("--sample-every", type=int_range(1), default=5000,
                        help="steps between pictures")
    parser.add_argument("--steps", type=int_range(1), default=20, help="steps timed without a save")
    parser.add_argument("--saves", type=int_range(1), default=5, help="checkpoints written")
    parser.add_argument("--precision", default="tf32", choices=("fp32", "tf32", "bf16"),
                        help="as in train.py")
    return parser.parse_args(argv)


def main(args):
    with (start_processes(args.precision) as world, tempfile.TemporaryDirectory() as folder,
          Saver(folder, keep_last=1) as saver):
        print(*describe_environment(world), sep="\n", file=sys.stderr)
        training = Training(args, world)
        for _ in range(3):
            training.step()
        step = statistics.median(training.step() for _ in range(args.steps))
        calls, excesses, writes = [], [], []
        for number in range(1, args.saves + 1):
            call, excess, write = around_a_save(training, saver, number, step)
            calls.append(call), excesses.append(excess), writes.append(write)
        size = saver.path.stat().st_size
        cost = statistics.mean(calls) + statistics.mean(excesses)
        record, picture = time_records(Path(folder), args, world), time_pictures(Path(folder))
        logs = record / args.log_every + picture / args.sample_every  # per step
        print(json.dumps({
            "model": args.model, "batch_size": args.batch_size, "device": world.device.type,
            "step_s": round(step, 4), "checkpoint_mb": round(size / 1e6, 1),
            "call_s": round(statistics.mean(calls), 4),
            "steps_slowed_by_s": round(statistics.mean(excesses), 4),
            "write_s": round(statistics.mean(writes), 3),
            "share_percent": round(100 * cost / (cost + args.ckpt_every * step), 4),
            "record_s": round(record, 6), "picture_s": round(picture, 3),
            "logs_percent": round(100 * logs / (logs + step), 4)}))


class Training:
    """The steps of train.py's loop, on random latents."""

    def __init__(self, args, world):
        self.args, self.world = args, world
        self.config = {"model": args.model, "latent_shape": SHAPE, "num_classes": 1000}
        self.net = build(self.config).to(world.device)
        self.ema = copy.deepcopy(self.net).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-4, fused=True)
        self.flow = MeanFlow(num_classes=1000, cfg=3.0)
        self.x = torch.randn(args.batch_size, *SHAPE, device=world.device)
        self.y = torch.randint(1000, (args.batch_size,), device=world.device)

    def step(self):
        """Make a step; returns its seconds."""
        begin = time.perf_counter()
        with self.world.autocast():
            out = self.flow.loss(self.net, self.x, self.y,
                                 self.flow.draw(self.x.shape, device=self.x.device))
        out.loss.backward()
        torch.nn.utils.get_total_norm([p.grad for p in self.net.parameters()])
        self.optimizer.step()
        self.optimizer.zero_grad()
        train.update_average(self.ema, self.net, 0.9999)
        return self.seconds_since(begin)

    def seconds_since(self, begin):
        """Seconds since begin, once the GPU has finished."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def state(self, number):
        """The dict that train.py saves."""
        return {"step": number, "model": self.net.state_dict(), "ema": self.ema.state_dict(),
                "opt": self.optimizer.state_dict(), "config": self.config}


def around_a_save(training, saver, number, step):
    """Save once. Returns seconds: of the call, lost by the steps during the write, of the write."""
    begin = time.perf_counter()
    saver.save(training.state(number))
    call, excess = training.seconds_since(begin), 0.0
    while not saver.job.done():
        excess += training.step() - step
    written = time.perf_counter() - begin
    saver.raise_errors()
    return call, excess, written


def time_records(folder, args, world, count=200):
    """Median seconds of train.py's record of an interval, written to a log in folder."""
    seconds = []
    with Log(folder, active=True) as log:
        run = SimpleNamespace(log=log, total_steps=count)
        meter = train.Meter(world, args.batch_size)
        meter.begin(0)
        for step in range(1, count + 1):
            meter.sums = torch.ones(len(train.STATISTICS), device=world.device)
            begin = time.perf_counter()
            train.Run.record(run, step, meter.read(step, ()), (), interval_ends=True)
            seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def time_pictures(folder, count=5):
    """Median seconds of writing a picture of 80 images of 256 px with the names of classes."""
    images = torch.randint(256, (80, 3, 256, 256), dtype=torch.uint8)
    seconds = []
    for _ in range(count):
        begin = time.perf_counter()
        save_grid(folder / "picture.png", images, 10, [f"class {i % 10}" for i in range(80)])
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


if __name__ == "__main__":
    run_main(main, parse_args)

"""Train for thousands of steps and check that nothing a run holds grows with the step number.

    python tests/growth.py                                  # 20,000 steps from image files
    python tests/growth.py --data latents --processes 2     # from latent shards, read by threads

Readers, pictures, evaluations and checkpoints are on. Memory, descriptors, threads and processor
time of all ranks and their readers come from /proc. The model is the smallest, as what grows with
steps grows the same in any. Prints a JSON line per reading and one for the whole; the exit code is
1 if something grew.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import combinations, pairwise
from pathlib import Path

import soak

TICKS = os.sysconf("SC_CLK_TCK")
MIB_PER_5000 = 8  # allowed
IN_FLIGHT = 4  # descriptors that a batch on its way from a reader may hold


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Train for thousands of steps and check that nothing grows with their number.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=20000, help="optimiser steps")
    parser.add_argument("--points", type=int, default=20, help="readings, evenly spaced")
    parser.add_argument("--data", choices=("images", "latents"), default="images",
                        help="image files, which processes read, or shards, which threads read")
    parser.add_argument("--processes", type=int, default=1, help="ranks of the run")
    return parser.parse_args(argv)


def main(args):
    with tempfile.TemporaryDirectory(prefix="growth-") as folder:
        result = growth(watch(Path(folder), args.data, args.steps, args.points, args.processes))
    print(json.dumps({"data": args.data, "processes": args.processes, **result}))
    sys.exit(0 if result["flat"] else 1)


def watch(folder, data, steps, points, processes=1):
    """Readings of a run, one every steps / points, printed. Raises AssertionError if it fails."""
    every, readings = steps // points, []
    words = [*map(str, options(folder, data, steps, every))]
    outputs = [folder / f"said.{rank}.txt" for rank in range(processes)]
    run = [subprocess.Popen(  # a Child could not start readers
        [sys.executable, soak.ROOT / "train.py", *words], stdout=subprocess.DEVNULL,
        stderr=output.open("w"), env=os.environ | place | {"CUDA_VISIBLE_DEVICES": ""})
        for place, output in zip(soak.ranks(processes), outputs)]
    try:
        # No reading of the last step: its readers end
        for step in range(every, steps, every):
            soak.wait_for_step(folder / "run", step, *run)
            readings.append(read([process.pid for process in run], soak.logged(folder / "run")))
            print(json.dumps(readings[-1]))
        codes = [process.wait(soak.HANG_S) for process in run]
    finally:
        for process in run:
            process.kill()
    assert not any(codes), "".join(output.read_text() for output in outputs)
    return readings


def options(folder, data, steps, every):
    """Options of train.py for the smallest model, with everything on that happens repeatedly."""
    path, pixels = soak.write_digits(folder / "digits"), ["--image-size", 8]
    said = folder / "prepare.txt"
    soak.succeed("evaluate_fid", "--samples", path, "--make-ref", folder / "ref.npz", "--protocol",
                 "pixels", *pixels, "--num-workers", 0, output=said)
    pixels += ["--vae", "none"]
    if data == "latents":
        soak.succeed("encode_imagenet", "--data-path", path, "--out-path", folder / "latents",
                     *pixels, "--num-workers", 0, output=said)
        path, pixels = folder / "latents", [*pixels, "--encoded-data"]
    return ["--data-path", path, *pixels, "--run-dir", folder / "run", "--model", "DiT-T/8",
            "--global-batch-size", 4, "--num-workers", 2, "--max-steps", steps, "--log-every",
            max(1, every // 10), "--skip-nonfinite", 1, "--sample-every", every // 2,
            "--ckpt-every", every // 2, "--eval-every", every, "--fid-ref", folder / "ref.npz",
            "--eval-samples", 60, "--protocol", "pixels"]


def read(pids, step):
    """What these processes and their readers hold now."""
    paths = [Path("/proc", str(pid)) for parent in pids for pid in (parent, *children(parent))]
    return {"step": step, "memory_mib": round(sum(map(memory, paths)) / 2**20, 1),
            "descriptors": sum(len(os.listdir(path / "fd")) for path in paths),
            "threads": sum(len(os.listdir(path / "task")) for path in paths),
            "readers": len(paths) - len(pids), "processor_s": sum(map(processor_time, paths))}


def children(pid):
    """The processes that a process has started, in any of its threads."""
    tasks = Path("/proc", str(pid), "task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def memory(path):
    """Bytes that a process holds, without those that map files."""
    fields = dict(line.split(":") for line in (path / "status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024


def processor_time(path):
    """Seconds of processor time that a process has used."""
    fields = (path / "stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def growth(readings, *, mib_per_5000=MIB_PER_5000):
    """By how much a run grows, and whether that is flat.

    Of memory for 5,000 steps, the lesser of two medians: of the increments between neighbours, as
    an allocator now and then takes 10 MiB for good, and between all readings, as neighbours differ
    by what is in flight. Of the rest the median of the last third above that of the first. The
    first reading may precede the first evaluation and does not count.
    """
    readings = readings[1:]
    third, spent = len(readings) // 3, [reading["processor_s"] for reading in readings]
    ratio = (spent[-1] - spent[-1 - third]) / (spent[third] - spent[0])
    mib = min(statistics.median(
        5000 * (b["memory_mib"] - a["memory_mib"]) / (b["step"] - a["step"]) for a, b in pairs)
        for pairs in (pairwise(readings), combinations(readings, 2)))

    def rise(name):
        values = [reading[name] for reading in readings]
        return statistics.median(values[-third:]) - statistics.median(values[:third])

    more = {name: rise(name) for name in ("descriptors", "threads", "readers")}
    return {"steps": readings[-1]["step"], "mib_per_5000_steps": round(mib, 2), **more,
            "processor_time_ratio": round(ratio, 3),
            "flat": (mib <= mib_per_5000 and more["descriptors"] <= IN_FLIGHT
                     and more["threads"] <= 0 and more["readers"] <= 0)}


if __name__ == "__main__":
    main(parse_args())

"""Train for thousands of steps and check that nothing a run holds grows with the step number.

    python tests/growth.py                                  # 20,000 steps from image files
    python tests/growth.py --data latents --processes 2     # from latent shards, read by threads

Readers, pictures, evaluations and checkpoints are on. Memory, descriptors, threads and processor
time of all ranks and their readers come from /proc. The model is the smallest, as what grows with
steps grows the same in any. Prints a table and one JSON line; the exit code is 1 if something grew.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
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
    folder = Path(tempfile.mkdtemp(prefix="growth-"))
    try:
        readings = watch(folder, args.data, args.steps, args.points, processes=args.processes)
    finally:
        shutil.rmtree(folder)
    print(table(readings))
    result = growth(readings)
    print(json.dumps({"data": args.data, "processes": args.processes, **result}))
    sys.exit(0 if result["flat"] else 1)


def watch(folder, data, steps, points, *, processes=1):
    """Readings of a run, one every steps / points. Raises AssertionError if it fails."""
    every = steps // points
    words = map(str, options(folder, data, steps, every))
    command = [sys.executable, soak.ROOT / "train.py", *words]
    places = soak.ranks(processes) if processes > 1 else [{}]
    run = [subprocess.Popen(
        command, cwd=soak.ROOT, stdout=subprocess.DEVNULL,
        stderr=open(folder / f"said.{i}.txt", "w"),
        env=os.environ | place | {"CUDA_VISIBLE_DEVICES": ""})
        for i, place in enumerate(places)]
    readings = []
    try:
        # No reading of the last step: its readers end
        for step in range(every, steps, every):
            soak.wait_for_step(folder / "run", step, alive=lambda: all(
                process.poll() is None for process in run))
            readings.append(read([process.pid for process in run], soak.logged(folder / "run")))
        codes = [process.wait(soak.HANG_S) for process in run]
    finally:
        for process in run:
            process.kill()
    said = "".join(path.read_text() for path in folder.glob("said.*.txt"))
    assert not any(codes), said
    return readings


def options(folder, data, steps, every):
    """Options of train.py for the smallest model, with everything on that happens repeatedly."""
    import digits  # of examples/, which soak has put on the path

    source = digits.load_digits()
    source.images = source.images[:200]
    digits.write(folder / "digits", source)
    path, pixels = folder / "digits", ["--image-size", 8, "--vae", "none"]
    if data == "latents":
        path = folder / "latents"
        prepare(folder, "encode_imagenet", "--data-path", folder / "digits", "--out-path", path,
                *pixels, "--num-workers", 0)
        pixels = [*pixels, "--encoded-data"]
    prepare(folder, "evaluate_fid", "--samples", folder / "digits", "--make-ref",
            folder / "ref.npz", "--protocol", "pixels", "--image-size", 8, "--num-workers", 0)
    return ["--data-path", path, *pixels, "--run-dir", folder / "run", "--model", "DiT-T/8",
            "--global-batch-size", 4, "--num-workers", 2, "--max-steps", steps, "--log-every",
            max(1, every // 10), "--skip-nonfinite", 1, "--sample-every", every // 2,
            "--ckpt-every", every // 2, "--eval-every", every, "--fid-ref", folder / "ref.npz",
            "--eval-samples", 60, "--protocol", "pixels"]


def prepare(folder, script, *words):
    """Run a script that makes what training needs."""
    code, said = soak.Child(script, *words, output=folder / "prepare.txt").wait()
    assert code == 0, said


def read(pids, step):
    """What these processes and their readers hold now."""
    families = [[pid, *children(pid)] for pid in pids]
    every = [Path("/proc", str(pid)) for family in families for pid in family]
    return {"step": step, "time": time.monotonic(), "memory": sum(map(memory, every)) / 2**20,
            "descriptors": sum(len(os.listdir(path / "fd")) for path in every),
            "threads": sum(len(os.listdir(path / "task")) for path in every),
            "readers": len(every) - len(pids), "busy": sum(map(busy, every))}


def children(pid):
    """The processes that a process has started, in any of its threads."""
    tasks = Path("/proc", str(pid), "task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def memory(path):
    """Bytes that a process holds, without those that map files."""
    fields = dict(line.split(":") for line in (path / "status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024


def busy(path):
    """Seconds of processor time that a process has used."""
    fields = (path / "stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def growth(readings, *, mib_per_5000=MIB_PER_5000):
    """By how much a run grows, and whether that is flat.

    Of memory the median of the increments between readings, scaled to 5,000 steps: what leaks grows
    in each interval, while an allocator now and then takes 10 MiB at once, for good. Of the rest by
    how much the median of the last third of the readings exceeds that of the first. The first
    reading does not count: it may precede the first evaluation, whose memory a run keeps.
    """
    readings = readings[1:]

    def thirds(values):
        third = len(values) // 3
        return statistics.median(values[:third]), statistics.median(values[-third:])

    def per_step(name):
        return [(b[name] - a[name]) / (b["step"] - a["step"])
                for a, b in zip(readings, readings[1:])]

    descriptors, threads, readers = (thirds([reading[name] for reading in readings])
                                     for name in ("descriptors", "threads", "readers"))
    before, after = thirds(per_step("busy"))
    mib = statistics.median(per_step("memory")) * 5000
    more = {"descriptors": descriptors[1] - descriptors[0], "threads": threads[1] - threads[0],
            "readers": readers[1] - readers[0]}
    flat = more["descriptors"] <= IN_FLIGHT and more["threads"] <= 0 and more["readers"] <= 0
    return {"steps": readings[-1]["step"], "mib_per_5000_steps": round(mib, 2), **more,
            "processor_time_per_step_ratio": round(after / before, 3),
            "flat": flat and mib <= mib_per_5000}


def table(readings):
    """The readings as lines."""
    lines = ["   step  memory MiB  descriptors  threads  processor ms/step  wall ms/step"]
    for before, now in zip([None, *readings], readings):
        steps = now["step"] - before["step"] if before else None
        paces = [f"{1000 * (now[name] - before[name]) / steps:.2f}" if before else ""
                 for name in ("busy", "time")]
        lines.append(f"{now['step']:7d}  {now['memory']:10.1f}  {now['descriptors']:11d}  "
                     f"{now['threads']:7d}  {paces[0]:>17}  {paces[1]:>12}")
    return "\n".join(lines)


if __name__ == "__main__":
    main(parse_args())

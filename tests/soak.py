"""Kill training at random moments, finish it, and check that nothing was lost.

    python tests/soak.py                         # 100 SIGKILLs, some minutes on two cores
    python tests/soak.py --kills 0 --pairs 50    # two-process runs that must exit cleanly

The final state must equal an uninterrupted run's bit for bit; after every kill, once a checkpoint
was saved, the newest one must load. Prints one JSON line.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import random
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import torch  # noqa: E402

from engine.checkpoint import list_checkpoints, load_checkpoint  # noqa: E402
from engine.errors import run_main  # noqa: E402

# Of this process and of those it starts: more would compete for the cores
THREADS = int(os.environ.setdefault("OMP_NUM_THREADS", "1"))
EVERY = 3  # steps between checkpoints
HANG_S = 600  # a wait that lasts longer is a hang; on a busy machine all waits are long
REACH = 8  # steps after the newest checkpoint by which the next kill comes


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Kill training at random moments, finish it, compare.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs; 0 = none")
    parser.add_argument("--pairs", type=int, default=0, help="two-process runs; 0 = none")
    parser.add_argument("--seed", type=int, default=0, help="fixes the moments of the kills")
    parser.add_argument("--keep", action="store_true", help="keep the folder of the runs")
    return parser.parse_args(argv)


def main(args):
    import digits  # of examples/

    torch.set_num_threads(THREADS)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    source = digits.load_digits()
    source.images = source.images[:200]
    digits.write(folder / "data", source)
    result = {}
    if args.kills:
        result |= kill_and_finish(folder / "data", folder, kills=args.kills, seed=args.seed)
    if args.pairs:
        result |= run_pairs(folder / "data", folder, args.pairs)
    if args.keep:
        print(folder, file=sys.stderr)
    else:
        shutil.rmtree(folder)
    print(json.dumps(result))


# ---- runs ----------------------------------------------------------------------------------


def options(data, folder, steps, *extra):
    """Options of train.py for a tiny run that saves and logs often."""
    return ["--data-path", data, "--run-dir", folder, "--vae", "none", "--image-size", 8,
            "--model", "DiT-T/4", "--global-batch-size", 16, "--num-workers", 0, "--lr", 1e-3,
            "--ema-decay", 0.9, "--sample-every", 0, "--ckpt-every", EVERY, "--log-every", 1,
            "--max-steps", steps, *extra]


class Child:
    """A script of this repository, or a .py file, in a process of its own, on the CPU.

    It is forked, which saves the seconds that importing PyTorch takes. A server that does nothing
    else forks it: a fork of this process would share its locks, and one that is killed while it
    holds a lock would block all others.
    """

    def __init__(self, script, *words, output, limit=None, **environment):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["train", "sample", "encode_imagenet", "evaluate_fid",
                                        "torch.distributed.run"])
        environment |= {"CUDA_VISIBLE_DEVICES": ""}
        self.output, words = Path(output), [str(word) for word in words]
        self.process = context.Process(
            target=work, args=(str(script), words, self.output, limit, environment), daemon=True)
        self.process.start()
        self.pid = self.process.pid

    @property
    def alive(self):
        return self.process.is_alive()

    def wait(self):
        """(exit code, what it printed). After a signal the code is the negative number of it."""
        self.process.join(HANG_S)
        assert not self.alive, f"still running: {self.output.read_text()}"
        return self.process.exitcode, self.output.read_text()


def work(script, words, output, limit, environment):
    """Run the script as a user would: what a child does."""
    os.environ.update(environment)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # where these tests run under nohup
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
    sys.argv = [script if script.endswith(".py") else f"{script}.py", *words]
    torch.set_num_threads(THREADS)
    if script.endswith(".py"):
        runpy.run_path(script, run_name="__main__")
        return
    module = importlib.import_module(script)
    run_main(module.main, module.parse_args)


def ranks(count):
    """The environments of so many ranks of one process group, without torchrun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [{"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(count),
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} for i in range(count)]


def logged(folder):
    """The last step in a run's metrics, 0 if there is none."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["step"]
    except (OSError, LookupError, ValueError):
        return 0


def wait_for_step(folder, step, alive):
    """Wait until a run has logged this step. Raises AssertionError if it ends before."""
    end = time.monotonic() + HANG_S
    while logged(folder) < step:
        assert alive() and time.monotonic() < end, f"step {step} did not come"
        time.sleep(0.002)


def differences(one, two):
    """Names of the weights, averages and optimiser tensors that differ in a bit."""
    found = [f"{kind} {key}" for kind in ("model", "ema") for key, value in one[kind].items()
             if not torch.equal(value, two[kind][key])]
    return found + [f"optimiser {i} {key}" for i, state in one["opt"]["state"].items()
                    for key, value in state.items()
                    if not torch.equal(value, two["opt"]["state"][i][key])]


# ---- the two trials ------------------------------------------------------------------------


def kill_and_finish(data, folder, *, kills, seed):
    """Figures of a run that is killed so often and then finished. Raises AssertionError."""
    steps, moments, began = 6 * kills, random.Random(seed), time.monotonic()
    whole, broken = folder / "whole", folder / "broken"
    finish(data, whole, steps)
    saved = in_writing = 0
    for _ in range(kills):
        target = saved + moments.randint(0, REACH)
        child = Child("train", *options(data, broken, steps), output=folder / "child.txt")
        wait_for_step(broken, target, lambda: child.alive)  # noqa: B023
        time.sleep(moments.uniform(0, 0.1))
        child.process.kill()
        code, said = child.wait()
        assert code == -9, f"not killed but ended with {code}: {said}"
        in_writing += bool(list((broken / "checkpoints").glob(".*.tmp")))
        saved = check(broken, saved)
    finish(data, broken, steps)
    ends = [load_checkpoint(run / "checkpoints" / f"{steps:07d}.pt") for run in (whole, broken)]
    assert not differences(*ends), differences(*ends)
    assert not list((broken / "checkpoints").glob(".*")), "half a file was left behind"
    lines = (broken / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, steps + 1))
    return {"kills": kills, "kills_while_a_checkpoint_was_written": in_writing, "steps": steps,
            "step_at_the_last_kill": saved, "bit_equal": True,
            "seconds": round(time.monotonic() - began)}


def finish(data, run, steps):
    """Train to the end."""
    code, said = Child("train", *options(data, run, steps),
                       output=run.with_name("child.txt")).wait()
    assert code == 0, said


def check(run, saved):
    """The step of a killed run's newest checkpoint, which must load if there ever was one."""
    found = list_checkpoints(run / "checkpoints")
    assert found or not saved, "the checkpoints are gone"
    if not found:
        return 0
    step = load_checkpoint(found[0])["step"]
    assert step == int(found[0].stem) and step >= saved
    return step


def run_pairs(data, folder, count):
    """Figures of so many runs of two ranks, each in two new Pythons. Raises AssertionError."""
    began = time.monotonic()
    for i in range(count):
        words = map(str, options(data, folder / f"pair{i}", 2))
        command = [sys.executable, ROOT / "train.py", *words]
        pair = [subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE,
                                 stdout=subprocess.DEVNULL,
                                 env=os.environ | environment)
                for environment in ranks(2)]
        said = [process.communicate(timeout=HANG_S)[1] for process in pair]
        assert not any(process.returncode for process in pair), said
        assert not any("terminate" in text or "Traceback" in text for text in said), said
        shutil.rmtree(folder / f"pair{i}")
        print(f"{i + 1} of {count} pairs exited cleanly", file=sys.stderr)
    return {"pairs": count, "clean_exits": count,
            "seconds_of_pairs": round(time.monotonic() - began)}


if __name__ == "__main__":
    main(parse_args())

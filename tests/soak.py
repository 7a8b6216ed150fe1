"""Kill training at random moments, finish it, and check that nothing was lost.

    python tests/soak.py    # 100 SIGKILLs, some minutes on two cores

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
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs")
    parser.add_argument("--seed", type=int, default=0, help="fixes the moments of the kills")
    return parser.parse_args(argv)


def main(args):
    torch.set_num_threads(THREADS)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))  # stays where a check fails
    print(json.dumps(kill_and_finish(write_digits(folder / "data"), folder, kills=args.kills,
                                     seed=args.seed)))
    shutil.rmtree(folder)


# ---- runs ----------------------------------------------------------------------------------


def write_digits(folder):
    """Write 200 handwritten digits, one folder of pictures per class; returns the folder."""
    import digits  # of examples/

    source = digits.load_digits()
    source.images = source.images[:200]
    digits.write(folder, source)
    return folder


def options(data, folder, steps, *extra):
    """Options of train.py for a tiny run that saves and logs often."""
    return ["--data-path", data, "--run-dir", folder, "--vae", "none", "--image-size", 8,
            "--model", "DiT-T/4", "--global-batch-size", 12, "--num-workers", 0, "--lr", 1e-3,
            "--ema-decay", 0.9, "--sample-every", 0, "--ckpt-every", EVERY, "--log-every", 1,
            "--max-steps", steps, *extra]


class Child:
    """A script of this repository, or a .py file, in a process of its own, on the CPU.

    A server forks it, which saves the seconds that importing PyTorch takes: a fork of this process
    would share its locks, and one that is killed while it holds a lock would block all others.
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

    def poll(self):
        """The exit code, None while it runs. After a signal it is the negative number of that."""
        return self.process.exitcode

    def wait_for(self, word):
        """Wait until it has printed this word. Raises AssertionError if it ends before."""
        end = time.monotonic() + HANG_S
        while not self.output.exists() or word not in self.output.read_text():
            assert self.poll() is None and time.monotonic() < end
            time.sleep(0.01)

    def wait(self):
        """(exit code, what it printed)."""
        self.process.join(HANG_S)
        assert self.poll() is not None, f"still running: {self.output.read_text()}"
        return self.poll(), self.output.read_text()


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


def succeed(script, *words, output):
    """Run a script to its end. Raises AssertionError if it fails."""
    code, said = Child(script, *words, output=output).wait()
    assert code == 0, said


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


def wait_for_step(folder, step, *processes):
    """Wait until a run has logged this step. Raises AssertionError if a process ends before."""
    end = time.monotonic() + HANG_S
    while logged(folder) < step:
        assert not any(process.poll() is not None for process in processes), "the run has ended"
        assert time.monotonic() < end, f"step {step} did not come"
        time.sleep(0.002)


def differences(one, two):
    """Names of the weights, averages and optimiser tensors that differ in a bit."""
    pairs = [(one[kind], two[kind]) for kind in ("model", "ema")]
    pairs += [(state, two["opt"]["state"][i]) for i, state in one["opt"]["state"].items()]
    return [name for a, b in pairs for name in a if not torch.equal(a[name], b[name])]


# ---- the trial -----------------------------------------------------------------------------


def kill_and_finish(data, folder, *, kills, seed):
    """Figures of a run that is killed so often and then finished. Raises AssertionError."""
    steps, moments, began = 6 * kills, random.Random(seed), time.monotonic()
    whole, broken = folder / "whole", folder / "broken"
    succeed("train", *options(data, whole, steps), output=folder / "whole.txt")
    saved = in_writing = 0
    for _ in range(kills):
        child = Child("train", *options(data, broken, steps), output=folder / "broken.txt")
        wait_for_step(broken, saved + moments.randint(0, REACH), child)
        time.sleep(moments.uniform(0, 0.1))
        child.process.kill()
        code, said = child.wait()
        assert code == -9, f"not killed but ended with {code}: {said}"
        in_writing += bool(list((broken / "checkpoints").glob(".*.tmp")))
        saved = check(broken, saved)
    succeed("train", *options(data, broken, steps), output=folder / "broken.txt")
    ends = [load_checkpoint(run / "checkpoints" / f"{steps:07d}.pt") for run in (whole, broken)]
    assert not differences(*ends), differences(*ends)
    assert not list((broken / "checkpoints").glob(".*")), "half a file was left behind"
    lines = (broken / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, steps + 1))
    return {"kills": kills, "kills_while_a_checkpoint_was_written": in_writing, "steps": steps,
            "step_at_the_last_kill": saved, "bit_equal": True,
            "seconds": round(time.monotonic() - began)}


def check(run, saved):
    """The step of a killed run's newest checkpoint, which must load if there ever was one."""
    paths = list_checkpoints(run / "checkpoints")
    assert paths or not saved, "the checkpoints are gone"
    if not paths:
        return 0
    step = load_checkpoint(paths[0])["step"]
    assert step == int(paths[0].stem) and step >= saved
    return step


if __name__ == "__main__":
    main(parse_args())

"""Runs that are stopped, killed, fed with bad numbers or left without disk, and go on."""

import os
import random
import re
import resource
import signal
import subprocess
import time

import pytest
import torch
from conftest import ROOT, call, command, run_script, tiny

import faults
import runtime

WORLD = runtime.World(0, 1, torch.device("cpu"), "fp32")


def options(digits, folder, steps):
    return [*tiny(digits, folder), "--max-steps", steps, "--ckpt-every", 3, "--log-every", 1]


def weights(folder, step):
    return torch.load(folder / "checkpoints" / f"{step:07d}.pt", weights_only=True)


def assert_same_state(one, two):
    """Bit for bit: weights, averages and optimiser."""
    for kind in ("model", "ema"):
        for key, value in one[kind].items():
            assert torch.equal(value, two[kind][key]), f"{kind} {key}"
    for i, state in one["opt"]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, two["opt"]["state"][i][key]), f"optimiser {key}"


def train(digits, folder, steps, *extra, processes=1):
    """Train to this step, with a checkpoint every three."""
    if processes == 1:
        call("train", *options(digits, folder, steps), *extra)
    else:
        done = run_script("train.py", *options(digits, folder, steps), *extra, processes=processes)
        assert done.returncode == 0, done.stderr


def start(*arguments, processes=1, **options):
    return subprocess.Popen(command(*arguments, processes=processes), cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)


def wait_for_step(folder, step, process, timeout=180):
    """Until the run has logged this step."""
    for _ in range(timeout * 20):
        path = folder / "metrics.jsonl"
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    raise AssertionError(f"step {step} did not come")


@pytest.fixture(scope="module")
def uninterrupted(digits, tmp_path_factory):
    """The final states of runs of 20 steps, 1.6 epochs, by number of processes."""
    states = {}
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp(f"uninterrupted{processes}")
        train(digits, folder, 20, processes=processes)
        states[processes] = weights(folder, 20)
    return states


@pytest.mark.parametrize("processes", [1, 2])
def test_resumed_run_equals_uninterrupted_run(processes, digits, tmp_path, uninterrupted):
    """Interrupted twice, in mid-epoch, it ends with the same bits."""
    for steps in (7, 14, 20):
        train(digits, tmp_path, steps, processes=processes)
    assert_same_state(uninterrupted[processes], weights(tmp_path, 20))


def test_a_run_goes_on_with_another_number_of_processes(digits, tmp_path, uninterrupted):
    for steps, processes in ((7, 2), (20, 1)):
        train(digits, tmp_path, steps, processes=processes)
    for key, value in uninterrupted[1]["model"].items():
        if not key.endswith("qkv.bias"):  # of key biases Adam sees the rounding only
            other = weights(tmp_path, 20)["model"][key]
            assert (other - value).abs().max() <= 1e-5 * value.abs().max(), key


def test_a_killed_run_loses_nothing(digits, tmp_path, uninterrupted):
    """SIGKILL at three random moments; at each, once one was written, a checkpoint loads."""
    moments = random.Random(0)
    for _ in range(3):
        process = start("train.py", *options(digits, tmp_path, 20), start_new_session=True)
        logged = len(list((tmp_path / "checkpoints").glob("*.pt"))) * 3
        if logged < 18:
            wait_for_step(tmp_path, logged + 1, process)
            time.sleep(moments.uniform(0, 0.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        files = sorted((tmp_path / "checkpoints").glob("[0-9]*.pt"))
        if files:
            assert torch.load(files[-1], weights_only=True)["step"] == int(files[-1].stem)
    train(digits, tmp_path, 20)
    assert_same_state(uninterrupted[1], weights(tmp_path, 20))
    assert not list((tmp_path / "checkpoints").glob(".*")), "half a file was left behind"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_saves_and_ends_the_run(processes, digits, tmp_path, uninterrupted):
    """One run, ended by each signal in turn; torchrun passes on SIGTERM and SIGINT only."""
    step = 0
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)[::processes]:
        process = start("train.py", *options(digits, tmp_path, 20), processes=processes)
        wait_for_step(tmp_path, step + 1, process)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        if processes == 1:  # torchrun reports the signal as its own end
            assert process.returncode == 0, err
        asked = re.search(rf"{number.name}: saved step (\d+); repeat", err)
        assert asked, err
        step = int(asked[1])
        assert weights(tmp_path, step)["step"] == step
    train(digits, tmp_path, 20, processes=processes)
    assert_same_state(uninterrupted[processes], weights(tmp_path, 20))


def test_a_second_interrupt_stops_at_once():
    signals = faults.Signals(WORLD)
    try:
        signals.hear(signal.SIGINT, None)
        signals.hear(signal.SIGINT, None)  # the same Ctrl-C, passed on by torchrun
        assert signals.stop() == "SIGINT"
        signals.first_interrupt -= 2
        with pytest.raises(KeyboardInterrupt):
            signals.hear(signal.SIGINT, None)
    finally:
        signals.close()


def test_a_killed_rank_ends_the_job(digits, tmp_path):
    process = start("train.py", *options(digits, tmp_path, 10**6), processes=2)
    wait_for_step(tmp_path, 4, process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    victim = max(map(int, children.stdout.split()))
    began = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - began < 30
    assert torch.load(sorted((tmp_path / "checkpoints").glob("*.pt"))[-1], weights_only=True)


def test_a_diverging_run_stops_and_keeps_its_checkpoints(digits, tmp_path):
    train(digits, tmp_path, 3)
    state = torch.load(tmp_path / "checkpoints" / "0000003.pt", weights_only=True)
    for key, value in state["model"].items():
        if key.endswith("fc1.weight"):
            value.fill_(1e38)
    torch.save(state, tmp_path / "checkpoints" / "0000003.pt")
    with pytest.raises(runtime.RunError, match="step 6: not a finite number"):
        train(digits, tmp_path, 10, "--skip-nonfinite", 2)
    done = run_script("train.py", *options(digits, tmp_path, 10))
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "step 4: not a finite number: loss on rank 0" in last and "--skip-nonfinite" in last
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["0000003.pt"]


def test_steps_that_are_not_finite_leave_weights_and_optimiser_alone():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    guard = faults.Guard(WORLD, tolerance=2)
    seen = []
    for step, value in enumerate([1.0, float("nan"), float("inf"), 1.0, float("nan")], 1):
        weight.grad = torch.full((3,), value)
        before = weight.detach().clone()
        norm = torch.nn.utils.get_total_norm([weight.grad])
        optimizer.found_inf = guard.admit(step, norm, norm)
        optimizer.step()
        seen.append(bool((weight != before).all()))
        assert torch.isfinite(weight).all()
    assert seen == [True, False, False, True, False]
    assert optimizer.state[weight]["step"].item() == 2 and guard.check() == 3
    for step in (6, 7, 8):
        guard.admit(step, torch.tensor(1.0), torch.tensor(float("nan")))
    with pytest.raises(runtime.RunError, match="step 7: .*though every rank's loss was finite"):
        guard.check()
    assert guard.admit(9, torch.tensor(1.0), torch.tensor(1.0)) == 1  # nothing moves any more


def test_a_full_disk_is_one_line_and_older_files_stay(digits, tmp_path):
    train(digits, tmp_path, 3)
    process = start("train.py", *options(digits, tmp_path, 9), preexec_fn=lambda: (
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))))  # 1 MB a file
    _, err = process.communicate(timeout=120)
    line = err.strip().splitlines()[-1]
    assert process.returncode == 2 and "Traceback" not in err, err
    assert re.search("train.py: error: cannot write .*0000006.pt.*; free space", line)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["0000003.pt"]

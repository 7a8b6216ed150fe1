"""Runs that are stopped, killed, fed with bad numbers or left without disk, and go on."""

import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import time
import types
from pathlib import Path

import pytest
import soak
import torch
from conftest import ROOT, assert_same_training, call, load_state, sharding, torchrun
from soak import Child, differences, options, ranks, wait_for_step

from dataset.images import ImageFolder
from dataset.loader import BatchSampler, load_batches
from engine.checkpoint import list_checkpoints, newest_checkpoint
from engine.distributed import World
from engine.errors import RunError, UserError, run_main
from engine.faults import STOP_SIGNALS, Guard, Signals, propagate_nonfinite
from engine.files import FolderLock, list_folder

WORLD = World(0, 1, torch.device("cpu"), "fp32")


def begin(digits, folder, steps, *extra, processes=1, script="train"):
    """Processes that train to this step."""
    places = ranks(processes) if processes > 1 else [{}]
    return [Child(script, *options(digits, folder, steps, *extra), **place,
                  output=f"{folder}.{i}.txt") for i, place in enumerate(places)]


def train(digits, folder, steps, *extra, processes=1):
    """Train to this step; what the processes print."""
    ends = [child.wait() for child in begin(digits, folder, steps, *extra, processes=processes)]
    assert not any(code for code, _ in ends), ends
    return "".join(said for _, said in ends)


def workers(agent):
    """The processes of a torchrun, the oldest first."""
    found = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True).stdout
    return sorted(map(int, found.split()))


@pytest.fixture(scope="module")
def uninterrupted(digits, tmp_path_factory):
    """The folders of runs of 20 steps, 1.6 epochs, by number of processes, with all checkpoints."""
    root = tmp_path_factory.mktemp("uninterrupted")
    for processes in (1, 2):
        train(digits, root / str(processes), 20, "--keep-last", 0, processes=processes)
    return {processes: root / str(processes) for processes in (1, 2)}


# ---- resume --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_resumed_run_equals_uninterrupted_run(processes, digits, tmp_path, uninterrupted):
    """Interrupted twice, in mid-epoch, it ends with the same bits."""
    for steps in (7, 14, 20):
        train(digits, tmp_path / "run", steps, processes=processes)
    assert not differences(load_state(uninterrupted[processes], 20),
                           load_state(tmp_path / "run", 20))


@pytest.mark.slow
def test_resumed_run_of_many_processes_equals_uninterrupted_run(digits, tmp_path):
    """DistributedDataParallel orders the gradients anew after its first backward, and so the sums
    of three or more processes were others in the step after a resume: 2e-6 off."""
    words = "--global-batch-size", 24, "--cfg", 2, "--kappa", 0.5
    for name, ends in (("whole", [8]), ("parts", [4, 8])):
        for steps in ends:
            train(digits, tmp_path / name, steps, *words, processes=3)
    assert not differences(*(load_state(tmp_path / name, 8) for name in ("whole", "parts")))


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(digits, tmp_path, uninterrupted):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted[2], run)
    for path in list_checkpoints(run / "checkpoints")[:-2]:
        path.unlink()
    train(digits, run, 20)
    assert_same_training(load_state(run, 20), load_state(uninterrupted[1], 20))


@pytest.mark.slow
def test_a_killed_run_loses_nothing(digits, tmp_path):
    """SIGKILL at 8 random moments; at each, once one was written, the newest checkpoint loads.
    ``python tests/soak.py`` kills 100 times."""
    assert soak.kill_and_finish(digits, tmp_path, kills=8, seed=0)["bit_equal"]


@pytest.mark.slow
def test_a_torn_newest_checkpoint_is_passed_over(digits, tmp_path, uninterrupted):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted[1], run)
    os.truncate(run / "checkpoints" / "0000020.pt", 10**6)
    said = train(digits, run, 20)
    assert "0000020.pt" in said and "steps 18 to 20" in said
    assert not differences(load_state(uninterrupted[1], 20), load_state(run, 20))
    for path in list_checkpoints(run / "checkpoints"):
        os.truncate(path, 10**4)
    child, = begin(digits, run, 20)
    code, said = child.wait()
    assert code == 2 and "--run-dir" in said
    assert len(list_checkpoints(run / "checkpoints")) == 3


# ---- signals -------------------------------------------------------------------------------


GATED = """
import itertools, sys, time, train
from pathlib import Path
from engine import checkpoint, errors
work, calls = {0}, itertools.count()

def wait_and_work(*words, **more):
    if next(calls) >= {1}:
        while not Path(sys.argv[0]).with_name("go on").exists():
            time.sleep(0.01)
    return work(*words, **more)
{0} = wait_and_work
errors.run_main(train.main, train.parse_args)
"""


def gated(folder, function, free=0):
    """The script of a training that waits in each call of this function, but for so many free ones,
    until the file "go on" is beside it."""
    (folder / "gated.py").write_text(GATED.format(function, free))
    return folder / "gated.py"


@pytest.fixture
def slow_disk(tmp_path):
    """The script of a training that writes no checkpoint before the file "go on" is beside it."""
    return gated(tmp_path, "checkpoint.save_checkpoint")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_saves_and_ends_the_run(processes, digits, tmp_path, uninterrupted):
    """One run, ended by each signal in turn, of which only one of two processes hears."""
    run, step = tmp_path / "run", 0
    script = gated(tmp_path, "train.train_step", free=2)  # else it may be at its end before we look
    for number in STOP_SIGNALS if processes == 1 else STOP_SIGNALS[:2]:
        children = begin(digits, run, 20, processes=processes, script=script)
        wait_for_step(run, step + 1, lambda: children[0].alive)  # noqa: B023
        os.kill(children[-1].pid, number)
        script.with_name("go on").touch()
        ends = [child.wait() for child in children]
        assert not any(code for code, _ in ends), ends
        found = re.findall(rf"{number.name}: saved step (\d+); repeat", ends[0][1])
        step = int(found[-1])
        assert load_state(run, step)["step"] == step < 20
        script.with_name("go on").unlink()
    train(digits, run, 20, processes=processes)
    assert not differences(load_state(uninterrupted[processes], 20), load_state(run, 20))


@pytest.mark.slow
def test_a_second_interrupt_lets_the_checkpoint_be_finished(digits, tmp_path, slow_disk):
    """It cut the file that was being written short."""
    run = tmp_path / "run"
    child, = begin(digits, run, 1000, script=slow_disk)
    wait_for_step(run, 3, lambda: child.alive)
    for pause in (1.1, 0.2):  # two within a second are one Ctrl-C
        os.kill(child.pid, signal.SIGINT)
        time.sleep(pause)
    assert child.alive and not list_checkpoints(run / "checkpoints")
    slow_disk.with_name("go on").touch()
    code, said = child.wait()
    assert code == 130 and load_state(run, 3)["step"] == 3, said
    assert said.count("this step ends and is saved; once more leaves at once") == 1
    before, last = said.strip().splitlines()[-2:]
    assert "checkpoint that is being written is finished first" in before
    assert "interrupted twice" in last and "repeat the command" in last


@pytest.mark.slow
def test_a_signal_after_the_last_step_ends_no_process_that_waits_for_the_save(digits, tmp_path,
                                                                              slow_disk):
    """Rank 1 died of it while it waited, and rank 0 of that, with exit code 1."""
    run = tmp_path / "run"
    pair = begin(digits, run, 5, "--ckpt-every", 1000, script=slow_disk, processes=2)
    wait_for_step(run, 5, lambda: pair[0].alive)
    time.sleep(0.7)
    for child in pair:
        os.kill(child.pid, signal.SIGTERM)
    time.sleep(0.7)
    slow_disk.with_name("go on").touch()
    ends = [child.wait() for child in pair]
    assert [code for code, _ in ends] == [0, 0] and "error" not in ends[1][1], ends
    assert load_state(run, 5)["step"] == 5


CLOSED = """
import os, sys, train
from engine.errors import run_main
os.setsid()
terminal = os.open(sys.argv.pop(1), os.O_RDWR)  # of this new session
os.dup2(terminal, 1), os.dup2(terminal, 2)
files = sys.stdout, sys.stderr  # kept, or their ends would close the terminal
sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
run_main(train.main, train.parse_args)
"""


@pytest.mark.slow
def test_a_closed_terminal_saves_and_ends_the_run(digits, tmp_path):
    """To write to it is an error from then on; the run ends as it does after SIGTERM."""
    run, (ours, theirs) = tmp_path / "run", os.openpty()
    (tmp_path / "closed.py").write_text(CLOSED)
    child = Child(tmp_path / "closed.py", os.ttyname(theirs), *options(digits, run, 10**6),
                  output=tmp_path / "said")
    wait_for_step(run, 2, lambda: child.alive)
    os.close(theirs), os.close(ours)
    assert child.wait()[0] == 0
    step, = re.findall(r"SIGHUP: saved step (\d+)", (run / "log.txt").read_text())
    assert load_state(run, int(step))["step"] == int(step)


def test_a_hangup_that_is_ignored_stays_ignored():
    """nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals(WORLD):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


STUCK = """
import sys, time
from engine import faults
from engine.distributed import start_processes
faults.GRACE_S = float(sys.argv[1])
with start_processes() as world, faults.Signals(world):
    print("ready", flush=True)
    time.sleep(3600) if world.rank else world.barrier()  # rank 0 waits within PyTorch, in C++
"""


@pytest.mark.slow
@pytest.mark.parametrize(("numbers", "grace", "code", "line"), [
    ([signal.SIGINT, signal.SIGTERM], 600, 130, "rank 0: interrupted twice at the start; what"),
    ([signal.SIGTERM], 1, 1, "rank 0: the step did not end within 1.0 s of a signal at the start")])
def test_a_process_that_waits_for_another_can_be_stopped(numbers, grace, code, line, tmp_path):
    (tmp_path / "stuck.py").write_text(STUCK)
    pair = [Child(tmp_path / "stuck.py", grace, **place, output=tmp_path / f"said{i}")
            for i, place in enumerate(ranks(2))]
    try:
        while not all(child.output.exists() and child.output.read_text() for child in pair):
            assert all(child.alive for child in pair)
        for number in numbers:
            time.sleep(1.1)  # two within a second are one Ctrl-C
            assert pair[0].alive
            os.kill(pair[0].pid, number)
        ended, said = pair[0].wait()
        assert ended == code and f"stuck.py: error: {line}" in said.splitlines()[-1], said
    finally:
        for child in pair:
            child.process.kill()


def test_a_signal_adds_no_record_to_the_metrics(digits, tmp_path, monkeypatch):
    """It added one of the steps since the last one, which no uninterrupted run has."""
    steps = itertools.count(1)
    words = [*options(digits, tmp_path, 12), "--log-every", 4]
    with monkeypatch.context() as patch:
        patch.setattr(Signals, "stop", lambda self: next(steps) == 6 and "SIGTERM" or None)
        call("train", *words)
    assert "step 6/12  error" in (tmp_path / "log.txt").read_text()
    call("train", *words)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [record["step"] for record in records] == [4, 8, 12]


def test_metrics_are_on_disk_before_their_checkpoint(digits, tmp_path, monkeypatch):
    """After a power cut a checkpoint was there and the metrics before it were not."""
    steps, counts, fsync, replace = {}, [], os.fsync, os.replace

    def note(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        steps[path.name] = len(path.read_text().splitlines()) if path.suffix == ".jsonl" else 1
        fsync(descriptor)

    def count(source, target):
        if Path(target).suffix == ".pt":
            counts.append(steps.get("metrics.jsonl"))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", count)
    call("train", *options(digits, tmp_path, 7))
    assert len(counts) == 3 and counts[0] >= 3 and counts[1] >= 6 and counts[2] >= 7
    assert steps["log.txt"] and any(name.startswith("events.out.tfevents") for name in steps)


@pytest.mark.slow
def test_torchrun_passes_a_signal_on(digits, tmp_path):
    """SIGUSR1 if it is told to. Its own end is not clean: it calls a signal an error."""
    run = tmp_path / "run"
    agent = torchrun("--standalone", "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
                     ROOT / "train.py", *options(digits, run, 10**6), output=tmp_path / "agent.txt")
    wait_for_step(run, 2, lambda: agent.alive)
    os.kill(agent.pid, signal.SIGUSR1)
    code, said = agent.wait()
    step, = re.findall(r"SIGUSR1: saved step (\d+); repeat", said)
    assert code and load_state(run, int(step))["step"] == int(step)
    assert "train.py: error" not in said


def test_signals_have_their_usual_effect_after_a_run():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with Signals(WORLD) as signals:
        assert signals.stop() is None
        assert signal.getsignal(signal.SIGTERM) == signals.hear
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


# ---- processes that die --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("extra", [
    pytest.param([], id="whole"), pytest.param(["--shard"], id="sharded", marks=sharding)])
def test_a_killed_rank_ends_the_job(extra, digits, tmp_path):
    """And with a last line from the rank that is left."""
    run = tmp_path / "run"
    pair = begin(digits, run, 10**6, *extra, processes=2)
    wait_for_step(run, 4, lambda: pair[0].alive)
    os.kill(pair[1].pid, signal.SIGKILL)
    code, said = pair[0].wait()
    assert code == 1 and "Traceback" not in said
    assert re.search(r"rank 0: lost the other processes at step \d+ \(.*Connection .*\); .* "
                     r"repeat the command", said.splitlines()[-1])
    assert newest_checkpoint(run / "checkpoints")


def test_a_run_directory_is_of_one_run_at_a_time(digits, tmp_path):
    """A second run is refused before it writes anything, and starts once the first has ended."""
    with FolderLock(tmp_path / "run"):
        code, said = begin(digits, tmp_path / "run", 2)[0].wait()
        assert code == 2 and "--run-dir" in said and f"process {os.getpid()} on" in said
        assert not list_folder(tmp_path / "run")
    train(digits, tmp_path / "run", 2)


@pytest.mark.slow
def test_a_run_whose_directory_was_made_again_ends(digits, tmp_path):
    """Two runs wrote to it, and the newer went on from the other's checkpoint."""
    run = tmp_path / "run"
    child, = begin(digits, run, 10**6)
    wait_for_step(run, 4, lambda: child.alive)
    run.rename(tmp_path / "moved")
    with FolderLock(run):  # the newer
        (run / "checkpoints").mkdir()
        code, said = child.wait()
    last = said.strip().splitlines()[-1]
    assert code == 1, said
    assert re.search("error: .*run was taken by process .* repeat the command", last), said
    assert not list_folder(run / "checkpoints")


def test_the_options_are_compared_again_once_the_directory_is_held(digits, tmp_path, uninterrupted,
                                                                   monkeypatch):
    """A run of another rate that waited for the first to end went on from its checkpoint."""
    run = tmp_path / "run"

    def wait_for_another_run(folder):
        shutil.copytree(uninterrupted[1], run)
        return FolderLock(folder)

    monkeypatch.setattr("train.FolderLock", wait_for_another_run)
    with pytest.raises(UserError, match="--run-dir .*lr 0.001, now 0.01"):
        call("train", *options(digits, run, 30, "--lr", 0.01))
    before = uninterrupted[1] / "config.json"
    assert (run / "config.json").read_bytes() == before.read_bytes()


@pytest.mark.slow
def test_two_nodes_train_and_restart_by_themselves(digits, tmp_path, uninterrupted):
    """Two torchruns of one process each, which meet as those of two machines do."""
    run, port = tmp_path / "run", ranks(1)[0]["MASTER_PORT"]
    words = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=test",
             f"--rdzv_endpoint=127.0.0.1:{port}", "--local_addr=127.0.0.1", "--max-restarts=1",
             "--monitor-interval=0.1", ROOT / "train.py", *options(digits, run, 20)]
    pair = [torchrun(*words, output=tmp_path / f"agent{i}.txt") for i in range(2)]
    wait_for_step(run, 4, lambda: pair[0].alive)
    os.kill(workers(pair[1])[0], signal.SIGKILL)
    ends = [agent.wait() for agent in pair]
    assert not any(code for code, _ in ends), ends
    assert not differences(load_state(uninterrupted[2], 20), load_state(run, 20))
    text = (run / "log.txt").read_text()
    assert text.count("2 process(es)") == 2 and re.search(r"steps \d+ to 20", text)
    assert len(re.findall(r"\bstep 20/", text)) == 1  # logged by one process alone


# ---- numbers and disks ---------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), [
    ("fc1.weight", 1e38), ("final_layer.linear.bias", 1e25)])
def test_a_diverging_run_stops_and_keeps_its_checkpoints(name, value, digits, tmp_path,
                                                         uninterrupted):
    """The second makes an error that overflows, whose gradient is 0 and told nothing."""
    run = tmp_path / "run"
    shutil.copytree(uninterrupted[1], run)
    for path in list_checkpoints(run / "checkpoints")[:-1]:
        path.unlink()
    path, = list_checkpoints(run / "checkpoints")
    state = torch.load(path, weights_only=True)
    for key, weight in state["model"].items():
        if key.endswith(name):
            weight.fill_(value)
    torch.save(state, path)
    for skip, step in ((2, 6), (0, 4)):
        with pytest.raises(RunError, match=f"step {step}: .*loss on rank 0.*--skip-nonfinite"):
            call("train", *options(digits, run, 10, "--skip-nonfinite", skip))
        assert "ended by RunError: step" in (run / "log.txt").read_text().splitlines()[-1]
    assert list((run / "checkpoints").iterdir()) == [path]


def test_steps_that_are_left_out_are_logged(digits, tmp_path, monkeypatch):
    """Also the one that was counted for a checkpoint, before the next line of the log. Weights do
    not move at one."""
    losses = itertools.count(1)
    monkeypatch.setattr("train.propagate_nonfinite", lambda loss: propagate_nonfinite(
        loss * float("nan") if next(losses) in (3, 5) else loss))
    call("train", *options(digits, tmp_path / "run", 8, "--skip-nonfinite", 1, "--log-every", 4,
                           "--ckpt-every", 1, "--keep-last", 0))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [line["skipped_steps"] for line in lines] == [1, 1]
    before, after = load_state(tmp_path / "run", 3), load_state(tmp_path / "run", 8)
    assert before["opt"]["state"][0]["step"] == 2 and after["opt"]["state"][0]["step"] == 6
    assert all(value.isfinite().all() for value in after["model"].values())
    for step, moves in ((2, True), (3, False), (4, True), (5, False), (6, True)):
        one, two = (load_state(tmp_path / "run", n) for n in (step - 1, step))
        same = [torch.equal(value, two["model"][key]) for key, value in one["model"].items()]
        assert all(same) != moves, f"step {step}"


def test_the_rank_whose_loss_is_not_finite_is_named():
    world = types.SimpleNamespace(device=torch.device("cpu"), gather=lambda own: [own, 1.0])
    guard = Guard(world, tolerance=0)
    guard.should_skip(1, torch.tensor(0.5), torch.tensor(float("nan")))
    with pytest.raises(RunError, match="step 1: .*loss on rank 1;"):
        guard.check()


def test_steps_that_are_not_finite_leave_weights_and_optimiser_alone():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    guard = Guard(WORLD, tolerance=2)
    seen = []
    for step, value in enumerate([1.0, float("nan"), float("inf"), 1.0, float("nan")], 1):
        weight.grad = torch.full((3,), value)
        before = weight.detach().clone()
        norm = torch.nn.utils.get_total_norm([weight.grad])
        optimizer.found_inf = guard.should_skip(step, norm, norm)
        optimizer.step()
        seen.append(bool((weight != before).all()))
        assert torch.isfinite(weight).all()
    assert seen == [True, False, False, True, False]
    assert optimizer.state[weight]["step"].item() == 2 and guard.check() == 3
    for step in (6, 7, 8):
        guard.should_skip(step, torch.tensor(1.0), torch.tensor(float("nan")))
    with pytest.raises(RunError, match="step 7: .*though every rank's loss was finite"):
        guard.check()
    assert guard.should_skip(9, torch.tensor(1.0), torch.tensor(1.0)) == 1  # nothing moves any more


def test_a_loss_that_is_not_finite_tells_by_its_gradient():
    for value, finite in ((0.1, True), (3e38, True), (float("inf"), False), (float("nan"), False)):
        x = torch.tensor(value, requires_grad=True)
        loss = propagate_nonfinite(x)
        loss.backward()
        assert bool(torch.isfinite(x.grad)) == finite
        assert not finite or (loss == x and x.grad == 1)


def test_a_full_disk_is_one_line_and_older_files_stay(digits, tmp_path, uninterrupted):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted[1], run)
    before = {path.name: path.read_bytes() for path in (run / "checkpoints").iterdir()}
    code, said = Child("train", *options(digits, run, 10**6), output=tmp_path / "out.txt",
                       limit=10**6).wait()  # 1 MB a file
    assert code == 2 and "Traceback" not in said, said
    last = said.strip().splitlines()[-1]
    assert re.search("train.py: error: cannot write .*0000021.pt", last)
    assert {path.name: path.read_bytes() for path in (run / "checkpoints").iterdir()} == before


def test_readers_leave_the_end_to_the_training_process(digits, capfd):
    """A signal to the whole process group, as from a terminal, reaches the workers, too."""
    images = ImageFolder(digits, 8)
    batches = BatchSampler(200, 10, seed=0, flip=False, world=WORLD)
    loaded = load_batches(images, batches.steps(0, 10**6), workers=1, device=torch.device("cpu"))
    next(loaded)
    reader, = multiprocessing.active_children()
    for number in STOP_SIGNALS:
        os.kill(reader.pid, number)
    for _ in range(20):
        next(loaded)
    reader.kill()  # as a system without memory does
    with pytest.raises(SystemExit):
        run_main(lambda args: list(loaded), lambda: None)
    err = capfd.readouterr().err  # Python's own threads may complain, too
    assert re.search("error: .*--num-workers", err), err

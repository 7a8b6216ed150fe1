"""Runs that are stopped, killed, fed with bad numbers or left without disk, and go on."""

import functools
import itertools
import json
import math
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
from conftest import ROOT, assert_same_training, call, load_state, run_ranks, sharding, torchrun
from soak import Child, differences, options, ranks, wait_for_step

from dataset.images import ImageFolder
from dataset.loader import BatchSampler, load_batches
from engine.checkpoint import list_checkpoints, newest_checkpoint
from engine.distributed import World
from engine.errors import RunError, UserError, run_main
from engine.faults import STOP_SIGNALS, Guard, Signals, propagate_nonfinite
from engine.files import FolderLock, list_folder

WORLD = World(0, 1, torch.device("cpu"), "fp32")
SHARDED = pytest.param(2, ["--shard"], marks=sharding)  # processes and extra options


def begin(digits, folder, steps, *extra, processes=1, script="train"):
    """Processes that train to this step."""
    return [Child(script, *options(digits, folder, steps, *extra), **place,
                  output=f"{folder}.{i}.txt") for i, place in enumerate(ranks(processes))]


def train(digits, folder, steps, *extra, processes=1):
    """Train to this step; what the processes print."""
    return "".join(run_ranks("train", *options(digits, folder, steps, *extra), processes=processes,
                             output=folder))


def last_line(said):
    return said.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def uninterrupted(digits, tmp_path_factory):
    """A function of the number of processes and of extra options: the folder of a run of 20 steps,
    1.25 epochs, with all checkpoints."""
    root = tmp_path_factory.mktemp("uninterrupted")

    @functools.cache
    def run(processes, *extra):
        folder = root / f"{processes}{''.join(extra)}"
        train(digits, folder, 20, "--keep-last", 0, *extra, processes=processes)
        return folder
    return run


def shorten(run, folder, checkpoints):
    """A copy of a run as it was after so many checkpoints."""
    shutil.copytree(run, folder)
    for path in list_checkpoints(folder / "checkpoints")[:-checkpoints]:
        path.unlink()
    return folder


# ---- resume --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "extra"), [(1, []), (2, []), (3, []), SHARDED])
def test_resumed_run_equals_uninterrupted_run(processes, extra, digits, tmp_path, uninterrupted):
    """Interrupted twice, in mid-epoch, it ends with the same bits. With three it did not:
    DistributedDataParallel orders the gradients anew after its first backward, and so the sums."""
    for steps in (7, 14, 20):
        train(digits, tmp_path / "run", steps, *extra, processes=processes)
    assert not differences(load_state(uninterrupted(processes, *extra), 20),
                           load_state(tmp_path / "run", 20))


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(digits, tmp_path, uninterrupted):
    run = shorten(uninterrupted(2), tmp_path / "run", checkpoints=2)
    train(digits, run, 20)
    assert_same_training(load_state(run, 20), load_state(uninterrupted(1), 20))


@pytest.mark.slow
def test_a_killed_run_loses_nothing(digits, tmp_path):
    """SIGKILL at 8 random moments; at each, once one was written, the newest checkpoint loads.
    ``python tests/soak.py`` kills 100 times."""
    assert soak.kill_and_finish(digits, tmp_path, kills=8, seed=0)["bit_equal"]


def test_a_torn_newest_checkpoint_is_passed_over(digits, tmp_path, uninterrupted, capfd):
    """Where all are torn, the run is refused: to begin anew would replace them."""
    run = shutil.copytree(uninterrupted(1), tmp_path / "run")
    os.truncate(run / "checkpoints" / "0000020.pt", 10**6)
    call("train", *options(digits, run, 20))
    said = capfd.readouterr().err
    assert "0000020.pt" in said and "steps 18 to 20" in said
    assert not differences(load_state(uninterrupted(1), 20), load_state(run, 20))
    for path in list_checkpoints(run / "checkpoints"):
        os.truncate(path, 10**4)
    with pytest.raises(UserError, match="--run-dir"):
        call("train", *options(digits, run, 20))
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
    until the file "go on" is beside it. With save_checkpoint it is one with a slow disk."""
    (folder / "gated.py").write_text(GATED.format(function, free))
    return folder / "gated.py"


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "extra"), [(1, []), (2, []), SHARDED])
def test_a_signal_saves_and_ends_the_run(processes, extra, digits, tmp_path, uninterrupted):
    """One run, ended by each signal in turn, of which only one of two processes hears."""
    run, step = tmp_path / "run", 0
    script = gated(tmp_path, "train.train_step", free=2)  # else it may be at its end before we look
    for number in STOP_SIGNALS if processes == 1 else STOP_SIGNALS[:2]:
        children = begin(digits, run, 20, *extra, processes=processes, script=script)
        wait_for_step(run, step + 1, *children)
        os.kill(children[-1].pid, number)
        script.with_name("go on").touch()
        ends = [child.wait() for child in children]
        assert not any(code for code, _ in ends), ends
        step = int(re.findall(rf"{number.name}: saved step (\d+); repeat", ends[0][1])[-1])
        assert load_state(run, step)["step"] == step < 20
        script.with_name("go on").unlink()
    train(digits, run, 20, *extra, processes=processes)
    assert not differences(load_state(uninterrupted(processes, *extra), 20), load_state(run, 20))


@pytest.mark.slow
def test_a_second_interrupt_lets_the_checkpoint_be_finished(digits, tmp_path):
    """It cut the file that was being written short."""
    run, script = tmp_path / "run", gated(tmp_path, "checkpoint.save_checkpoint")
    child, = begin(digits, run, 1000, script=script)
    wait_for_step(run, 3, child)
    for pause in (1.1, 0.2):  # two within a second are one Ctrl-C
        os.kill(child.pid, signal.SIGINT)
        time.sleep(pause)
    assert child.poll() is None and not list_checkpoints(run / "checkpoints")
    script.with_name("go on").touch()
    code, said = child.wait()
    assert code == 130 and load_state(run, 3)["step"] == 3, said
    assert "interrupted twice" in last_line(said)


@pytest.mark.slow
def test_a_signal_after_the_last_step_ends_no_process_that_waits_for_the_save(digits, tmp_path):
    """Rank 1 died of it while it waited, and rank 0 of that, with exit code 1."""
    run, script = tmp_path / "run", gated(tmp_path, "checkpoint.save_checkpoint")
    pair = begin(digits, run, 5, "--ckpt-every", 1000, script=script, processes=2)
    wait_for_step(run, 5, *pair)
    time.sleep(0.7)
    for child in pair:
        os.kill(child.pid, signal.SIGTERM)
    time.sleep(0.7)
    script.with_name("go on").touch()
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
    wait_for_step(run, 2, child)
    os.close(theirs), os.close(ours)
    assert child.wait()[0] == 0
    step, = re.findall(r"SIGHUP: saved step (\d+)", (run / "log.txt").read_text())
    assert load_state(run, int(step))["step"] == int(step)


def test_signals_have_their_usual_effect_after_a_run_and_nohup_its_own_in_it():
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)  # as the loop of a notebook may
    with Signals(WORLD) as signals:
        assert signals.stop() is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == signals.receive
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == writer
    signal.signal(signal.SIGHUP, hangup)


def test_a_signal_adds_no_record_to_the_metrics(digits, tmp_path, monkeypatch):
    """It added one of the steps since the last one, which no uninterrupted run has."""
    steps = itertools.count(1)
    words = [*options(digits, tmp_path, 12), "--log-every", 4]
    with monkeypatch.context() as patch:
        patch.setattr(Signals, "stop", lambda self: "SIGTERM" if next(steps) == 6 else None)
        call("train", *words)
    assert "step 6/12  error" in (tmp_path / "log.txt").read_text()
    call("train", *words)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [record["step"] for record in records] == [4, 8, 12]


def test_metrics_are_on_disk_before_their_checkpoint(digits, tmp_path, monkeypatch):
    """After a power cut a checkpoint was there and the metrics before it were not."""
    synced, fsync = [], os.fsync

    def note(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.suffix == ".jsonl":
            synced.append(len(path.read_text().splitlines()))
        if ".pt." in path.name:
            synced.append(path.name[:9])
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    call("train", *options(digits, tmp_path, 7))
    lines, checkpoints = synced[::2], synced[1::2]
    assert checkpoints == [".0000003.", ".0000006.", ".0000007."]
    assert lines[0] >= 3 and lines[1] >= 6 and lines[2] == 7


# ---- processes that die --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "extra"), [(2, []), SHARDED])
def test_a_killed_rank_ends_the_job(processes, extra, digits, tmp_path):
    """And with a last line from the rank that is left."""
    run = tmp_path / "run"
    pair = begin(digits, run, 10**6, *extra, processes=processes)
    wait_for_step(run, 4, *pair)
    os.kill(pair[1].pid, signal.SIGKILL)
    code, said = pair[0].wait()
    assert code == 1 and "Traceback" not in said
    assert re.search(r"rank 0: lost the other processes at step \d+ \(.*Connection .*\); .* "
                     r"repeat the command", said.splitlines()[-1])
    assert newest_checkpoint(run / "checkpoints")


def test_a_run_directory_is_of_one_run_at_a_time(digits, tmp_path, refusal):
    """A second run is refused before it writes anything, and starts once the first has ended."""
    with FolderLock(tmp_path / "run"):
        line = refusal("train", options(digits, tmp_path / "run", 2), "--run-dir")
        assert f"process {os.getpid()} on" in line
    call("train", *options(digits, tmp_path / "run", 2))


@pytest.mark.slow
def test_a_run_whose_directory_was_made_again_ends(digits, tmp_path):
    """Two runs wrote to it, and the newer went on from the other's checkpoint."""
    run = tmp_path / "run"
    child, = begin(digits, run, 10**6)
    wait_for_step(run, 4, child)
    run.rename(tmp_path / "moved")
    with FolderLock(run):  # the newer
        (run / "checkpoints").mkdir()
        code, said = child.wait()
    assert code == 1, said
    assert re.search("error: .*run was taken by process .* repeat the command", last_line(said))
    assert not list_folder(run / "checkpoints")


def test_the_options_are_compared_again_once_the_directory_is_held(digits, tmp_path, uninterrupted,
                                                                   monkeypatch):
    """A run of another rate that waited for the first to end went on from its checkpoint."""
    run = tmp_path / "run"

    def wait_for_another_run(folder):
        shutil.copytree(uninterrupted(1), run)
        return FolderLock(folder)

    monkeypatch.setattr("train.FolderLock", wait_for_another_run)
    with pytest.raises(UserError, match="--run-dir .*lr 0.001, now 0.01"):
        call("train", *options(digits, run, 30, "--lr", 0.01))
    assert json.loads((run / "config.json").read_text())["lr"] == 0.001


@pytest.mark.slow
def test_two_nodes_train_and_restart_by_themselves(digits, tmp_path, uninterrupted):
    """Two torchruns of one process each, which meet as those of two machines do."""
    run, port = tmp_path / "run", ranks(1)[0]["MASTER_PORT"]
    words = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=test",
             f"--rdzv_endpoint=127.0.0.1:{port}", "--local_addr=127.0.0.1", "--max-restarts=1",
             "--monitor-interval=0.1", ROOT / "train.py", *options(digits, run, 20)]
    pair = [torchrun(*words, output=tmp_path / f"agent{i}.txt") for i in range(2)]
    wait_for_step(run, 4, *pair)
    worker = subprocess.run(["pgrep", "-oP", str(pair[1].pid)], capture_output=True).stdout
    os.kill(int(worker), signal.SIGKILL)
    ends = [agent.wait() for agent in pair]
    assert not any(code for code, _ in ends), ends
    assert not differences(load_state(uninterrupted(2), 20), load_state(run, 20))
    text = (run / "log.txt").read_text()
    assert text.count("2 process(es)") == 2 and re.search(r"steps \d+ to 20", text)
    assert len(re.findall(r"\bstep 20/", text)) == 1  # logged by one process alone


# ---- numbers and disks ---------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), [
    ("fc1.weight", 1e38), ("final_layer.linear.bias", 1e25)])
def test_a_diverging_run_stops_and_keeps_its_checkpoints(name, value, digits, tmp_path,
                                                         uninterrupted):
    """The second makes an error that overflows, whose gradient is 0 and told nothing."""
    run = shorten(uninterrupted(1), tmp_path / "run", checkpoints=1)
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


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_steps_that_are_left_out_are_logged(optimizer, digits, tmp_path, monkeypatch):
    """Also the one that was counted for a checkpoint, before the next line of the log. Muon does
    not know found_inf: its step waits for the check."""
    losses = itertools.count(1)
    monkeypatch.setattr("train.propagate_nonfinite", lambda loss: propagate_nonfinite(
        loss * math.nan if next(losses) in (3, 5) else loss))
    call("train", *options(digits, tmp_path, 8, "--skip-nonfinite", 1, "--log-every", 4,
                           "--ckpt-every", 1, "--keep-last", 0, "--optimizer", optimizer))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [line["skipped_steps"] for line in lines] == [1, 1]
    states = [load_state(tmp_path, step) for step in (2, 3, 4, 5, 6)]
    assert [all(torch.equal(value, two["model"][key]) for key, value in one["model"].items())
            for one, two in itertools.pairwise(states)] == [True, False, True, False]
    last = max(states[0]["opt"]["state"])  # a parameter that AdamW trains
    assert [state["opt"]["state"][last]["step"] for state in states] == [2, 2, 3, 3, 4]


@pytest.mark.parametrize(("bad_loss", "reason"), [
    ([0.0, 0.0], "though every rank's loss was finite"), ([0.0, 1.0], "loss on rank 1;")])
def test_a_run_stops_after_as_many_bad_steps_in_a_row_as_it_tolerates(bad_loss, reason):
    """Nothing moves from then on until the host looks, steps later."""
    world = types.SimpleNamespace(device="cpu", gather=lambda own: bad_loss)
    guard = Guard(world, tolerance=2)
    skips = [guard.judge(step, torch.tensor(1.0), torch.tensor(norm)) for step, norm in
             enumerate([1.0, math.nan, math.inf, 1.0, math.nan], 1)]
    assert skips == [0, 1, 1, 0, 1]
    guard.raise_if_stopped()
    for step, norm in enumerate([math.nan, math.nan, 1.0], 6):
        assert guard.judge(step, torch.tensor(1.0), torch.tensor(norm)) == 1
    with pytest.raises(RunError, match=f"step 7: .*{reason}"):
        guard.raise_if_stopped()


def test_a_full_disk_is_one_line_and_older_files_stay(digits, tmp_path, uninterrupted):
    run = shutil.copytree(uninterrupted(1), tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (run / "checkpoints").iterdir()}
    code, said = Child("train", *options(digits, run, 10**6), output=tmp_path / "out.txt",
                       limit=10**6).wait()  # 1 MB a file
    assert code == 2 and "Traceback" not in said, said
    assert re.search("train.py: error: cannot write .*0000021.pt", last_line(said))
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

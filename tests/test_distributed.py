"""Processes meet, agree, notice who is gone and end with one line; randomness is counted.

Several machines are namespaces of the network, for which one must be root, or environments.
"""

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch
from conftest import ROOT, torchrun
from soak import HANG_S, Child, ranks

import train
from engine.distributed import World, counted_generator
from engine.errors import run_main
from engine.network import _address_towards, _interface_of, _lost_error


def test_generators_are_functions_of_their_counters():
    def numbers(*counters):
        return torch.rand(4, generator=counted_generator(*counters)).tolist()

    assert numbers(0, 7, "noise") == numbers(0, 7, "noise")
    different = [numbers(*c) for c in ((0, 7, "noise"), (1, 7, "noise"), (0, 8, "noise"),
                                       (0, 7, "flip"), (0, 77, "noise"), (7, 0, "noise"))]
    assert len({tuple(n) for n in different}) == len(different)


# ---- the end of a script -------------------------------------------------------------------


def raises(error):
    def work():
        raise error
    return work


@pytest.mark.parametrize(("work", "code", "line"), [
    (raises(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has ...")),
     2, "Out of GPU memory: .*--grad-accum-steps"),
    (lambda: torch.empty(2**50), 2, "Out of memory: "),
    (lambda: bytearray(2**60), 2, "Out of memory: "),
    (raises(KeyboardInterrupt), 130, "interrupted")])
def test_too_little_memory_and_an_interrupt_are_one_line(work, code, line, capfd):
    with pytest.raises(SystemExit) as exit:
        run_main(lambda args: work(), lambda: None)
    err = capfd.readouterr().err
    assert exit.value.code == code and len(err.splitlines()) == 1 and re.search(line, err), err


@pytest.mark.parametrize("error", [RuntimeError("size of tensor"), FileNotFoundError("a bug")])
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)):
        run_main(lambda args: raises(error)(), lambda: None)


@pytest.mark.parametrize("script", ["train", "sample", "encode_imagenet", "evaluate_fid"])
def test_an_interrupt_during_the_imports_prints_no_traceback(script, tmp_path):
    """To import PyTorch takes seconds, in which a user may think better of it."""
    for name in ("torch", "numpy"):
        (tmp_path / f"{name}.py").write_text("import time; print('here', flush=True)\n"
                                             "time.sleep(60)")
    process = subprocess.Popen(
        [sys.executable, ROOT / f"{script}.py"], env=os.environ | {"PYTHONPATH": str(tmp_path)},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=HANG_S)[1] == "" and process.returncode == -signal.SIGINT


# ---- several processes ---------------------------------------------------------------------


def begin(tmp_path, text, *words, one_machine=True):
    """Two processes that run this text; with one_machine false, as if each had its own."""
    (tmp_path / "script.py").write_text(text)
    alone = {} if one_machine else {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return [Child(tmp_path / "script.py", *words, **place | alone, output=tmp_path / f"said{i}")
            for i, place in enumerate(ranks(2))]


AGREE = """
from pathlib import Path
import torch
from engine.distributed import start_processes
from engine.errors import UserError, run_main
def work():
    raise UserError("of rank 0")
def main(args):
    with start_processes() as world:
        maximum = world.maximum_later(world.rank + 3)
        print(world.broadcast(world.rank + 7), world.total(torch.tensor([world.rank + 1])).item(),
              world.gather(world.rank), maximum(), world.on_main(lambda: world.rank), world.main)
        try:
            world.on_main(work)
        except UserError as error:
            print(error)
        net = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    del net
    names = [task.read_text() for task in Path("/proc/self/task").glob("*/comm")]
    print(any("gloo_runloop" in name for name in names))
run_main(main, lambda: None)
"""


@pytest.mark.slow
def test_two_processes_agree_average_and_leave_cleanly(tmp_path):
    """Freeing the group with DistributedDataParallel now and then hung. gloo aborted one pair in
    ten without the barrier at the end, and one in 25 where Python cleaned up."""
    ends = [child.wait() for child in begin(tmp_path, AGREE)]
    assert ends == [(0, f"7 3 [0, 1] 4 0 {main}\nof rank 0\nTrue\n") for main in (True, False)]


FAILING = """
import sys
from engine import distributed, errors
from engine.errors import UserError
errors.ERROR_WAIT_S = float(sys.argv[1])
def main(args):
    with distributed.start_processes() as world:
        if str(world.rank) in sys.argv[2:]:
            raise UserError("--option must be right, got wrong; mend it")
        world.barrier()
errors.run_main(main, lambda: None)
"""
LINE = "--option must be right, got wrong; mend it"


@pytest.mark.slow
def test_a_rank_that_fails_alone_says_so_and_the_others_that_they_lost_it(tmp_path):
    (lost, said), (failed, reason) = [child.wait() for child in begin(tmp_path, FAILING, 1, 1)]
    assert failed == 2 and reason == f"script.py: error: rank 1: {LINE}\n"
    assert lost == 1 and said.count("\n") == 1
    assert said.startswith("script.py: error: rank 0: lost the other processes at the start (")


@pytest.mark.slow
def test_an_error_of_all_ranks_is_one_line_under_torchrun(tmp_path):
    """Local rank 0's; torchrun ends the others while they wait."""
    (tmp_path / "failing.py").write_text(FAILING)
    code, said = torchrun("--standalone", "--nproc_per_node=2", tmp_path / "failing.py", 600, 0, 1,
                          output=tmp_path / "agent.txt", PYTHONPATH=str(ROOT)).wait()
    lines = [line for line in said.splitlines() if "failing.py: error" in line]
    assert code and lines == [f"failing.py: error: {LINE}"], said


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
    ([signal.SIGINT, signal.SIGTERM], 600, 130, "rank 0: interrupted twice at the start; repeat"),
    ([signal.SIGTERM], 1, 1, "rank 0: the step did not end within 1.0 s of a signal at the start")])
def test_a_process_that_waits_for_another_can_be_stopped(numbers, grace, code, line, tmp_path):
    pair = begin(tmp_path, STUCK, grace)
    try:
        for child in pair:
            child.wait_for("ready")
        for number in numbers:
            time.sleep(1.1)  # two within a second are one Ctrl-C
            assert pair[0].poll() is None
            os.kill(pair[0].pid, number)
        ended, said = pair[0].wait()
        assert ended == code and f"script.py: error: {line}" in said.splitlines()[-1], said
    finally:
        for child in pair:
            child.process.kill()


# ---- several machines ----------------------------------------------------------------------

SCRIPT = """
import sys, time
from engine import distributed, errors, network
network.HEARTBEAT_S, network.HEARTBEAT_TIMEOUT_S = 0.5, 3
def main(args):
    with distributed.start_processes() as world:
        world.position = "the middle"
        print("met", flush=True)
        if sys.argv[1] == "wait" and world.rank:
            world.barrier()
        time.sleep(3600 if sys.argv[1] == "wait" else float(sys.argv[1]) * world.main)
        world.barrier()
        print("left", flush=True)
errors.run_main(main, lambda: None)
"""


@pytest.fixture
def machines():
    """The names of two machines, each of which stands for 127.0.1.1 there, as Debian has it."""
    names = [f"mf{uuid.uuid4().hex[:6]}{end}" for end in "ab"]
    hosts = [Path("/etc/netns", name, "hosts") for name in names]
    try:
        for i, (name, path) in enumerate(zip(names, hosts)):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
            path.parent.mkdir(parents=True)
            path.write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n10.77.0.{2 - i} "
                            f"{names[1 - i]}\n")
        ip("link", "add", "eth7", "netns", names[0], "type", "veth", "peer", "name", "eth7",
           "netns", names[1])
        for i, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "eth7")
            ip("-n", name, "link", "set", "eth7", "up")
        yield names
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no namespaces of the network: {error}")
    finally:
        for name, path in zip(names, hosts):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            path.unlink(missing_ok=True)
            if path.parent.exists():
                path.parent.rmdir()


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


def begin_on(machines, tmp_path, word):
    """Two processes that run SCRIPT, one on each machine."""
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {k: v for k, v in os.environ.items() if k != "GLOO_SOCKET_IFNAME"} | {
        "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return [subprocess.Popen(
        ["unshare", "-u", "sh", "-c", 'hostname "$0"; exec ip netns exec "$0" "$@"', machine,
         sys.executable, tmp_path / "script.py", word],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment | place | {"MASTER_ADDR": machines[0], "LOCAL_WORLD_SIZE": "1",
                                   "LOCAL_RANK": "0"})
        for machine, place in zip(machines, ranks(2))]


@pytest.mark.slow
def test_machines_meet_and_one_that_vanishes_ends_the_processes_of_the_others(machines, tmp_path):
    """gloo gave the others 127.0.1.1: "Connection refused". They hung, mute, in a question to the
    store, which was gone as well."""
    pair = begin_on(machines, tmp_path, "wait")
    try:
        for process in pair:
            assert process.stdout.readline() == "met\n", process.communicate()
        ip("-n", machines[0], "link", "set", "eth7", "down")
        for i, process in enumerate(pair):
            _, err = process.communicate(timeout=HANG_S)
            assert process.returncode == 1, err
            assert re.match(rf"script.py: error: rank {i}: another machine .* at the middle; .*"
                            "repeat the command", err.splitlines()[-1]), err
    finally:
        for process in pair:
            process.kill()


@pytest.mark.slow
def test_a_process_that_stands_still_is_noticed(tmp_path):
    """As a machine does whose system hangs; needs no namespaces."""
    pair = begin(tmp_path, SCRIPT, "wait", one_machine=False)
    try:
        for child in pair:
            child.wait_for("met")
        os.kill(pair[0].pid, signal.SIGSTOP)
        code, said = pair[1].wait()
        assert code == 1 and "rank 1: another machine did not answer" in said
    finally:
        pair[0].process.kill()


@pytest.mark.slow
def test_a_process_may_work_alone_for_longer_than_a_machine_may_be_silent(tmp_path):
    pair = begin(tmp_path, SCRIPT, 5, one_machine=False)
    assert [child.wait() for child in pair] == [(0, "met\nleft\n")] * 2


def test_the_interface_of_an_address_is_found():
    assert _interface_of("127.0.0.1") is None and _interface_of("192.0.2.1") is None
    assert _address_towards("127.0.0.1") == _address_towards("no such host") == "127.0.0.1"


def test_the_error_names_the_variable_where_machines_cannot_meet(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    world = World(0, 2, torch.device("cpu"), "fp32")
    line = str(_lost_error(RuntimeError("gloo: Connection refused"), world))
    assert "GLOO_SOCKET_IFNAME" in line and "not set" in line and "Connection refused" in line


STAND_INS = {  # for the programs of a cluster: what they do that the script relies on
    "srun": 'echo $$ > step; test $1 = --cpus-per-task=64 || exit 3; shift; exec "$@"',
    "scancel": 'echo "scancel $*" >> calls; kill -TERM $(cat step)',
    "scontrol": 'if [ $1 = show ]; then echo node1; else echo "$* after $(cat saved)" >> calls; fi',
    "torchrun": """echo "$*" >> calls
if [ -e saved ]; then exit 0; fi  # the run goes on and ends
trap 'sleep 1; echo saving > saved; exit 1' TERM
touch begun
while true; do sleep 0.1; done""",
}


def test_the_script_for_slurm_saves_at_the_time_limit_and_queues_the_job_again(tmp_path):
    text = (ROOT / "docs" / "operations.md").read_text()
    script, = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", text, re.S)
    (tmp_path / "job.sh").write_text(script)
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7",
                                "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "64",
                                "SLURM_JOB_NODELIST": "node[1-2]"}
    for code in (1, 0):  # the second time, the run goes on to its end
        job = subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env=environment)
        end = time.monotonic() + HANG_S
        while not (tmp_path / "begun").exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        if code:
            job.send_signal(signal.SIGUSR1)
        assert job.wait(HANG_S) == code
    first, *others, last = (tmp_path / "calls").read_text().splitlines()
    assert others == ["scancel --signal=TERM 7", "requeue 7 after saving"] and last == first
    agent, options = first.split(" train.py ")
    assert "--nnodes=2 " in agent and "--rdzv_endpoint=node1:29500" in agent
    train.parse_args(options.split())

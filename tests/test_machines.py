"""Several machines: here namespaces of the network, for which one must be root, or environments."""

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
from conftest import ROOT
from soak import ranks

import train
from engine.distributed import World, _address_towards, _interface_of, _lost

SCRIPT = """
import sys, time
from engine import distributed
distributed.BEAT_S, distributed.GONE_S = 1, 5
def main(args):
    with distributed.start_processes() as world:
        world.position = "the middle"
        print("met", flush=True)
        if sys.argv[1:] == ["wait"] and world.rank:
            world.barrier()
            time.sleep(600)
        time.sleep(0 if sys.argv[1:] == ["wait"] else int(sys.argv[1]))
        world.barrier()
        print("left", flush=True)
        time.sleep(600 if sys.argv[1:] == ["wait"] else 0)
distributed.run_main(main, lambda: None)
"""


@pytest.fixture
def machines():
    """Two machines: a prefix of their names and the commands that run something there."""
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


def begin(tmp_path, *words, machines=None):
    """Two processes, each as if on a machine of its own."""
    (tmp_path / "script.py").write_text(SCRIPT)
    pair = []
    for i, place in enumerate(ranks(2)):
        command = [sys.executable, str(tmp_path / "script.py"), *map(str, words)]
        if machines:
            place["MASTER_ADDR"] = machines[0]
            command = ["unshare", "-u", "sh", "-c", 'hostname "$0"; exec ip netns exec "$0" "$@"',
                       machines[i], *command]
        place |= {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1",
                  "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        environment = {k: v for k, v in os.environ.items() if k != "GLOO_SOCKET_IFNAME"} | place
        pair.append(subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE,
                                     stderr=subprocess.PIPE))
    return pair


@pytest.mark.slow
def test_machines_whose_names_stand_for_127_0_1_1_meet(machines, tmp_path):
    """gloo gave the others that address, and all ended with "Connection refused"."""
    pair = begin(tmp_path, 0, machines=machines)
    said = [process.communicate(timeout=90) for process in pair]
    assert [out for out, _ in said] == ["met\nleft\n"] * 2, said
    assert [process.returncode for process in pair] == [0, 0]


@pytest.mark.slow
def test_a_machine_that_vanishes_ends_the_processes_of_the_others(machines, tmp_path):
    """They hung, mute, in a question to the store, which was gone as well."""
    pair = begin(tmp_path, "wait", machines=machines)
    try:
        for process in pair:
            assert process.stdout.readline() == "met\n"
        ip("-n", machines[0], "link", "set", "eth7", "down")
        began = time.monotonic()
        for i, process in enumerate(pair):
            _, err = process.communicate(timeout=60)
            assert process.returncode == 1 and err.endswith(  # PyTorch warns of unknown names
                f"script.py: error: rank {i}: another machine did not answer for 5 s at the "
                f"middle; what is on disk is whole: repeat the command to go on\n"), err
        assert time.monotonic() - began < 30
    finally:
        for process in pair:
            process.kill()


@pytest.mark.slow
def test_a_process_that_stands_still_is_noticed(tmp_path):
    """As a machine does whose system hangs; needs no namespaces."""
    pair = begin(tmp_path, "wait")
    try:
        for process in pair:
            assert process.stdout.readline() == "met\n"
        pair[0].send_signal(signal.SIGSTOP)
        _, err = pair[1].communicate(timeout=60)
        assert pair[1].returncode == 1 and "rank 1: another machine did not answer" in err
    finally:
        for process in pair:
            process.kill()
            process.communicate()


@pytest.mark.slow
def test_a_process_may_work_alone_for_longer_than_a_machine_may_be_silent(tmp_path):
    pair = begin(tmp_path, 8)
    said = [process.communicate(timeout=90) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    assert [err for _, err in said] == ["", ""]


def test_the_interface_of_an_address_is_found(monkeypatch):
    assert _interface_of("127.0.0.1") == "lo" and _interface_of("192.0.2.1") is None
    assert _address_towards("127.0.0.1") == "127.0.0.1"
    assert _address_towards("no such host") == "127.0.0.1"
    if Path("/proc/net/if_inet6").exists() and Path("/proc/net/if_inet6").read_text():
        assert _interface_of("::1") in ("lo", None)


def test_the_error_names_the_variable_where_machines_cannot_meet(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    world = World(0, 2, torch.device("cpu"), "fp32")
    line = str(_lost(RuntimeError("gloo: Connection refused"), world))
    assert "GLOO_SOCKET_IFNAME" in line and "not set" in line and "Connection refused" in line


STAND_INS = {  # for the programs of a cluster: what they do that the script of README.md relies on
    "srun": 'echo $$ > step; exec "$@"',
    "scancel": 'echo "scancel $*" >> calls; kill -TERM $(cat step)',
    "scontrol": 'if [ $1 = show ]; then echo node1; else echo "$* after $(cat saved)" >> calls; fi',
    "torchrun": """echo "$*" >> calls
if [ -e saved ]; then exit 0; fi  # the run goes on and ends
trap 'sleep 1; echo saving > saved; exit 1' TERM
touch begun
while true; do sleep 0.1; done""",
}


def test_the_script_for_slurm_saves_at_the_time_limit_and_queues_the_job_again(tmp_path):
    text = (ROOT / "README.md").read_text()
    script, = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", text, re.S)
    (tmp_path / "job.sh").write_text(script)
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7",
                                "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
    for code in (1, 0):
        job = subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env=environment)
        end = time.monotonic() + 30
        while code and not (tmp_path / "begun").exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        if code:
            job.send_signal(signal.SIGUSR1)
        assert job.wait(30) == code
    first, *others, last = (tmp_path / "calls").read_text().splitlines()
    assert others == ["scancel --signal=TERM 7", "requeue 7 after saving"] and last == first
    agent, options = first.split(" train.py ")
    assert "--nnodes=2 " in agent and "--rdzv_endpoint=node1:29500" in agent
    train.parse_args(options.split())

"""Processes, counted randomness, whole files, the log, the one-line exit."""

import argparse
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_script

import runtime


def test_generators_are_functions_of_their_counters():
    def numbers(*counters):
        return torch.rand(4, generator=runtime.generator(*counters)).tolist()

    assert numbers(0, 7, "noise") == numbers(0, 7, "noise")
    different = [numbers(*c) for c in ((0, 7, "noise"), (1, 7, "noise"), (0, 8, "noise"),
                                       (0, 7, "flip"), (0, 77, "noise"), (7, 0, "noise"))]
    assert len({tuple(n) for n in different}) == len(different)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(KeyError), runtime.whole_file(path) as temporary:
        temporary.write_text("half of the n")
        raise KeyError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with runtime.whole_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(runtime.UserError, match="cannot write .*missing"), \
            runtime.whole_file(tmp_path / "missing" / "file") as temporary:
        temporary.write_text("x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(runtime.UserError, match="--run-dir must be a folder"):
        runtime.make_folder("--run-dir", tmp_path / "file" / "run")


def test_metrics_after_the_resumed_step_are_dropped(tmp_path):
    """They would stand twice in the file; a line torn by the crash goes as well."""
    with runtime.Log(tmp_path, active=True) as log:
        for step in (1, 2, 3):
            log.record(step, error=float(step))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "err')
    with runtime.Log(tmp_path, active=True, step=2) as log:
        log.record(3, error=30.0)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records == [{"step": 1, "error": 1.0}, {"step": 2, "error": 2.0},
                       {"step": 3, "error": 30.0}]


def test_the_log_of_other_processes_is_silent(tmp_path, capfd):
    with runtime.Log(tmp_path, active=False) as log:
        log.say("nothing")
        log.record(1, error=0.0)
    assert not list(tmp_path.iterdir()) and capfd.readouterr().err == ""


@pytest.mark.parametrize(("kind", "text"), [
    (runtime.whole(1), "0"), (runtime.whole(1), "1.5"), (runtime.whole(1), "x"),
    (runtime.whole(0), "-1"), (runtime.whole(0), "9" * 30), (runtime.real(0, 1), "nan"),
    (runtime.real(0, 1), "1.1"), (runtime.real(0), "inf"), (runtime.real(0, above=True), "0")])
def test_numbers_out_of_range_are_refused_with_the_range(kind, text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"got '{text}'; give"):
        kind(text)


def test_numbers_in_range_are_taken():
    assert runtime.whole(1)("1") == 1 and runtime.real(0, 1)("1") == 1.0
    assert runtime.real(0, above=True)("1e-9") == 1e-9


def test_two_processes_agree_average_and_leave_cleanly(tmp_path):
    """gloo aborted a process about once in ten runs without a barrier at the end, and about once
    in 25 (of training: "terminate called without an active exception") where Python cleaned up."""
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, runtime\n"
        "def main(args):\n"
        "    with runtime.start() as world:\n"
        "        mean = world.mean(torch.tensor([world.rank + 1.0]))\n"
        "        print(f'{world.agree(world.rank + 7)}|{mean.item()}|{world.main}\\n', end='')\n"
        "runtime.run(main, lambda: None)\n")
    for _ in range(3):
        done = run_script(script, processes=2, PYTHONPATH=str(ROOT))
        assert done.returncode == 0, done.stderr
        assert sorted(done.stdout.split()) == ["7|1.5|False", "7|1.5|True"]
        assert "terminate" not in done.stderr


def test_an_interrupted_script_ends_in_one_line(capfd):
    def main(args):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit:
        runtime.run(main, lambda: None)
    assert exit.value.code == 130 and capfd.readouterr().err.strip().endswith("error: interrupted")


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
    assert process.communicate(timeout=30)[1] == "" and process.returncode == -signal.SIGINT

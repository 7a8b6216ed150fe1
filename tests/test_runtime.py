"""Processes, counted randomness, whole files, the log, the one-line exit."""

import argparse
import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_script

from engine.distributed import counted_generator, run_main
from engine.files import atomic_file, lock_folder, make_folder
from engine.log import Log
from engine.options import RunError, UserError, float_range, int_range


def test_generators_are_functions_of_their_counters():
    def numbers(*counters):
        return torch.rand(4, generator=counted_generator(*counters)).tolist()

    assert numbers(0, 7, "noise") == numbers(0, 7, "noise")
    different = [numbers(*c) for c in ((0, 7, "noise"), (1, 7, "noise"), (0, 8, "noise"),
                                       (0, 7, "flip"), (0, 77, "noise"), (7, 0, "noise"))]
    assert len({tuple(n) for n in different}) == len(different)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(KeyError), atomic_file(path) as temporary:
        temporary.write_text("half of the n")
        raise KeyError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with atomic_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("of_folder", "fault"), [
    *[(True, fault) for fault in ("EINVAL", "ENOTSUP", "EBADF", "EACCES")],
    (True, "EIO"), (False, "EINVAL"), (False, "EIO")])
def test_a_folder_need_not_be_synced_and_a_file_must_be(of_folder, fault, tmp_path, monkeypatch):
    """CIFS, FUSE and Ceph mounts sync no folder: every file there was refused."""
    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == of_folder:
            raise OSError(getattr(errno, fault), os.strerror(getattr(errno, fault)))

    monkeypatch.setattr(os, "fsync", fsync)
    refused = not of_folder or fault == "EIO"
    with (pytest.raises(UserError, match="cannot write") if refused
          else contextlib.nullcontext()), atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "file").exists() == of_folder


def test_the_log_comes_to_disk_where_folders_cannot_be_synced(tmp_path, monkeypatch):
    """Every checkpoint failed there: the log is on disk before it."""
    original = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with Log(tmp_path, active=True) as log:
        log.record(1, error=0.5)
        log.to_disk()


def test_a_folder_is_locked_by_a_file_that_says_who_holds_it(tmp_path, monkeypatch):
    """Its text is quoted in the refusal; a killed process leaves the file, which is no lock."""
    monkeypatch.setattr("engine.files.READERS_S", 0)
    (tmp_path / ".lock").write_text("process 1 on a machine of long ago")
    with lock_folder("--run-dir", tmp_path):
        who = f"process {os.getpid()} on {socket.gethostname()} since 20"
        with (pytest.raises(UserError, match=f"--run-dir must be of one run.*{who}.*; end"),
              lock_folder("--run-dir", tmp_path)):
            pass
    assert not list(tmp_path.iterdir())


def test_the_lock_file_is_open_for_writing(tmp_path, monkeypatch):
    """NFS answers EBADF to a lock on what is open for reading; a folder can be open no other way,
    so every run there was told that another one was writing."""
    def flock(descriptor, operation):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock_folder("--run-dir", tmp_path):
        pass


@pytest.mark.parametrize("fault", ["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def test_a_file_system_without_locks_is_warned_of(fault, tmp_path, monkeypatch, capfd):
    """There the first of two runs finds the lock file with another's name, and ends."""
    def flock(descriptor, operation):
        raise OSError(getattr(errno, fault), "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock_folder("--run-dir", tmp_path) as lock:
        lock.check()
        err = capfd.readouterr().err
        assert len(err.splitlines()) == 1 and "warning" in err and "cannot be locked" in err
        (tmp_path / ".lock").write_text("process 1 on another machine")
        with pytest.raises(RunError, match="--run-dir .* taken by process 1 on another"):
            lock.check()
    assert (tmp_path / ".lock").read_text() == "process 1 on another machine"


def test_a_lock_that_fails_is_one_line(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with (pytest.raises(UserError, match="cannot write .*[.]lock: Input/output error"),
          lock_folder("--run-dir", tmp_path)):
        pass


def test_a_folder_that_was_made_again_is_no_longer_the_one_that_was_locked(tmp_path):
    folder = tmp_path / "run"
    with lock_folder("--run-dir", folder) as lock:
        lock.check()
        shutil.rmtree(folder)
        with pytest.raises(RunError, match="--run-dir .*run, which was removed or repl"):
            lock.check()
        folder.mkdir()
        (folder / ".lock").write_text("process 1 on another machine")
        with pytest.raises(RunError, match="--run-dir .*taken by process 1 on another ma"):
            lock.check()
    assert (folder / ".lock").read_text() == "process 1 on another machine"  # not ours to remove


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot write .*missing"), \
            atomic_file(tmp_path / "missing" / "file") as temporary:
        temporary.write_text("x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="--run-dir must be a folder"):
        make_folder("--run-dir", tmp_path / "file" / "run")


def test_metrics_after_the_resumed_step_are_dropped(tmp_path, capfd):
    """They would stand twice in the file. Damaged lines, as a crash leaves, vanished with them."""
    with Log(tmp_path, active=True) as log:
        for step in (1, 2, 3):
            log.record(step, error=float(step))
    path, damaged = tmp_path / "metrics.jsonl", [b'{"step": 1, "err\xffr": 1}', b'{"step": 4, "err']
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], damaged[0], *lines[1:], damaged[1]]))
    with Log(tmp_path, active=True, step=2) as log:
        log.record(3, error=30.0)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert records == [{"step": 1, "error": 1.0}, {"step": 2, "error": 2.0},
                       {"step": 3, "error": 30.0}]
    assert (tmp_path / "metrics.damaged.txt").read_bytes().splitlines() == damaged
    said = "damaged lines of metrics.jsonl, moved to metrics.damaged.txt: 2"
    assert said in capfd.readouterr().err and said in (tmp_path / "log.txt").read_text()


def test_a_record_follows_one_that_lost_its_line_end(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "error": 1.0}')
    with Log(tmp_path, active=True, step=1) as log:
        log.record(2, error=2.0)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()] == [1, 2]


def test_the_log_of_other_processes_is_silent(tmp_path, capfd):
    with Log(tmp_path, active=False) as log:
        log.say("nothing")
        log.record(1, error=0.0)
    assert not list(tmp_path.iterdir()) and capfd.readouterr().err == ""


def test_the_log_does_not_import_tensorflow(tmp_path):
    """TensorBoard's writer did where TensorFlow was installed: seconds, and pages of messages."""
    (tmp_path / "run").mkdir()
    (tmp_path / "tensorflow.py").write_text("print('TensorFlow was imported')\n")
    script = tmp_path / "script.py"
    script.write_text(f"from engine.log import Log\n"
                      f"with Log({str(tmp_path / 'run')!r}, active=True) as log:\n"
                      f"    log.record(1, error=0.5)\n")
    done = run_script(script, PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")
    assert done.returncode == 0 and "TensorFlow" not in done.stdout + done.stderr
    assert list((tmp_path / "run").glob("events.*"))


@pytest.mark.parametrize(("kind", "text"), [
    (int_range(1), "0"), (int_range(1), "1.5"), (int_range(1), "x"),
    (int_range(0), "-1"), (int_range(0), "9" * 30), (float_range(0, 1), "nan"),
    (float_range(0, 1), "1.1"), (float_range(0), "inf"), (float_range(0, above=True), "0")])
def test_numbers_out_of_range_are_refused_with_the_range(kind, text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"got '{text}'; give"):
        kind(text)


def test_numbers_in_range_are_taken():
    assert int_range(1)("1") == 1 and float_range(0, 1)("1") == 1.0
    assert float_range(0, above=True)("1e-9") == 1e-9


def test_two_processes_agree_average_and_leave_cleanly(tmp_path):
    """gloo aborted a process about once in ten runs without a barrier at the end, and about once
    in 25 (of training: "terminate called without an active exception") where Python cleaned up."""
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\nfrom engine.distributed import run_main, start_processes\n"
        "def main(args):\n"
        "    with start_processes() as world:\n"
        "        mean = world.mean(torch.tensor([world.rank + 1.0]))\n"
        "        print(f'{world.agree(world.rank + 7)}|{mean.item()}|{world.main}\\n', end='')\n"
        "run_main(main, lambda: None)\n")
    for _ in range(3):
        done = run_script(script, processes=2, PYTHONPATH=str(ROOT))
        assert done.returncode == 0, done.stderr
        assert sorted(done.stdout.split()) == ["7|1.5|False", "7|1.5|True"]
        assert "terminate" not in done.stderr


def test_an_interrupted_script_ends_in_one_line(capfd):
    def main(args):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit:
        run_main(main, lambda: None)
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

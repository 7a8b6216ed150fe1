"""The log: one record a step, on disk before a checkpoint, one line where the disk is full."""

import errno
import os
import resource
import stat
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.errors import UserError
from engine.log import Log, read_records


def test_metrics_after_the_resumed_step_are_dropped(tmp_path, capfd):
    """They would stand twice in the file; a line cut short by a crash stopped the next run."""
    with Log(tmp_path, active=True) as log:
        for step in (1, 2, 3):
            log.record(step, error=float(step))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], b'{"step": 1, "err\xffr": 1}', b"[1]", *lines[1:],
                                 b'{"step": 4, "err']))
    with Log(tmp_path, active=True, step=2) as log:
        assert log.has(2, "error", 2.0) and not log.has(3, "error", 3.0)
        assert not log.has(2, "error", 3.0) and not log.has(2, "fid", 2.0)
        log.record(3, error=30.0)
    assert read_records(path) == ([{"step": 1, "error": 1.0}, {"step": 2, "error": 2.0},
                                   {"step": 3, "error": 30.0}], 0)
    said = "damaged lines of metrics.jsonl, dropped: 3"
    assert said in capfd.readouterr().err and said in (tmp_path / "log.txt").read_text()


def test_the_log_of_other_processes_is_silent(tmp_path, capfd):
    with Log(tmp_path, active=False) as log:
        log.say("nothing")
        log.record(1, error=0.0)
        assert not log.has(1, "error", 0.0)
    assert not list(tmp_path.iterdir()) and capfd.readouterr().err == ""


def test_an_error_that_ends_the_run_is_the_last_line(tmp_path):
    with pytest.raises(KeyError), Log(tmp_path, active=True):
        raise KeyError("what happened")
    assert "KeyError: 'what happened'" in (tmp_path / "log.txt").read_text().splitlines()[-1]


def test_the_log_comes_to_disk_where_folders_cannot_be_synced(tmp_path, monkeypatch):
    """Every checkpoint failed there: the log is on disk before it."""
    synced = []

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", fsync)
    with Log(tmp_path, active=True) as log:
        log.record(1, error=0.5)
        log.to_disk()
    assert {Path(name).name for name in synced} == {"log.txt", "metrics.jsonl"}


@pytest.mark.parametrize(("name", "write"), [
    ("log.txt", lambda log: log.say("x" * 99)),
    ("metrics.jsonl", lambda log: log.record(1, text="x" * 99)),
    ("events", lambda log: log.record(1, **{f"value_{i}": 1.0 for i in range(10)}))])
def test_a_full_disk_is_one_line(name, write, tmp_path, capfd):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write"), Log(tmp_path, active=True) as log:
            for _ in range(200):
                write(log)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    fullest = max(tmp_path.iterdir(), key=lambda path: path.stat().st_size)
    assert fullest.name.startswith(name) and "Traceback" not in capfd.readouterr().err


def test_tensorboard_reads_the_event_files_of_a_resumed_run(tmp_path):
    for step, values in ((0, {1: 1.0, 2: 2.0, 3: 3.0}), (2, {3: 30.0})):
        with Log(tmp_path, active=True, step=step) as log:
            for at, value in values.items():
                log.record(at, error=value, protocol="adm")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["scalars"] == ["error"]
    assert {event.step: event.value for event in events.Scalars("error")} == {1: 1, 2: 2, 3: 30}

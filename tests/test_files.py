"""Files are whole or not there, and a folder has one writer."""

import contextlib
import errno
import os
import shutil
import signal
import socket
import stat
import time

import pytest
from conftest import refused

from engine.errors import BadValue, RunError, UserError
from engine.files import WRITER, FolderLock, atomic_file, list_folder, make_folder


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


@pytest.mark.parametrize(("of_folder", "fault", "error"), [
    (True, errno.EINVAL, None), (True, errno.EIO, UserError), (False, errno.EINVAL, UserError)])
def test_a_folder_need_not_be_synced_and_a_file_must_be(of_folder, fault, error, tmp_path,
                                                        monkeypatch):
    """CIFS, FUSE and Ceph mounts sync no folder: every file there was refused."""
    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == of_folder:
            raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(os, "fsync", fsync)
    with (pytest.raises(error) if error else contextlib.nullcontext(),
          atomic_file(tmp_path / "file") as temporary):
        temporary.write_text("new")
    assert (tmp_path / "file").exists() == of_folder


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(UserError, match="missing"), \
            atomic_file(tmp_path / "missing" / "file") as temporary:
        temporary.write_text("x")
    (tmp_path / "file").write_text("x")
    with refused("is a file"):
        make_folder(tmp_path / "file" / "run")


def test_a_folder_has_one_writer_and_the_refusal_says_who(tmp_path):
    """What a killed process left is no lock."""
    (tmp_path / WRITER).write_text("process 1 on a machine of long ago")
    with (FolderLock(tmp_path),
          refused(f"process {os.getpid()} on {socket.gethostname()} since 20"),
          FolderLock(tmp_path)):
        pass
    assert not list_folder(tmp_path) and not (tmp_path / WRITER).exists()
    with FolderLock(tmp_path):
        pass


def test_a_forked_process_does_not_keep_the_lock_of_one_that_died(tmp_path):
    """A killed run's data loaders, which outlive it by seconds, kept its folder."""
    end, start = os.pipe()
    holder = os.fork()
    if not holder:
        FolderLock(tmp_path).__enter__()
        if not os.fork():
            os.read(end, 1)  # the forked process lives until this test ends
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(holder, 0)
    deadline = time.monotonic() + 60
    try:
        while True:  # the fork lets go of the lock in its first moments
            try:
                with FolderLock(tmp_path):
                    return
            except BadValue:
                assert time.monotonic() < deadline
                time.sleep(0.05)
    finally:
        os.write(start, b"x")


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, capfd):
    """There the first of two runs finds the other's name, and ends."""
    def acquire(*_, **__):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    with FolderLock(tmp_path) as lock:
        lock.raise_if_lost()
        err = capfd.readouterr().err
        assert len(err.splitlines()) == 1 and "warning" in err
        (tmp_path / WRITER).write_text("process 1 on another machine")
        with pytest.raises(RunError, match="taken by process 1 on another machine"):
            lock.raise_if_lost()
    assert (tmp_path / WRITER).read_text() == "process 1 on another machine"  # not ours to remove


def test_a_folder_that_was_removed_is_no_longer_the_one_that_was_locked(tmp_path):
    folder = tmp_path / "run"
    with FolderLock(folder) as lock:
        lock.raise_if_lost()
        shutil.rmtree(folder)
        with pytest.raises(RunError, match="removed"):
            lock.raise_if_lost()

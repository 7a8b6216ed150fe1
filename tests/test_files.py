"""Files are whole or not there, and a folder has one writer."""

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import socket
import stat
import time

import pytest

from engine.errors import RunError, UserError
from engine.files import FolderLock, atomic_file, make_folder


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
    (True, "EINVAL"), (True, "EACCES"), (True, "EIO"), (False, "EINVAL"), (False, "EIO")])
def test_a_folder_need_not_be_synced_and_a_file_must_be(of_folder, fault, tmp_path, monkeypatch):
    """CIFS, FUSE and Ceph mounts sync no folder: every file there was refused."""
    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == of_folder:
            raise OSError(getattr(errno, fault), os.strerror(getattr(errno, fault)))

    monkeypatch.setattr(os, "fsync", fsync)
    refused = not of_folder or fault == "EIO"
    with (pytest.raises(UserError) if refused else contextlib.nullcontext(),
          atomic_file(tmp_path / "file") as temporary):
        temporary.write_text("new")
    assert (tmp_path / "file").exists() == of_folder


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(UserError, match="missing"), \
            atomic_file(tmp_path / "missing" / "file") as temporary:
        temporary.write_text("x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="--run-dir"):
        make_folder(tmp_path / "file" / "run")


def test_a_folder_is_locked_by_a_file_that_says_who_holds_it(tmp_path):
    """Its text is quoted in the refusal; a killed process leaves the file, which is no lock."""
    (tmp_path / ".lock").write_text("process 1 on a machine of long ago")
    with FolderLock(tmp_path):
        who = f"process {os.getpid()} on {socket.gethostname()} since 20"
        with (pytest.raises(UserError, match=f"--run-dir.*{who}"),
              FolderLock(tmp_path)):
            pass
    assert not list(tmp_path.iterdir())


def test_a_forked_process_does_not_keep_the_lock_of_one_that_died(tmp_path):
    """A killed run's data loaders, which outlive it by seconds, kept its folder."""
    lock = FolderLock(tmp_path)
    child = os.fork()
    if not child:
        time.sleep(3600)
        os._exit(0)
    try:
        time.sleep(0.2)
        lock.file.close()  # as the system does for a process that dies
        with FolderLock(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_the_lock_file_is_open_for_writing(tmp_path, monkeypatch):
    """NFS answers EBADF to a lock on what is open for reading; a folder can be open no other way,
    so every run there was told that another one was writing."""
    def flock(file, operation):
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(fcntl, "flock", flock)
    with FolderLock(tmp_path):
        pass


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, capfd):
    """There the first of two runs finds the lock file with another's name, and ends."""
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    with FolderLock(tmp_path) as lock:
        lock.check()
        err = capfd.readouterr().err
        assert len(err.splitlines()) == 1 and "warning" in err
        (tmp_path / ".lock").write_text("process 1 on another machine")
        with pytest.raises(RunError, match="--run-dir .*process 1 on another machine"):
            lock.check()
    assert (tmp_path / ".lock").read_text() == "process 1 on another machine"


def test_a_folder_that_was_made_again_is_no_longer_the_one_that_was_locked(tmp_path):
    folder = tmp_path / "run"
    with FolderLock(folder) as lock:
        lock.check()
        shutil.rmtree(folder)
        with pytest.raises(RunError, match="--run-dir .*removed"):
            lock.check()
        folder.mkdir()
        (folder / ".lock").write_text("process 1 on another machine")
        with pytest.raises(RunError, match="--run-dir .*process 1 on another machine"):
            lock.check()
    assert (folder / ".lock").read_text() == "process 1 on another machine"  # not ours to remove

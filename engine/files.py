"""Files that are written whole or not at all, and folders that one process writes at a time."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import stat
import sys
import time
import zipfile
from pathlib import Path

from engine.options import RunError, UserError

LOCK = ".lock"  # the file in a folder by which one process holds it
READERS_S = 15  # a killed process's readers, which hold what it held, notice within some seconds


@contextlib.contextmanager
def atomic_file(path, *, durable=True):
    """Yields a temporary path beside path; on leaving, what was written there takes path's name.

    Nobody ever sees half a file under its final name: if durable, which takes milliseconds, not
    even after a power cut, for the data is on disk before the rename.
    Raises UserError where the disk is full or the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if durable:
            sync_file(temporary)
        os.replace(temporary, path)
        if durable:
            sync_folder(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sync_file(path):
    """Wait until a file would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder):
    """The same for the names in a folder, which some file systems (CIFS, FUSE) cannot do: that is
    no error. A folder that may be written and not listed cannot be opened for it, either."""
    try:
        sync_file(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS,
                               errno.EBADF, errno.EACCES):
            raise


def unwritable(path, error):
    return UserError(f"cannot write {path}: {error.strerror or error}; free space or choose a "
                     f"folder you may write")


def find_damage(path):
    """What in a zip archive, such as a checkpoint or an .npz file, is not as it was written: a
    name, or None. Reads every byte. Raises errors of many kinds, of damaged headers."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        file.seek(-22, os.SEEK_END)
        end, count = file.read(), len(archive.infolist())
        # A damaged length in the list of contents hides what follows: the end says how many there
        # are (65535: it says so elsewhere)
        if end[:4] == b"PK\5\6" and int.from_bytes(end[10:12], "little") not in (count, 65535):
            return "the list of contents"
        return archive.testzip()


def regular_file(path):
    """The path of a file that can be opened: a FIFO would wait for a writer. Raises OSError."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("not a regular file")
    return path


def remove_temporary_files(folder):
    """Remove what whole_file left in a folder where its process was killed."""
    for path in Path(folder).glob(".*.tmp"):
        with contextlib.suppress(OSError):
            path.unlink()


def check_folder(option, path):
    """Raise UserError unless the folder that an option names is, or could be made, writable."""
    path = Path(path)
    place = next(place for place in (path, *path.parents) if place.exists())
    fault = f"{place} is a file" if not place.is_dir() else (
        None if os.access(place, os.W_OK | os.X_OK) else "no permission")
    if fault:
        raise UserError(f"{option} must be a folder that can be written, got {path} ({fault}); "
                        f"choose another")


def make_folder(option, path):
    """Create the folder that an option names, with its parents. Raises UserError."""
    check_folder(option, path)
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} must be a folder that can be written, got {path} "
                        f"({error.strerror}); choose another") from error


class FolderLock:
    """A folder that this process alone writes. The lock file says who that is."""

    def __init__(self, option, folder, descriptor):
        self.option, self.path, self.descriptor = option, Path(folder) / LOCK, descriptor
        since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        self.holder = f"process {os.getpid()} on {socket.gethostname()} since {since}"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, self.holder.encode(), 0)

    def held(self):
        """Whether the folder is still the one that was locked, and no other process's."""
        try:
            return self.path.read_text(errors="replace") == self.holder
        except OSError as error:  # others may pass
            return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)

    def check(self):
        """Raises RunError once the folder was removed, or taken where there are no locks."""
        if not self.held():
            now = _holder(self.path)
            fault = f"taken by {now}" if now else "removed or replaced"
            raise RunError(f"{self.option} must stay in place while a run writes to it, got "
                           f"{self.path.parent}, which was {fault}; nothing more is written there; "
                           f"repeat the command or choose another folder")

    def release(self):
        if self.held():
            with contextlib.suppress(OSError):
                self.path.unlink()
        os.close(self.descriptor)


@contextlib.contextmanager
def lock_folder(option, folder):
    """Makes and locks the folder that an option names; yields its FolderLock.

    The system releases the lock when this process ends, however it does. Raises UserError where
    another process holds it.
    """
    make_folder(option, folder)
    path, end = Path(folder) / LOCK, time.monotonic() + READERS_S
    try:
        while (descriptor := _lock(path)) is None:
            if time.monotonic() > end:
                raise UserError(f"{option} must be of one run at a time, got {folder}, which "
                                f"{_holder(path) or 'another process'} is writing; end that or "
                                f"choose another folder")
            time.sleep(0.2)
        lock = FolderLock(option, folder, descriptor)
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        yield lock
    finally:
        lock.release()


def _holder(path):
    """What a lock file says of its process, in a line; nothing where it cannot be read."""
    with contextlib.suppress(OSError):
        return " ".join(path.read_text(errors="replace")[:200].split())
    return ""


def _lock(path):
    """A descriptor of the lock file, locked; None while another process holds it.

    Open for writing: NFS locks no other. A file that its holder has just removed is none.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if _flock(descriptor, path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    except FileNotFoundError:
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _flock(descriptor, path):
    """Whether the lock is this process's, or the file system knows none, which is said."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP):
            raise
        print(f"warning: {path.parent} cannot be locked here ({error}): start no second run in it",
              file=sys.stderr)
    return True


def write_json(path, value):
    """Write a JSON file, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")

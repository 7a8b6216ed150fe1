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
import zipfile
from pathlib import Path

from engine.options import RunError, UserError

LOCK = ".lock"  # the file in a folder by which one process holds it

# ---- files ---------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_file(path, *, durable=True):
    """Yields a temporary path; at the end the file written there is renamed to path.

    durable: the data is on disk before the rename, so that not even a power cut leaves half a file
    under this name; it takes milliseconds. An exception within ``with`` leaves the old file.
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


def write_json(path, value):
    """Write a JSON file, whole or not at all. Raises UserError as atomic_file does."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def sync_file(path):
    """Wait until a file would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder):
    """Wait until the names in a folder would survive a power cut. CIFS, FUSE and a folder that may
    be written but not read refuse that, which is ignored."""
    try:
        sync_file(folder)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):  # data was lost
            raise


def unwritable(path, error):
    """The UserError for an OSError met while writing path."""
    return UserError(f"cannot write {path}: {error.strerror or error}; free space or choose a "
                     f"folder you may write")


def remove_temporary_files(folder):
    """Remove what atomic_file left in a folder when its process was killed."""
    for path in Path(folder).glob(".*.tmp"):
        with contextlib.suppress(OSError):
            path.unlink()


def regular_file(path):
    """Returns path if it is a regular file: to open a FIFO would wait for a writer.
    Raises OSError."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("not a regular file")
    return path


def find_damage(path, *, mapped=False):
    """The name of the first damaged part of a zip archive (a checkpoint, an .npz file), or None.

    Reads every byte and compares checksums. mapped: parts will be mapped into memory, so that a
    compressed one counts as damaged. Raises errors of many kinds where headers are damaged.
    """
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        # A damaged length in the list of contents hides later entries from zipfile. The last
        # 22 bytes hold their number, or 65535 where there are too many
        file.seek(-22, os.SEEK_END)
        end, count = file.read(), len(archive.infolist())
        if end[:4] == b"PK\5\6" and int.from_bytes(end[10:12], "little") not in (count, 65535):
            return "the list of contents"
        compressed = [part.filename for part in archive.infolist()
                      if mapped and part.compress_type != zipfile.ZIP_STORED]
        return f"{compressed[0]}, compressed" if compressed else archive.testzip()


# ---- folders -------------------------------------------------------------------------------


def check_folder(option, path):
    """Raise UserError unless the folder that an option names is, or could be made, writable."""
    path = Path(path)
    place = next(place for place in (path, *path.parents) if place.exists())
    if not place.is_dir():
        raise _no_folder(option, path, f"{place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise _no_folder(option, path, "no permission")


def make_folder(option, path):
    """Create the folder that an option names, with its parents. Raises UserError."""
    check_folder(option, path)
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _no_folder(option, path, error.strerror) from error


def _no_folder(option, path, reason):
    return UserError(f"{option} must be a folder that can be written, got {path} ({reason}); "
                     f"choose another")


@contextlib.contextmanager
def lock_folder(option, folder):
    """Makes and locks the folder that an option names; yields its FolderLock.

    The system releases the lock when this process ends, even by SIGKILL. Raises UserError where
    another process holds it.
    """
    make_folder(option, folder)
    lock = FolderLock(option, folder)
    try:
        yield lock
    finally:
        lock.release()


class FolderLock:
    """The lock on a folder, held from construction to release(). Raises UserError as lock_folder.

    The lock file says who holds it. Its text also guards folders on file systems without locks:
    there the second process overwrites it, and ``check`` ends the first.
    """

    def __init__(self, option, folder):
        self.option, self.path = option, Path(folder) / LOCK
        since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        self.holder = f"process {os.getpid()} on {socket.gethostname()} since {since}"
        try:
            self.file = open(self.path, "a+")  # NFS locks only files that are open for writing
            if not self._acquire():
                self.file.close()
                raise UserError(
                    f"{option} must be of one run at a time, got {folder}, which "
                    f"{self._text() or 'another process'} is writing; end that or choose "
                    f"another folder")
            self.file.truncate(0)
            self.file.write(self.holder)
            self.file.flush()
        except OSError as error:
            raise unwritable(self.path, error) from error
        # A forked data loader would hold the lock for as long as it survives this process
        os.register_at_fork(after_in_child=self.file.close)

    def _acquire(self):
        """Whether no other process holds the lock; also where the file system has no locks."""
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The previous holder may have removed the file since it was opened here
            return os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path))
        except (BlockingIOError, FileNotFoundError):
            return False
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP):
                raise
            print(f"warning: {self.path.parent} cannot be locked here ({error}): start no second "
                  f"run in it", file=sys.stderr)
            return True

    def _text(self):
        """What the lock file says: "" if it is gone, None if it cannot be read now."""
        try:
            return self.path.read_text(errors="replace")[:200]
        except OSError as error:
            return "" if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE) else None

    def held(self):
        """Whether the folder is still the one that was locked, and not taken by another process."""
        return self._text() in (self.holder, None)

    def check(self):
        """Raises RunError if the folder was removed, replaced or taken by another process."""
        if not self.held():
            fault = f"taken by {self._text()}" if self._text() else "removed or replaced"
            raise RunError(f"{self.option} {self.path.parent} was {fault} during the run; nothing "
                           f"more is written there: repeat the command or choose another folder")

    def release(self):
        if self.held():
            with contextlib.suppress(OSError):
                self.path.unlink()
        self.file.close()

"""Files that are written whole or not at all, and folders that one process writes at a time."""

import contextlib
import datetime
import errno
import hashlib
import json
import os
import shutil
import socket
import sys
import zipfile
from pathlib import Path

from filelock import FileLock, Timeout

from engine.errors import BadValue, RunError, UserError

LOCK, WRITER = ".lock", ".writer"  # files in a folder that one process holds: the lock, and who


@contextlib.contextmanager
def atomic_file(path, *, durable=True):
    """Yields a temporary path; at the end the file written there is renamed to path.

    durable: the data is on disk before the rename, so no power cut leaves half a file. An exception
    within ``with`` leaves the old file. Raises UserError if the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if durable:
            sync(temporary)
        os.replace(temporary, path)
        if durable:
            sync(path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def atomic_folder(path):
    """Yields a temporary folder; at the end it is renamed to path, which must not exist. An
    exception within ``with`` leaves nothing. Raises UserError if it cannot be written."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        temporary.rename(path)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path, value):
    """Write a JSON file as atomic_file does."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def sync(path):
    """Wait until a file, or the names in a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # CIFS and FUSE sync no folder; three errors tell of lost data
        if os.path.isfile(path) or error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise
    finally:
        os.close(descriptor)


def write_error(path, error):
    """The UserError for an OSError while writing path."""
    return UserError(f"cannot write {path}: {error.strerror or error}; free space or choose a "
                     f"folder you may write")


def list_folder(folder):
    """The files in a folder, except temporary files, locks and other hidden ones."""
    return [path for path in Path(folder).iterdir() if path.name[0] != "."]


def remove_temporary_files(folder):
    """Remove what atomic_file left in a folder when its process was killed."""
    for path in Path(folder).glob(".*.tmp"):
        with contextlib.suppress(OSError):
            path.unlink()


def find_damage(path, *, mapped=False):
    """The name of the first part of a zip archive (a checkpoint, an .npz) that differs from its
    checksum, or None. mapped: parts will be mapped into memory, compressed ones count as damaged.
    Raises errors of many kinds where headers are damaged."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        # A damaged length in the list of contents hides later parts. The last 22 bytes hold their
        # number, or 65535 where there are too many
        file.seek(-22, os.SEEK_END)
        end, parts = file.read(), archive.infolist()
        if end[:4] == b"PK\5\6" and int.from_bytes(end[10:12], "little") not in (len(parts), 65535):
            return "the list of contents"
        if mapped and any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            return "a compressed part"
        return archive.testzip()


def sha256(path):
    """SHA-256, in hex, of a file; of a folder, of what sha256sum prints of its files, ./NAME, in
    the order of the names' bytes."""
    path, digest = Path(path), hashlib.sha256()
    if path.is_dir():
        for name in sorted(os.fsencode(file.relative_to(path)) for file in path.rglob("*")
                           if file.is_file()):
            digest.update(f"{sha256(path / os.fsdecode(name))}  ./".encode() + name + b"\n")
        return digest.hexdigest()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


@contextlib.contextmanager
def utf8_path(path):
    """Yields a path to a file for code in C++ and Rust, which opens only names in UTF-8."""
    with open(path, "rb") as file:
        utf8 = os.fsencode(path) == str(path).encode(errors="replace")
        yield path if utf8 else f"/dev/fd/{file.fileno()}"


def check_folder(path):
    """Raise BadValue unless this folder is, or could be made, writable."""
    path = Path(path)
    place = next(place for place in (path, *path.parents) if place.exists())
    reason = "no permission" if place.is_dir() else f"{place} is a file"
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise BadValue(f"must be a folder that can be written, got {path} ({reason}); choose "
                       f"another")


def make_folder(path):
    """Create a folder with its parents. Raises BadValue."""
    check_folder(path)
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadValue(f"must be a folder that can be made, got {path} ({error.strerror}); choose "
                       f"another") from error


class FolderLock:
    """Within ``with``, no other process writes to this folder, which is made if it is missing.

    The system releases the lock when this process ends, however. A file says who holds it; on file
    systems without locks a second process overwrites it, and raise_if_lost ends the first. Raises
    BadValue if another process holds the lock.
    """

    def __init__(self, folder):
        self.folder, self.file = folder, Path(folder) / WRITER
        since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        self.writer = f"process {os.getpid()} on {socket.gethostname()} since {since}"
        self.lock = FileLock(Path(folder) / LOCK, blocking=False)

    def __enter__(self):
        make_folder(self.folder)
        try:
            self.lock.acquire()
        except Timeout as error:
            raise BadValue(f"must be of one run at a time, got {self.folder}, which "
                           f"{self._read() or 'another process'} is writing; end that or choose "
                           f"another folder") from error
        except (OSError, NotImplementedError) as error:
            print(f"warning: {self.folder} cannot be locked ({error}): start no second run in it",
                  file=sys.stderr)
        with atomic_file(self.file, durable=False) as temporary:
            temporary.write_text(self.writer)
        return self

    def _read(self):
        """Who writes to the folder: "" if the file is gone, this process if it cannot be read."""
        try:
            return self.file.read_text(errors="replace")[:200]
        except OSError as error:
            return "" if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE) else self.writer

    def raise_if_lost(self):
        """Raises RunError if the folder was removed, replaced or taken by another process."""
        writer = self._read()
        if writer != self.writer:
            fault = f"taken by {writer}" if writer else "removed or replaced"
            raise RunError(f"{self.folder} was {fault} during the run; repeat the command or "
                           f"choose another folder")

    def __exit__(self, *_):
        if self._read() == self.writer:
            with contextlib.suppress(OSError):
                self.file.unlink()
        self.lock.release()

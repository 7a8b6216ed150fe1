"""Errors that end a script with one line, and how a script ends."""

import contextlib
import errno
import io
import os
import select
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

ERROR_WAIT_S = 10  # a rank that is alive so long after an error is the only one that has it


class UserError(ValueError):
    """The user's mistake: option, rule, value and remedy, which are printed; exit code 2."""


class BadValue(UserError):
    """A mistake in a value whose option only the caller knows: "must be ...". See naming."""


class RunError(RuntimeError):
    """A failure that is not the user's mistake: what happened, what to do; exit code 1."""


class LostError(RunError):
    """Another process or its machine is gone. Each rank prints its own line at once."""


def one_line(error):
    """What an error of another package says, in one line."""
    return f"{' '.join(str(error).split()) or type(error).__name__:.200}"


@contextlib.contextmanager
def naming(option):
    """Within ``with``, a BadValue becomes a UserError that begins with the option."""
    try:
        yield
    except BadValue as error:
        raise UserError(f"{option} {error}") from error


class _Output(io.FileIO):
    """The bytes of stdout or stderr, which nobody has to read: the rest then goes nowhere."""

    over = False  # after the script: its number may be that of another file

    def write(self, data):
        """Raises UserError where a file does not take a result."""
        if self.over:
            return len(data)
        try:
            while (written := super().write(data)) is None:
                select.select([], [self], [])  # full, and another program made it not wait
            return written
        except OSError as error:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.fileno())
            if self.holds_result and error.errno != errno.EPIPE:
                raise UserError(f"cannot write the result to stdout: {error.strerror}; free space "
                                f"and repeat the command") from error
            return len(data)


def _lasting(stream, holds_result):
    """stdout or stderr in a form that outlives its reader; itself if it is no file."""
    try:
        number = stream.fileno() if stream else os.open(os.devnull, os.O_WRONLY)
    except (OSError, ValueError):
        return stream
    raw = _Output(number, "w", closefd=False)
    raw.holds_result = holds_result and not raw.isatty()  # whose terminal may be closed
    return io.TextIOWrapper(
        io.BufferedWriter(raw), stream and stream.encoding, line_buffering=True,
        errors="surrogateescape" if holds_result else "backslashreplace")  # paths, of any bytes


@contextlib.contextmanager
def lasting_output():
    """Within ``with``, output that nobody reads, whose terminal or disk is gone, or that was closed
    before the start, is no error. Raises UserError where the disk of stdout is full."""
    for number in range(3):  # a file would take over a closed one's number, and its output
        with contextlib.suppress(OSError):
            os.fstat(number)
            continue
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = streams = _lasting(sys.stdout, True), _lasting(sys.stderr, False)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in streams:
            if stream not in before:
                with contextlib.suppress(UserError):
                    stream.flush()
                stream.buffer.raw.over = True


@lasting_output()
def run_main(main, parse_args):
    """Run a script. Expected errors end it with one line."""
    utf8 = sys.getfilesystemencoding() == "utf-8" or "utf8" in sys._xoptions
    if not utf8 and main.__module__ == "__main__":
        # Names are bytes: as UTF-8 they are the same text, in options and configs, in every locale
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # set by the script for its imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main(parse_args())
    except UserError as error:
        fail(error)
    except RunError as error:
        fail(error, code=1, at_once=isinstance(error, LostError))
    except KeyboardInterrupt:
        fail("interrupted", code=130)
    except (OSError, RuntimeError, MemoryError) as error:
        if isinstance(error, OSError) and error.filename:
            fail(f"cannot open {error.filename}: {error.strerror}; change that or choose another "
                 f"path")
        fail(_memory_line(error))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # The interpreter's own end races with gloo's threads, which abort it once in some 25 runs
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _memory_line(error):
    """The line for an error that means too little memory; raises any other."""
    gpu = "GPU " if isinstance(error, torch.OutOfMemoryError) else ""
    # On a CPU PyTorch's has no class of its own
    if gpu or isinstance(error, MemoryError) or "allocate memory" in str(error):
        return (f"Out of {gpu}memory: lower the batch size or, for train.py, raise "
                f"--grad-accum-steps")
    raise error


def fail(message, *, code=2, at_once=False):
    """Prints one line on stderr and ends this process.

    Most errors occur on all ranks. Local rank 0 prints at once, and torchrun then ends the other
    ranks of its machine. One that outlives ERROR_WAIT_S has its own error; at_once: no such wait.
    """
    rank = int(os.environ.get("RANK", 0))
    if int(os.environ.get("LOCAL_RANK", 0)) and not at_once:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)  # by which torchrun ends this process
        time.sleep(ERROR_WAIT_S)
    print_last(f"rank {rank}: {message}" if rank or at_once else message)
    sys.stdout.flush()
    if dist.is_initialized():
        os._exit(code)  # other ranks may be inside a collective; torchrun ends them
    sys.exit(code)


def print_last(message):
    """Print the line with which a process ends, on stderr."""
    for bar in list(tqdm._instances):  # or their last refresh would follow it
        bar.close()
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}", file=sys.stderr,
          flush=True)

"""What every script needs around its job: processes, device, precision, counted randomness,
files that appear whole or not at all, the log of rank 0, and the one-line exit.

Nothing else in the repository reads ranks from the environment or picks a device.
"""

import argparse
import contextlib
import datetime
import fcntl
import hashlib
import json
import math
import os
import stat
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm


class OneLine(Exception):
    """What ends a run with one line, the message. ``local`` marks what one process may meet alone
    before the processes know of each other."""

    def __init__(self, message, *, local=False):
        super().__init__(" ".join(str(message).split()))
        self.local = local


class UserError(OneLine, ValueError):
    """A mistake of the user's: option, rule, value and remedy. The exit code is 2."""


class RunError(OneLine, RuntimeError):
    """What ends a run through no fault of its options. The exit code is 1."""


# ---- the command line -----------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, from rank 0, and whose help prints defaults."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message):
        remedies = {"unrecognized": "--help lists the options", "expected": "give it",
                    "required": "give them", "not allowed with": "give one of them"}
        remedy = next((remedies[word] for word in remedies if word in message), None)
        fail(f"{message}; {remedy}" if remedy else message)

    def validate(self, build, /, *args, **kwargs):
        """What build(...) returns; its ValueError, a rule broken by the options, is our error."""
        try:
            return build(*args, **kwargs)
        except ValueError as error:
            self.error(f"--{error}".replace("_", "-", 1) if _names_option(self, error) else error)


def _names_option(parser, error):
    """Whether the message opens with an option's name, as 'label_drop must be ...' does."""
    first = str(error).split(" ", 1)[0]
    return any(action.dest == first for action in parser._actions)


def whole(low, high=2**63 - 1):
    """An argparse type: a whole number from low to high."""
    def parse(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            bound = f"{low} or more" if high == 2**63 - 1 else f"one from {low} to {high}"
            raise argparse.ArgumentTypeError(
                f"must be a whole number, got {text!r}; give {bound}")
        return value
    return parse


def real(low, high=math.inf, *, above=False):
    """An argparse type: a finite number from low (or above it) to high."""
    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low < value if above else low <= value) or value > high or math.isinf(value):
            bound = f"above {low:g}" if above else f"{low:g} or more"
            bound = bound if high == math.inf else f"from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"must be a number, got {text!r}; give one {bound}")
        return value
    return parse


def run(main, parse_args):
    """Run a script; a UserError ends it with one line and exit code 2, a RunError with 1."""
    try:
        main(parse_args())
    except UserError as error:
        fail(error, local=error.local)
    except RunError as error:
        fail(error, local=error.local, code=1)
    except PermissionError as error:  # a path below a locked folder cannot even be looked for
        fail(f"{error.filename} must be open to this user, got: {error.strerror}; change its "
             f"permissions or choose another path")
    except KeyboardInterrupt:
        fail("interrupted", code=130)
    except (RuntimeError, MemoryError) as error:
        line = _shortage(error)
        if line is None:
            raise
        fail(line, local=True)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # The interpreter's own end races with gloo's threads, which abort it once in some 25 runs
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _shortage(error):
    """The line for an error that comes of too little memory, shared or not, else None.

    Only a GPU's has a class of its own; a reader that the system kills for memory has none, either.
    """
    reason = str(error).split("DefaultCPUAllocator: ")[-1].split(". ")[0].split("\n")[0]
    if "Bus error" in reason or "shared memory" in reason:
        return (f"/dev/shm is too small ({reason}); in Docker raise it with --shm-size=8g or "
                f"--ipc=host, or read without processes: --num-workers 0")
    if "DataLoader worker" in reason:
        return (f"--num-workers must be as many readers as memory holds, got one that ended "
                f"({reason}); lower it and repeat the command")
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in reason:
        return (f"memory must hold a batch, got {reason or 'no more'}; lower the batch size; "
                f"train.py has --grad-accum-steps, too")
    return None


def fail(message, *, local=False, code=2):
    """One line on stderr, from one of the processes, and the end of this one."""
    if _speaks(local):
        say_last(message)
    sys.stdout.flush()
    if dist.is_initialized():
        os._exit(code)  # other processes may be inside a collective; torchrun ends them
    sys.exit(code)


_meeting = None  # the store by which the processes found each other, once they did


def _speaks(local):
    """Whether this process says why it ends: the first that fails does, as it knows why.

    Before they know of each other, or when one took the store along, one of each machine does.
    """
    if _meeting is not None:
        with contextlib.suppress(RuntimeError), _silent():
            _meeting.set_timeout(datetime.timedelta(seconds=10))
            return _meeting.add("failed", 1) == 1
    return local or int(os.environ.get("LOCAL_RANK", 0)) == 0


@contextlib.contextmanager
def _silent():
    """Without stderr, on which PyTorch's C++ lists its call stack where the store is gone."""
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def say_last(message):
    """The line on stderr with which a process ends."""
    for bar in list(tqdm._instances):  # their last refresh would come after it
        bar.close()
    line = " ".join(str(message).split())
    print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr, flush=True)


# ---- processes, device, precision ----------------------------------------------------------


@dataclass
class World:
    """This process among all, and its device; ``place`` is where in its work it is, for errors."""

    rank: int
    size: int
    device: torch.device
    precision: str
    place: str = "the start"

    @property
    def main(self):
        """Whether this is rank 0, the one that speaks and writes."""
        return self.rank == 0

    @property
    def distributed(self):
        return self.size > 1

    def barrier(self):
        if self.distributed:
            dist.barrier()

    def agree(self, value):
        """Rank 0's value, on every process."""
        box = [value]
        if self.distributed:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def mean(self, tensor):
        """The mean of a tensor over the processes."""
        if self.distributed:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor / self.size

    def total(self, tensor):
        """The sum of a tensor over the processes, in place."""
        if self.distributed:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value):
        """Every process's value, in the order of ranks, on every process."""
        values = [value] * self.size
        if self.distributed:
            dist.all_gather_object(values, value)
        return values

    def maximum(self, value):
        """The largest of every process's whole number, later: ``.result()`` waits for it."""
        return _Maximum(value)

    def autocast(self):
        """Where networks run: bfloat16 for --precision bf16, else as the tensors are."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @contextlib.contextmanager
    def full_precision(self):
        """Where float32 must be float32 whatever --precision says: evaluation."""
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        try:
            with torch.autocast(self.device.type, enabled=False):
                yield
        finally:
            torch.set_float32_matmul_precision(before[0])
            torch.backends.cudnn.allow_tf32 = before[1]

    def progress(self, total, *, initial=0, desc=None, unit="step"):
        """A progress bar on stderr, on rank 0 only; rarely refreshed where nobody watches."""
        return tqdm(total=total, initial=initial, desc=desc, unit=unit, disable=not self.main,
                    dynamic_ncols=True, mininterval=0.2 if sys.stderr.isatty() else 30)


class _Maximum:
    def __init__(self, value):
        self.tensor = torch.tensor([value])
        self.work = dist.all_reduce(self.tensor, dist.ReduceOp.MAX, async_op=True)

    def result(self):
        self.work.wait()
        return int(self.tensor)


@contextlib.contextmanager
def one_thread():
    """Where bits count: a CPU's sums depend on the number of threads, of which torchrun gives each
    of several processes one and Python alone as many as there are cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _device():
    """This process's own: the GPU of its local rank, or the CPU. Raises UserError."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"--nproc_per_node must be at most the number of GPUs, "
                        f"{torch.cuda.device_count()}; this is process {local_rank + 1}; "
                        f"start fewer", local=True)
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def start(precision="fp32", *, patience_h=0.5):
    """The World of this process, set up from torchrun's environment (one process without it).

    precision: fp32, tf32 (fp32 with TensorFloat-32 products on GPUs) or bf16 (autocast).
    patience_h: hours that a process may wait for another that lives; one that ends is noticed at
    once. Leaves the process group behind a barrier: without it gloo aborts a process that is left
    behind.
    """
    global _meeting
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = _device()
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    world = World(rank, size, device, precision)
    if not world.distributed:
        yield world
        return
    cuda = device.type == "cuda"
    try:
        _meeting = _fresh_store(rank, size)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=_meeting,
                                rank=rank, world_size=size,
                                timeout=datetime.timedelta(hours=patience_h),
                                device_id=device if cuda else None)
        yield world
        world.barrier()
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = str(error).split("] ", 1)[-1].split(". ")[0].splitlines()[0]
        raise RunError(
            f"rank {rank}, at {world.place}: lost the other processes ({reason:.200}); the one "
            f"that ended first says why; what is on disk is whole: repeat the command to go on, or "
            f"let torchrun --max-restarts do so", local=True) from error
    dist.destroy_process_group()


def _fresh_store(rank, size):
    """The store by which the processes find each other, under a name that is new at each start.

    torchrun's store outlives the processes that --max-restarts replaces, and what the old ones left
    in it would be taken for the new ones' addresses (pytorch issue 135712). So rank 0 draws a name
    and confirms it to each process that repeats it with a word of its own, which is new as well.
    """
    store, _, _ = next(dist.rendezvous("env://"))
    word = uuid.uuid4().hex
    if rank == 0:
        store.set("name", word)
        for other in range(1, size):
            while not (answer := store.get(f"answer {other}").decode()).startswith(word):
                time.sleep(0.05)
            store.set(f"confirmed {answer}", "")
        return dist.PrefixStore(word, store)
    while True:
        name = store.get("name").decode()
        store.set(f"answer {rank}", name + word)
        if store.check([f"confirmed {name}{word}"]):
            return dist.PrefixStore(name, store)
        time.sleep(0.05)


def generator(seed, *counters, device="cpu"):
    """A generator that is a function of (seed, counters) alone, such as (seed, step, "noise").

    Nothing has to be carried from step to step, so a resumed run draws what an uninterrupted one
    would. The hash keeps neighbouring steps and purposes apart; of its 63 bits PyTorch's CPU
    generator uses 32, its CUDA generator all.
    """
    digest = hashlib.sha256(repr((seed, *counters)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


# ---- files and the log ---------------------------------------------------------------------


@contextlib.contextmanager
def whole_file(path, *, durable=True):
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
            _to_disk(temporary)
        os.replace(temporary, path)
        if durable:
            _to_disk(path.parent)  # the new name
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _to_disk(path):
    """Wait until a file, or the names in a folder, would outlast a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritable(path, error):
    return UserError(f"cannot write {path}: {error.strerror or error}; free space or choose a "
                     f"folder you may write", local=True)


def regular(path):
    """The path of a file that can be opened: a FIFO would wait for a writer. Raises OSError."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("not a regular file")
    return path


def sweep(folder):
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


READERS_S = 15  # a killed process's readers, which hold what it held, notice within some seconds


@contextlib.contextmanager
def alone(option, folder):
    """Makes the folder that an option names and holds it: no other process may at the same time.

    The system lets go of it when this process ends, however it does. Raises UserError.
    """
    make_folder(option, folder)
    descriptor, end = os.open(folder, os.O_RDONLY), time.monotonic() + READERS_S
    try:
        while not _locked(descriptor):
            if time.monotonic() > end:
                raise UserError(f"{option} must be of one run at a time, got {folder}, which "
                                f"another process is writing; end that or choose another folder")
            time.sleep(0.2)
        yield
    finally:
        os.close(descriptor)


def _locked(descriptor):
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system that knows no locks
        return True
    return True


class Log:
    """log.txt, metrics.jsonl and TensorBoard events of a run; active on rank 0 only.

    Records later than ``step``, left by a run that ended after its last checkpoint, are dropped:
    they are about to be written again. Raises UserError where the disk is full.
    """

    def __init__(self, folder, *, active, step=0):
        self.active = active
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self.folder = folder = Path(folder)
        with self._writing():
            path = folder / "metrics.jsonl"
            if path.exists():
                kept = [line for line in path.read_text(errors="replace").splitlines(keepends=True)
                        if _step_of(line) <= step]
                with whole_file(path) as temporary:
                    temporary.write_text("".join(kept))
            self.text = open(folder / "log.txt", "a", buffering=1, errors="backslashreplace")
            self.metrics = open(path, "a", buffering=1)
            self.board = SummaryWriter(folder, purge_step=step + 1 if step else None)

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:
            raise _unwritable(error.filename or self.folder, error) from error

    def say(self, line):
        """One line, to stderr and log.txt."""
        if self.active:
            tqdm.write(line, file=sys.stderr)
            with self._writing():
                self._write(line)

    def _write(self, line):
        self.text.write(f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S} {line}\n")

    def record(self, step, **values):
        """One metrics.jsonl object and one TensorBoard scalar per number."""
        if self.active:
            with self._writing():
                self.metrics.write(json.dumps({"step": step, **values}) + "\n")
                for name, value in values.items():
                    if not isinstance(value, str):
                        self.board.add_scalar(name, value, step)

    def has(self, step, name):
        """Whether a value of this name was recorded for this step."""
        if not self.active:
            return False
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return any(name in json.loads(line) for line in lines if _step_of(line) == step)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        """Closes all; an error that ends the run is the last line of log.txt."""
        if not self.active:
            return
        with contextlib.suppress(OSError) if error else self._writing():
            if error:
                reason = next(iter(str(error).splitlines()), "")
                self._write(f"ended by {kind.__name__}: {reason}")
            for file in (self.text, self.metrics, self.board):
                file.close()


def _step_of(line):
    """The step of a metrics line; a line torn by a crash counts as too late to keep."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf


def describe(world):
    """The first lines of a log: what runs, where, on what."""
    folder = Path(__file__).parent
    commit = "unknown"
    with contextlib.suppress(OSError):  # git is not needed to train
        commit = subprocess.run(["git", "-C", folder, "describe", "--always", "--dirty"],
                                capture_output=True, text=True).stdout.strip() or commit
    hardware = (torch.cuda.get_device_name(world.device) if world.device.type == "cuda"
                else f"CPU, {torch.get_num_threads()} threads")
    return [
        f"command: {' '.join(sys.argv)}",
        f"commit {commit}, torch {torch.__version__}, CUDA {torch.version.cuda}",
        f"{world.size} process(es) on {hardware}, precision {world.precision}",
    ]

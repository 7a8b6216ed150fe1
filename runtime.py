"""What every script needs around its job: processes, device, precision, counted randomness,
files that appear whole or not at all, the log of rank 0, and the one-line exit.

Nothing else in the repository reads ranks from the environment or picks a device.
"""

import argparse
import contextlib
import datetime
import errno
import fcntl
import hashlib
import ipaddress
import json
import math
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import uuid
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm


class OneLine(Exception):
    """What ends a run with one line, the message."""

    def __init__(self, message):
        super().__init__(" ".join(str(message).split()))


class UserError(OneLine, ValueError):
    """A mistake of the user's: option, rule, value and remedy. The exit code is 2."""


class RunError(OneLine, RuntimeError):
    """What ends a run through no fault of its options. The exit code is 1."""


class LostError(RunError):
    """Another process or its machine is gone. Each rank prints what it saw of that."""


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


def utf8_path(text):
    """An argparse type: a path for PyTorch and TensorBoard, which take names in UTF-8 alone."""
    if text.encode(errors="replace").decode() != text:
        raise argparse.ArgumentTypeError(f"must be a name in UTF-8, got {text!r}; choose another")
    return Path(text)


def run(main, parse_args):
    """Run a script; a UserError ends it with one line and exit code 2, a RunError with 1."""
    sys.stdout.reconfigure(errors="surrogateescape")  # results are paths, of any bytes
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # since the script's imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main(parse_args())
    except UserError as error:
        fail(error)
    except RunError as error:
        fail(error, code=1, at_once=isinstance(error, LostError))
    except PermissionError as error:  # a path below a locked folder cannot even be looked for
        fail(f"{error.filename} must be open to this user, got: {error.strerror}; change its "
             f"permissions or choose another path")
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        fail(f"a path must be no longer than the file system allows, got {error.filename}; choose "
             f"a shorter one")
    except KeyboardInterrupt:
        fail("interrupted", code=130)
    except (RuntimeError, MemoryError) as error:
        line = _shortage(error)
        if line is None:
            raise
        fail(line)
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


PEERS_S = 10  # within which the ranks of a machine meet an error that all meet


def fail(message, *, code=2, at_once=False):
    """Prints one line on stderr and ends this process.

    Most errors are met by all ranks. Local rank 0 prints at once, and torchrun then ends the others
    of its machine. A rank that still lives after PEERS_S seconds met the error by itself and prints
    it, too; ``at_once``: without this wait. No rank asks another, which may be gone.
    """
    rank = int(os.environ.get("RANK", 0))
    if int(os.environ.get("LOCAL_RANK", 0)) and not at_once:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)  # torchrun ends this process without a word
        time.sleep(PEERS_S)
    say_last(f"rank {rank}: {message}" if rank or at_once else message)
    sys.stdout.flush()
    if dist.is_initialized():
        os._exit(code)  # other processes may be inside a collective; torchrun ends them
    sys.exit(code)


def say_last(message):
    """The line on stderr with which a process ends."""
    for bar in list(tqdm._instances):  # their last refresh would come after it
        bar.close()
    line = " ".join(str(message).split())
    with contextlib.suppress(OSError):  # a terminal that was closed
        print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr, flush=True)


# ---- processes, device, precision ----------------------------------------------------------


WRITING_S = 300  # for a checkpoint that is being written; torchrun may give less


@dataclass
class World:
    """This process among all, and its device; ``place`` is where in its work it is, for errors.

    ``saver`` writes checkpoints, if anything does; it has ``writing`` and ``wait(seconds)``.
    """

    rank: int
    size: int
    device: torch.device
    precision: str
    place: str = "the start"
    saver: object = None

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

    def on_main(self, work):
        """What work() returns on rank 0, on every process, and so is the UserError it raises."""
        value = fault = None
        if self.main:
            try:
                value = work()
            except UserError as error:
                fault = error
        value, fault = self.agree((value, fault))
        if fault:
            raise fault
        return value

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

    def leave(self, reason, code):
        """End the process, after the checkpoint that is being written: for a thread, as the main
        thread may be waiting for another process."""
        reason = f"rank {self.rank}: {reason} at {self.place}"
        if self.saver and self.saver.writing:
            say_last(f"{reason}; a checkpoint is being written and finished first")
            self.saver.wait(WRITING_S)
        say_last(f"{reason}; what is on disk is whole: repeat the command to go on")
        os._exit(code)

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
                        f"start fewer")
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
        store = _fresh_store(rank, size)
        _choose_interface(store, rank, size)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store,
                                rank=rank, world_size=size,
                                timeout=datetime.timedelta(hours=patience_h),
                                device_id=device if cuda else None)
        heartbeat = _Heartbeat(world) if _several_machines(size) else None
        if heartbeat:
            heartbeat.start()
        yield world
        world.barrier()
        if heartbeat:
            heartbeat.end()
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise _lost(error, world) from error
    dist.destroy_process_group()


def _lost(error, world):
    """The LostError that says what PyTorch's error means here."""
    reason = str(error).split("] ", 1)[-1].split(". ")[0].splitlines()[0][:200]
    if _several_machines(world.size) and not dist.is_initialized():
        return LostError(
            f"cannot reach the other processes ({reason}); if all machines are up, set "
            f"GLOO_SOCKET_IFNAME on each to the network interface that reaches the others; here it "
            f"is {os.environ.get('GLOO_SOCKET_IFNAME', 'not set')}")
    return LostError(
        f"lost the other processes at {world.place} ({reason}); the one that ended first says why; "
        f"what is on disk is whole: repeat the command to go on, or let torchrun --max-restarts do "
        f"so")


def _fresh_store(rank, size):
    """The store by which the processes find each other, under a name that is new at each start.

    torchrun's store outlives the processes that --max-restarts replaces, and what the old ones left
    in it would be taken for the new ones' addresses (pytorch issue 135712; the count of restarts
    differs between machines, so it is no name). So each process asks under a word of its own, and
    rank 0, until each has taken it, answers with the name.
    """
    store, _, _ = next(dist.rendezvous("env://"))
    word = uuid.uuid4().hex
    if rank:
        store.set(f"asked {rank}", word)
        name = store.get(f"answer {word}").decode()
        store.set(f"taken {name} {rank}", "")
        return dist.PrefixStore(name, store)
    for other in range(1, size):
        while not store.check([f"taken {word} {other}"]):
            store.set(f"answer {store.get(f'asked {other}').decode()}", word)
            time.sleep(0.05)
    return dist.PrefixStore(word, store)


def _choose_interface(store, rank, size):
    """Where there are several machines, tells gloo the network interface by which they are reached.

    gloo takes the address that the host name stands for, which often is 127.0.0.1. This takes the
    interface that reaches MASTER_ADDR or, on the machine that has it, the first other machine.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ or not _several_machines(size):
        return
    own = _address_towards(os.environ["MASTER_ADDR"])
    store.set(f"address {rank}", own)
    if _is_loopback(own):
        addresses = (store.get(f"address {other}").decode() for other in range(size))
        own = _address_towards(next((x for x in addresses if not _is_loopback(x)), own))
    if not _is_loopback(own) and (name := _interface_of(own)):
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _several_machines(size):
    return int(os.environ.get("LOCAL_WORLD_SIZE", size)) != size


def _is_loopback(address):
    return ipaddress.ip_address(address).is_loopback


def _address_towards(host):
    """This machine's address on the way to a host; 127.0.0.1 where there is no way."""
    with contextlib.suppress(OSError):  # of the name
        for family, kind, _, _, target in socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
                probe.connect(target)  # with UDP this sends nothing
                return probe.getsockname()[0]
    return "127.0.0.1"


def _interface_of(address):
    """The name of the network interface that has this address, None if unknown (Linux)."""
    with contextlib.suppress(OSError):
        if ":" in address:
            digits = ipaddress.ip_address(address).packed.hex()
            lines = Path("/proc/net/if_inet6").read_text().splitlines()
            return next((line.split()[-1] for line in lines if line.startswith(digits)), None)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            for _, name in socket.if_nameindex():
                with contextlib.suppress(OSError):  # an interface without an address
                    request = struct.pack("256s", name.encode())
                    reply = fcntl.ioctl(probe, 0x8915, request)  # SIOCGIFADDR
                    if socket.inet_ntoa(reply[20:24]) == address:
                        return name
    return None


BEAT_S = 20  # between two heartbeats
GONE_S = 300  # that a heartbeat waits for the other machines


class _Heartbeat(threading.Thread):
    """A thread that ends this process when another machine no longer answers.

    A collective notices that only at its timeout, which must be long: rank 0 may work alone for
    hours. Its heartbeat answers meanwhile. That a process ended the main thread notices at once.
    """

    def __init__(self, world):
        super().__init__(daemon=True)
        self.world, self.ending = world, threading.Event()
        self.group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=GONE_S))

    def run(self):
        ended = False
        while not ended:
            beat = torch.tensor([int(self.ending.wait(BEAT_S))])
            began = time.monotonic()
            try:
                dist.all_reduce(beat, dist.ReduceOp.MAX, group=self.group)
            except RuntimeError:
                if time.monotonic() - began >= GONE_S - 1:
                    self.world.leave(f"another machine did not answer for {GONE_S} s", code=1)
                return
            ended = bool(beat)

    def end(self):
        """Once all processes are there: all threads end after the same beat."""
        self.ending.set()
        self.join()


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
            _names_to_disk(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _to_disk(path):
    """Wait until a file would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _names_to_disk(folder):
    """The same for the names in a folder, which some file systems (CIFS, FUSE) cannot do: that is
    no error. A folder that may be written and not listed cannot be opened for it, either."""
    try:
        _to_disk(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS,
                               errno.EBADF, errno.EACCES):
            raise


def _unwritable(path, error):
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


LOCK = ".lock"  # the file in a folder by which one process holds it
READERS_S = 15  # a killed process's readers, which hold what it held, notice within some seconds


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
def alone(option, folder):
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
        raise _unwritable(path, error) from error
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


class Log:
    """log.txt, metrics.jsonl and TensorBoard events of a run; active on rank 0 only.

    Records later than ``step``, left by a run that ended after its last checkpoint, are dropped:
    they are about to be written again. Damaged lines, such as one cut short by a crash, move to
    metrics.damaged.txt. Raises UserError where the disk is full.
    """

    def __init__(self, folder, *, active, step=0):
        self.active = active
        if not active:
            return
        self.folder = folder = Path(folder)
        with self._writing():
            self.text = open(folder / "log.txt", "a", buffering=1, errors="backslashreplace")
            self._drop_records(step)
            self.metrics = open(folder / "metrics.jsonl", "a", buffering=1)
            self.board = Board(folder, step)

    def _drop_records(self, step):
        """Those later than step and the damaged ones, which are kept elsewhere."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return
        kept, damaged = [], []
        for line in path.read_bytes().splitlines():
            found = _step_of(line)
            if found is None or found <= step:
                (damaged if found is None else kept).append(line + b"\n")
        if damaged:
            elsewhere = path.with_name("metrics.damaged.txt")
            with open(elsewhere, "ab") as file:
                file.writelines(damaged)
            _to_disk(elsewhere)
            self.say(f"damaged lines of {path.name}, moved to {elsewhere.name}: {len(damaged)}")
        with whole_file(path) as temporary:
            temporary.write_bytes(b"".join(kept))

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:
            raise _unwritable(error.filename or self.folder, error) from error

    def say(self, line):
        """One line, to stderr and log.txt."""
        if self.active:
            with contextlib.suppress(OSError):  # a terminal that was closed
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
                self.board.record(step, **{name: value for name, value in values.items()
                                           if not isinstance(value, str)})

    def to_disk(self):
        """What was recorded so far outlasts a power cut: called before a checkpoint is written."""
        if self.active:
            with self._writing():
                for file in (self.text, self.metrics, self.board.file):
                    os.fsync(file.fileno())
                _names_to_disk(self.folder)

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
            for file in (self.text, self.metrics, self.board.file):
                file.close()


class Board:
    """TensorBoard's event file of a run that starts after ``step``, each record written at once.

    TensorBoard's own writer has a thread, which meets a full disk with a traceback.
    """

    def __init__(self, folder, step):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.event, self.summary = event_pb2.Event, summary_pb2.Summary
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self.file = open(Path(folder, name), "ab")
        self.writer = RecordWriter(self.file)
        self.write(file_version="brain.Event:2")
        if step:  # later records are of a run that ended after its last checkpoint
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self.write(step=step + 1, session_log=start)

    def record(self, step, **values):
        """One scalar per number."""
        scalars = [self.summary.Value(tag=name, simple_value=value)
                   for name, value in values.items()]
        self.write(step=step, summary=self.summary(value=scalars))

    def write(self, **fields):
        event = self.event(wall_time=time.time(), **fields)
        self.writer.write(event.SerializeToString())
        self.file.flush()


def _step_of(line):
    """The step of a metrics line; None for a damaged one."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


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

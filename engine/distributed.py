"""Processes, device, precision and counted randomness.

This module alone reads ranks from the environment and picks a device.
"""

import contextlib
import datetime
import errno
import fcntl
import hashlib
import ipaddress
import os
import signal
import socket
import struct
import sys
import threading
import time
import uuid
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from engine.options import LostError, RunError, UserError

PEERS_S = 10  # within which the ranks of a machine meet an error that all meet
LEAST_BUCKET_MIB = 25  # PyTorch's default
WRITING_S = 300  # for a checkpoint that is being written; torchrun may give less
BEAT_S = 20  # between two heartbeats
GONE_S = 300  # that a heartbeat waits for the other machines


def run_main(main, parse_args):
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
    print_last(f"rank {rank}: {message}" if rank or at_once else message)
    sys.stdout.flush()
    if dist.is_initialized():
        os._exit(code)  # other processes may be inside a collective; torchrun ends them
    sys.exit(code)


def print_last(message):
    """The line on stderr with which a process ends."""
    for bar in list(tqdm._instances):  # their last refresh would come after it
        bar.close()
    line = " ".join(str(message).split())
    with contextlib.suppress(OSError):  # a terminal that was closed
        print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr, flush=True)


@dataclass
class World:
    """This process among all, and its device; ``position`` is where in its work it is, for errors.

    ``saver`` writes checkpoints, if anything does; it has ``writing`` and ``wait(seconds)``.
    """

    rank: int
    size: int
    device: torch.device
    precision: str
    position: str = "the start"
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
        reason = f"rank {self.rank}: {reason} at {self.position}"
        if self.saver and self.saver.writing:
            print_last(f"{reason}; a checkpoint is being written and finished first")
            self.saver.wait(WRITING_S)
        print_last(f"{reason}; what is on disk is whole: repeat the command to go on")
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
def start_processes(precision="fp32", *, patience_h=0.5):
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
        f"lost the other processes at {world.position} ({reason}); the one that ended first says "
        f"why; what is on disk is whole: repeat the command to go on, or let torchrun "
        f"--max-restarts do so")


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


def counted_generator(seed, *counters, device="cpu"):
    """A generator that is a function of (seed, counters) alone, such as (seed, step, "noise").

    Nothing has to be carried from step to step, so a resumed run draws what an uninterrupted one
    would. The hash keeps neighbouring steps and purposes apart; of its 63 bits PyTorch's CPU
    generator uses 32, its CUDA generator all.
    """
    digest = hashlib.sha256(repr((seed, *counters)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def data_parallel(net):
    """net in DistributedDataParallel, which averages gradients over the ranks."""
    with warnings.catch_warnings():  # of a new name for an option, which torch 2.11 does not know
        warnings.simplefilter("ignore")
        # The buffers are constant: no broadcast each step. Gradients alias DDP's buckets, which
        # saves a copy of them
        return DistributedDataParallel(net, broadcast_buffers=False, gradient_as_bucket_view=True,
                                       bucket_cap_mb=bucket_mib(net))


def bucket_mib(net):
    """MiB of gradients that DistributedDataParallel sends at once: two blocks', or 25 at least.

    torch.compile cuts the network where a bucket is full: with PyTorch's 25 MiB within every block
    of DiT-B (18 graphs) and DiT-XL (58), with these after every second block (8 and 16). Of
    DiT-XL/2 a fourteenth of the gradients is then sent after the backward, the rest during it.
    """
    lists = [module for module in net.modules() if isinstance(module, torch.nn.ModuleList)]
    blocks = [sum(p.numel() * p.element_size() for p in block.parameters())
              for blocks in lists for block in blocks]
    return max(LEAST_BUCKET_MIB, 2 * max(blocks, default=0) / 2**20)

"""Processes, device, precision, networks over the ranks and counted randomness.

This module alone reads ranks from the environment and picks a device.
"""

import contextlib
import datetime
import errno
import fcntl
import hashlib
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
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from engine.options import RunError, UserError

LEAST_BUCKET_MIB = 25  # PyTorch's default
SHARDING_SINCE = 2, 13  # torch.func.jvp through fully_shard (pytorch pull request 182732)
ERROR_WAIT_S = 10  # a rank that is alive so long after an error is the only one that has it
SAVE_TIMEOUT_S = 300  # for the checkpoint in progress when the process must end; torchrun may kill
# the process sooner
HEARTBEAT_S = 20  # between two heartbeats
HEARTBEAT_TIMEOUT_S = 300  # until a machine that does not answer counts as gone

# ---- this process among all ----------------------------------------------------------------


@dataclass
class World:
    """This process's rank, the world size, its device and precision.

    position: the step or image that the process works at, for error messages. saver: the Saver of
    the run's checkpoints, if there is one.
    """

    rank: int
    size: int
    device: torch.device
    precision: str
    position: str = "the start"
    saver: object = None

    @property
    def main(self):
        """Whether this is rank 0, which prints and writes."""
        return self.rank == 0

    @property
    def distributed(self):
        return self.size > 1

    def barrier(self):
        if self.distributed:
            dist.barrier()

    def broadcast(self, value):
        """Rank 0's value, on every rank."""
        box = [value]
        if self.distributed:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_main(self, work):
        """Calls work() on rank 0; every rank returns its value or raises its UserError."""
        value = fault = None
        if self.main:
            try:
                value = work()
            except UserError as error:
                fault = error
        value, fault = self.broadcast((value, fault))
        if fault:
            raise fault
        return value

    def total(self, tensor):
        """The sum over the ranks of a tensor of any shape, in place."""
        if self.distributed:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor):
        """The mean over the ranks of a tensor of any shape, a new tensor."""
        return self.total(tensor.clone()) / self.size

    def gather(self, value):
        """Every rank's value, in the order of ranks, on every rank."""
        values = [value] * self.size
        if self.distributed:
            dist.all_gather_object(values, value)
        return values

    def start_maximum(self, number):
        """Starts an asynchronous max-reduce of an int; returns a function that waits for it."""
        tensor = torch.tensor([number])
        work = dist.all_reduce(tensor, dist.ReduceOp.MAX, async_op=True)

        def result():
            work.wait()
            return int(tensor)
        return result

    def exit(self, reason, code):
        """End the process, from any thread, after the checkpoint in progress."""
        reason = f"rank {self.rank}: {reason} at {self.position}"
        if self.saver and self.saver.writing:
            print_last(f"{reason}; a checkpoint is being written and finished first")
            self.saver.wait(SAVE_TIMEOUT_S)
        print_last(f"{reason}; what is on disk is whole: repeat the command to go on")
        os._exit(code)

    def autocast(self):
        """The context networks run in: bfloat16 for --precision bf16, else as the tensors are."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @contextlib.contextmanager
    def full_precision(self):
        """Within ``with``, float32 is computed as float32 whatever --precision says."""
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
        """A progress bar on stderr, on rank 0; refreshed each 30 s if that is no terminal."""
        return tqdm(total=total, initial=initial, desc=desc, unit=unit, disable=not self.main,
                    dynamic_ncols=True, mininterval=0.2 if sys.stderr.isatty() else 30)


# DistributedDataParallel holds its group and frees it, where nothing else does, without releasing
# the GIL. If a thread of gloo waits for the GIL just then, the process stands still for ever
_ended_groups = []


@contextlib.contextmanager
def start_processes(precision="fp32", *, patience_h=0.5):
    """Yields this process's World, set up from torchrun's environment; without it, of one process.

    precision: fp32, tf32 (fp32 with TensorFloat-32 products on GPUs) or bf16 (autocast).
    patience_h: hours that a rank waits for another that is alive. One that died is noticed at once,
    a machine that is unreachable within HEARTBEAT_TIMEOUT_S. Raises UserError and LostError.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    world = World(rank, size, _device(), precision)
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    if not world.distributed:
        yield world
        return
    try:
        _join(world, datetime.timedelta(hours=patience_h))
        heartbeat = _Heartbeat(world) if _several_machines() else None
        yield world
        world.barrier()  # gloo aborts a process that the others leave behind
        if heartbeat:
            heartbeat.end()
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise _lost(error, world) from error
    _ended_groups.append(dist.group.WORLD)
    dist.destroy_process_group()


def _device():
    """The GPU of this process's local rank, or the CPU. Raises UserError."""
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
def one_thread():
    """Within ``with``, PyTorch uses one thread. The bits of a CPU's sums depend on the number of
    threads, which is one under torchrun and one per core otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def counted_generator(seed, *counters, device="cpu"):
    """A generator that is a function of (seed, counters) alone, such as (seed, step, "noise").

    No random state needs saving: a resumed run draws what an uninterrupted one would. The hash
    keeps neighbouring steps and purposes apart; of its 63 bits PyTorch's CPU generator uses 32, its
    CUDA generator all. On a GPU more numbers than it runs threads, in one draw, are in an order of
    its own: they are the same on GPUs of one model only (ATen's DistributionTemplates.h).
    """
    digest = hashlib.sha256(repr((seed, *counters)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


# ---- networks over the ranks ---------------------------------------------------------------


def parallelise(net, ema, world, *, shard):
    """What the forward with gradient of net goes through, so that ranks average their gradients.

    That is net in DistributedDataParallel, or net itself in one process. With shard it is net
    itself, too, and the parameters of net and of its average ema are divided among the ranks.
    """
    if shard:
        shard_parameters(net, world)
        shard_parameters(ema, world)
        return net
    return data_parallel(net) if world.distributed else net


def local_gradients(forward):
    """A context in which the gradients of a backward stay on their rank, to be averaged by a later
    one. A sharded network averages them at once: no rank has room for all of them."""
    return forward.no_sync() if hasattr(forward, "no_sync") else contextlib.nullcontext()


def data_parallel(net):
    """net in DistributedDataParallel, which averages gradients over the ranks."""
    with warnings.catch_warnings():  # that an option has a new name, which torch 2.11 lacks
        warnings.simplefilter("ignore")
        # The buffers are constant: no broadcast each step. Gradients alias DDP's buckets, which
        # saves a copy of them
        return DistributedDataParallel(net, broadcast_buffers=False, gradient_as_bucket_view=True,
                                       bucket_cap_mb=bucket_mib(net))


def replace_network(forward, net):
    """forward with net, compiled or not, in place of its network: net itself, or in the same
    DistributedDataParallel.

    torch.compile cannot trace DistributedDataParallel. Around a compiled network it still tells the
    compiler where buckets of gradients end.
    """
    if not isinstance(forward, DistributedDataParallel):
        return net
    forward.module = net
    return forward


def bucket_mib(net):
    """MiB of gradients that DistributedDataParallel sends at once: two blocks', or 25 at least.

    torch.compile cuts the network where a bucket is full. With PyTorch's 25 MiB that is within
    every block: DiT-B has 18 graphs and DiT-XL 58. With two blocks a bucket they have 8 and 16.
    DiT-XL/2 then sends a fourteenth of its gradients after the backward, and the rest during it.
    """
    blocks = [sum(p.numel() * p.element_size() for p in block.parameters())
              for block in list_blocks(net)]
    return max(LEAST_BUCKET_MIB, 2 * max(blocks, default=0) / 2**20)


def list_blocks(net):
    """The modules in the ModuleLists of net, outer ones first."""
    return [block for module in net.modules() if isinstance(module, nn.ModuleList)
            for block in module]


def check_sharding(world):
    """Raise UserError unless parameters can be sharded here."""
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    if version < SHARDING_SINCE:
        raise UserError(f"--shard must come with torch {'.'.join(map(str, SHARDING_SINCE))} or "
                        f"newer, whose fully_shard has forward mode, got {torch.__version__}; "
                        f"install that or leave --shard out")
    if not world.distributed:
        raise UserError("--shard must come with several processes, got 1; start more with torchrun "
                        "or leave it out")


def shard_parameters(net, world):
    """Divide the parameters of net among the ranks, in place, by PyTorch's fully_shard.

    A block gathers its parameters before it runs and frees them afterwards. In bf16 the weights of
    linear layers and convolutions are gathered in bfloat16, to which autocast rounds them anyway:
    autocast would keep rounded copies of the whole network until the backward.
    """
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # not written to
    mesh = init_device_mesh(world.device.type, (world.size,))
    rounded = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in reversed(list_blocks(net)):
        layers = [m for m in block.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        of_layers = {p for layer in layers for p in layer.parameters()}
        policy = MixedPrecisionPolicy()
        if world.precision == "bf16" and of_layers.issuperset(block.parameters()):
            policy = rounded
        elif world.precision == "bf16" and layers:
            fully_shard(layers, mesh=mesh, mp_policy=rounded, reshard_after_forward=True)
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    # By default the whole would keep its parameters until a backward, which ema never makes
    fully_shard(net, mesh=mesh, reshard_after_forward=True)


@contextlib.contextmanager
def whole_parameters(net):
    """Where every rank holds all parameters of net, so that each may run it as often as it likes.

    All ranks must enter. Without sharding that is so anyway.
    """
    modules = [module for module in net.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


def local_shard(tensor):
    """This rank's rows of a sharded tensor (N, ...), in the same memory; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor):
    """A sharded tensor (N, ...) in full, for which all ranks must call this; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor, other):
    """The full tensor (N, ...) sharded as other is, from this rank's own copy; itself if other is
    not."""
    if not isinstance(other, DTensor):
        return tensor
    # Without the clone the shard would be a view of the full tensor and keep it
    shard = distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)
    return shard.clone()


def send_shards(value):
    """What the other ranks do while rank 0 makes full tensors of nested dicts and lists."""
    if isinstance(value, DTensor):
        value.full_tensor()
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            send_shards(item)


# ---- the end of a script -------------------------------------------------------------------


class LostError(RunError):
    """Another process or its machine is gone. Each rank prints its own line at once."""


def run_main(main, parse_args):
    """Run a script. Expected errors end it with one line: exit code 1 for a RunError, else 2."""
    sys.stdout.reconfigure(errors="surrogateescape")  # results are paths, of any bytes
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
        line = _path_error(error) if isinstance(error, OSError) else _memory_error(error)
        if line is None:
            raise
        fail(line)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # The interpreter's own end races with gloo's threads, which abort it once in some 25 runs
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _path_error(error):
    """The line for a path that may not be opened or has too long a name, else None."""
    rule = {errno.EACCES: "open to this user",
            errno.ENAMETOOLONG: "a name that the file system can hold"}.get(error.errno)
    return rule and (f"{error.filename} must be {rule}, got: {error.strerror}; change that or "
                     f"choose another path")


def _memory_error(error):
    """The line for an error that means too little memory, else None.

    Only a GPU's error has a class of its own; PyTorch's others are known by their text.
    """
    text = str(error)
    if "DataLoader worker" in text:
        return (f"A data loading process died, perhaps out of memory: lower --num-workers and "
                f"repeat the command ({text.splitlines()[0]})")
    remedy = "lower the batch size or, for train.py, raise --grad-accum-steps"
    if isinstance(error, torch.OutOfMemoryError):
        return f"Out of GPU memory: {remedy}"
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return f"Out of memory: {remedy}"
    return None


def fail(message, *, code=2, at_once=False):
    """Prints one line on stderr and ends this process.

    Most errors occur on all ranks. Local rank 0 prints at once, and torchrun then ends the others
    of its machine. A rank that is alive ERROR_WAIT_S seconds later has the error alone and prints
    it, too; at_once: without this wait. No rank asks another, which may be gone.
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
    with contextlib.suppress(OSError):  # the terminal was closed
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}",
              file=sys.stderr, flush=True)


def _lost(error, world):
    """The LostError for an error that gloo or NCCL raised."""
    reason = str(error).split("] ", 1)[-1].split(". ")[0].splitlines()[0][:200]
    if _several_machines() and not dist.is_initialized():
        return LostError(
            f"cannot reach the other processes ({reason}); if all machines are up, set "
            f"GLOO_SOCKET_IFNAME on each to the network interface that reaches the others; here it "
            f"is {os.environ.get('GLOO_SOCKET_IFNAME', 'not set')}")
    return LostError(
        f"lost the other processes at {world.position} ({reason}); the one that ended first says "
        f"why; what is on disk is whole: repeat the command to go on, or let torchrun "
        f"--max-restarts do so")


# ---- how the processes meet ----------------------------------------------------------------


def _join(world, timeout):
    """Set up the process group: gloo, and NCCL on GPUs."""
    cuda = world.device.type == "cuda"
    store = _fresh_store(world)
    if _several_machines() and "GLOO_SOCKET_IFNAME" not in os.environ:
        _choose_interface(store, world)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store,
                            rank=world.rank, world_size=world.size, timeout=timeout,
                            device_id=world.device if cuda else None)


def _several_machines():
    return os.environ.get("LOCAL_WORLD_SIZE") not in (None, os.environ.get("WORLD_SIZE"))


def _fresh_store(world):
    """The store by which the processes find each other, under a name that is new at each start.

    torchrun's store outlives the processes that --max-restarts replaces, and what the old ones left
    there would be taken for the new ones' addresses: they hang (pytorch issue 135712). The count of
    restarts differs between machines, so it cannot be the name. Rank 0 chooses a random name. Each
    other rank asks for it under a random word, and rank 0 answers until every rank has confirmed.
    """
    store, _, _ = next(dist.rendezvous("env://"))
    word = uuid.uuid4().hex
    if world.rank:
        store.set(f"asked {world.rank}", word)
        name = store.get(f"answer {word}").decode()
        store.set(f"taken {name} {world.rank}", "")
        return dist.PrefixStore(name, store)
    for other in range(1, world.size):
        while not store.check([f"taken {word} {other}"]):
            store.set(f"answer {store.get(f'asked {other}').decode()}", word)
            time.sleep(0.05)
    return dist.PrefixStore(word, store)


def _choose_interface(store, world):
    """Sets GLOO_SOCKET_IFNAME to the network interface by which this machine reaches the others.

    gloo takes the address of the host name, which often is a loopback address. The machine of
    MASTER_ADDR reaches it by loopback, so it takes its route to another rank. IPv4 only.
    """
    address = _address_towards(os.environ["MASTER_ADDR"])
    store.set(f"address {world.rank}", address)
    others = (store.get(f"address {rank}").decode() for rank in range(world.size))
    while address.startswith("127.") and (other := next(others, None)):
        address = _address_towards(other)
    if name := _interface_of(address):
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _address_towards(host):
    """This machine's IPv4 address on the way to a host; 127.0.0.1 where there is none."""
    with (contextlib.suppress(OSError),
          socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe):
        probe.connect((host, 1))  # with UDP this sends nothing
        return probe.getsockname()[0]
    return "127.0.0.1"


def _interface_of(address):
    """The name of the network interface that has this IPv4 address; None for loopback or none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                request = struct.pack("256s", name.encode())
                reply = fcntl.ioctl(probe, 0x8915, request)  # SIOCGIFADDR
                if socket.inet_ntoa(reply[20:24]) == address and name != "lo":
                    return name
    return None


class _Heartbeat(threading.Thread):
    """A thread that ends this process when another machine no longer answers.

    A collective notices that only at its timeout, which must be long, as rank 0 may work alone for
    hours; its heartbeat answers meanwhile. A process that died is noticed by the main thread.
    """

    def __init__(self, world):
        super().__init__(daemon=True)
        self.world, self.ending = world, threading.Event()
        timeout = datetime.timedelta(seconds=HEARTBEAT_TIMEOUT_S)
        self.group = dist.new_group(backend="gloo", timeout=timeout)
        self.start()

    def run(self):
        ended = False
        while not ended:
            beat = torch.tensor([int(self.ending.wait(HEARTBEAT_S))])
            began = time.monotonic()
            try:
                dist.all_reduce(beat, dist.ReduceOp.MAX, group=self.group)
            except RuntimeError:
                if time.monotonic() - began >= HEARTBEAT_TIMEOUT_S - 1:
                    self.world.exit(f"another machine did not answer for {HEARTBEAT_TIMEOUT_S} s",
                                    code=1)
                return
            ended = bool(beat)

    def end(self):
        """Called once all ranks are done: all threads end after the same beat."""
        self.ending.set()
        self.join()

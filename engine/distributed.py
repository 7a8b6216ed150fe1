"""Processes, their device and precision, and counted randomness."""

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from tqdm import tqdm

from engine.errors import UserError, print_last
from engine.network import process_group


@dataclass
class World:
    """This process's rank, the world size, its device and precision.

    position: the current step or image, for error messages. before_exit: what exit calls first.
    """

    rank: int
    size: int
    device: torch.device
    precision: str
    position: str = "the start"
    before_exit: Callable = lambda: None  # noqa: E731

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

    def gather(self, value):
        """Every rank's value, in the order of ranks, on every rank."""
        values = [value] * self.size
        if self.distributed:
            dist.all_gather_object(values, value)
        return values

    def maximum_later(self, number):
        """Starts an asynchronous max-reduce of an int; returns a function that waits for it."""
        tensor = torch.tensor([number])
        work = dist.all_reduce(tensor, dist.ReduceOp.MAX, async_op=True)
        return lambda: work.wait() and int(tensor)

    def exit(self, reason, code):
        """End the process, from any thread, after before_exit."""
        print_last(f"rank {self.rank}: {reason} at {self.position}; repeat the command to go on")
        self.before_exit()
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


@contextlib.contextmanager
def start_processes(precision="fp32", *, timeout_hours=0.5):
    """Yields this process's World by torchrun's environment; without it, of one process.

    precision: fp32, tf32 (fp32 with TensorFloat-32 products on GPUs) or bf16 (autocast).
    timeout_hours: how long a rank waits for another that is alive. Raises UserError and LostError.
    """
    _check_launcher()
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    world = World(rank, size, _device(), precision)
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    group = process_group(world, timeout_hours=timeout_hours)
    with group if world.distributed else contextlib.nullcontext():
        yield world


def _check_launcher():
    """Raise UserError where srun or mpirun started several processes, which know nothing of each
    other without torchrun: each would train alone."""
    env, names = os.environ, ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"]
    # The shells of sbatch and salloc have the count, too, but are one process and in no step
    if ("SLURM_JOB_ID" not in env or "SLURM_STEP_ID" in env
            or "SLURM_PROCID" in env and env.get("ENVIRONMENT") != "BATCH"):
        names.append("SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS")
    for name in names:
        if env.get(name, "1") not in ("", "1") and "WORLD_SIZE" not in env:
            raise UserError(f"several processes must be started by torchrun, got {name}="
                            f"{env[name]} without; start torchrun once per machine, or set "
                            f"WORLD_SIZE=1 for processes that each work alone")


def _device():
    """The GPU of this process's local rank, or the CPU. Raises UserError."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local_rank >= gpus:
        raise UserError(f"--nproc_per_node must be at most the number of GPUs, {gpus}, got "
                        f"{local_rank + 1} or more; start fewer")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def one_thread():
    """Within ``with``, PyTorch uses one thread: the bits of a CPU's sums depend on the count."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def counted_generator(seed, *counters, device="cpu"):
    """A generator that is a function of (seed, counters), such as (seed, step, "noise"): no random
    state needs saving.

    PyTorch's CPU generator uses 32 bits of the hash, its CUDA generator 63. On a GPU the order of
    many numbers depends on its count of threads, so on its model (ATen's DistributionTemplates.h).
    """
    return torch.Generator(device).manual_seed(counted_seed(seed, *counters))


def counted_seed(seed, *counters):
    """A hash of (seed, counters), below 2^63."""
    digest = hashlib.sha256(repr((seed, *counters)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1

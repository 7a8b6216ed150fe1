"""How processes meet, and how they notice that another is gone."""

import contextlib
import datetime
import fcntl
import os
import socket
import struct
import threading
import time
import uuid

import torch
import torch.distributed as dist

from engine.errors import LostError

HEARTBEAT_S, HEARTBEAT_TIMEOUT_S = 20, 300  # between two; until a silent machine counts as gone

# DistributedDataParallel would free the last reference to its group without releasing the GIL; if
# a thread of gloo waits for the GIL just then, the process stands still for ever
_ended_groups = []


@contextlib.contextmanager
def process_group(world, *, timeout_hours):
    """Within ``with``, the processes of this World are one group: gloo, and NCCL on GPUs. Raises
    LostError. timeout_hours: how long a rank waits for another that is alive."""
    cuda, timeout = world.device.type == "cuda", datetime.timedelta(hours=timeout_hours)
    try:
        store = _fresh_store(world)
        if _several_machines() and "GLOO_SOCKET_IFNAME" not in os.environ:
            _choose_interface(store, world)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store,
                                rank=world.rank, world_size=world.size, timeout=timeout,
                                device_id=world.device if cuda else None)
        with _heartbeat(world) if _several_machines() else contextlib.nullcontext():
            yield
            world.barrier()  # gloo aborts a process that the others leave behind
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise _lost_error(error, world) from error
    _ended_groups.append(dist.group.WORLD)
    dist.destroy_process_group()


def _lost_error(error, world):
    """The LostError for an error that gloo or NCCL raised; gloo's has no class of its own."""
    reason = str(error).split("] ", 1)[-1].split(". ")[0].splitlines()[0][:200]
    if _several_machines() and not dist.is_initialized():
        return LostError(
            f"cannot reach the other processes ({reason}); if all machines are up, set "
            f"GLOO_SOCKET_IFNAME on each to the network interface that reaches the others; here it "
            f"is {os.environ.get('GLOO_SOCKET_IFNAME', 'not set')}")
    return LostError(f"lost the other processes at {world.position} ({reason}); the one that ended "
                     f"first says why; repeat the command to go on, or use torchrun --max-restarts")


def _several_machines():
    return os.environ.get("LOCAL_WORLD_SIZE") not in (None, os.environ.get("WORLD_SIZE"))


def _fresh_store(world):
    """The store by which processes find each other, under a name that is new at each start: rank 0
    chooses it, and answers the others, who ask under random words, until all have confirmed."""
    # Needed up to torch 2.15: torchrun's store keeps the addresses of processes that --max-restarts
    # replaces (pytorch issue 135712). Machines count restarts differently: that is no name
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
    """Sets GLOO_SOCKET_IFNAME to the interface by which this machine reaches MASTER_ADDR or, if
    that is its own address, another rank. IPv4 only."""
    # Needed up to torch 2.15: gloo takes the address of the host name, often a loopback address
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


@contextlib.contextmanager
def _heartbeat(world):
    """Within ``with``, a thread ends this process when another machine no longer answers."""
    # Needed up to torch 2.15: a collective notices a silent machine only at its timeout, which must
    # be long, as rank 0 may work alone for hours; its heartbeat answers meanwhile
    ending, timeout = threading.Event(), datetime.timedelta(seconds=HEARTBEAT_TIMEOUT_S)
    group = dist.new_group(backend="gloo", timeout=timeout)

    def run():
        beat = torch.tensor([0])
        while not beat:
            beat[:] = int(ending.wait(HEARTBEAT_S))
            began = time.monotonic()
            try:
                dist.all_reduce(beat, dist.ReduceOp.MAX, group=group)
            except RuntimeError:
                if time.monotonic() - began >= HEARTBEAT_TIMEOUT_S - 1:
                    world.exit(f"another machine did not answer for {HEARTBEAT_TIMEOUT_S} s", 1)
                return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield
    ending.set()  # all threads end after the same beat
    thread.join()


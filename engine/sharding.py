"""Networks over the ranks: DistributedDataParallel, FSDP2, and what is sharded in full."""

import contextlib
import warnings

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from engine.errors import UserError

LEAST_BUCKET_MIB = 25  # PyTorch's default
SHARDING_SINCE = 2, 13  # torch.func.jvp through fully_shard (pytorch pull request 182732)


def parallelise(net, ema, world, *, shard):
    """The module for the forward with gradient, so that ranks average gradients: net in
    DistributedDataParallel; net itself in one process or, with its average ema, sharded."""
    if shard:
        shard_parameters(net, world)
        shard_parameters(ema, world)
        return net
    return data_parallel(net) if world.distributed else net


def local_gradients(forward):
    """A context in which DistributedDataParallel averages no gradients: a later backward does."""
    return forward.no_sync() if hasattr(forward, "no_sync") else contextlib.nullcontext()


def data_parallel(net):
    """net in DistributedDataParallel, which averages gradients over the ranks."""
    with warnings.catch_warnings():  # that an option has a new name, which torch 2.11 lacks
        warnings.simplefilter("ignore")
        # The ranks' buffers are equal: no broadcast each step. Gradients alias the buckets: no copy
        return DistributedDataParallel(net, broadcast_buffers=False, gradient_as_bucket_view=True,
                                       bucket_cap_mb=bucket_mib(net))


def replace_network(forward, net):
    """forward with net, compiled or not, in place of its network: torch.compile cannot trace
    DistributedDataParallel, which around a compiled network still tells it where buckets end."""
    if not isinstance(forward, DistributedDataParallel):
        return net
    forward.module = net
    return forward


def bucket_mib(net):
    """MiB of gradients that DistributedDataParallel sends at once: two blocks', or 25 at least.

    torch.compile cuts the network where a bucket is full: DiT-XL into 58 graphs with 25 MiB, into
    16 with two blocks, of which one fourteenth of the gradients is sent after the backward.
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
    if tuple(map(int, torch.__version__.split(".")[:2])) < SHARDING_SINCE:
        raise UserError(f"--shard must come with torch {'.'.join(map(str, SHARDING_SINCE))} or "
                        f"newer, got {torch.__version__}; install that or leave --shard out")
    if not world.distributed:
        raise UserError("--shard must come with several processes, got 1; use torchrun")


def shard_parameters(net, world):
    """Divide the parameters of net among the ranks, in place. In bf16 those of linear layers and
    convolutions are gathered in bfloat16: autocast would keep rounded copies until the backward."""
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
def gathered_parameters(net):
    """Within ``with``, which all ranks must enter, every rank holds all parameters of net."""
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
    """This rank's rows of a tensor (N, ...), if other is sharded; else the tensor."""
    if not isinstance(other, DTensor):
        return tensor
    # The clone frees the full tensor, of which the shard is a view
    return distribute_tensor(tensor, other.device_mesh, other.placements,
                             src_data_rank=None).clone()

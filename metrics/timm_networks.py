"""Networks of timm as feature extractors: their names, what images they take, their weights, and
the position table of DINOv2."""

import difflib
import functools
import logging
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F

from engine.errors import BadValue, UserError, one_line
from metrics.inception import fill
from weights.foreign_files import code_in, reader_of


class Plan(NamedTuple):
    """What a network takes and gives."""

    dimension: int  # of its pooled features
    size: tuple  # (H, W) of its images
    interpolation: str  # to that size, as resize_like_pillow takes it
    mean: tuple  # of the three channels, for pixels in [0, 1]
    std: tuple


def check_name(name):
    """Raise BadValue unless timm has a network of this name, which may end in .TAG of weights."""
    import timm  # takes seconds to import

    try:
        known = timm.is_model(name) and timm.get_pretrained_cfg(name) is not None
    except RuntimeError:  # an unknown tag
        known = False
    if not known:
        every = [*timm.list_models(), *timm.list_pretrained()]
        near = difflib.get_close_matches(name, every, cutoff=0.5)
        raise BadValue(f"must name a network of timm, got timm:{name:.100}; "
                       + (f"near it are {', '.join(near)}" if near else
                          "timm.list_models() in Python lists them"))


@functools.cache
def plan_of(name):
    """The Plan of a network, from its structure and timm's data configuration; no weights are read.
    Raises BadValue for an unknown network, and for one that makes no vector of an RGB image."""
    import timm

    check_name(name)
    with torch.device("meta"):  # where nothing is computed
        net = create(name).eval()
        config = timm.data.resolve_model_data_config(net)
        channels, *size = config["input_size"]
        shape = tuple(net(torch.empty(1, channels, *size)).shape)
    if channels != 3 or len(shape) != 2 or config["interpolation"] not in ("bilinear", "bicubic"):
        raise BadValue(f"must name a network of RGB images, of bilinear or bicubic resize, with "
                       f"one vector as output, got timm:{name} with {channels} channels, "
                       f"{config['interpolation']} and {shape}; name another")
    return Plan(shape[1], tuple(size), config["interpolation"], config["mean"], config["std"])


def load_network(name, weights, world):
    """timm's network of this name, without its classifier, in float32 on the CPU: with the weights
    of a file, or by default those that timm names, from Hugging Face's cache, to which rank 0
    downloads them. Every rank must call it. Raises UserError."""
    if weights is not None:
        net = load_file(name, weights)
    else:
        first = []  # rank 0's
        world.on_main(lambda: first.append(load_published(name, world)))
        net = first[0] if first else load_published(name, world)
    return net.float().eval().requires_grad_(False)


def load_published(name, world):
    """The network with the weights that timm names. Raises UserError."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells each of its attempts
    if world.main:
        print(f"loading {name}, downloaded if it is not in Hugging Face's cache", file=sys.stderr)
    try:
        return create(name, pretrained=True)
    except Exception as error:  # of timm, safetensors, the hub's client or the network
        raise UserError(f"cannot load the weights of {name} ({one_line(error)}): connect once, "
                        f"fill its cache, or give evaluate_fid.py --weights") from error


def load_file(name, path):
    """The network with the state dict of a .safetensors or PyTorch file, opened as data, which must
    have its names and shapes. Raises UserError."""
    net = create(name)
    left_out = ("mask_token", *classifier_of(net))  # the first, in DINOv2's files, is for training
    try:
        tensors = reader_of(path)(path, "ema")
        fill(net, {key: value for key, value in tensors.items() if not key.startswith(left_out)})
    except Exception as error:  # torch.load raises errors of many kinds
        code = code_in(error)
        reason = f"it names {code}, code that is not run" if code else one_line(error)
        raise UserError(f"--weights must be a whole file of the weights of timm's {name}, got "
                        f"{path} ({reason}); get it again or name another") from error
    return net


def classifier_of(net):
    """What the names of the classifier's weights begin with, in files of the network that net is
    without it: its layers, or what holds them and is gone as well, such as a batch norm."""
    layers = net.pretrained_cfg.get("classifier") or ()
    for layer in (layers,) if isinstance(layers, str) else layers:
        parent = layer.rpartition(".")[0]
        gone = parent and not any(key.startswith(f"{parent}.") for key in net.state_dict())
        yield f"{parent if gone else layer}."


def create(name, **options):
    """timm's network without its classifier; the random numbers of others stay as they were."""
    import timm

    with torch.random.fork_rng(devices=[]):
        return timm.create_model(name, num_classes=0, **options)


def set_size_like_dinov2(net, size):
    """Let a ViT of timm take images of size x size, with the position table that DINOv2's own code
    makes for them; returns it.

    That code (facebookresearch/dinov2, interpolate_pos_encoding) interpolates the table of the
    training, bicubic without antialias, by a factor of (new + 0.1) / old sides. timm antialiases
    and takes new / old, with other features.
    """
    table, prefix = net.pos_embed.detach(), net.num_prefix_tokens  # (1, prefix + old^2, D)
    net.set_input_size(size)
    old, new = round((table.shape[1] - prefix) ** 0.5), net.patch_embed.grid_size[0]
    grid = table[:, prefix:].unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(new + 0.1) / old, mode="bicubic")  # (1, D, new, new)
    net.pos_embed = torch.nn.Parameter(
        torch.cat([table[:, :prefix], grid.flatten(2).transpose(1, 2)], dim=1), requires_grad=False)
    return net

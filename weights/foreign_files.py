"""Opens what other repositories saved as data: tensors by name, no code.

PyTorch files, .safetensors, and the JAX states of flax and orbax: one msgpack file, or a folder of
TensorStore's OCDBT format.
"""

import argparse
import importlib
import re
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch

from engine.checkpoint import KEYS, read_safetensors
from engine.errors import UserError
from engine.files import find_damage

INTERRUPTED = ".orbax-checkpoint-tmp"  # in the name of a folder that orbax has not finished
ANOTHER = "give a checkpoint of MeanFlow, improved MeanFlow or SiT"


def refuse(rule, got, remedy=ANOTHER):
    """The UserError for --in."""
    return UserError(f"--in must {rule}, got {got:.300}; {remedy}")


class Source(NamedTuple):
    """Tensors by name as they were saved, and what the container says of them."""

    weights: dict
    container: str
    which: str = ""  # averaged or raw weights; "" for a bare state dict
    step: int | None = None
    jax: bool = False  # names and layouts are those of JAX, with dots in the path
    config: dict | None = None  # of our own files
    args: dict = {}  # the command line of a PyTorch training file
    keys: tuple = ()  # of such a file


def is_unet(names):
    """Whether these names of tensors are of a U-Net, as py-meanflow's."""
    return any("map_" in name or name.startswith(("net_ema.", "num_updates"))
               for name in map(str, names))


def read_source(path, *, raw=False):
    """The Source at path, a file or a folder. raw: not the averaged weights, which is the default.

    Files are opened as data: no code in them runs. Tensors of PyTorch files stay on disk until they
    are used. Raises UserError.
    """
    path = Path(path)
    if path.is_dir():
        return read_folder(path, raw)
    if not path.is_file():
        raise refuse("be a file or a folder", f"{path} (no such file)", "check the path")
    with open(path, "rb") as file:
        start = file.read(9)
    # .safetensors opens with the length of its header and {, a msgpack map with its own length, a
    # pickle with 0x80
    if start[8:] == b"{" or path.suffix == ".safetensors":
        return read_safetensors_file(path, raw)
    if start and (0x81 <= start[0] <= 0x8f or start[0] in (0xde, 0xdf)):
        return read_msgpack(path, raw)
    return read_torch(path, raw)


def read_torch(path, raw):
    """The Source of what torch.save wrote."""
    def torn(reason):
        return refuse("be a whole file of torch.save", f"{path} ({reason})",
                      "copy it again, or unzip it if it is a zip of a folder")

    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the line on stderr says it
            try:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # a file of before PyTorch 1.6 cannot be mapped
                state = torch.load(path, map_location="cpu", weights_only=True)
        # torch.load compares no checksums
        damage = find_damage(path, mapped=True) if zipfile.is_zipfile(path) else None
    except Exception as error:  # the unpickler and the archive raise errors of many kinds
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found:
            raise refuse("hold tensors and plain values alone", f"{path}, which names "
                         f"{found[1]}, code that will not be run",
                         "save its state dict anew, without that object") from error
        raise torn(f"torn, or of another kind: {type(error).__name__}") from error
    if damage:
        raise torn(f"damaged: {damage}")
    if not isinstance(state, dict):
        raise refuse("hold a dict of tensors", f"{path} with a {type(state).__name__}")
    return pick(state, raw, path)


def pick(state, raw, path):
    """The Source in a loaded dict: averaged or raw weights of a training file, or bare ones."""
    if not {"ema", "model"} & state.keys():
        if raw:
            raise UserError(f"--raw must come with a training file, got {path}, a bare state dict; "
                            f"leave it out")
        return Source(state, "a bare state dict")
    name = "model" if raw else "ema"
    weights = state.get(name)
    if is_unet(state.get("model") or ()):  # whose averages have another place
        raise refuse("hold a DiT", f"{path}, a U-Net of py-meanflow")
    if not isinstance(weights, dict) or not weights:
        other = "leave --raw out" if raw else "add --raw for the weights that are not averaged"
        raise refuse(f"hold {'raw' if raw else 'averaged'} weights", f"{path}, whose {name!r} is "
                     f"{'missing' if weights is None else 'no state dict'}", other)
    which, step = "raw" if raw else "averaged", state.get("steps")
    if state.keys() >= set(KEYS):
        if not isinstance(state["config"], dict):
            raise refuse("hold a config", f"{path}, whose 'config' is no dict")
        return Source(weights, "our checkpoint", which, config=state["config"])
    args = state.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    return Source(weights, "a PyTorch training file", which,
                  step if isinstance(step, int) else None,
                  args=args if isinstance(args, dict) else {}, keys=tuple(state))


def read_safetensors_file(path, raw):
    """The Source of a .safetensors file, ours with a config or bare."""
    try:
        weights, config, _ = read_safetensors(path)
    except Exception as error:  # of the library
        raise refuse("be a whole .safetensors file", f"{path} ({error!s:.150})",
                     "copy it again") from error
    if raw:
        raise UserError(f"--raw must come with a training file, got {path}, which holds one set of "
                        f"weights; leave it out")
    if isinstance(config, dict):
        return Source(weights, "our .safetensors file", "averaged", config=config)
    return Source(weights, "a bare .safetensors file")


def read_folder(folder, raw):
    """The Source of a folder that flax or orbax wrote, or of the newest checkpoint in it."""
    if INTERRUPTED in folder.name:
        raise refuse("be a finished checkpoint", f"{folder}, which an interrupted save left",
                     "give another checkpoint")
    if (folder / "checkpoint").is_file():
        return read_msgpack(folder / "checkpoint", raw)
    if (folder / "manifest.ocdbt").is_file():
        return read_ocdbt(folder, raw)
    found = [path for path in folder.glob("checkpoint_*")
             if re.fullmatch(r"checkpoint_\d+", path.name)
             and (path.is_file() or path.is_dir() and not re.search(r"/checkpoint_\d+$",
                                                                    str(folder.absolute())))]
    if found:
        newest = max(found, key=lambda path: int(path.name.split("_")[1]))
        return read_msgpack(newest, raw) if newest.is_file() else read_folder(newest, raw)
    interrupted = any(INTERRUPTED in path.name or path.name.startswith("ocdbt.process_")
                      for path in folder.iterdir())
    raise refuse("be or hold a checkpoint", f"{folder}, which has no checkpoint or manifest.ocdbt"
                 + (", only an interrupted save" if interrupted else ""),
                 "give the folder checkpoint_N of a JAX run, or a PyTorch file")


def optional(module, path):
    """An optional package. Raises UserError where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"--in {path} needs the {module} package; pip install {module}") from error


def read_msgpack(path, raw):
    """The Source of a JAX state in one msgpack file, as flax and old orbax write it.

    Of its groups only the one that is asked for is held in memory.
    """
    msgpack = optional("msgpack", path)

    def array(code, data):
        if code != 1:  # flax's number for an array
            return None
        shape, kind, content = msgpack.unpackb(data)
        return from_bytes(content, kind, shape)

    group, tree, step = "params" if raw else "ema_params", None, None
    try:
        with open(path, "rb") as file:
            stream = msgpack.Unpacker(file, ext_hook=array, strict_map_key=False,
                                      max_buffer_size=2**31 - 1)
            for _ in range(stream.read_map_header()):
                key = stream.unpack()
                if key == group:
                    tree = stream.unpack()
                elif key == "step":
                    step = stream.unpack()
                else:
                    stream.skip()
        weights = flatten(tree) if isinstance(tree, dict) else {}
    except Exception as error:
        raise refuse("be a whole msgpack file of a JAX state", f"{path} (torn, or of another kind: "
                     f"{type(error).__name__})", "copy it again") from error
    if not weights:
        raise refuse(f"hold {group}", f"{path} without", "add or leave out --raw, or " + ANOTHER)
    return Source(weights, "a JAX state (msgpack)", "raw" if raw else "averaged",
                  int(step) if isinstance(step, int) or getattr(step, "shape", 0) == () else None,
                  jax=True)


def flatten(tree, prefix=""):
    """{path: tensor} of nested dicts, whose arrays flax cuts into chunks above 2^30 bytes."""
    found = {}
    for name, value in tree.items():
        if isinstance(value, dict) and "__msgpack_chunked_array__" in value:
            chunks = [value["chunks"][str(i)] for i in range(len(value["chunks"]))]
            shape = [value["shape"][str(i)] for i in range(len(value["shape"]))]
            found[prefix + name] = torch.cat(chunks).reshape(shape)
        elif isinstance(value, dict):
            found |= flatten(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def from_bytes(content, kind, shape):
    """The tensor of this shape, such as (96, 256), whose little-endian bytes content holds; kind: a
    dtype's name."""
    dtype = getattr(torch, kind, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"unknown dtype {kind}")
    if not content:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(content), dtype=dtype).reshape(shape)


def read_ocdbt(folder, raw):
    """The Source of a JAX state in TensorStore's OCDBT format, as newer orbax writes it."""
    tensorstore = optional("tensorstore", folder)
    group, weights, step = "params." if raw else "ema_params.", {}, None
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder.resolve()}/"}}

    def read(name, driver):
        array = tensorstore.open({"driver": driver, "kvstore": {**store, "path": f"{name}/"}})
        return array.result().read().result()

    try:
        for key in tensorstore.KvStore.open(store).result().list().result():
            name, _, part = key.decode().rpartition("/")
            driver = {".zarray": "zarr", "zarr.json": "zarr3"}.get(part)
            if driver and name.startswith(group):
                value = read(name, driver)
                weights[name.removeprefix(group)] = from_bytes(value.tobytes(), value.dtype.name,
                                                               value.shape)
            elif driver and name == "step":
                step = int(read(name, driver))
    except Exception as error:
        raise refuse("be a whole OCDBT checkpoint", f"{folder} ({error!s:.150})",
                     "copy it again") from error
    if not weights:
        raise refuse(f"hold {group[:-1]}", f"{folder} without", "add or leave out --raw, or "
                     + ANOTHER)
    return Source(weights, "a JAX state (OCDBT)", "raw" if raw else "averaged", step, jax=True)

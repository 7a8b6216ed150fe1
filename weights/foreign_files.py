"""Opens what other repositories saved, as data: PyTorch files, .safetensors, and the JAX states of
flax and orbax, one msgpack file or a folder of TensorStore's OCDBT format."""

import argparse
import math
import re
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch

from engine.checkpoint import SAFETENSORS, check_plain, read_safetensors
from engine.errors import BadValue
from engine.files import find_damage


def refusal(rule, content, remedy="give a checkpoint of MeanFlow, improved MeanFlow or SiT"):
    """The BadValue for a file or folder."""
    return BadValue(f"must {rule}, got {content:.300}; {remedy}")


class ForeignWeights(NamedTuple):
    """Tensors by name as they were saved, and what the file says of them."""

    tensors: dict
    path: Path | None = None
    has_checksums: bool = False  # which were compared
    about: str = "weights"  # for reports: averaged or raw, and of which step
    step: int | None = None
    args: dict | None = None  # the command line in a PyTorch training file
    config: dict | None = None  # in our own files
    jax: bool = False  # names and layouts are those of JAX, with dots in the path


def read_weights(path, *, raw=False):
    """The ForeignWeights of a file or folder: averaged, or the raw ones of a training file.
    Tensors of PyTorch files stay on disk until they are used. Raises BadValue."""
    path = find_checkpoint(Path(path))
    read = reader_of(path)
    try:
        state = read(path, "model" if raw else "ema")
    except ImportError as error:
        raise refusal("be a file that this Python can open", f"{path} without the {error.name} "
                      f"package", f"pip install {error.name}") from error
    except Exception as error:  # the unpickler and the libraries raise errors of many kinds
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise refusal("hold only tensors and plain values", f"{path}, which names {code[1]}, "
                          f"code that is not run", "save its state dict anew") from error
        raise refusal("be a whole file of PyTorch, safetensors, flax or orbax", f"{path} (torn, "
                      f"damaged or of another kind: {type(error).__name__} {error!s:.100})",
                      "copy it again, or unzip it if it is a zip of a folder") from error
    if not isinstance(state, dict):
        raise refusal("hold a dict of tensors", f"{path} with a {type(state).__name__}")
    weights = choose_weights(state, raw, path)
    checked = read is read_torch and zipfile.is_zipfile(path) or bool(weights.config)
    return weights._replace(path=path, has_checksums=checked,
                            jax=read in (read_msgpack, read_ocdbt))


def choose_weights(state, raw, path):
    """The ForeignWeights in a loaded dict: a training file's, or a bare state dict."""
    if not raw and not {"ema", "model"} & state.keys():
        return ForeignWeights(state)
    model, tensors = state.get("model"), state.get("model" if raw else "ema")
    if isinstance(model, dict) and "num_updates" in model:
        raise refusal("hold a DiT", f"{path}, a U-Net of py-meanflow")
    if not isinstance(tensors, dict) or not tensors:
        raise refusal(f"hold {'raw' if raw else 'averaged'} weights", f"{path} without them",
                      "leave --raw out" if raw else "add --raw for weights that are not averaged")
    about, step, args = "raw weights" if raw else "averaged weights", state.get("steps"), None
    step = step if type(step) is int and 0 <= step < 2**63 else None
    if step:
        about += f" of step {step}"
    try:
        if isinstance(state.get("args"), argparse.Namespace):
            args = vars(state["args"])
            check_plain(args)
        check_plain(state.get("config"))
    except ValueError as error:
        raise refusal("hold plain settings", f"{path} ({error})") from error
    return ForeignWeights(tensors, about=about, step=step, args=args, config=state.get("config"))


def find_checkpoint(path):
    """The file or OCDBT folder at path, which may be a folder of the newest one, checkpoint_N."""
    if path.is_file() or (path / "manifest.ocdbt").is_file():
        return path
    if (path / "checkpoint").is_file():
        return path / "checkpoint"
    numbered = [child for child in path.glob("checkpoint_*")
                if re.fullmatch(r"checkpoint_\d+", child.name)]  # not what orbax has not finished
    if not numbered:
        fault = "which has no finished one" if path.is_dir() else "which does not exist"
        raise refusal("be a checkpoint or a folder of checkpoints", f"{path}, {fault}",
                      "give a file, or the folder checkpoint_N of a JAX run")
    return find_checkpoint(max(numbered, key=lambda child: int(child.name.split("_")[1])))


def reader_of(path):
    """The function (path, "ema" or "model") -> dict that opens a file or folder of this format. The
    dict is a training file's, {"ema" or "model": tensors by name, ...}, or a bare state dict."""
    if path.is_dir():
        return read_ocdbt
    with open(path, "rb") as file:
        start = file.read(9)
    # .safetensors opens with the length of its header and {, a msgpack map with its own length
    if start[8:] == b"{" or path.suffix == SAFETENSORS:
        return read_safetensors_file
    if start and (0x81 <= start[0] <= 0x8f or start[0] in (0xde, 0xdf)):
        return read_msgpack
    return read_torch


def read_torch(path, _):
    """What torch.save wrote."""
    zipped = zipfile.is_zipfile(path)  # files of before PyTorch 1.6 are not, and cannot be mapped
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the line on stderr says it
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    if zipped and (damage := find_damage(path, mapped=True)):  # torch.load compares no checksums
        raise ValueError(damage)
    return state


def read_safetensors_file(path, _):
    """A .safetensors file, ours with a config or bare."""
    tensors, config, _ = read_safetensors(path)
    return {"ema": tensors, "config": config} if config else tensors


def read_msgpack(path, group):
    """A JAX state in one msgpack file, of flax or old orbax, with one group of its weights."""
    import msgpack

    def array(code, data):
        if code != 1:  # flax's number for an array
            return None
        shape, dtype, content = msgpack.unpackb(data)
        return from_bytes(content, dtype, shape)

    state = {group: None}
    with open(path, "rb") as file:
        stream = msgpack.Unpacker(file, ext_hook=array, strict_map_key=False,
                                  max_buffer_size=2**31 - 1)
        for _ in range(stream.read_map_header()):
            key = stream.unpack()
            if key == JAX_GROUPS[group]:
                state[group] = flatten(stream.unpack())
            elif key == "step":
                state["steps"] = int(stream.unpack())
            else:
                stream.skip()
    return state


JAX_GROUPS = {"ema": "ema_params", "model": "params"}


def flatten(tree, prefix=""):
    """{path: tensor} of nested dicts, whose arrays flax cuts into chunks above 2^30 bytes."""
    tensors = {}
    for name, value in tree.items():
        if isinstance(value, dict) and "__msgpack_chunked_array__" in value:
            chunks, shape = ([value[key][str(i)] for i in range(len(value[key]))]
                             for key in ("chunks", "shape"))
            tensors[prefix + name] = torch.cat(chunks).reshape(shape)
        elif isinstance(value, dict):
            tensors |= flatten(value, f"{prefix}{name}.")
        else:
            tensors[prefix + name] = value
    return tensors


def from_bytes(content, dtype, shape):
    """The tensor of little-endian bytes; dtype: its name, shape: such as (96, 256)."""
    return torch.frombuffer(bytearray(content), dtype=getattr(torch, dtype)).reshape(shape)


def read_ocdbt(folder, group):
    """A JAX state in TensorStore's OCDBT format, as newer orbax writes it; as read_msgpack."""
    import tensorstore
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder.resolve()}/"}}
    prefix, state = JAX_GROUPS[group] + ".", {group: {}}
    # Bytes. Arrays of zeros take none in the files; but TensorStore aborts where memory is short
    left = 100 * sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    for key in tensorstore.KvStore.open(store).result().list().result():
        name, _, file = key.decode().rpartition("/")
        driver = {".zarray": "zarr", "zarr.json": "zarr3"}.get(file)
        if driver and (name == "step" or name.startswith(prefix)):
            spec = {"driver": driver, "kvstore": {**store, "path": f"{name}/"}}
            array = tensorstore.open(spec).result()
            shapes = array.shape, array.chunk_layout.read_chunk.shape or ()
            left -= math.prod(array.shape) * array.dtype.numpy_dtype.itemsize
            if max(map(math.prod, shapes)) > left:
                raise ValueError(f"{name:.60} with shape and chunk {shapes!s:.90} is larger than "
                                 f"the files")
            value = array.read().result()
            if name == "step":
                state["steps"] = int(value)
            else:
                state[group][name.removeprefix(prefix)] = from_bytes(
                    value.tobytes(), value.dtype.name, value.shape)
    return state

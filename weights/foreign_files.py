"""Opens what other repositories saved, as data: PyTorch files, .safetensors, and the JAX states of
flax and orbax, one msgpack file or a folder of TensorStore's OCDBT format."""

import argparse
import json
import math
import re
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch

from engine.checkpoint import SAFETENSORS, is_step, read_safetensors
from engine.errors import BadValue
from engine.files import find_damage, sha256, utf8_path

# In a folder that convert_checkpoint.py --format diffusers writes
DIFFUSERS_WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def refusal(rule, content,
            remedy="give a checkpoint of MeanFlow, improved MeanFlow, SoFlow, SiT or REPA"):
    """The BadValue for a file or folder."""
    return BadValue(f"must {rule}, got {content:.300}; {remedy}")


class ForeignWeights(NamedTuple):
    """Tensors by name as they were saved, and what the file says of them."""

    tensors: dict
    about: str = "weights"  # for reports: averaged or raw, and of which step
    step: int | None = None
    args: dict | None = None  # the command line in a PyTorch training file
    config: dict | None = None  # in our own files
    jax: bool = False  # names and layouts are those of JAX, with dots in the path
    origin: str = ""  # for reports: path, SHA-256, and whether damage would have been seen


def read_weights(path, *, raw=False):
    """The ForeignWeights of a file or folder: averaged, or the raw ones of a training file.
    Tensors of PyTorch files stay on disk until they are used. Raises BadValue."""
    path = find_checkpoint(Path(path))
    read, digest = reader_of(path), sha256(path)
    blob = path.resolve()  # Hugging Face's cache names a file by its SHA-256
    if path.is_file() and re.fullmatch("[0-9a-f]{64}", blob.name) and blob.name != digest:
        raise refusal("be whole", f"{blob}, whose SHA-256 is {digest}", "remove it")
    try:
        with warnings.catch_warnings():  # the line on stderr says it
            warnings.simplefilter("ignore")
            state = read(path, "model" if raw else "ema")
    except ImportError as error:
        raise refusal("be a file that this Python can open", f"{path} without the {error.name} "
                      f"package", f"pip install {error.name}") from error
    except Exception as error:  # the unpickler and the libraries raise errors of many kinds
        if code := code_in(error):
            raise refusal("hold only tensors and plain values", f"{path}, which names {code}, "
                          f"code that is not run", "save its state dict anew") from error
        raise refusal("be a whole file of PyTorch, safetensors, flax or orbax", f"{path} (torn, "
                      f"damaged or of another kind: {type(error).__name__} {error!s:.100})",
                      "copy it again, or unzip it if it is a zip of a folder") from error
    if not isinstance(state, dict):
        raise refusal("hold a dict of tensors", f"{path} with a {type(state).__name__}")
    origin = f"read: {path}, SHA-256 {digest}"
    if not (zipfile.is_zipfile(path) if read is read_torch else state.get("config")):
        origin += "\nthat format has no checksum: compare the SHA-256 with its owner's"
    return choose_weights(state, raw, path)._replace(jax=read in (read_msgpack, read_ocdbt),
                                                     origin=origin)


def code_in(error):
    """The code that a file names, by torch.load's error, or None."""
    code = re.search(r"GLOBAL (\S+)", str(error))
    return code and code[1]


def choose_weights(state, raw, path):
    """The ForeignWeights in a loaded dict: a training file's, or a bare state dict."""
    if not raw and not {"ema", "ema_model", "model"} & state.keys():
        return ForeignWeights(state)
    model, tensors = state.get("model"), state.get("model" if raw else "ema")
    if not raw and tensors is None:
        tensors = state.get("ema_model")  # SoFlow's name
    if isinstance(model, dict) and "num_updates" in model:
        raise refusal("hold a DiT", f"{path}, a U-Net of py-meanflow")
    if not isinstance(tensors, dict) or not tensors:
        raise refusal(f"hold {'raw' if raw else 'averaged'} weights", f"{path} without them",
                      "leave --raw out" if raw else "add --raw for weights that are not averaged")
    about, args = "raw weights" if raw else "averaged weights", None
    step = state.get("step" if "config" in state else
                     "finished_steps" if "finished_steps" in state else "steps")
    if step is not None and not is_step(step):
        raise refusal("hold a count of steps", f"{path}, whose step is no whole number")
    if step:
        about += f" of step {step}"
    if isinstance(state.get("args"), argparse.Namespace):  # other values may be of any size
        args = {name: value for name, value in vars(state["args"]).items()
                if isinstance(value, str | int | float)}
    return ForeignWeights(tensors, about, step, args, state.get("config"))


def find_checkpoint(path):
    """The file or OCDBT folder at path, which may be a folder of the newest one, checkpoint_N, or a
    folder for diffusers."""
    if (path / "model_index.json").is_file():
        return path / DIFFUSERS_WEIGHTS
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
    if zipped and (damage := find_damage(path, mapped=True)):  # torch.load compares no checksums
        raise ValueError(damage)
    with torch.serialization.safe_globals([argparse.Namespace]), utf8_path(path) as name:
        return torch.load(name, map_location="cpu", weights_only=True, mmap=zipped)


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


ZEROS, COMPRESSION = 2**30, 100  # bytes that a folder may leave out, and that one byte becomes
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
    files = tensorstore.KvStore.open(store).result()
    prefix, state, drivers, arrays = JAX_GROUPS[group] + ".", {group: {}}, {}, []
    for key in files.list().result():
        name, _, file = key.decode().rpartition("/")
        driver = {".zarray": "zarr", "zarr.json": "zarr3"}.get(file)
        if driver and (name == "step" or name.startswith(prefix)):
            drivers[name] = driver
            arrays.append(json.loads(files.read(key).result().value))
    check_claims(folder, arrays)
    for name, driver in drivers.items():
        spec = {"driver": driver, "kvstore": {**store, "path": f"{name}/"}}
        value = tensorstore.open(spec).result().read().result()
        if name == "step":
            state["steps"] = int(value)
        else:
            state[group][name.removeprefix(prefix)] = from_bytes(
                value.tobytes(), value.dtype.name, value.shape)
    return state


def check_claims(folder, arrays):
    """Raises errors of many kinds where zarr's metadata claim other things than numbers, or far
    more than the folder has: TensorStore would allocate them, and end the process if it cannot."""
    claimed = 0
    for array in arrays:
        kind = array["dtype"] if "dtype" in array else array["data_type"]
        if not isinstance(kind, str) or not re.fullmatch(r"[<>|]?[a-z]{1,6}[0-9]{1,2}", kind):
            raise ValueError(f"an array of {kind!s:.40}")
        chunk = (array["chunks"] if "chunks" in array else
                 array["chunk_grid"]["configuration"]["chunk_shape"])
        claimed += 8 * max(math.prod(abs(int(size)) for size in sizes)
                           for sizes in (array["shape"], chunk))
    if claimed > ZEROS + COMPRESSION * sum(file.stat().st_size for file in folder.rglob("*")):
        raise ValueError(f"arrays that claim {claimed:.1e} bytes")

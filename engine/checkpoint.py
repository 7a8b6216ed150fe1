"""Checkpoints: written whole or not at all, opened as data, found again after any crash.

A checkpoint is a file of tensors and plain values, {"step", "model", "ema", "opt", "config"}:
<run-dir>/checkpoints/0050000.pt. Or a .safetensors file: its tensors are "ema", its metadata hold
config as JSON, step, and the SHA-256 of all, as the format has no checksum.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import sys
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import torch
from torch.utils._pytree import tree_map_only

from engine.errors import BadValue, one_line
from engine.files import atomic_file, find_damage, utf8_path
from engine.optimizer import check_state
from engine.sharding import full_tensor, shard_like
from methods import method_of
from models import build

KEYS = ("step", "model", "ema", "opt", "config")
SAFETENSORS = ".safetensors"
SAVE_TIMEOUT_S = 300  # for the checkpoint in progress at an early end; torchrun may kill sooner
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # not float8: it is scaled
SCALES = 1e-6, 1e6  # of a plausible scale or std: beyond them images have one colour
CONFIG_DEPTH, CONFIG_SIZE = 50, 2**22  # of nested values, and of characters and values, at most
TEXT = 4096  # characters of a name, at most: a path's length
REMEDY = "give a checkpoint that train.py wrote, or convert it with convert_checkpoint.py"


def save_checkpoint(path, state, *, keep_last=0):
    """Write a checkpoint, by its suffix as .safetensors (ema, step and config) or whole; then, if
    keep_last > 0, remove all but the newest so many. Raises UserError if it cannot be written."""
    path = Path(path)
    write = _write_safetensors if path.suffix == SAFETENSORS else torch.save
    with atomic_file(path) as temporary:
        try:
            write(state, temporary)
        except RuntimeError as error:  # what PyTorch raises where the disk is full
            raise OSError(str(error).splitlines()[0]) from error
    if keep_last:  # later checkpoints are damaged, as this run resumed from an older one
        until = [old for old in list_checkpoints(path.parent) if int(old.stem) <= int(path.stem)]
        for old in until[keep_last:]:
            with contextlib.suppress(OSError):
                old.unlink()


def _write_safetensors(state, path):
    from safetensors.torch import save

    tensors, seen = {}, set()
    for name, value in state["ema"].items():
        value = value.detach().contiguous()
        place = value.untyped_storage().data_ptr()
        tensors[name] = value.clone() if place in seen else value  # the format has no shared memory
        seen.add(place)
    metadata = {"format": "pt", "config": json.dumps(state["config"]), "step": str(state["step"])}
    path.write_bytes(save(tensors, metadata | {"sha256": _digest(tensors, metadata)}))


def _digest(tensors, metadata):
    text = f"{fingerprint(tensors)} {metadata['step']} {metadata['config']}"
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(tensors):
    """SHA-256, in hex, of a dict of tensors by name, of any shapes, taken as float32."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()


class Saver(contextlib.AbstractContextManager):
    """Writes a run's checkpoints in a thread, from a copy of the state, one at a time.

    lock: of the run's folder. before_write: called before each write. Leaving ``with`` waits for
    the write in progress.
    """

    def __init__(self, folder, keep_last, *, lock=None, before_write=lambda: None):
        self.folder, self.keep_last = Path(folder), keep_last
        self.lock, self.before_write = lock, before_write
        self.path = None  # of the last checkpoint
        self.thread, self.job = concurrent.futures.ThreadPoolExecutor(1), None

    def save(self, state):
        """Copy the state, sharded tensors in full, and start to write it. Raises earlier errors."""
        self.raise_errors(wait=True)
        self.path = self.folder / f"{state['step']:07d}.pt"
        self.job = self.thread.submit(self._write, self.path, tree_map_only(
            torch.Tensor, lambda t: full_tensor(t.detach()).to("cpu", copy=True), state))

    def _write(self, path, state):
        self.before_write()
        save_checkpoint(path, state, keep_last=self.keep_last)

    def raise_errors(self, *, wait=False):
        """Raises UserError if the last checkpoint could not be written, RunError if the folder is
        no longer this run's. wait: for the end of a write in progress, else passed over."""
        if self.job and wait:
            concurrent.futures.wait([self.job])
        if self.lock:  # before the error of a write, which may have come of a lost folder
            self.lock.raise_if_lost()
        if self.job and self.job.done():
            self.job.result()

    def finish_writing(self):
        """Wait for the write in progress, before an early end of the process."""
        if self.job:
            concurrent.futures.wait([self.job], timeout=SAVE_TIMEOUT_S)

    def __exit__(self, *_):
        self.thread.shutdown()


# ---- reading -------------------------------------------------------------------------------


def list_checkpoints(folder):
    """The checkpoints of a folder, newest first; files of other names are not ours."""
    paths = [path for path in Path(folder).glob("*.pt") if path.stem.isdecimal()]
    return sorted(paths, key=lambda path: int(path.stem), reverse=True)


def load_checkpoint(path, *, verify=False):
    """A checkpoint's dict, on the CPU, its tensors memory-mapped from the file.

    Of a .safetensors file model is ema, and opt is None. verify: compare every byte with the
    file's checksums. The config is as JSON gives it back. Raises BadValue for a missing, torn,
    damaged or foreign file.
    """
    state = _open(Path(path), verify)
    with _fitting(path):
        if not is_step(state["step"]):
            raise ValueError("its step is no whole number")
        return state | {"config": plain_config(state["config"])}


def _open(path, verify):
    """load_checkpoint's dict, whatever its step and config are. Raises BadValue."""
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no such file"
        inside = (*list_checkpoints(path / "checkpoints"), *list_checkpoints(path),
                  *path.glob(f"transformer/*{SAFETENSORS}"))  # in a folder for diffusers
        remedy = f"did you mean {inside[0]}?" if inside else REMEDY
        raise BadValue(f"must be a checkpoint file, got {path} ({kind}); {remedy}")
    try:
        with warnings.catch_warnings():  # of odd kinds of tensors: one line says it
            warnings.simplefilter("ignore")
            state = _read(path, verify)
    except Exception as error:  # the unpickler and the archive raise errors of many kinds
        raise BadValue(f"must be a checkpoint file, got {path} (torn, damaged or not opened as "
                       f"data: {type(error).__name__} {error!s:.100}); {REMEDY}") from error
    if not isinstance(state, dict) or any(key not in state for key in KEYS):
        raise BadValue(f"must hold {', '.join(KEYS)}, got {path} (a foreign file); {REMEDY}")
    return state


def _read(path, verify):
    """The file's content: load_checkpoint's dict, unless the file is foreign."""
    if path.suffix == SAFETENSORS:
        weights, config, step = read_safetensors(path)
        return config and {"step": step, "model": weights, "ema": weights, "opt": None,
                           "config": config}
    if verify and zipfile.is_zipfile(path) and (damage := find_damage(path, mapped=True)):
        raise ValueError(f"damaged: {damage}")
    with utf8_path(path) as name:
        return torch.load(name, map_location="cpu", weights_only=True, mmap=True)


def read_safetensors(path):
    """(tensors by name, config, step) of a .safetensors file; a foreign one has no config and step.
    Raises ValueError for damaged bytes, and errors of many kinds for a torn file."""
    from safetensors import safe_open

    with utf8_path(path) as name, safe_open(name, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    if not metadata.keys() >= {"config", "step", "sha256"}:
        return tensors, None, None
    if _digest(tensors, metadata) != metadata["sha256"]:
        raise ValueError("damaged: its SHA-256 is not the one that it records")
    if not is_step(step := int(metadata["step"])):
        raise ValueError("its step is no whole number")
    return tensors, json.loads(metadata["config"]), step


def is_step(value):
    """Whether a value of a file is a count of steps: also not NaN, True or a tensor."""
    return type(value) is int and 0 <= value < 2**63


def plain_config(config):
    """A config as JSON gives it back. Raises ValueError for one too deep or too large to be printed
    (of shared parts a small file holds any amount), and TypeError for what JSON cannot hold."""
    if not isinstance(config, dict):
        raise ValueError(f"config is a {type(config).__name__}")
    level, size = [config], 0
    for _ in range(CONFIG_DEPTH):
        size += sum(len(value) for value in level if isinstance(value, str | list | tuple | dict))
        if size > CONFIG_SIZE:
            break
        level = [part for value in level if isinstance(value, list | tuple | dict)
                 for part in ((*value, *value.values()) if isinstance(value, dict) else value)]
        if not level:
            return json.loads(json.dumps(config))
    raise ValueError("config is too deep or too large")


def newest_checkpoint(folder):
    """The path of a folder's newest undamaged checkpoint, or None if it has no checkpoints. Raises
    BadValue if all are damaged: a run from the start would replace them."""
    paths = list_checkpoints(folder)
    for path in paths:
        try:
            _open(path, verify=True)
            return path
        except BadValue:
            print(f"passing over {path}, which is torn or damaged", file=sys.stderr)
    if paths:
        raise BadValue(f"must hold an undamaged checkpoint, got none in {folder}; restore one or "
                       f"choose another folder")
    return None


def network_of(state, name):
    """The network of a checkpoint of this name, with its EMA weights. Raises BadValue."""
    with _fitting(name):
        config, weights = state["config"], to_float32(state["ema"])
        check_network(config, weights)
        net = build(config)
        net.load_state_dict(weights)
    return net.eval().requires_grad_(False)


def load_network(path):
    """(network with the EMA weights, config) of a checkpoint file. Raises BadValue."""
    state = load_checkpoint(path)
    return network_of(state, path), state["config"]


def to_float32(tensors):
    """The tensors of a file in float32, contiguous, without gradient; names may share one. Raises
    ValueError unless all are finite floats and the file holds each of their numbers."""
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise ValueError("the weights are no dict of tensors by name")
    floats, views, claimed = {}, {}, Counter()
    for name, value in tensors.items():
        kind = getattr(value, "dtype", type(value).__name__)
        if (type(value) not in (torch.Tensor, torch.nn.Parameter) or kind not in FLOATS
                or value.is_meta or value.layout != torch.strided):
            raise ValueError(f"{name:.100} is of {kind}, quantised, sparse or no tensor")
        storage = value.untyped_storage()
        place = storage.data_ptr()
        view = place, value.storage_offset(), value.shape, value.stride(), kind
        if view not in views:
            claimed[place] += value.nbytes
            if claimed[place] > storage.nbytes():  # a stride of 0 makes any amount of one number
                raise ValueError(f"{name:.100} has more numbers than the file")
            views[view] = value.detach().float().contiguous()
            if not views[view].isfinite().all():
                raise ValueError(f"{name:.100} is not finite in float32")
        floats[name] = views[view]
    return floats


def check_network(config, weights):
    """Raises errors of many kinds unless these weights, of to_float32, are those of the network
    that the config describes, and sampling can use its fields."""
    check_fields(config, weights)
    with torch.device("meta"):  # takes no memory, whatever the sizes
        net = build(config)
        net.load_state_dict(weights, assign=True)
    method_of(config, net)


def check_fields(config, weights):
    """Raises ValueError, KeyError or TypeError for a field that sampling cannot use, and for sizes
    beyond those of the weights, which would take any amount of memory."""
    for name, kind in {"model": str, "vae": str, "image_size": int, "num_classes": int,
                       "latent_shape": list, "scale": (float, int)}.items():
        if not isinstance(config[name], kind) or isinstance(config[name], bool):
            raise ValueError(f"{name} is {config[name]!s:.60}")
    channels, *sides = config["latent_shape"]
    classes, count = config.get("classes"), config["num_classes"]
    scaled = config.keys() & {"latent_mean", "latent_std"}
    rules = {
        "vae": len(config["vae"]) <= TEXT,
        "latent_shape": all(type(side) is int for side in (channels, *sides)),
        "image_size": 1 <= config["image_size"] <= 2**16,
        "scale": _are_numbers([config["scale"]], 1, *SCALES),
        "latent_mean": not scaled or _are_numbers(config.get("latent_mean"), channels),
        "latent_std": not scaled or _are_numbers(config.get("latent_std"), channels, *SCALES),
        "omega_max": _are_numbers([config.get("omega_max") or 1], 1, 1, float("inf")),
        "classes": not classes or isinstance(classes, list) and len(classes) == count
        and all(isinstance(name, str | int) and len(str(name)) <= TEXT for name in classes)}
    if wrong := [name for name, right in rules.items() if not right]:
        raise ValueError(f"{wrong[0]} is {config.get(wrong[0])!s:.60}")
    largest = max([len(weights), *(tensor.numel() for tensor in weights.values())])
    sizes = {"num_classes": count, "channels": channels} | {
        f"side {i}": side for i, side in enumerate(sides)}
    for name, size in (sizes | (config.get("sizes") or {})).items():
        least, most = int(name in sizes), len(weights) if "depth" in name else largest
        if not least <= size <= most:
            raise ValueError(f"{name} is {size!s:.60}")


def _are_numbers(values, count, least=-1e6, most=1e6):
    """Whether values are a list of so many finite numbers, from least to most."""
    return isinstance(values, list) and len(values) == count and all(
        type(value) in (int, float) and least <= value <= most for value in values)


@contextlib.contextmanager
def _fitting(name):
    """Turns any error that a hostile or foreign checkpoint causes within into a BadValue."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise BadValue(f"must hold weights that fit its config, got {name} ({one_line(error)}); "
                       f"{REMEDY}") from error


# ---- continuing a run ----------------------------------------------------------------------


def restore_checkpoint(path, net, ema, optimizer):
    """Load a checkpoint into network, EMA and optimiser; returns its step. Raises BadValue."""
    state = load_checkpoint(path)
    with _fitting(path):
        if not state["step"]:
            raise ValueError("step 0")
        _load(net, state["model"])
        _load(ema, state["ema"])
        _restore_moments(optimizer, state["opt"]["state"])
    return state["step"]


def _load(net, tensors):
    """net.load_state_dict(tensors); a sharded network takes this rank's rows of them."""
    ours = net.state_dict()
    net.load_state_dict({name: shard_like(tensor, ours.get(name))
                         for name, tensor in tensors.items()})


def _restore_moments(optimizer, moments):
    """The optimiser's state by parameter number. Its settings stay: check_config has compared
    them."""
    check_state(optimizer, moments)  # load_state_dict would take any shapes
    params = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {i: {name: shard_like(value, params[i]) if _is_like(value, params[i]) else value
                   for name, value in state.items()} for i, state in moments.items()}
    optimizer.load_state_dict(
        {"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    for state in optimizer.state.values():  # on a CPU these still are the mapped file
        state.update({name: value.clone() for name, value in state.items()
                      if isinstance(value, torch.Tensor)})


def _is_like(value, p):
    return isinstance(value, torch.Tensor) and value.shape == p.shape and value.ndim > 0


def check_config(folder, config, *, defaults, may_change):
    """The config of the run in a directory, this config if it is new. Raises BadValue if it is of
    another run.

    defaults: values of options that a stored config lacks. may_change: names of the options that
    may change when a run continues; before the first checkpoint all may.
    """
    path, begun = Path(folder) / "config.json", bool(list_checkpoints(Path(folder) / "checkpoints"))
    if not begun and not path.exists():
        return config
    try:
        stored = defaults | json.loads(path.read_text())
        foreign = not config.keys() <= stored.keys()
        changed = differences(stored, config, may_change)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise BadValue(f"must hold a readable config.json, got {path} ({error!s:.200}); choose "
                       f"another folder") from error
    if changed and (begun or foreign):
        raise BadValue(f"must be a run of the same options, got {folder} ({changed}); give another "
                       f"--run-dir or the run's own options")
    return stored


def differences(stored, present, may_change=()):
    """Lists the settings whose values differ, as "lr 0.1, now 0.2"; "" if none differ."""
    return "; ".join(f"{name:.60} {stored.get(name)!s:.60}, now {present.get(name)!s:.60}"
                     for name in sorted(stored.keys() | present.keys())
                     if name not in may_change and stored.get(name) != present.get(name))

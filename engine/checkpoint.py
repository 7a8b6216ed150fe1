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
from pathlib import Path

import torch
from torch.utils._pytree import tree_map_only

from engine.errors import BadValue
from engine.files import atomic_file, find_damage
from engine.sharding import full_tensor, shard_like
from models import build

KEYS = ("step", "model", "ema", "opt", "config")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # not float8: it is scaled
MOST_VALUES = 10**6  # in a config: labels of a million classes
SAFETENSORS = ".safetensors"
SAVE_TIMEOUT_S = 300  # for the checkpoint in progress at an early end; torchrun may kill sooner
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

    tensors, stored = {}, set()
    for name, value in state["ema"].items():
        value = value.detach().contiguous()
        place = value.untyped_storage().data_ptr()
        tensors[name] = value.clone() if place in stored else value  # the format shares no memory
        stored.add(place)
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
    file's checksums. Raises BadValue for a missing, torn, damaged or foreign file.
    """
    path = Path(path)
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no such file"
        inside = (*list_checkpoints(path / "checkpoints"), *list_checkpoints(path))
        remedy = f"did you mean {inside[0]}?" if inside else REMEDY
        raise BadValue(f"must be a checkpoint file, got {path} ({kind}); {remedy}")
    try:
        state = _read(path, verify)
        if isinstance(state, dict):
            check_plain([state.get("config"), state.get("step")])
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sparse tensors, which are refused
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def read_safetensors(path):
    """(tensors by name, config, step) of a .safetensors file; a foreign one has no config and step.
    Raises ValueError for damaged bytes, and errors of many kinds for a torn file."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    if not metadata.keys() >= {"config", "step", "sha256"}:
        return tensors, None, None
    if _digest(tensors, metadata) != metadata["sha256"]:
        raise ValueError("damaged: its SHA-256 is not the one that it records")
    return tensors, json.loads(metadata["config"]), int(metadata["step"])


def newest_checkpoint(folder):
    """The path of a folder's newest undamaged checkpoint, or None if it has no checkpoints. Raises
    BadValue if all are damaged: a run from the start would replace them."""
    paths = list_checkpoints(folder)
    for path in paths:
        try:
            load_checkpoint(path, verify=True)
            return path
        except BadValue:
            print(f"passing over {path}, which is torn or damaged", file=sys.stderr)
    if paths:
        raise BadValue(f"must hold an undamaged checkpoint, got none in {folder}; restore one or "
                       f"choose another folder")
    return None


def network_of(state, name):
    """The network of a checkpoint of this name, with its EMA weights. Raises BadValue."""
    config, weights = state["config"], state["ema"]
    with _fitting(name):
        check_weights(weights)
        check_fields(config, weights)
        net = build(config)
        net.load_state_dict(weights)
    return net.eval().requires_grad_(False)


def load_network(path):
    """(network with the EMA weights, config) of a checkpoint file. Raises BadValue."""
    state = load_checkpoint(path)
    return network_of(state, path), state["config"]


def check_plain(value):
    """Raises ValueError for a value of too many parts, or too deep: to print lists that hold each
    other many times would take any amount of memory."""
    waiting, count = [(value, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        count += 1 + (len(value) if isinstance(value, str | bytes) else 0) // 1000
        inside = [*value, *value.values()] if isinstance(value, dict) else (
            value if isinstance(value, list | tuple) else [])
        if count + len(waiting) + len(inside) > MOST_VALUES or depth > 50:
            raise ValueError("a config that is too large or too deep")
        waiting += [(each, depth + 1) for each in inside]


def check_weights(weights):
    """Raises ValueError unless these are tensors of floats by name, finite in float32, that are in
    the file: of a view that repeats one number, memory would hold any amount."""
    stored = {}
    for name, value in weights.items():
        kind = getattr(value, "dtype", type(value).__name__)
        if kind not in FLOATS or (value.layout, value.device.type) != (torch.strided, "cpu"):
            raise ValueError(f"{name!s:.60} is of {kind}, quantised, sparse or no tensor")
        storage = value.untyped_storage()
        stored[storage.data_ptr()] = storage.nbytes()
        if value.nbytes > storage.nbytes():
            raise ValueError(f"{name!s:.60} repeats {storage.nbytes()} bytes to {value.nbytes}")
        if not value.float().isfinite().all():
            raise ValueError(f"{name!s:.60} is not finite in float32")
    if sum(value.nbytes for value in weights.values()) > 2 * sum(stored.values()):
        raise ValueError("many names share the same numbers")  # two may: weights that are tied


def check_fields(config, weights):
    """Raises errors of many kinds for a field that sampling cannot use, and unless the network fits
    the weights, before it takes any amount of memory."""
    for name, kind in {"model": str, "vae": str, "image_size": int, "num_classes": int,
                       "latent_shape": list, "scale": (float, int)}.items():
        if not isinstance(config[name], kind) or isinstance(config[name], bool):
            raise ValueError(f"{name} is {config[name]!s:.60}")
    channels, height, width = config["latent_shape"]
    numbers = [config["scale"], config.get("omega_max") or 1]
    if {"latent_mean", "latent_std"} & config.keys():
        if not len(config["latent_mean"]) == len(config["latent_std"]) == channels:
            raise ValueError("latent_mean or latent_std is not of one number a channel")
        numbers += [*config["latent_std"], *(1 + abs(mean) for mean in config["latent_mean"])]
    if not all(1e-6 <= number <= 1e6 for number in numbers):  # beyond, images have one colour
        raise ValueError(f"scale, omega_max, latent_mean or latent_std is of {numbers!s:.60}")
    classes = config.get("classes")
    if classes and (len(classes) != config["num_classes"]
                    or not all(isinstance(name, str) for name in classes)):
        raise ValueError(f"classes are {len(classes)} of {config['num_classes']}, or no names")
    if height != width:
        raise ValueError(f"latent_shape is {config['latent_shape']!s:.60}")
    largest = max(len(weights), *(tensor.numel() for tensor in weights.values()))
    sizes = {"num_classes": config["num_classes"], "latent_shape": height}
    for name, size in (sizes | (config.get("sizes") or {})).items():
        if not 0 <= size <= (len(weights) if "depth" in name else largest):
            raise ValueError(f"{name} is {size!s:.60}")
    with torch.device("meta"):
        build(config).load_state_dict({name: value.to("meta") for name, value in weights.items()})


@contextlib.contextmanager
def _fitting(name):
    """Turns any error that a hostile or foreign checkpoint causes within into a BadValue."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadValue(f"must hold weights that fit its config, got {name} ({reason:.200}); "
                       f"{REMEDY}") from error


# ---- continuing a run ----------------------------------------------------------------------


def restore_checkpoint(path, net, ema, optimizer):
    """Load a checkpoint into network, EMA and optimiser; returns its step. Raises BadValue."""
    state = load_checkpoint(path)
    with _fitting(path):
        if type(state["step"]) is not int or not 0 < state["step"] < 2**63:
            raise ValueError(f"step {state['step']!s:.60}")
        _load(net, state["model"])
        _load(ema, state["ema"])
        _restore_moments(optimizer, state["opt"]["state"], list(net.parameters()))
    return state["step"]


def _load(net, tensors):
    """net.load_state_dict(tensors); a sharded network takes this rank's rows of them."""
    ours = net.state_dict()
    net.load_state_dict({name: shard_like(tensor, ours.get(name))
                         for name, tensor in tensors.items()})


def _restore_moments(optimizer, moments, params):
    """AdamW's state by parameter number. Its settings stay: check_config has compared them."""
    shapes = {i: {name: value.shape for name, value in state.items()}
              for i, state in moments.items()}
    if shapes != {i: {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}
                  for i, p in enumerate(params)}:  # load_state_dict would take any shapes
        raise ValueError("the optimiser's state is of another network")
    moments = {i: {name: value if name == "step" else shard_like(value, params[i])
                   for name, value in state.items()} for i, state in moments.items()}
    optimizer.load_state_dict(
        {"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    for state in optimizer.state.values():  # on a CPU these still are the mapped file
        state.update({name: value.clone() for name, value in state.items()})


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

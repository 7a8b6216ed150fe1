"""Checkpoints: written whole or not at all, opened as data, found again after any crash.

A checkpoint is one file of tensors and plain values, {"step", "model", "ema", "opt", "config"},
from which training continues and sampling starts: <run-dir>/checkpoints/0050000.pt.

A .safetensors file is a checkpoint, too. Its tensors are the averaged weights, "ema". Its metadata
hold config as JSON, step, and the SHA-256 of all of these, as the format itself has no checksum.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import re
import sys
import zipfile
from pathlib import Path

import torch

from engine.distributed import full_tensor, shard_like
from engine.files import atomic_file, find_damage
from engine.options import UserError
from models import build, describe

KEYS = ("step", "model", "ema", "opt", "config")
SAFETENSORS = ".safetensors"
REMEDY = ("give a checkpoint that train.py wrote, or convert it first: python "
          "convert_checkpoint.py --in FILE --out CONVERTED.pt")

# ---- writing -------------------------------------------------------------------------------


def save_checkpoint(path, state, *, keep_last=0):
    """Write a checkpoint; then, if keep_last > 0, remove all but the newest so many.

    The suffix .safetensors chooses that format, which keeps ema, step and config alone. Raises
    UserError if the disk is full or the folder cannot be written.
    """
    path = Path(path)
    write = _write_safetensors if path.suffix == SAFETENSORS else torch.save
    with atomic_file(path) as temporary:
        try:
            write(state, temporary)
        except RuntimeError as error:  # what PyTorch raises where the disk is full
            raise OSError(str(error).splitlines()[0]) from error
    if keep_last:
        # Later checkpoints are damaged, as this run resumed from an older one: do not count them
        until = [old for old in list_checkpoints(path.parent) if int(old.stem) <= int(path.stem)]
        for old in until[keep_last:]:
            with contextlib.suppress(OSError):
                old.unlink()


def _write_safetensors(state, path):
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: value.contiguous() for name, value in state["ema"].items()}
    config, step = json.dumps(state["config"]), str(state["step"])
    path.touch()
    mode = path.stat().st_mode  # save_file would leave the file to its owner alone
    try:
        save_file(tensors, path, metadata={"format": "pt", "config": config, "step": step,
                                           "sha256": _digest(tensors, config, step)})
        path.chmod(mode)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _digest(tensors, config, step):
    return hashlib.sha256(f"{fingerprint(tensors)} {step} {config}".encode()).hexdigest()


class Saver:
    """Writes a run's checkpoints in a thread, from a copy of the state, one at a time.

    lock: the FolderLock of the run's folder. before: called before each write, for what must be on
    disk earlier. Leaving ``with`` waits for the write in progress, also after an error.
    """

    def __init__(self, folder, keep_last, *, lock=None, before=lambda: None):
        self.folder, self.keep_last, self.lock, self.before = folder, keep_last, lock, before
        self.path = None  # of the last checkpoint
        self.thread, self.job = concurrent.futures.ThreadPoolExecutor(1), None

    def __enter__(self):
        return self

    def save(self, state):
        """Copy the state and start to write it. Raises as ``check`` does."""
        self.check(wait=True)
        self.path = Path(self.folder) / f"{state['step']:07d}.pt"
        self.job = self.thread.submit(self._write, self.path, _copy(state))

    def _write(self, path, state):
        self.before()
        save_checkpoint(path, state, keep_last=self.keep_last)

    def check(self, *, wait=False):
        """Raises UserError if the last checkpoint could not be written, RunError if the folder is
        no longer this run's. wait: wait for the end of a write in progress; otherwise skip it."""
        if self.lock:
            self.lock.check()
        if self.job and (wait or self.job.done()):
            self.job.result()

    @property
    def writing(self):
        return self.job is not None and not self.job.done()

    def wait(self, seconds):
        """Wait, no longer than so many seconds, for the write in progress; raises no errors."""
        concurrent.futures.wait([self.job], timeout=seconds)

    def close(self):
        self.check(wait=True)

    def __exit__(self, *_):
        self.thread.shutdown()


def _copy(value):
    """Dicts and lists with their tensors copied to the CPU, one by one; sharded ones in full."""
    if isinstance(value, torch.Tensor):
        return full_tensor(value.detach()).to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


# ---- reading -------------------------------------------------------------------------------


def list_checkpoints(folder):
    """The checkpoints of a folder, newest first; files of other names are not ours."""
    found = [path for path in Path(folder).glob("*.pt") if path.stem.isdecimal()]
    return sorted(found, key=lambda path: int(path.stem), reverse=True)


def load_checkpoint(path, *, option="--ckpt"):
    """A checkpoint's dict, on the CPU, its tensors memory-mapped from the file.

    Of a .safetensors file model is ema, and opt is None. Raises UserError for a missing, torn or
    foreign file; verify_checkpoint finds damaged bytes.
    """
    path = Path(path)
    if not path.is_file():
        found, remedy = _explain(path)
        raise UserError(f"{option} must be a checkpoint file, got {path} ({found}); {remedy}")
    try:
        state = (state_of(*open_safetensors(path)) if path.suffix == SAFETENSORS else
                 torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except Exception as error:  # the unpickler and the archive raise errors of many kinds
        raise UserError(f"{option} must be a checkpoint file, got {path} (torn, or not opened as "
                        f"data: {type(error).__name__}); {REMEDY}") from error
    if not isinstance(state, dict) or any(key not in state for key in KEYS):
        raise UserError(f"{option} must hold {', '.join(KEYS)}, got {path} (a foreign file); "
                        f"{REMEDY}")
    return state


def _explain(path):
    """(what is found, remedy) where a path is no file."""
    if not path.is_dir():
        return "no such file", REMEDY
    for folder, kind in ((path / "checkpoints", "a run directory"),
                         (path, "a folder of checkpoints")):
        if newest := list_checkpoints(folder)[:1]:
            return kind, f"did you mean {newest[0]}?"
    return "a folder", REMEDY


def open_safetensors(path):
    """(tensors by name, metadata) of a .safetensors file. Raises errors of many kinds for a torn
    one."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, file.metadata() or {}


def state_of(tensors, metadata):
    """What load_checkpoint returns for a .safetensors file of tensors (N, ...); {} if it is
    foreign."""
    try:
        config, step = json.loads(metadata["config"]), int(metadata["step"])
    except (KeyError, ValueError, RecursionError):
        return {}
    return {"step": step, "model": tensors, "ema": tensors, "opt": None, "config": config}


def safetensors_damage(tensors, metadata):
    """What is damaged in a file of ours with tensors (N, ...), or None; None for a foreign one."""
    wanted = metadata.get("sha256")
    if wanted is None or not state_of(tensors, metadata):
        return None
    found = _digest(tensors, metadata["config"], metadata["step"])
    return None if found == wanted else "its SHA-256 is not the one that it records"


def verify_checkpoint(path, *, option="--ckpt"):
    """Raises UserError as load_checkpoint does, and where the file's bytes are damaged.

    torch.load compares no checksums; the archive has one for each tensor. A .safetensors file has
    one only if save_checkpoint wrote it.
    """
    try:
        damage = _find_damage(Path(path))
    except Exception as error:  # damaged headers raise errors of many kinds
        damage = str(error)
    if damage:
        raise UserError(f"{option} must be a checkpoint as it was written, got {path} (damaged: "
                        f"{damage:.200}); give another or copy it again")
    load_checkpoint(path, option=option)


def _find_damage(path):
    """What is damaged in a checkpoint, or None; also None where no checkpoint can be seen at all.

    Raises errors of many kinds where headers are damaged.
    """
    if path.suffix != SAFETENSORS:
        return find_damage(path, mapped=True) if zipfile.is_zipfile(path) else None
    try:
        return safetensors_damage(*open_safetensors(path))
    except Exception:  # torn: load_checkpoint says so
        return None


def newest_checkpoint(folder):
    """The path of a folder's newest undamaged checkpoint; None where there are no checkpoints.

    Raises UserError if all are damaged: a run from the start would replace them.
    """
    found = list_checkpoints(folder)
    for path in found:
        try:
            verify_checkpoint(path, option="--run-dir")
            return path
        except UserError as error:
            print(f"passing over {path}: {error}", file=sys.stderr)
    if found:
        raise UserError(f"--run-dir must hold a checkpoint that can be read, got none in {folder}; "
                        f"restore one, or choose another folder to begin anew")
    return None


def load_network(path, *, option="--ckpt"):
    """(network with the EMA weights, config) of a checkpoint file. Raises UserError."""
    state = load_checkpoint(path, option=option)
    with _fitting(option, path):
        config = state["config"]
        check_fields(config)
        with torch.device("meta"):  # a hostile config may ask for more memory than there is
            shapes = {name: value.shape for name, value in build(config).state_dict().items()}
        if shapes != {name: value.shape for name, value in state["ema"].items()}:
            raise ValueError(f"the tensors are not those of {describe(config)}")
        net = build(config)
        net.load_state_dict(state["ema"])
    return net.eval().requires_grad_(False), config


def fingerprint(tensors):
    """SHA-256, in hex, of a dict of tensors by name, of any shapes, taken as float32."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def check_fields(config):
    """Raises ValueError for a field that sampling cannot use. load_network compares shapes, too."""
    kinds = {"model": str, "vae": str, "image_size": int, "num_classes": int, "latent_shape": list,
             "scale": (float, int)}
    _, height, width = config["latent_shape"]
    for name, kind in kinds.items():
        fits = isinstance(config[name], kind) and not isinstance(config[name], bool)
        if not fits or height != width and name == "latent_shape":
            raise ValueError(f"{name} is {config[name]!s:.60}")


@contextlib.contextmanager
def _fitting(option, path):
    """Turns any error that a hostile or foreign checkpoint causes within into a UserError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{option} must hold weights that fit its config, got {path} "
                        f"({reason:.200}); give a checkpoint that train.py wrote") from error


# ---- continuing a run ----------------------------------------------------------------------


def restore_checkpoint(path, net, ema, optimizer, *, config, free, defaults=()):
    """Load a checkpoint of this run into network, EMA and optimiser; returns its step.

    config, free, defaults: as in check_config. Raises UserError.
    """
    state = load_checkpoint(path, option="--run-dir")
    with _fitting("--run-dir", path):
        found = differences(state["config"], config, free, defaults)
    if found:
        raise UserError(f"--run-dir must hold checkpoints of the same options, got {path} "
                        f"({found}); choose another folder or these options")
    with _fitting("--run-dir", path):
        if type(state["step"]) is not int or not 0 < state["step"] < 2**63:
            raise ValueError(f"step {state['step']!s:.60}")
        _load(net, state["model"])
        _load(ema, state["ema"])
        _restore_moments(optimizer, state["opt"]["state"], list(net.parameters()))
    return state["step"]


def _load(net, tensors):
    """net.load_state_dict(tensors), of which a sharded network takes this rank's parts."""
    own = net.state_dict()
    net.load_state_dict({name: shard_like(tensor, own.get(name))
                         for name, tensor in tensors.items()})


def _restore_moments(optimizer, moments, params):
    """AdamW's state by parameter number. Its settings stay: check_config has compared them."""
    found = {i: {name: value.shape for name, value in state.items()}
             for i, state in moments.items()}
    if found != {i: {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}
                 for i, p in enumerate(params)}:  # load_state_dict would take any shapes
        raise ValueError("the optimiser's state is of another network")
    moments = {i: {name: value if name == "step" else shard_like(value, params[i])
                   for name, value in state.items()} for i, state in moments.items()}
    optimizer.load_state_dict(
        {"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    for state in optimizer.state.values():  # on a CPU these still are the mapped file
        state.update({name: value.clone() for name, value in state.items()})


def check_config(folder, config, free, defaults=()):
    """The path of a run directory's config.json. Raises UserError if another run's is there.

    free: names of the options that may change when a run continues. defaults: values of options
    that an older stored config lacks. Before the first checkpoint the options may still change.
    """
    path, begun = Path(folder) / "config.json", bool(list_checkpoints(Path(folder) / "checkpoints"))
    if path.exists():
        try:
            stored = dict(defaults) | json.loads(path.read_text())
            found, ours = differences(stored, config, free), config.keys() <= stored.keys()
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"--run-dir must hold a readable config.json, got {path} "
                            f"({error!s:.200}); choose another folder") from error
        if found and (begun or not ours):
            raise UserError(f"--run-dir must be a run of the same options, got {folder} "
                            f"({found}); give another --run-dir or the run's own options")
    elif begun:
        raise UserError(f"--run-dir must hold config.json beside its checkpoints, got {folder}; "
                        f"choose another folder")
    return path


def differences(stored, wanted, free=(), defaults=()):
    """Lists the settings whose values differ, as "lr 0.1, now 0.2"; "" if none differ. Of a SHA-256
    it shows eight digits.

    defaults: values that count as stored where stored, from an older version, lacks the name.
    """
    names, stored = sorted(stored.keys() | wanted.keys()), dict(defaults) | stored
    return "; ".join(f"{name:.60} {_short(stored.get(name))}, now {_short(wanted.get(name))}"
                     for name in names
                     if name not in free and stored.get(name) != wanted.get(name))


def _short(value):
    """The text of a value for a message: of a SHA-256 eight digits, else 60 characters at most."""
    text = str(value)
    return text[:8 if re.fullmatch("[0-9a-f]{64}", text) else 60]

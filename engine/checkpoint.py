"""Checkpoints: written whole or not at all, opened as data, found again after any crash.

A checkpoint is one file of tensors and plain values, {"step", "model", "ema", "opt", "config"},
from which training continues and sampling starts; it lies in <run-dir>/checkpoints/0050000.pt.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import sys
import zipfile
from pathlib import Path

import torch

from engine.files import atomic_file, find_damage
from engine.options import UserError
from models import build

KEYS = ("step", "model", "ema", "opt", "config")


def save_checkpoint(path, state, *, keep_last=0):
    """Write a checkpoint; then, if keep_last > 0, remove what is older than the newest so many.

    Raises UserError if the disk is full or the folder cannot be written.
    """
    with atomic_file(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # PyTorch's word for a disk that takes no more
            raise OSError(str(error).splitlines()[0]) from error
    if keep_last:
        upto = [old for old in list_checkpoints(path.parent) if int(old.stem) <= int(path.stem)]
        for old in upto[keep_last:]:  # a torn one of a later step is none of those kept
            with contextlib.suppress(OSError):
                old.unlink()


class Saver:
    """Writes the checkpoints of a run beside the training: from a copy, one at a time.

    ``path`` is the last one's. What is being written when the run ends, ``with`` or without an
    error, is written to its end. lock: on the run's folder, which must still be this run's.
    ``before`` is called before each: what must be on disk earlier.
    """

    def __init__(self, folder, keep_last, *, lock=None, before=lambda: None):
        self.folder, self.keep_last, self.path = Path(folder), keep_last, None
        self.lock, self.before = lock, before
        self.thread, self.job = concurrent.futures.ThreadPoolExecutor(1), None

    def __enter__(self):
        return self

    def save(self, state):
        """Start to write this state. Raises as ``check`` does."""
        self.check(wait=True)
        self.path = self.folder / f"{state['step']:07d}.pt"
        self.job = self.thread.submit(self._write, self.path, copied(state))

    def _write(self, path, state):
        self.before()
        if self.lock:  # again: to copy a large state takes seconds
            self.lock.check()
        save_checkpoint(path, state, keep_last=self.keep_last)

    def check(self, *, wait=False):
        """Raises UserError if the last one could not be written, as far as is known, RunError if
        the folder is no longer this run's."""
        if self.lock:
            self.lock.check()
        if self.job and (wait or self.job.done()):
            self.job.result()

    @property
    def writing(self):
        return self.job is not None and not self.job.done()

    def wait(self, seconds):
        """Until nothing is being written, but no longer; errors are left to ``check``."""
        concurrent.futures.wait([self.job], timeout=seconds)

    def close(self):
        self.check(wait=True)

    def __exit__(self, *_):
        self.thread.shutdown()


def copied(value):
    """Dicts and lists as they are, their tensors copied to the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [copied(item) for item in value]
    return value


def list_checkpoints(folder):
    """The checkpoints of a folder, newest first; a file of any other name is not ours to touch."""
    found = [path for path in Path(folder).glob("*.pt") if path.stem.isdecimal()]
    return sorted(found, key=lambda path: int(path.stem), reverse=True)


def load_checkpoint(path, *, option="--ckpt"):
    """A checkpoint's dict, its tensors mapped from the file, on the CPU.

    Raises UserError for a missing, torn or foreign file; a damaged one is for ``verify`` to see.
    """
    remedy = "give a checkpoint that train.py wrote"
    if not Path(path).is_file():
        found = "a folder" if Path(path).is_dir() else "no such file"
        raise UserError(f"{option} must be a checkpoint file, got {path} ({found}); {remedy}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of the unpickler or the archive, which raise errors of many kinds
        raise UserError(f"{option} must be a checkpoint file, got {path} (torn, or not opened as "
                        f"data: {type(error).__name__}); {remedy}") from error
    if not isinstance(state, dict) or any(key not in state for key in KEYS):
        raise UserError(f"{option} must hold {', '.join(KEYS)}, got {path} (a foreign file); "
                        f"{remedy}")
    return state


def verify_checkpoint(path, *, option="--ckpt"):
    """Raises UserError as ``load`` does, and where a byte is not as it was written.

    torch.load compares no checksum; the archive has one for each tensor.
    """
    try:
        damage = find_damage(path) if zipfile.is_zipfile(path) else None
    except Exception as error:  # of a damaged header, errors of many kinds
        damage = str(error)
    if damage:
        raise UserError(f"{option} must be a checkpoint as it was written, got {path} (damaged: "
                        f"{damage:.200}); give another or copy it again")
    load_checkpoint(path, option=option)  # whether it is one


def newest_checkpoint(folder):
    """The path of a folder's newest undamaged checkpoint, or None where there is none.

    Raises UserError if there are some and none can be read: to begin anew would replace them.
    """
    for path in list_checkpoints(folder):
        try:
            verify_checkpoint(path, option="--run-dir")
        except UserError as error:
            print(f"passing over {path}: {error}", file=sys.stderr)
        else:
            return path
    if list_checkpoints(folder):
        raise UserError(f"--run-dir must hold a checkpoint that can be read, got none in {folder}; "
                        f"restore one, or choose another folder to begin anew")
    return None


def restore_checkpoint(path, net, ema, optimizer, *, config, free):
    """Take the state of a checkpoint of this very run; returns its step. Raises UserError.

    config and free: as in check_config, as config.json may have been replaced since.
    """
    state = load_checkpoint(path, option="--run-dir")
    with _fitting("--run-dir", path):
        found = differences(state["config"], config, free)
    if found:
        raise UserError(f"--run-dir must hold checkpoints of the same options, got {path} "
                        f"({found}); choose another folder or these options")
    with _fitting("--run-dir", path):
        if not (type(state["step"]) is int and 0 < state["step"] < 2**63):
            raise ValueError(f"step {state['step']!s:.60}")
        net.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        params, moments = list(net.parameters()), state["opt"]["state"]
        fits = [{name: value.shape for name, value in moments[i].items()} == {
                    "step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}
                for i, p in enumerate(params)]
        if not all(fits) or len(moments) != len(params):
            raise ValueError("another network's optimiser")
        # Its settings are the options', which check_config has compared
        optimizer.load_state_dict(
            {"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        for own in optimizer.state.values():  # on a CPU still in the file, which may be removed
            own.update({name: value.clone() for name, value in own.items()})
    return state["step"]


@contextlib.contextmanager
def _fitting(option, path):
    """Turns what a hostile or foreign checkpoint runs into within into a UserError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{option} must hold weights that fit its config, got {path} "
                        f"({reason:.200}); give a checkpoint that train.py wrote") from error


def load_network(path):
    """(network with the EMA weights, config) of a checkpoint file. Raises UserError."""
    state = load_checkpoint(path)
    with _fitting("--ckpt", path):
        config = state["config"]
        _check_fields(config)
        with torch.device("meta"):  # before memory is taken for what a stranger asks for
            shapes = {name: value.shape for name, value in build(config).state_dict().items()}
        if shapes != {name: value.shape for name, value in state["ema"].items()}:
            raise ValueError(f"the tensors are not those of {config['model']}")
        net = build(config)
        net.load_state_dict(state["ema"])
    return net.eval().requires_grad_(False), config


def fingerprint(tensors):
    """SHA-256 of a dict of tensors by name, taken as float32."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _check_fields(config):
    """Raises ValueError unless the fields that sampling relies on are of their kind."""
    for name, ok in {
        "model": isinstance(config["model"], str),
        "vae": isinstance(config["vae"], str),
        "image_size": _is_count(config["image_size"]),
        "num_classes": _is_count(config["num_classes"]),
        "latent_shape": len(config["latent_shape"]) == 3
        and all(map(_is_count, config["latent_shape"]))
        and config["latent_shape"][1] == config["latent_shape"][2],
    }.items():
        if not ok:
            raise ValueError(f"{name} is {config[name]!s:.60}")


def _is_count(value):
    return type(value) is int and 0 < value < 2**31


def check_config(folder, config, free):
    """The path of a run directory's config.json. Raises UserError where it is of another run.

    A run that has no checkpoint yet may become another. free: names of options that may change
    between two starts of a run.
    """
    path, begun = Path(folder) / "config.json", bool(list_checkpoints(Path(folder) / "checkpoints"))
    if path.exists():
        try:
            stored = json.loads(path.read_text())
            found = differences(stored, config, free)
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"--run-dir must hold a readable config.json, got {path} "
                            f"({error!s:.200}); choose another folder") from error
        if found and (begun or not config.keys() <= stored.keys()):
            raise UserError(f"--run-dir must be a run of the same options, got {folder} "
                            f"({found}); choose another folder or these options")
    elif begun:
        raise UserError(f"--run-dir must hold config.json beside its checkpoints, got {folder}; "
                        f"choose another folder")
    return path


def differences(stored, wanted, free=()):
    """In words, the settings, two dicts, in which what lies there differs from what is wanted."""
    return "; ".join(f"{name:.60} {stored.get(name)!s:.60} there, {wanted.get(name)!s:.60} here"
                     for name in sorted(stored.keys() | wanted.keys())
                     if name not in free and stored.get(name) != wanted.get(name))

"""Checkpoints: written whole or not at all, opened as data, found again after any crash.

A checkpoint is one file of tensors and plain values, {"step", "model", "ema", "opt", "config"},
from which training continues and sampling starts; it lies in <run-dir>/checkpoints/0050000.pt.
"""

import json
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import runtime
from models import DiT_models
from runtime import UserError

KEYS = ("step", "model", "ema", "opt", "config")


def save(path, state, *, keep_last=0):
    """Write a checkpoint; then, if keep_last > 0, remove all but that many newest of its folder.

    Raises UserError if the disk is full or the folder cannot be written.
    """
    with runtime.whole_file(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # PyTorch's word for a disk that takes no more
            raise OSError(str(error).splitlines()[0]) from error
    if keep_last:
        for old in files(Path(path).parent)[keep_last:]:
            old.unlink(missing_ok=True)


class Saver:
    """Writes the checkpoints of a run beside the training: from a copy, one at a time."""

    def __init__(self, folder, keep_last):
        self.folder, self.keep_last = Path(folder), keep_last
        self.thread, self.job = ThreadPoolExecutor(1), None

    def save(self, state):
        """Start to write this state. Raises UserError if the one before could not be written."""
        self.wait()
        path = self.folder / f"{state['step']:07d}.pt"
        self.job = self.thread.submit(save, path, copied(state), keep_last=self.keep_last)

    def wait(self):
        if self.job:
            self.job.result()

    def close(self):
        self.wait()
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


def files(folder):
    """The checkpoints of a folder, newest first."""
    return sorted(Path(folder).glob("[0-9]*.pt"), key=lambda path: path.stem, reverse=True)


def load(path, *, option="--ckpt"):
    """A checkpoint's dict, on the CPU. Raises UserError for a missing, torn or foreign file."""
    remedy = "give a checkpoint that train.py wrote"
    if not Path(path).is_file():
        raise UserError(f"{option} must be a checkpoint file, got {path} (no such file); {remedy}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(f"{option} must be a checkpoint file, got {path} (torn, or not opened as "
                        f"data: {type(error).__name__}); {remedy}") from error
    if not isinstance(state, dict) or any(key not in state for key in KEYS):
        raise UserError(f"{option} must hold {', '.join(KEYS)}, got {path} (a foreign file); "
                        f"{remedy}")
    return state


def newest(folder):
    """The path of a folder's newest checkpoint that can be read, or None."""
    for path in files(folder):
        try:
            load(path)
        except UserError as error:
            print(f"passing over {path}: {error}", file=sys.stderr)
        else:
            return path
    return None


def network(config):
    """The network, freshly initialised, that a config describes. Raises ValueError."""
    if config["model"] not in DiT_models:
        raise ValueError(f"--model must be one of {', '.join(DiT_models)}, got {config['model']}")
    channels, height, _ = config["latent_shape"]
    return DiT_models[config["model"]](
        input_size=height, in_channels=channels, num_classes=config["num_classes"])


def load_network(path):
    """(network with the EMA weights, config) of a checkpoint file. Raises UserError."""
    state = load(path)
    try:
        net = network(state["config"])
        net.load_state_dict(state["ema"])
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"--ckpt must hold weights that fit its config, got {path} "
                        f"({str(error).splitlines()[0]}); give a checkpoint that train.py "
                        f"wrote") from error
    return net.eval().requires_grad_(False), state["config"]


def check_config(folder, config, free):
    """Refuse a run directory that was begun with other options; write config.json otherwise.

    free: names of options that may change between two starts of a run. Raises UserError naming
    the options that differ.
    """
    path = Path(folder) / "config.json"
    if path.exists():
        try:
            stored = json.loads(path.read_text())
            names = sorted(stored.keys() | config.keys())
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"--run-dir must hold a readable config.json, got {path} ({error}); "
                            f"choose another folder") from error
        differing = [f"{name} {stored.get(name)} there, {config.get(name)} here" for name in names
                     if name not in free and stored.get(name) != config.get(name)]
        if differing:
            raise UserError(f"--run-dir must be a run of the same options, got {folder} "
                            f"({'; '.join(differing)}); choose another folder or these options")
    elif files(Path(folder) / "checkpoints"):
        raise UserError(f"--run-dir must hold config.json beside its checkpoints, got {folder}; "
                        f"choose another folder")
    return path


def write_config(path, config):
    with runtime.whole_file(path) as temporary:
        temporary.write_text(json.dumps(config, indent=1) + "\n")

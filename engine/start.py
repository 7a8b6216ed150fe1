"""The weights that a run starts from: those of train.py --init, fitted to the run's network."""

import json
from pathlib import Path

import torch

from engine.checkpoint import (
    differences,
    list_checkpoints,
    load_checkpoint,
    load_network,
    verify_checkpoint,
)
from engine.hub import shared_file
from engine.options import UserError
from models import LabelEmbedder, is_improved

NORMALISATION = ("vae", "scale", "latent_mean", "latent_std")


class Start:
    """The checkpoint that --init names, a path or an address of the Hub, opened on every rank.

    model, sizes: those of the run's network, as build takes them. notes: lines for the log, once
    check has been called. Raises UserError for what is no checkpoint.
    """

    def __init__(self, name, world):
        path = shared_file(name, "--init", world)
        world.on_main(lambda: verify_checkpoint(path, option="--init"))
        net, self.config = load_network(path, option="--init")
        self.weights = net.state_dict()
        self.label_tables = [f"{module_name}.embedding_table.weight"
                             for module_name, module in net.named_modules()
                             if isinstance(module, LabelEmbedder)]
        self.model, self.sizes = self.config["model"], self.config.get("sizes")
        if self.sizes and is_improved(self.model):  # released files lack the v head, training not
            self.sizes = {size: value for size, value in self.sizes.items() if size != "v_head"}
        self.sizes = self.sizes or None
        step = load_checkpoint(path, option="--init")["step"]
        self.notes = [f"starts from the averaged weights of {name}, step {step}"]

    def check(self, config):
        """Compare the file with the config of the run. Raises UserError if it cannot start so."""
        ours, theirs = config["latent_shape"], self.config["latent_shape"]
        if ours != theirs:
            raise UserError(f"--init must be a network for data of shape {ours}, as --vae and "
                            f"--image-size make it, got one for {theirs}; change those or give "
                            f"another file")
        self.new_classes = self._has_new_classes(config)
        if self.new_classes and not self.label_tables:
            raise UserError(f"--init must have the classes of --data-path where the network's "
                            f"label table is no LabelEmbedder, got a {self.model} of "
                            f"{self.config['num_classes']} classes for "
                            f"{config['num_classes']}; give another file")
        if changed := differences(_normalisation(self.config), _normalisation(config)):
            self.notes.append(f"the latents are not those of the file ({changed}): the network has "
                              f"to learn the difference")

    def _has_new_classes(self, config):
        """Whether the label table must start anew; says it, and what cannot be known."""
        names, count = self.config.get("classes"), self.config["num_classes"]
        if count == config["num_classes"] and names == config["classes"]:
            return False
        if count == config["num_classes"] and not names:
            self.notes.append(f"the file does not name its {count} classes: they are taken to be "
                              f"those of the data, in the same order")
            return False
        self.notes.append(f"the {config['num_classes']} classes of the data are not the {count} of "
                          f"the file: the label table starts anew, but for the null label's row")
        return True

    def load_into(self, net):
        """Load the weights into the run's freshly initialised network, and let go of them.

        A label table of other classes keeps its fresh rows, and takes over the last, the null
        label's. The blocks of a v head that the file lacks are copies of the u head's.
        """
        fresh = net.state_dict()
        for name in self.label_tables if self.new_classes else ():
            self.weights[name] = fresh[name].index_copy(
                0, torch.tensor([len(fresh[name]) - 1]), self.weights[name][-1:])
        lacking = fresh.keys() - self.weights.keys()
        for name in lacking:
            self.weights[name] = self.weights[name.replace("v_", "u_", 1)]
        if lacking:
            self.notes.append("the file has no v head: it starts as a copy of the u head")
        net.load_state_dict(self.weights)
        self.weights = None


def _normalisation(config):
    """What a config says of the data's latents, where it says it."""
    found = {name: config[name] for name in NORMALISATION if config.get(name) is not None}
    if found.get("vae") == "mse":  # differs from ema in the decoder alone
        found["vae"] = "ema"
    if "latent_mean" in found:  # takes the place of the scale
        found.pop("scale", None)
    return found


def begun_from(folder, name):
    """The config of the run in a folder if it began from the file of this name and has checkpoints,
    so that it continues without that file; else None."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        if list_checkpoints(folder / "checkpoints") and config["init"] == str(name):
            is_improved(config["model"])  # KeyError for an unknown one
            return config if "sizes" in config else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass  # whatever it is, Run refuses it or begins anew
    return None

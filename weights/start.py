"""The weights that a run starts from: those of train.py --init, fitted to the run's network."""

import torch

from engine.checkpoint import differences, network_of
from engine.errors import UserError
from models import LabelEmbedder
from weights.hub import open_checkpoint


class InitialWeights:
    """The averaged weights of a checkpoint, a path or an address, opened on every rank.

    sizes: of the run's network, as build takes them. notes: lines for the log, complete after
    load_into. Raises BadValue for what is no checkpoint.
    """

    def __init__(self, name, world):
        state = open_checkpoint(name, world)
        net, self.config = network_of(state, name), state["config"]
        self.weights = net.state_dict()
        self.label_tables = [f"{module_name}.embedding_table.weight"
                             for module_name, module in net.named_modules()
                             if isinstance(module, LabelEmbedder)]
        sizes = self.config.get("sizes") or {}  # released files lack the v head, which training has
        self.sizes = {key: size for key, size in sizes.items() if key != "v_head"} or None
        self.notes = [f"starts from the averaged weights of {name}, step {state['step']}"]

    def compare(self, config):
        """Compare the file with the run's config. Raises UserError if the run cannot start so."""
        ours, theirs = config["latent_shape"], self.config["latent_shape"]
        if ours != theirs:
            raise UserError(f"--init must be a network for data of shape {ours}, got one for "
                            f"{theirs}; change --vae and --image-size or give another file")
        names, count = self.config.get("classes"), self.config["num_classes"]
        self.new_classes = (count != config["num_classes"]
                            or bool(names) and names != config["classes"])
        if self.new_classes and not self.label_tables:
            raise UserError(f"--init must have the {config['num_classes']} classes of --data-path, "
                            f"as it has no LabelEmbedder, got {count}; give another file")
        if self.new_classes:
            self.notes.append(f"the data's {config['num_classes']} classes are not the file's "
                              f"{count}: the label table starts anew, but for the null label's row")
        elif not names:
            self.notes.append(f"the file does not name its {count} classes: they are taken to be "
                              f"those of the data, in the same order")
        if self.config.get("method") not in (None, config["method"]):
            self.notes.append(f"the file was trained by {self.config['method']}, this run by "
                              f"{config['method']}")
        if changed := differences(_normalisation(self.config), _normalisation(config)):
            self.notes.append(f"the latents are not the file's ({changed}): the network has to "
                              f"learn the difference")

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
    """What a config says of the data's latents."""
    per_channel = {name: config[name] for name in ("latent_mean", "latent_std") if config.get(name)}
    vae = "ema" if config["vae"] == "mse" else config["vae"]  # the decoder is all that differs
    return {"vae": vae, **(per_channel or {"scale": config["scale"]})}

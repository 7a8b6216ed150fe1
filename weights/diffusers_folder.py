"""A checkpoint as a folder for diffusers, which opens without this repository:

    model_index.json                        the pipeline, and what the weights say of the data
    meanflow_pipeline_HASH.py               its code, made of weights/pipeline.py
    transformer/dit_model_HASH.py           the network's code, made of its file
    transformer/config.json                 the network's sizes
    transformer/*.safetensors               a checkpoint like any other of ours
    vae/                                    an AutoencoderKL, if it is to be inside
    README.md, CODE_LICENSE.txt             the model card, and the licence of the code

diffusers copies the code of all folders into one, where files of one name would replace each other.
"""

import hashlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

from dataset.classes import names_of_classes
from dataset.noise import noise_of
from dataset.vae import HUB, codec_of
from engine.checkpoint import save_checkpoint
from engine.errors import BadValue, UserError
from engine.files import atomic_folder, write_json
from methods import default_method, method_of
from models import arguments, build, describe, network_class
from weights.foreign_files import DIFFUSERS_WEIGHTS
from weights.hub import NAME
from weights.stand_alone import ROOT, stand_alone

PIPELINES = {"meanflow": "MeanFlowPipeline", "improved-meanflow": "ImprovedMeanFlowPipeline",
             "soflow": "SoFlowPipeline"}  # in weights/pipeline.py
PAPERS = {"meanflow": "[MeanFlow](https://arxiv.org/abs/2505.13447)",
          "improved-meanflow": "[improved MeanFlow](https://arxiv.org/abs/2512.02012)",
          "soflow": "[SoFlow](https://arxiv.org/abs/2512.15657)"}
ROUNDING = 1e-3  # of a network that another process computes, as a share of its largest number
HEADER = '''"""The {what} of this model, made by convert_checkpoint.py of MeanFlow-PyTorch.

The licence of the code, MIT, is in CODE_LICENSE.txt.
"""

'''
MODEL = '''

class {name}Model({name}, ModelMixin, ConfigMixin):
    """The network as a model of diffusers."""

    __init__ = register_to_config({name}.__init__)
'''
# Opens a folder as others will, without the VAE; its data x go into a file
OPEN = """
import json, sys
import torch
from diffusers import DiffusionPipeline

folder, settings, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, settings=json.loads(settings), vae=None,
                                         trust_remote_code=True)
torch.save(pipe([0], seed=0, output_type="latent").images, out)
"""
CARD = '''---
license: {license}
library_name: diffusers
tags:
- {tag}
- class-conditional-image-generation
---

# {model}

Images of {count} classes at {size} x {size} pixels, by {paper}.

```python
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("{repository}", trust_remote_code=True)
pipe(class_labels={labels}, seed=0).images
```

`trust_remote_code=True` runs the two Python files of this folder: pipeline and network. They need
diffusers and torch.

| | |
|---|---|
{rows}
'''


def write_diffusers_folder(path, state, *, vae, license, figures, repository, about):
    """Write a state, as convert returns it, as a new folder; returns which decoder it has.

    vae: ema, mse, a repository of the Hub, which the folder names, or a local folder, which is
    copied into it; None: the checkpoint's. For the card: license, an identifier of the Hub's;
    figures, as read_figures returns them; repository, OWNER/REPO, where the folder is to be, or
    None; about, which weights they are. Raises UserError.
    """
    export = _Export(state["config"])
    inside, reference = choose_vae(vae, export.config)
    decoder = "in the folder" if inside else reference or "none: the network makes pixels"
    made_with = {"_diffusers_version": version("diffusers")}
    with atomic_folder(path) as folder:
        (folder / "transformer").mkdir()
        for name, source in export.code.items():
            (folder / name).write_text(source, encoding="utf-8")
        if inside:
            inside.model.register_to_config(_name_or_path="vae")  # not the path on this machine
            inside.model.save_pretrained(folder / "vae")
        save_checkpoint(folder / DIFFUSERS_WEIGHTS, state | {"config": export.public_config()})
        write_json(folder / "transformer" / "config.json",
                   {"_class_name": export.model[1], **made_with, **arguments(export.config)})
        write_json(folder / "model_index.json", {
            "_class_name": export.pipeline, **made_with, "transformer": export.model,
            "vae": ["diffusers", "AutoencoderKL"] if inside else [None, None],
            "settings": export.settings(reference)})
        (folder / "README.md").write_text(
            export.card(license, figures, repository, decoder, about), encoding="utf-8")
        shutil.copyfile(ROOT / "LICENSE.txt", folder / "CODE_LICENSE.txt")
        export.check(folder, state)
    return decoder


def read_figures(path):
    """The JSON lines of a file, as evaluate_fid.py and sample.py print them, without paths but the
    reference's name. Raises BadValue."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        return [{name: Path(value).name if name == "ref" else value for name, value in line.items()
                 if name not in ("ckpt", "samples")} for line in lines]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise BadValue(f"must be a file of lines that evaluate_fid.py printed, got {path} "
                       f"({error!s:.100}); write them anew") from error


class _Export:
    """What a config says of the folder to be written. Raises UserError for a checkpoint of which
    none can be made."""

    def __init__(self, config):
        self.config, self.network = config, network_class(config["model"])
        self.method_name = config.get("method") or default_method(self.network)
        if self.method_name not in PIPELINES or not self.network or config.get("conditions"):
            raise UserError(f"--format diffusers must have a checkpoint of {', '.join(PIPELINES)} "
                            f"with labels, whose network is a class, got {config['model']} of "
                            f"{self.method_name}; convert another")
        self.method = method_of(config, self.network)
        pipeline, network = PIPELINES[self.method_name], self.network.__name__
        sources = [HEADER.format(what=what) + source for what, source in (
            ("pipeline", stand_alone(ROOT / "weights" / "pipeline.py", pipeline)),
            ("network", self.network_source()))]
        method = self.method_name.replace("-", "_")
        # A module and its class; the code by file
        self.pipeline = f"{method}_pipeline_{_hash(sources[0])}", pipeline
        self.model = f"{network.lower()}_model_{_hash(sources[1])}", f"{network}Model"
        self.code = {f"{self.pipeline[0]}.py": sources[0],
                     f"transformer/{self.model[0]}.py": sources[1]}

    def refusal(self, reason):
        return UserError(f"--format diffusers must have a network whose file can stand alone, got "
                         f"{self.config['model']} ({reason}); mend its file")

    def network_source(self):
        """The network's code as a model of diffusers. Raises UserError where it cannot be carried
        over."""
        name = self.network.__name__
        try:
            network = stand_alone(Path(inspect.getfile(self.network)), name)
        except (ValueError, SyntaxError) as error:
            raise self.refusal(error) from error
        imports, rest = network.split("\n\n\n", 1)
        imports += ("\nfrom diffusers import ModelMixin"
                    "\nfrom diffusers.configuration_utils import ConfigMixin, register_to_config")
        return f"{imports}\n\n\n{rest}{MODEL.format(name=name)}"

    def check(self, folder, state):
        """Raise UserError unless a process that cannot see this repository opens the folder, and
        makes the same of noise as the network here."""
        net, label = build(self.config).eval(), torch.zeros(1, dtype=torch.int64)
        net.load_state_dict(state["ema"])
        x = self.method.sample(net, noise_of([0], self.config["latent_shape"], 0), label,
                               **self.method.guidance(self.config))
        del net
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        with tempfile.TemporaryDirectory() as place:
            done = subprocess.run(
                [sys.executable, "-c", OPEN, folder.absolute(), json.dumps(self.settings(None)),
                 "x.pt"], cwd=place, capture_output=True, text=True,
                env=environment | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": place})
            if done.returncode:
                raise self.refusal(f"{done.stderr.strip().splitlines()[-1]:.200}")
            difference = torch.load(Path(place, "x.pt"), weights_only=True) - x
        if not difference.abs().max() <= ROUNDING * x.abs().max():
            raise self.refusal("alone it computes something else")

    def settings(self, vae):
        """What the pipeline must know. vae: the repository that holds it, or None."""
        names = names_of_classes(self.config)
        known = {name: self.config[name] for name in (
            "image_size", "latent_shape", "scale", "latent_mean", "latent_std", "num_classes")
            if name in self.config}
        return known | {
            "classes": None if names == [[str(i)] for i in range(len(names))] else names,
            "vae": vae, "velocity_only": self.method.ratio == 0,
            "guidance": self.method.guidance(self.config)}

    def public_config(self):
        """The config, without what it says of one machine and of the course of the training."""
        kept = ("model", "sizes", "latent_shape", "image_size", "num_classes", "classes", "scale",
                "latent_mean", "latent_std", "source", *self.method.settings())
        vae = self.config["vae"] if self.config["vae"] in (*HUB, "none") else "vae"
        return {name: self.config[name] for name in kept if self.config.get(name) is not None} | {
            "method": self.method_name, "vae": vae}

    def card(self, license, figures, repository, vae, about):
        """The text of README.md."""
        names = [known[0] for known in names_of_classes(self.config)]
        rows = {"network": describe(self.config),
                "method": ", ".join([PAPERS[self.method_name], *(
                    f"{name} {_text(value)}" for name, value in vars(self.method).items()
                    if name in self.method.settings())]),
                "data": f"{self.config['num_classes']} classes, such as {', '.join(names[:3])}",
                "decoder": vae,
                "weights": self.config.get("source", about),
                "figures": "; ".join(", ".join(f"{name} {_text(value)}" for name, value in line
                                               .items()) for line in figures)}
        return CARD.format(
            license=license, tag=self.method_name, model=self.config["model"],
            count=self.config["num_classes"],
            size=self.config["image_size"], paper=PAPERS[self.method_name],
            repository=repository or "path/of/this/folder",
            labels=json.dumps([names[0], len(names) - 1], ensure_ascii=False),
            rows="\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items() if value))


def _text(value):
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _cell(text):
    """A text as a cell of a table in Markdown."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _hash(source):
    return hashlib.sha256(source.encode()).hexdigest()[:8]


def choose_vae(name, config):
    """(codec, None) of a local folder, (None, repository) of the Hub, or (None, None) for pixels.
    name: of --vae, or None for the config's. Raises UserError."""
    if config["vae"] == "none":
        if name not in (None, "none"):
            raise UserError(f"--vae must be left out for a network of pixels, got {name}")
        codec_of(config, "none")  # refuses what is no image
        return None, None
    name = name or config["vae"]
    if os.path.isdir(name):
        return codec_of(config, name), None
    if not re.fullmatch(f"{NAME}/{NAME}", repository := HUB.get(name, name)):
        raise UserError(f"--vae must be ema, mse, OWNER/REPO of the Hub, or a folder that exists, "
                        f"got {name}; name the VAE of the latents")
    return None, repository

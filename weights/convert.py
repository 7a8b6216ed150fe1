"""What other repositories saved, under our names, and back.

convert recognises a network by names and shapes of its tensors and returns a checkpoint of ours.
export gives it the names of another repository.
"""

import math
import re
from typing import NamedTuple

import torch

from engine.checkpoint import check_network, plain_config, to_float32
from engine.errors import UserError
from methods import default_method
from models import (
    SIZES,
    DiT,
    DiT_models,
    ImprovedDiT,
    build,
    describe,
    network_class,
    sincos_table,
)
from weights.foreign_files import refusal


class Repository(NamedTuple):
    """What the tensors in a repository's files do not tell."""

    name: str  # on GitHub
    vae: str = "ema"  # whose decoder the repository samples with
    scale: float = 0.18215
    note: str = ""  # for the report
    method: str | None = None  # of methods.py, if it is not the first that the network fits


RENAMED = "renamed: h_embedder, here r_embedder"
START = "start for training: u(z, r, t, y) is the flow's velocity for every r"
REPOSITORIES = {
    "meanflow": Repository("Gsunshine/meanflow", "mse", note=RENAMED),  # JAX
    "imeanflow": Repository("Lyy-iiis/imeanflow", "mse"),  # JAX and PyTorch
    "noamelata": Repository("noamelata/MeanFlow"),
    "zhuyu": Repository("zhuyu-cs/MeanFlow", scale=0.18125),  # in its training and its evaluation
    "haoyizhu": Repository("HaoyiZhu/MeanFlow-PyTorch", note=RENAMED),
    "soflow": Repository("zlab-princeton/SoFlow", "mse", method="soflow",
                         note="renamed: s_embedder, here r_embedder"),
    "sit": Repository("willisma/SiT", note=f"{START}; its time and sign are turned"),
    "repa": Repository("sihyun-yu/REPA", note=START),
}
FORMATS = ("ours", "noamelata", "zhuyu", "haoyizhu", "imeanflow")

# ---- to ours -------------------------------------------------------------------------------


def convert(foreign, *, heads=None, image_size=None, source=None, num_classes=None):
    """(state, report): a checkpoint of ours, ready to be saved, and lines about it.

    state: {step, model, ema, opt, config}; model and ema are the same float32 weights. foreign:
    ForeignWeights, whose dict is emptied of JAX tensors. heads, image_size, source, num_classes:
    the options of these names. Raises BadValue and UserError.
    """
    if foreign.config is not None and any((heads, image_size, source, num_classes)):
        raise UserError("--heads, --image-size, --source and --num-classes must come with a file "
                        "of another repository, got one of ours; leave them out")
    try:
        if foreign.config is None:
            weights, config, report = convert_foreign(foreign, heads, image_size, source,
                                                      num_classes)
        else:
            weights, report = to_float32(foreign.tensors), [f"recognised: ours, {foreign.about}"]
            config = plain_config(foreign.config)
        check_network(config, weights)
    except UserError:
        raise
    except Exception as error:  # tensors and a config of any content
        raise refusal("hold one whole network", f"tensors that do not fit together "
                      f"({type(error).__name__}: {error!s:.200})") from error
    report.append(f"network: {describe(config)}, {sum(map(torch.numel, weights.values())):,} "
                  f"numbers, {config['num_classes']} classes")
    state = {"step": 0, "model": weights, "ema": weights, "opt": None, "config": config}
    return state, report


def convert_foreign(foreign, heads, image_size, source, num_classes):
    """(weights, config, report) of a file of another repository."""
    tensors = rename(from_jax(foreign.tensors) if foreign.jax else foreign.tensors)
    candidates = possible_repositories(tensors, foreign)
    key = candidates[0] if source is None and len(candidates) == 1 else source
    if key not in candidates:
        raise UserError(f"--source must be {' or '.join(candidates)} for this file, got "
                        f"{source or 'none'}; name the repository that saved it")
    repository = REPOSITORIES[key]
    if key != "imeanflow":
        ours = {re.sub("^[hs]_embedder", "r_embedder", name): value
                for name, value in tensors.items()}
        if len(ours) < len(tensors):
            raise refusal("hold one embedder of t - r", "two")
        tensors = ours
    unused = {"projectors", "" if "v_heads.0.norm1.weight" in tensors else "v_final_layer"}
    weights = to_float32({name: value for name, value in tensors.items()
                          if name.split(".")[0] not in unused})
    if key in ("sit", "repa"):
        warm_start(weights, reverse=key == "sit")
    added = add_null_row(weights, key, num_classes)
    config = network_config(weights, heads)
    config |= {"method": repository.method or default_method(network_class(config["model"]))}
    config |= data_config(weights, repository, foreign.args or {}, image_size)
    config["source"] = f"{repository.name}, {foreign.about}"
    report = [f"recognised: {config['source']}", *filter(None, [repository.note, added])]
    if left_out := unused & {name.split(".")[0] for name in tensors}:
        report.append(f"left out: {', '.join(sorted(left_out))}")
    if key == "meanflow":
        width, _, patch, _ = weights["x_embedder.proj.weight"].shape
        weights["pos_embed"] = sincos_table(width, config["latent_shape"][1] // patch)
        report.append(f"position table: computed for {config['image_size']} pixels")
    return weights, config, report


# ---- names and recognition -----------------------------------------------------------------

# Names of an earlier version of improved MeanFlow's code (Lyy-iiis/imeanflow, convert.py)
EARLIER_NAMES = {"k_embedder": "omega_embedder", "cfg_start_cond_tokens": "t_min_tokens",
                 "cfg_end_cond_tokens": "t_max_tokens", "time_cond_tokens": "time_tokens",
                 "class_cond_tokens": "class_tokens", "kappa_cond_tokens": "omega_tokens"}
# Of DistributedDataParallel, torch.compile, and parents
WRAPPERS = ("module.", "_orig_mod.", "net.", "network.")


def rename(tensors):
    """The tensors under the names of their repository's present code, without prefixes of all."""
    for prefix in WRAPPERS * 2:  # in any order
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    first = count(tensors, "blocks")
    renamed = {}
    for name, value in tensors.items():
        if match := re.match(r"decoder_blocks\.(\d+)", name):  # REPA's names before its release
            name = f"blocks.{first + int(match[1])}{name[match.end():]}"
        words = [EARLIER_NAMES.get(word, word) for word in name.split(".")
                 if word not in ("_flax_linear", "_flax_embedding")]
        renamed[".".join(words)] = value
    return renamed


def count(tensors, group):
    """How many blocks there are of the names group.N."""
    return len({match[1] for name in tensors if (match := re.match(rf"{group}\.(\d+)\.", name))})


def from_jax(tensors):
    """The tensors of a JAX state with PyTorch's names and layouts; empties its argument. Kernels
    are (in, out) or (h, w, in, out); weights of norms, one-dimensional, stay."""
    renamed = {}
    for path in list(tensors):
        tensor, (*parents, last) = tensors.pop(path), path.split(".")
        if last == "kernel" and tensor.ndim in (2, 4):
            tensor = tensor.T if tensor.ndim == 2 else tensor.permute(3, 2, 0, 1)
        last = "weight" if last in ("kernel", "scale", "embedding") else last
        name = re.sub(r"\blayers_(\d+)", r"\1", ".".join([*parents, last]))
        name = re.sub(r"\b(shared_blocks|u_heads|v_heads)_(\d+)", r"\1.\2", name)
        renamed[name] = tensor
    return renamed


def possible_repositories(tensors, foreign):
    """The keys in REPOSITORIES of those whose files have these tensors. Raises BadValue."""
    if "shared_blocks.0.norm1.weight" in tensors:
        return ("imeanflow",)
    if "blocks.0.attn.qkv.weight" not in tensors:
        raise refusal("hold a DiT", f"other tensors ({next(iter(tensors), 'none'):.60} ...)")
    if "s_embedder.mlp.0.weight" in tensors:
        return ("soflow",)
    if "h_embedder.mlp.0.weight" in tensors:
        return ("meanflow",) if foreign.jax else ("haoyizhu",)
    args = foreign.args or {}
    if "r_embedder.mlp.0.weight" in tensors:  # a training file tells: only zhuyu's has its step
        return (("zhuyu",) if foreign.step is not None else
                ("noamelata",) if args else ("noamelata", "zhuyu"))
    path, prediction = (str(args.get(name, "")).lower() for name in ("path_type", "prediction"))
    _, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    wide = len(tensors["final_layer.linear.bias"]) == 2 * channels * patch**2
    if path not in ("", "linear") or prediction not in ("", "velocity", "v"):
        raise refusal("hold a velocity of the linear path",
                      f"path_type {path:.40}, prediction {prediction:.40}")
    if wide and args and not prediction:
        raise refusal("hold a velocity", "a DiT that predicts noise at integer times")
    return {"velocity": ("sit",), "v": ("repa",)}.get(prediction, ("sit", "repa"))


def add_null_row(weights, key, num_classes):
    """Give a label table of so many rows a null row, in place; returns a line for the report or
    None. SoFlow without guidance has none. Raises UserError for another number of classes."""
    table, given = weights["y_embedder.embedding_table.weight"], num_classes
    num_classes = num_classes or (IMAGENET if key == "soflow" and len(table) == IMAGENET else
                                  len(table) - 1)
    if len(table) == num_classes and key == "soflow":
        weights["y_embedder.embedding_table.weight"] = torch.cat([table, 0 * table[:1]])
        return "label table: without a null row, which is added as zeros"
    if key == "soflow" and not given and len(table) != IMAGENET + 1:
        return f"label table: the last of {len(table)} rows is taken to be the null label"
    if len(table) != num_classes + 1:
        rule = f"{len(table)} or {len(table) - 1}" if key == "soflow" else len(table) - 1
        raise UserError(f"--num-classes must be {rule} for this file, got {num_classes}; give that "
                        f"of the network")
    return None


def warm_start(weights, *, reverse):
    """Turn a flow model's weights, in place, into those of u(z, r, t, y) = its velocity.

    The embedder of t - r is new, its last layer zero. Of a final layer with twice the channels the
    first half of them is the velocity (SiT, DiT). reverse: in the flow t = 0 is noise and the
    velocity is x - eps, so that u(z, r, t, y) = -v(z, 1 - t, y).
    """
    width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    sign = -1 if reverse else 1
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = weights[name].unflatten(0, (patch * patch, -1))  # (p * p, C or 2 C, ...)
        weights[name] = sign * rows[:, :channels].flatten(0, 1)
    first = weights["t_embedder.mlp.0.weight"]
    if reverse:
        weights["t_embedder.mlp.0.weight"] = reverse_time(first)
    generator = torch.Generator().manual_seed(0)  # the same file gives the same weights
    weights |= {"r_embedder.mlp.0.weight": 0.02 * torch.randn(first.shape, generator=generator),
                "r_embedder.mlp.0.bias": torch.zeros(width),
                "r_embedder.mlp.2.weight": torch.zeros(width, width),
                "r_embedder.mlp.2.bias": torch.zeros(width)}


def reverse_time(weight):
    """The first layer (D, 256) of a time embedder that makes of t what weight makes of 1 - t: the
    features cos(f - t f) and sin(f - t f) of 1 - t are a rotation of those of t."""
    cos, sin = weight.double().chunk(2, dim=1)  # (D, 128) each
    f = 10000 ** (-torch.arange(cos.shape[1], dtype=torch.float64) / cos.shape[1])
    turned = [cos * f.cos() + sin * f.sin(), cos * f.sin() - sin * f.cos()]
    return torch.cat(turned, dim=1).to(weight.dtype)


IMAGENET = 1000  # classes
HEADS = {width: heads for _, width, heads in SIZES.values()}  # of a width, in every repository


def network_config(weights, heads):
    """{"model", "sizes"}, as far as the table of models does not tell them, by the shapes. heads:
    --heads, as only the norms of an ImprovedDiT tell its own. Raises UserError."""
    width, _, patch, _ = weights["x_embedder.proj.weight"].shape
    head_depth = count(weights, "u_heads")
    known = (width // len(weights["u_heads.0.attn.q_norm.weight"]) if head_depth else
             HEADS.get(width))
    heads = heads or known
    if not heads or heads != (known or heads) or width % heads:
        rule = f"{known} for width" if known else "a divisor of the width"
        raise UserError(f"--heads must be {rule} {width}, got {heads or 'none'}; give that of the "
                        f"network")
    sizes, more = {"patch_size": patch, "hidden_size": width, "num_heads": heads}, {}
    if head_depth:
        family, depth = "iMF", count(weights, "shared_blocks") + head_depth
        sizes |= {"depth": depth, "head_depth": head_depth}
        if "v_heads.0.norm1.weight" not in weights:
            more = {"v_head": False}
    else:
        family, hidden = "DiT", len(weights["blocks.0.mlp.fc1.bias"])
        sizes |= {"depth": count(weights, "blocks")}
        if hidden != 4 * width:
            more = {"mlp_ratio": (hidden + 0.5) / width}  # DiT rounds down
    for name, constructor in DiT_models.items():
        if getattr(constructor, "keywords", None) == sizes:
            return {"model": name} | ({"sizes": more} if more else {})
    return {"model": family, "sizes": sizes | more}


def data_config(weights, repository, args, image_size):
    """What a config says of the data."""
    _, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    factor = {3: 1, 4: 8}.get(channels)  # pixels, or latents of the Stable Diffusion VAE
    if factor is None:
        raise refusal("hold a network of pixels or of 4 latent channels", f"{channels} channels")
    size = image_size or 256
    if "pos_embed" in weights:
        size = math.isqrt(weights["pos_embed"].shape[1]) * patch * factor
    if image_size not in (None, size) or size % (factor * patch):
        rule = size if "pos_embed" in weights else f"a multiple of {factor * patch}"
        raise UserError(f"--image-size must be {rule} for this file, got {image_size or size}; "
                        f"give that of the network")
    classes = len(weights["y_embedder.embedding_table.weight"]) - 1
    if classes < 1 or args.get("num_classes") == classes + 1:
        raise refusal("hold a label table with a null row", f"one of {classes + 1} rows for "
                      f"{args.get('num_classes', 'no')} classes")
    vae = args.get("vae") if args.get("vae") in ("ema", "mse") else repository.vae
    return {"image_size": size, "latent_shape": [channels, size // factor, size // factor],
            "num_classes": classes, "vae": "none" if factor == 1 else vae,
            "scale": 1.0 if factor == 1 else repository.scale}


# ---- to others -----------------------------------------------------------------------------


def export(state, repository):
    """What torch.save must write for a repository, of FORMATS, of a state that convert returned.
    Raises UserError for a network that the repository lacks."""
    weights, config = state["ema"], state["config"]
    with torch.device("meta"):
        network = type(build(config))
    fitting = {DiT: FORMATS[:-1], ImprovedDiT: ("ours", "imeanflow")}.get(network, ("ours",))
    if repository not in fitting:
        raise UserError(f"--format must be {' or '.join(fitting)} for {config['model']}, got "
                        f"{repository}; give another")
    if repository == "imeanflow":
        return dict(official_names(weights))
    if repository == "haoyizhu":
        weights = {re.sub("^r_embedder", "h_embedder", name): value
                   for name, value in weights.items()}
    steps = {} if repository == "noamelata" else {"steps": 0}
    return {"model": weights, "ema": weights, **steps}


def official_names(weights):
    """Yields (name, tensor) as in improved MeanFlow's released files, which always have the v
    head's final layer: without a v head it is the u head's."""
    for name, value in weights.items():
        parent, _, last = name.rpartition(".")
        if re.search(r"(_proj|\.w\d|mlp\.\d|\.linear)$", parent):
            parent += "._flax_linear"
        elif parent.endswith("embedding_table"):
            parent += "._flax_embedding"
        full = f"net.{parent}.{last}" if parent else f"net.{last}"
        yield full, value
        if name.startswith("u_final_layer.") and "v_final_layer.linear.bias" not in weights:
            yield full.replace("net.u_", "net.v_"), value

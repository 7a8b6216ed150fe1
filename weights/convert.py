"""What other repositories saved, under our names, and back.

convert recognises a network by names and shapes of its tensors and returns a checkpoint of ours.
export gives it the names of another repository. engine/containers.py opens the files.

Known: the official JAX states of MeanFlow (Gsunshine/meanflow) and improved MeanFlow
(Lyy-iiis/imeanflow), the latter's PyTorch weights, the PyTorch ports noamelata/MeanFlow,
zhuyu-cs/MeanFlow and HaoyiZhu/MeanFlow-PyTorch, our own files; and, as a start for training, the
flow models of willisma/SiT and sihyun-yu/REPA.
"""

import json
import math
import re
from typing import NamedTuple

import torch

from engine.checkpoint import check_fields
from engine.errors import UserError
from models import IMPROVED_SIZES, SIZES, DiT, ImprovedDiT, build, describe, sincos_table
from weights.foreign_files import is_unet, refuse


class Origin(NamedTuple):
    """What the tensors of a repository do not tell."""

    repository: str
    vae: str = "ema"  # whose decoder the repository samples with
    scale: float = 0.18215


ORIGINS = {
    "meanflow": Origin("Gsunshine/meanflow", "mse"),
    "imeanflow": Origin("Lyy-iiis/imeanflow", "mse"),
    "noamelata": Origin("noamelata/MeanFlow"),
    "zhuyu": Origin("zhuyu-cs/MeanFlow", scale=0.18125),  # so in its training and its evaluation
    "haoyizhu": Origin("HaoyiZhu/MeanFlow-PyTorch"),
    "sit": Origin("willisma/SiT"),
    "repa": Origin("sihyun-yu/REPA"),
}
SOURCES = ("noamelata", "zhuyu", "sit", "repa")  # those that a file alone may not tell apart
FORMATS = ("ours", "noamelata", "zhuyu", "haoyizhu", "imeanflow")


# ---- names ---------------------------------------------------------------------------------


# Names of an earlier version of improved MeanFlow's code (Lyy-iiis/imeanflow, convert.py)
EARLIER_NAMES = {"k_embedder": "omega_embedder", "cfg_start_cond_tokens": "t_min_tokens",
                 "cfg_end_cond_tokens": "t_max_tokens", "time_cond_tokens": "time_tokens",
                 "class_cond_tokens": "class_tokens", "kappa_cond_tokens": "omega_tokens"}
WRAPPERS = ("module.", "_orig_mod.", "net.")  # of DistributedDataParallel, torch.compile, a parent


def plain_names(weights):
    """The tensors under PyTorch's names, without the prefixes that all names share.

    A prefix of some names only, as of a network and its average in one file, stays.
    """
    for prefix in WRAPPERS * 2:  # in any order
        if weights and all(str(name).startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    plain = sum(re.fullmatch(r"blocks\.\d+\.attn\.qkv\.bias", str(name)) is not None
                for name in weights)
    found = {}
    for name, value in weights.items():
        parts = [EARLIER_NAMES.get(part, part) for part in str(name).split(".")
                 if part not in ("_flax_linear", "_flax_embedding")]
        if parts[0] == "decoder_blocks" and parts[1:2] and parts[1].isdecimal():
            parts[:2] = "blocks", str(plain + int(parts[1]))  # REPA's names before its release
        found[".".join(parts)] = value
    return found


def from_jax(weights):
    """The tensors of a JAX state with PyTorch's names and layouts; empties the dict it is given.

    Linear kernels (in, out) are transposed, a convolution's (h, w, in, out) is permuted, the
    one-dimensional weights of norms are as they are.
    """
    found = {}
    for path in list(weights):
        tensor, (*parents, last) = weights.pop(path), path.split(".")
        if last == "kernel" and tensor.ndim in (2, 4):
            tensor = tensor.T if tensor.ndim == 2 else tensor.permute(3, 2, 0, 1)
        last = "weight" if last in ("kernel", "scale", "embedding") else last
        name = ".".join([*parents, last])
        name = re.sub(r"\blayers_(\d+)", r"\1", name)
        name = re.sub(r"\b(shared_blocks|u_heads|v_heads)_(\d+)", r"\1.\2", name)
        found[name] = tensor.contiguous()
    return found


FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_tensors(weights):
    """The tensors in float32. Raises UserError unless all are finite floats with elements."""
    found = {}
    for name, value in weights.items():
        fault = None
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            fault = f"a {type(value).__name__} and no tensor"
        elif value.dtype not in FLOATS or value.layout != torch.strided or value.is_meta:
            fault = f"of {str(value.dtype).removeprefix('torch.')} on {value.device}"
        elif not value.numel():
            fault = "empty"
        else:
            found[name] = value.float()
            if not found[name].isfinite().all():
                fault = "not finite in float32"
        if fault:
            raise refuse("hold finite floating-point tensors", f"{name!r:.80}, which is {fault}",
                         "give a plain state dict, before it was wrapped, quantised, cut or "
                         "diverged")
    return found


# ---- recognition ---------------------------------------------------------------------------


def recognise(source, weights, named=None):
    """The key in ORIGINS of the repository that saved these weights, which have plain names.

    named: --source. Raises UserError for other networks, and where a file cannot tell.
    """
    choices = possible_origins(source, weights)
    if named and named not in choices:
        raise UserError(f"--source must be {' or '.join(choices)} for this file, got {named}; "
                        f"leave it out")
    if not named and choices == ("sit", "repa"):
        raise UserError("--source must be given for one time embedder and twice the channels, "
                        "which files of SiT and DiT have alike, got none; give --source sit if it "
                        "is SiT's")
    return named or choices[0]


def possible_origins(source, weights):
    """The keys in ORIGINS that a file may be of, the likeliest first."""
    if "shared_blocks.0.norm1.weight" in weights:
        return ("imeanflow",)
    if not {"x_embedder.proj.weight", "blocks.0.attn.qkv.weight"} <= weights.keys():
        found = ("a U-Net, as of py-meanflow" if is_unet(weights)
                 else "tensors of no network that is known")
        raise refuse("hold a DiT", f"{found} ({next(iter(weights), 'none'):.60} ...)")
    if any("q_norm" in name for name in weights):
        raise refuse("hold attention as DiT has it", "one that normalises queries and keys "
                     "(attn.q_norm), as --qk-norm makes it")
    if "h_embedder.mlp.0.weight" in weights:
        return ("meanflow",) if source.jax else ("haoyizhu",)
    channels, patch = weights["x_embedder.proj.weight"].shape[1:3]
    wide = len(weights["final_layer.linear.bias"]) == 2 * channels * patch**2
    if "r_embedder.mlp.0.weight" not in weights:
        return flow_origins(source, wide)
    if wide:
        raise refuse("hold as many output channels as input channels", "twice as many beside a "
                     "second time embedder (zhuyu-cs's --finetune), of which it is not known what "
                     "they mean")
    if "steps" in source.keys:  # of the two only zhuyu's training file tells the step
        return ("zhuyu",)
    return ("noamelata",) if {"opt", "args"} & set(source.keys) else ("noamelata", "zhuyu")


def flow_origins(source, wide):
    """As possible_origins, of a network with one time embedder. wide: of twice the channels."""
    path, prediction = (str(source.args.get(name, "")).lower()
                        for name in ("path_type", "prediction"))
    if path not in ("", "linear") or prediction not in ("", "velocity", "v"):
        raise refuse("hold a velocity of the linear path",
                     f"path_type {path:.40}, prediction {prediction:.40}")
    if prediction:
        return ("sit",) if wide or prediction == "velocity" else ("repa",)
    if wide and source.args:
        raise refuse("hold a velocity", "a DiT that predicts noise at integer times, of which no "
                     "MeanFlow can be made")
    return ("sit", "repa") if wide else ("repa", "sit")


# ---- to our names --------------------------------------------------------------------------


def convert(source, *, heads=None, image_size=None, named=None):
    """(state, report): a checkpoint of ours, ready to be saved, and lines about it.

    state: {step, model, ema, opt, config}; model and ema are the same float32 weights. heads,
    image_size, named: the options --heads, --image-size, --source. Raises UserError.
    """
    if source.config is None:
        weights, config, report = adopt(source, heads, image_size, named)
    else:
        for option, value in (("heads", heads), ("image-size", image_size), ("source", named)):
            if value is not None:
                raise UserError(f"--{option} must come with a file of another repository, got "
                                f"{value} with one of ours, whose config tells it; leave it out")
        weights, config = check_tensors(source.weights), dict(source.config)
        try:
            json.dumps(config)
            check_fields(config, weights)
        except (KeyError, TypeError, ValueError) as error:
            raise refuse("hold a whole config", f"one of which {error!s:.100}") from error
        report = [f"recognised: {source.container}, {source.which} weights"]
    weights = {name: value.contiguous() for name, value in weights.items()}
    check_shapes(weights, config)
    report.append(f"network: {describe(config)}; {sum(map(torch.numel, weights.values())):,} "
                  f"numbers, {config['num_classes']} classes, latents {config['latent_shape']}")
    state = {"step": 0, "model": weights, "ema": weights, "opt": None, "config": config}
    return state, report


def adopt(source, heads, image_size, named):
    """(weights, config, report) of a file of another repository."""
    try:
        given = plain_names(from_jax(source.weights) if source.jax else source.weights)
        origin = recognise(source, given, named)
        given = check_tensors(given)
        weights = to_ours(given, origin)
        sizes = improved_sizes if origin == "imeanflow" else dit_sizes
        config = sizes(weights, heads) | describe_data(weights, origin, source.args, image_size)
    except UserError:
        raise
    except KeyError as error:
        raise refuse("hold a whole network", f"one without {error.args[0]!s:.80}") from error
    except Exception as error:  # tensors of any shape
        raise refuse("hold a whole network", "one whose tensors do not fit together "
                     f"({error!s:.100})") from error
    about = f"{source.which} weights" if source.which else "weights"
    about += f" of step {source.step}" if source.step else ""
    config["source"] = f"{ORIGINS[origin].repository}, {about}"
    report = [f"recognised: {ORIGINS[origin].repository}, {source.container}, {about}"]
    report += [line for applies, line in (
        (any("decoder_blocks." in name for name in source.weights),
         "renamed: decoder_blocks, which follow blocks"),
        (origin in ("meanflow", "haoyizhu"), "renamed: h_embedder, here r_embedder"),
        (origin == "sit", "changed: time and sign, as SiT's t = 0 is noise"),
        (origin in ("sit", "repa"), "start for training: u(z, r, t, y) is the flow's velocity for "
                                    "every r, so one step gives no image yet"),
        ("v_final_layer.linear.bias" in given and "v_final_layer.linear.bias" not in weights,
         "left out: v_final_layer, as the blocks of its head are missing"),
        (any(name.startswith("projectors.") for name in given), "left out: projectors"),
        ("pos_embed" in weights and "pos_embed" not in given,
         f"position table: computed for {config['image_size']} pixels; --image-size names others"),
        (origin == "noamelata" and not {"opt", "args"} & set(source.keys) and not named,
         "not known: noamelata's or zhuyu's; --source zhuyu sets its latent scale .18125"),
    ) if applies]
    space = "per channel" if origin == "imeanflow" else f"by {config['scale']}"
    report.append(f"data: images of {config['image_size']} pixels, "
                  + ("no VAE" if config["vae"] == "none" else
                     f"VAE {config['vae']}, latents scaled {space}"))
    return weights, config, report


def to_ours(given, origin):
    """The tensors that our network has, of plain names, under our names and conventions."""
    v_head = "v_heads.0.norm1.weight" in given
    weights = {name: value for name, value in given.items()
               if not name.startswith("projectors.")
               and (v_head or not name.startswith("v_final_layer."))}
    if origin in ("meanflow", "haoyizhu"):
        weights = {re.sub("^h_embedder", "r_embedder", name): value
                   for name, value in weights.items()}
    if origin in ("sit", "repa"):
        warm_start(weights, reverse=origin == "sit")
    return weights


def warm_start(weights, *, reverse):
    """Turn a flow model's weights, in place, into those of a MeanFlow network with
    u(z, r, t, y) = its velocity, for every r.

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
    """The first layer (D, 256) of a time embedder that makes of t what weight makes of 1 - t.

    With angles f the features of 1 - t are cos(f - t f) and sin(f - t f), a rotation of those of t.
    """
    cos, sin = weight.double().chunk(2, dim=1)  # (D, 128) each
    f = 10000 ** (-torch.arange(cos.shape[1], dtype=torch.float64) / cos.shape[1])
    turned = [cos * f.cos() + sin * f.sin(), cos * f.sin() - sin * f.cos()]
    return torch.cat(turned, dim=1).to(weight.dtype)


# ---- sizes and data ------------------------------------------------------------------------


HEADS = {width: heads for _, width, heads in SIZES.values()}  # of a width, in every repository


def dit_sizes(weights, heads):
    """{"model"} and, outside the table, {"sizes"} of a DiT, by the shapes of its tensors."""
    width, _, patch, _ = weights["x_embedder.proj.weight"].shape
    depth, hidden = count(weights, "blocks"), len(weights["blocks.0.mlp.fc1.bias"])
    wanted = HEADS.get(width)
    if heads is None and wanted is None:
        raise UserError(f"--heads must be given for width {width}, which no published size has, "
                        f"got none; name the number of attention heads")
    if heads and (wanted or heads) != heads:
        raise UserError(f"--heads must be {wanted} for width {width}, got {heads}; leave it out")
    heads = heads or wanted
    if width % heads:
        raise UserError(f"--heads must divide the width {width}, got {heads}; name the number of "
                        f"heads that the network was trained with")
    for size, known in SIZES.items():
        if (depth, width, heads) == known and patch in (2, 4, 8) and hidden == 4 * width:
            return {"model": f"DiT-{size}/{patch}"}
    ratio = hidden / width
    if int(width * ratio) != hidden:  # rounded down
        ratio = (hidden + 0.5) / width
    return {"model": "DiT", "sizes": {"patch_size": patch, "hidden_size": width, "depth": depth,
                                      "num_heads": heads, "mlp_ratio": ratio}}


def improved_sizes(weights, heads):
    """As dit_sizes, of an ImprovedDiT, whose norms tell the heads."""
    width, _, patch, _ = weights["x_embedder.proj.weight"].shape
    found = max(1, width // len(weights["shared_blocks.0.attn.q_norm.weight"]))
    if heads not in (None, found):
        raise UserError(f"--heads must be {found} for this file, got {heads}; leave it out")
    head_depth = count(weights, "u_heads")
    depth = count(weights, "shared_blocks") + head_depth
    v_head = {} if "v_heads.0.norm1.weight" in weights else {"v_head": False}
    for size, known in IMPROVED_SIZES.items():
        if (depth, head_depth, width, found, patch) == known:
            return {"model": f"iMF-{size}", **({"sizes": v_head} if v_head else {})}
    sizes = {"patch_size": patch, "hidden_size": width, "depth": depth, "head_depth": head_depth,
             "num_heads": found}
    return {"model": "iMF", "sizes": sizes | v_head}


def count(weights, group):
    """How many blocks there are of the names group.N."""
    numbers = {int(match[1]) for name in weights
               if (match := re.match(rf"{group}\.(\d+)\.", name))}
    return max(numbers) + 1 if numbers else 0


def describe_data(weights, origin, args, image_size):
    """What a config says of the data; also adds the position table where a DiT's file lacks it."""
    width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    factor = {3: 1, 4: 8}.get(channels)  # pixels, or latents of the Stable Diffusion VAE
    if factor is None:
        raise refuse("hold a network of pixels or of 4 latent channels", f"{channels} channels")
    size = image_size or 256
    if "pos_embed" in weights:
        grid = math.isqrt(weights["pos_embed"].shape[1])
        size = grid * patch * factor
        if image_size not in (None, size):
            raise UserError(f"--image-size must be {size} for this file, got {image_size}; leave "
                            f"it out")
    elif size % (factor * patch):
        raise UserError(f"--image-size must be a multiple of {factor * patch} for this file, got "
                        f"{size}; give the size that the network was trained for")
    elif origin != "imeanflow":
        weights["pos_embed"] = sincos_table(width, size // factor // patch)
    classes = len(weights["y_embedder.embedding_table.weight"]) - 1
    if classes < 1 or args.get("num_classes") == classes + 1:
        raise refuse("hold a label table with a null row", f"one of {classes + 1} rows for "
                     f"{args.get('num_classes', 'no')} classes")
    about = ORIGINS[origin]
    vae = args.get("vae") if args.get("vae") in ("ema", "mse") else about.vae
    return {"image_size": size, "latent_shape": [channels, size // factor, size // factor],
            "num_classes": classes, "vae": "none" if factor == 1 else vae,
            "scale": 1.0 if factor == 1 else about.scale}


def check_shapes(weights, config):
    """Raise UserError unless the weights are those of the config's network."""
    try:
        with torch.device("meta"):  # a hostile config may ask for more memory than there is
            wanted = {name: value.shape for name, value in build(config).state_dict().items()}
    except Exception as error:  # of a config of any content
        raise refuse("hold a network that can be built", f"one with {error!s:.150}") from error
    found = {name: value.shape for name, value in weights.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            shapes = [tuple(group[name]) if name in group else "missing"
                      for group in (found, wanted)]
            raise refuse("hold the tensors of its network and no others",
                         f"{name:.80}: {shapes[0]} in place of {shapes[1]}".replace(
                             "of missing", "of none"))


# ---- to the names of others ----------------------------------------------------------------


def export(state, kind):
    """What torch.save must write for another repository, of a state that convert returned.

    kind: one of FORMATS but ours. Raises UserError for a network that the repository lacks.
    """
    weights, config = state["ema"], state["config"]
    with torch.device("meta"):
        net = build(config)
    improved = isinstance(net, ImprovedDiT)
    if not isinstance(net, DiT | ImprovedDiT) or improved != (kind == "imeanflow"):
        fit = "imeanflow or ours" if improved else " or ".join(
            name for name in FORMATS if name != "imeanflow")
        raise UserError(f"--format must be {fit} for {config['model']}, got {kind}; give another")
    if improved:
        return dict(official_names(weights))
    if kind == "haoyizhu":
        weights = {re.sub("^r_embedder", "h_embedder", name): value
                   for name, value in weights.items()}
    steps = {} if kind == "noamelata" else {"steps": 0}
    return {"model": weights, "ema": weights, **steps}


def official_names(weights):
    """Yields (name, tensor) as improved MeanFlow's released files have them.

    Their network always has the v head's final layer; without a v head it is the u head's.
    """
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

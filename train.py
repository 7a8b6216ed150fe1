"""Train a network with MeanFlow, improved MeanFlow or another method of the table in methods.py.

One process, for instance on a laptop, and eight GPUs of one node:

    python train.py --data-path data/digits --vae none --image-size 8 --model DiT-T/4 --cfg 1
    torchrun --standalone --nproc_per_node=8 train.py --data-path imagenet/train --vae ema

Several nodes: on each, torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d
--rdzv_endpoint=HOST:29500 train.py ... with --data-path and --run-dir on storage that all share.

Repeating a command resumes its run. The defaults are the paper's DiT-B/4 recipe.
"""

import argparse
import copy
import hashlib
import json
import math
import re
import shlex
import signal
import sys
import time
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of Ctrl-C during the imports

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from dataset.images import ImageFolder
from dataset.latents import LatentShards, read_dataset_json
from dataset.loader import BatchSampler, load_batches
from dataset.vae import LATENT_NORMALISATION, load_codec, normalisation, posterior_sample
from engine import sharding
from engine.checkpoint import (
    Saver,
    check_config,
    differences,
    list_checkpoints,
    newest_checkpoint,
    restore_checkpoint,
)
from engine.distributed import counted_generator, counted_seed, start_processes
from engine.errors import RunError, UserError, naming, run_main
from engine.faults import Guard, Signals, propagate_nonfinite
from engine.files import FolderLock, make_folder, remove_temporary_files, write_json
from engine.log import OF_DATA, OF_START, Log, code_version, describe_environment
from engine.optimizer import Both, parameter_groups
from engine.options import Parser, float_range, int_range
from meanflow import SettingError, rows_of
from methods import METHODS, default_method, make_method, settings_by_name
from metrics.extractors import known_protocol
from metrics.reference import Evaluation, metric_names, notes
from models import FAMILIES, DiT_models, build, describe, network_class
from sample import ImageSampler
from weights.hub import file_or_address
from weights.start import InitialWeights

# Options that may change when a run is resumed
MAY_CHANGE = ("data_path", "epochs", "max_steps", "run_dir", "ckpt_every", "keep_last", "log_every",
              "sample_every", "num_workers", "compile", "grad_accum_steps", "shard",
              "checkpoint_activations", "skip_nonfinite", "eval_every", "eval_samples", "fid_ref",
              "protocol", "skip_bad_images", "num_images", *OF_START)
IN_CHECKPOINTS = {"model", "method", "optimizer", "init", "encoded_data", "image_size", "vae",
                  "allow_change"}  # which --allow-change cannot change
# Of a config, beside the options
NO_OPTIONS = (*OF_DATA, *OF_START, "sizes", "conditions", "total_steps", "source")
DEFAULT_MODEL = "DiT-B/4"
EVAL_BATCH = 50  # images; a constant, as the rounding depends on it
LONGEST_NAME = 200  # characters of a default run directory; file systems take 255 bytes


def parse_args(argv=None):
    """The options as they are given; resolve fills in the others."""
    parser = Parser("Train a network to generate in one step. Repeat a command to resume its run.")
    data, method, optimisation, run = map(parser.add_argument_group, (
        "data", "method", "model and optimisation", "run"))
    add_data_options(data.add_argument)
    add_optimisation_options(optimisation)
    add_run_options(run.add_argument)
    add_method_options(method.add_argument)  # last: no setting may have the name of another option
    args = parser.parse_args(argv)
    if args.eval_every and args.fid_ref is None:
        parser.error(f"--eval-every must come with --fid-ref, got {args.eval_every} without; give "
                     f"reference statistics")
    if args.skip_bad_images and args.encoded_data:
        parser.error("--skip-bad-images must come without --encoded-data, got both; give it to "
                     "encode_imagenet.py")
    if args.shard and args.compile:
        parser.error("--compile must come without --shard, got both; leave one out")
    if args.shard and args.optimizer == "muon":
        parser.error("--optimizer muon must come without --shard, got both; leave one out")
    if args.allow_change and not args.run_dir:
        parser.error("--allow-change must come with --run-dir, as the default one depends on the "
                     "options; name the run's folder")
    for name in args.allow_change:
        if name.replace("-", "_") not in vars(args).keys() - IN_CHECKPOINTS:
            parser.error(f"--allow-change must name options that a checkpoint does not depend on, "
                         f"got {name}; begin another run with them, perhaps from --init")
    return args


def add_data_options(add):
    add("--data-path", type=Path, required=True,
        help="folder with a folder of images per class, or that encode_imagenet.py wrote")
    add("--encoded-data", action="store_true", help="train on latents of encode_imagenet.py")
    add("--image-size", type=int_range(1),
        help="side of the centre crop, pixels (default: of the latents or of --init, else 256)")
    add("--vae", help="ema or mse: the Stable Diffusion VAE with that decoder; a folder: a local "
                      "AutoencoderKL; none: pixels (default: of the latents or --init, else ema)")
    add("--flip", action="store_true", help="mirror half of the images at random")
    add("--skip-bad-images", action="store_true",
        help="in place of an unreadable image take another of its class")
    add("--num-workers", type=int_range(0, 1024), default=4,
        help="processes that read images, threads that read latents, per rank; 0 = none of them")


def add_method_options(add):
    """--method, and an option for each setting of a method of the table."""
    add("--method", choices=METHODS,
        help="training objective (default: the first of these that fits the network)")
    for name, known in settings_by_name().items():
        first, *others = known.values()
        if name in NO_OPTIONS or any(type(a.default) is not type(first.default) for a in others):
            raise UserError(f"METHODS must have settings with names of their own and of one kind, "
                            f"got {name} of {', '.join(known)}; rename it")
        kind = {"type": float_range(-math.inf)}
        if isinstance(first.default, str):  # each method checks its own
            kind = {"choices": [word for a in known.values() for word in a.rule]}
        elif isinstance(first.default, tuple):
            kind |= {"nargs": len(first.default), "metavar": "NUMBER"}
        elif isinstance(first.default, int):
            kind = {"type": int_range(-2**63)}
        try:
            add(f"--{name.replace('_', '-')}", **kind, help=first.help.replace("%", "%%")
                + f" (default: {describe_defaults(known)})")
        except argparse.ArgumentError as error:
            raise UserError(f"METHODS must have settings with names of their own, got {name} of "
                            f"{', '.join(known)}, an option of train.py; rename it") from error


def describe_defaults(known):
    """The default of a setting, {method's name: Setting}; by method if they differ, or if only some
    methods have it."""
    texts = {}
    for method, value in known.items():
        default = value.train_default
        text = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
        texts.setdefault(text, []).append(method)
    if len(texts) == 1 and len(known) == len(METHODS):
        return next(iter(texts))
    return "; ".join(f"{', '.join(methods)} {text}" for text, methods in texts.items())


def add_optimisation_options(group):
    add = group.add_argument
    add("--model", choices=DiT_models, metavar="NAME",
        help="DiT-{T,S,B,M,L,XL}/{2,4,8} for MeanFlow, iMF-{B,M,L,XL}/2 or iMF-T/4 for improved "
             f"MeanFlow: size and patch size (default: that of --init, else {DEFAULT_MODEL})")
    add("--init", type=file_or_address, metavar="FILE",
        help="start from a checkpoint's averaged weights: path or hf://OWNER/REPO[@REVISION]/FILE")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int_range(1), default=80, help="passes over the data")
    length.add_argument("--max-steps", type=int_range(1), help="steps, in place of --epochs")
    add("--global-batch-size", type=int_range(1), default=256,
        help="images per optimiser step, over all processes")
    add("--grad-accum-steps", type=int_range(1), default=1,
        help="micro-batches per step and rank: less memory, the same gradient")
    add("--checkpoint-activations", action="store_true",
        help="recompute activations in the backward pass: less memory, more time")
    add("--shard", action="store_true",
        help="divide weights, gradients, moments and averages among the ranks; needs torch 2.13")
    add("--optimizer", choices=("adamw", "muon"), default="adamw",
        help="adamw; muon: that for the weights of linear layers, AdamW for the rest")
    add("--lr", type=float_range(0, above=True), default=1e-4, help="rate after warm-up")
    add("--warmup-steps", type=int_range(0), default=0,
        help="steps in which the rate rises linearly from 0; 0 = none")
    add("--cooldown-steps", type=int_range(0), default=0,
        help="last steps, in which the rate falls linearly to 0; 0 = none")
    add("--weight-decay", type=float_range(0), default=0.0, help="decoupled decay; 0 = none")
    add("--clip-grad", type=float_range(0), default=0.0,
        help="gradient norm above which gradients are scaled down to it; 0 = off")
    add("--ema-decay", type=float_range(0, 1), default=0.9999,
        help="decay per step of the averaged weights, which sampling uses")
    add("--precision", default="tf32", choices=("fp32", "tf32", "bf16"),
        help="fp32; tf32: fp32 with TensorFloat-32 products on GPUs; bf16: autocast")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="torch.compile the passes of a step (default: on a GPU, if it works)")
    add("--seed", type=int_range(0), default=0, help="fixes weights, data order and all noise")


def add_run_options(add):
    add("--run-dir", type=Path,
        help="folder (default: results/<model>-cfg<scale>, iMF results/<model>-omega<largest>, and "
             "each option that differs from its default)")
    add("--allow-change", nargs="+", default=[], metavar="OPTION",
        help="options of which a run that resumes takes new values, such as lr")
    add("--ckpt-every", type=int_range(1), default=5000, help="steps between checkpoints")
    add("--keep-last", type=int_range(0), default=3, help="checkpoints kept; 0 = all")
    add("--skip-nonfinite", type=int_range(0), default=0,
        help="steps in a row that may be skipped for a gradient that is not finite")
    add("--log-every", type=int_range(1), default=100, help="steps between log lines")
    add("--sample-every", type=int_range(0), default=5000,
        help="steps between pictures of one-step samples; 0 = none")
    add("--eval-every", type=int_range(0), default=0,
        help="steps between evaluations of one-step samples, each after a checkpoint; 0 = none")
    add("--fid-ref", type=Path, metavar="REF.npz", help="reference statistics for --eval-every")
    add("--eval-samples", type=int_range(2), default=10000,
        help="images per evaluation; published figures use 50000")
    add("--protocol", type=known_protocol, default="pytorch-fid", help="as in evaluate_fid.py")


def main(args):
    with start_processes(args.precision) as world:
        initial = resolve(args, world)
        run = Run(args, world, initial)
        state = TrainingState(args, run.config, run.codec, world, initial)
        with run:
            run.open(state)
            train(run, state)


def train(run, state):
    """The steps from that of the state to the last, and what happens between them."""
    args, meter = run.args, Meter(run.world, run.args.global_batch_size)
    for data, y in run.read(state.step):
        if not state.warm:
            check_conditions(run, state, y)
            warm_up(state, run.log, data, y)
            meter.begin(state.step)
        meter.sums = meter.sums + train_step(state, data, y)

        stop = run.signals.stop()
        interval_ends, draw, evaluate, save = (
            run.is_due(every, state.step) for every in
            (args.log_every, args.sample_every, args.eval_every, args.ckpt_every))
        save = save or evaluate or stop  # an evaluation takes long
        if interval_ends or save:
            state.guard.raise_if_stopped()  # other steps do not wait for the device
            run.saver.raise_errors()
        if interval_ends or stop:
            means = meter.read(state.step, state.extra)
            run.record(state.step, means, state.extra, interval_ends)
        if save:
            run.save(state)
        if draw:
            run.picture(state.step)
        if stop:
            break
        if evaluate:
            run.evaluate(state.step)
    run.finish(state)


# ---- options that depend on others --------------------------------------------------------------


def resolve(args, world):
    """Fill in, in place, the options that are not given, by the file of --init, the latents and the
    method. Returns the InitialWeights, or None without --init and for a run that has its own
    checkpoints and no longer needs that file. Raises UserError."""
    initial, known = None, {"model": args.model or DEFAULT_MODEL}
    if args.init:
        known = world.on_main(lambda: begun_config(args))
        if known is None:
            with naming("--init"):
                initial = InitialWeights(args.init, world)
            known = {**initial.config, "sizes": initial.sizes}
        if args.model not in (None, known["model"]):
            raise UserError(f"--model must be {known['model']} like the network of --init, got "
                            f"{args.model}; leave it out")
    args.model, args.sizes = known["model"], known.get("sizes")
    if args.encoded_data:
        known = read_dataset_json(args.data_path)
    defaults = resolve_method(args)
    # mse differs from ema in the decoder alone, which stays to be chosen
    defaults["vae"] = "ema" if known.get("vae") in (None, "mse") else known["vae"]
    defaults["image_size"] = known.get("image_size") or 256
    args.vae = defaults["vae"] if args.vae is None else args.vae
    args.image_size = args.image_size or defaults["image_size"]
    if args.run_dir is None:
        args.run_dir = default_run_dir(args, vars(parse_args(["--data-path", "."])) | defaults)
    if args.run_dir.resolve().is_relative_to(args.data_path.resolve()):
        raise UserError(f"--run-dir must lie outside --data-path, whose folders are classes, got "
                        f"{args.run_dir}; choose another folder")
    return initial


def begun_config(args):
    """The config of the run in --run-dir if it began from --init and has checkpoints, else None."""
    # Whatever suppress hides, check_config refuses or the run begins anew
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        config = json.loads((args.run_dir / "config.json").read_text())
        if list_checkpoints(args.run_dir / "checkpoints") and config["init"] == str(args.init):
            return config if config["model"] in DiT_models | FAMILIES else None
    return None


def resolve_method(args):
    """Fill in the method and its settings; refuse other methods' options and what the method
    refuses. Returns the settings' defaults. Raises UserError."""
    network, name = network_class(args.model), args.method
    if name is None and (name := default_method(network)) is None:
        raise UserError(f"--model must be a network that a method fits, got {args.model}; give its "
                        f"forward the inputs of a method of methods.py")
    method = METHODS[name]
    args.method, settings = name, method.settings()
    if network:
        check_fit(args, network)
    for option, known in settings_by_name().items():
        if option not in settings and getattr(args, option) is not None:
            raise UserError(f"--{option.replace('_', '-')} must come with --method "
                            f"{' or '.join(known)}, got {name}; leave it out")
    if args.precision == "bf16" and not method.takes_bfloat16:
        raise UserError(f"--precision must be fp32 or tf32 for --method {name}, got bf16, which is "
                        f"too coarse for its target; change it")
    defaults = {option: known.train_default for option, known in settings.items()}
    for option, default in defaults.items():
        value = getattr(args, option)
        value = tuple(value) if isinstance(value, list) else value
        setattr(args, option, default if value is None else value)
    try:
        make_method(vars(args), num_classes=1)
    except SettingError as error:
        raise UserError(f"--{error.name.replace('_', '-')} {error.rule}") from error
    return defaults


def default_run_dir(args, defaults):
    """results/<model>-<what names runs of the method>, then each option that differs from its
    default and cannot change in a run."""
    method = METHODS[args.method]
    parts = [args.model.replace("/", "-")]
    if args.method != default_method(network_class(args.model)):
        parts.append(args.method)
    parts += [f"{short}{getattr(args, name)}" for name, short in method.run_names.items()]
    for name, default in defaults.items():
        value = getattr(args, name)
        if value == default or name in (*MAY_CHANGE, *method.run_names, "model", "method"):
            continue
        text = "-".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
        option = name.replace("_", "-")
        parts.append(option if value is True else
                     f"{option}={re.sub('[^A-Za-z0-9.+-]', '_', Path(text).name)}")
    name = "-".join(parts)
    if len(name) > LONGEST_NAME:
        name = f"{name[:LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return Path("results", name)


# ---- a training step -----------------------------------------------------------------------------

# What a step is measured by, from which Meter makes means, before what the method calls extra. Of
# error, velocity error and 1: sums over the leading rows, which have r = t, and over those with
# r < t, by the number of all rows
STATISTICS = ("grad_norm", "made_steps", "loss", "error_equal", "velocity_error_equal",
              "share_equal", "error_unequal", "velocity_error_unequal", "share_unequal")


class TrainingState:
    """What training changes: the step, the network, its average, the optimiser.

    net: the bare network, sharded or not. forward: net for the forward with gradient, perhaps in
    DistributedDataParallel, perhaps compiled, as the passes of method may be. initial: the
    InitialWeights, or None. Raises UserError for a network that cannot be built.
    """

    def __init__(self, args, config, codec, world, initial=None):
        self.args, self.config, self.codec, self.world = args, config, codec, world
        self.step, self.warm, self.extra = 0, False, None
        try:
            with torch.device("meta"):
                build(config)
        except (ValueError, RuntimeError) as error:  # the latter for a size beyond all numbers
            raise UserError(f"--image-size must suit --model {args.model}, got {args.image_size}: "
                            f"{error!s:.200}") from error
        torch.manual_seed(args.seed)  # the same initial weights on every rank
        self.net = build(config)
        check_network(args, self.net)
        if args.checkpoint_activations and not hasattr(self.net, "checkpoint_activations"):
            raise UserError(f"--checkpoint-activations must come with a network that can, got "
                            f"--model {args.model}; leave it out")
        if initial:
            initial.load_into(self.net)
        self.net = self.net.to(world.device)
        self.ema = copy.deepcopy(self.net).eval().requires_grad_(False)
        self.net.checkpoint_activations = args.checkpoint_activations
        self.forward = sharding.parallelise(self.net, self.ema, world, shard=args.shard)
        self.params = list(self.net.parameters())
        self.optimizer = make_optimizer(args, parameter_groups(self.net))
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.guard = Guard(world, args.skip_nonfinite)
        self.method = make_method(config)
        self.normalisation = normalisation(config, world.device)

    def state_dict(self):
        """What a checkpoint holds."""
        return {"step": self.step, "model": self.net.state_dict(), "ema": self.ema.state_dict(),
                "opt": self.optimizer.state_dict(), "config": self.config}


def make_optimizer(args, params):
    """The optimiser of the options, for params as parameter_groups gives them."""
    if args.optimizer == "adamw":
        return adamw(args, params)
    matrices, rest = params
    # Its updates are then as large as AdamW's, and the same rate suits both
    muon = torch.optim.Muon([matrices], lr=args.lr, weight_decay=args.weight_decay,
                            adjust_lr_fn="match_rms_adamw")
    return Both(muon, adamw(args, [rest]))


def adamw(args, params):
    """AdamW with the betas of the papers, for a list of groups."""
    return torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay,
                             fused=True)


def check_fit(args, network):
    """Raise UserError unless the method fits the network, a module or its class."""
    method = METHODS[args.method]
    if not method.fits(network):
        raise UserError(f"--method must fit the network, got {args.method} for --model "
                        f"{args.model}, whose forward does not take "
                        f"{', '.join((*method.inputs, *method.keywords))}; choose another")


def check_network(args, net):
    """Raise UserError for a network that cannot be trained by the method, or at all."""
    check_fit(args, net)
    for name, module in net.named_modules():
        if (isinstance(module, nn.modules.batchnorm._BatchNorm)
                or getattr(module, "running_mean", None) is not None):
            raise UserError(f"--model must have no BatchNorm, which mixes the rows of a batch and "
                            f"so the times and guidance of all, and no running statistics, got "
                            f"{args.model} with {name}; take GroupNorm, LayerNorm or RMSNorm")


def train_step(state, data, y):
    """One optimiser step on this rank's share of the global batch.

    data: images uint8 (B, 3, H, W), or moments (B, 2, C, ...) of encoded data; y: labels (B,)
    int64, or a nest of tensors with B rows. Returns STATISTICS and the means of state.extra, one
    vector on the device: zeros where the step was skipped.
    """
    args = state.args
    # What a network draws, as dropout does, is not carried over from step to step either
    torch.manual_seed(counted_seed(args.seed, state.step, state.world.rank, "network"))
    try:
        losses = add_gradients(state, data, y)
    except Exception as error:
        if type(error).__name__ != "FailOnRecompileLimitHit":  # its module takes seconds to import
            raise
        raise RunError(f"step {state.step + 1}: torch.compile needs ever more graphs, as "
                       f"{type(state.net).__name__} changes; give --no-compile") from error
    set_rates(state)
    state.step += 1

    norm = sharding.full_tensor(torch.nn.utils.get_total_norm([p.grad for p in state.params]))
    skip = state.guard.judge(state.step, losses[0], norm)
    if args.clip_grad:
        torch.nn.utils.clip_grads_with_norm_(state.params, args.clip_grad, norm)
    # Made for loss scaling: a fused optimiser skips its step where this is 1, and no host waits
    waits = not getattr(state.optimizer, "_step_supports_amp_scaling", False)
    if not waits:
        state.optimizer.found_inf = skip
    if not (waits and skip):
        state.optimizer.step()
    state.optimizer.zero_grad()
    update_average(state.ema, state.net, args.ema_decay)
    statistics = torch.cat([norm[None], torch.ones_like(norm)[None], losses])
    return torch.where(skip > 0, 0, statistics)


def set_rates(state):
    """The optimiser's rates for the coming step, of warm-up and cool-down."""
    args, left = state.args, state.config["total_steps"] - state.step
    if args.warmup_steps or args.cooldown_steps:
        share = min(1, state.step / args.warmup_steps if args.warmup_steps else 1,
                    left / args.cooldown_steps if args.cooldown_steps else 1)
        for rate, group in zip(state.rates, state.optimizer.param_groups, strict=True):
            group["lr"] = rate * share


def add_gradients(state, data, y, *, exchange=True):
    """Forward and backward of this rank's rows, in micro-batches whose gradients add up.

    Returns the STATISTICS of the losses and state.extra, means over the micro-batches. In the
    backward of the last, if exchange, DistributedDataParallel averages the gradients over the
    ranks; a sharded network does so in every one.
    """
    world, count = state.world, state.args.grad_accum_steps
    posterior_noise, global_draws = draw_global_batch(state)
    losses = 0
    for i in range(count):
        # This rank has every world.size-th row of the global batch, this micro-batch every count-th
        # of those
        first, stride = world.rank + world.size * i, world.size * count
        moments = data[i::count]
        if not state.args.encoded_data:
            moments = state.codec.encode(moments)
        x = posterior_sample(moments, posterior_noise[first::stride], *state.normalisation)
        draws = global_draws.part(first, stride)
        exchange_now = exchange and i == count - 1
        with nullcontext() if exchange_now else sharding.local_gradients(state.forward):
            with world.autocast():
                rows = rows_of(y, slice(i, None, count))
                out = state.method.loss(state.net, x, rows, draws, forward=state.forward)
            (propagate_nonfinite(out.loss) / count).backward()
        # Sums over rows by the number of all rows add up over micro-batches, ranks and steps
        errors = torch.stack([out.error, out.velocity_error, torch.ones_like(out.error)], dim=1)
        sums = errors[:draws.equal].sum(0), errors[draws.equal:].sum(0)
        check_extra(state, out)
        extra = [out.extra[name].float().mean()[None] for name in state.extra]
        losses = losses + torch.cat(
            [out.loss.detach()[None], torch.cat(sums) / len(errors), *extra]) / count
    return losses


def check_extra(state, out):
    """Set state.extra, the names of Loss.extra, at first. Raises UserError for what is no extra."""
    if state.extra is None:
        reserved = {"step", "protocol", "num_samples", *STATISTICS, *LOG_TEXTS, *metric_names("")}
        for name, value in out.extra.items():
            if (name in reserved or not re.fullmatch(r"[\w.-]+", name)
                    or not isinstance(value, torch.Tensor) or value.requires_grad
                    or value.shape != out.error.shape):
                raise UserError(f"--method must give as extra detached tensors of one number per "
                                f"row, under words that are not in use, got {name!r:.60} of "
                                f"{state.args.method}; change its loss")
        state.extra = tuple(out.extra)
    if out.extra.keys() != {*state.extra}:
        raise UserError(f"--method must give the same extra in every step, got "
                        f"{', '.join(out.extra)} after {', '.join(state.extra)} of "
                        f"{state.args.method}; change its loss")


def draw_global_batch(state):
    """All noise of a step, for the global batch, however that is divided: the posterior's
    (B, C, h, w), and the Draws of the method."""
    args, device = state.args, state.world.device
    shape = (args.global_batch_size, *state.config["latent_shape"])
    posterior, method = (counted_generator(args.seed, state.step, purpose, device=device)
                         for purpose in ("posterior", "method"))
    noise = torch.randn(shape, device=device, generator=posterior)
    return noise, state.method.draw(shape, device=device, generator=method, step=state.step,
                                    total=state.config["total_steps"])


@torch.no_grad()
def update_average(ema, net, decay):
    """ema += (1 - decay) (weights - ema), in place. Buffers are copied: those of spectral norm
    change with the weights."""
    torch._foreach_lerp_([sharding.local_shard(p) for p in ema.parameters()],
                         [sharding.local_shard(p) for p in net.parameters()], 1 - decay)
    for average, buffer in zip(ema.buffers(), net.buffers()):
        average.copy_(buffer)


def check_conditions(run, state, y):
    """Raise UserError for conditions y that the method does not know, or samples do not have."""
    rows = len(tree_leaves(y)[0])
    try:
        state.method.drop(y, torch.zeros(rows, dtype=torch.bool, device=state.world.device))
    except ValueError as error:
        raise UserError(f"--method must know the conditions of the data: {error}") from error
    drawn = run.args.sample_every or run.args.eval_every
    if drawn and not isinstance(y, torch.Tensor) and not run.sampler.conditions:
        raise UserError("--data-path must have conditions(rows) for samples, as its conditions are "
                        "no labels, got none; write it, or give --sample-every 0")


def warm_up(state, log, data, y):
    """Compile, and let DistributedDataParallel settle, on a first batch as in train_step. Weights
    and gradients stay as they are."""
    if state.config["compile"]:
        compile_passes(state, log, data, y)
    if state.world.distributed:
        # DDP rebuilds its buckets after the first backward. With three or more ranks that changes
        # the order of the sums, and a resumed run would differ in bits
        add_gradients(state, data, y)
        state.net.zero_grad()
    state.warm = True


def compile_passes(state, log, data, y):
    """Compile the passes, and try them, forward and backward, on a batch as in train_step.

    Each pass is one graph (fullgraph), or torch.compile could leave any part of it to Python. If
    that fails on any rank, all train without it and the log says why; if --compile was given, it
    is a UserError.
    """
    began, reason, plain = time.perf_counter(), None, state.method
    try:
        compiled = torch.compile(state.net, fullgraph=True)
        state.forward = sharding.replace_network(state.forward, compiled)
        state.method = copy.copy(plain)
        state.method.compile()
        # No all-reduce: if the compiler failed on one rank, the others would hang in it
        add_gradients(state, data, y, exchange=False)
    except (torch.OutOfMemoryError, UserError):
        raise
    except Exception as error:  # every layer of the compiler raises errors of its own
        reason = describe_compiler_error(error)
    state.net.zero_grad()
    reasons = [f"rank {rank}: {reason}" for rank, reason in enumerate(state.world.gather(reason))
               if reason]
    name = type(state.net).__name__
    if not reasons:
        log.say(f"compiled the passes of {name} in {time.perf_counter() - began:.0f} s")
        return
    if state.args.compile:
        raise UserError(f"--compile: torch.compile failed for {name} on {reasons[0]}; give "
                        f"--no-compile or mend what it names")
    state.forward, state.method = sharding.replace_network(state.forward, state.net), plain
    log.say(f"torch.compile failed for {name}, training goes on without it; {reasons[0]}")


def describe_compiler_error(error):
    """The kind of an error of torch.compile, its first sentence, and the network's line in one."""
    what = " ".join(str(error).split("\n\n")[0].split())
    frames = re.findall(r'File "(.+)", line (\d+), in', str(error).rpartition("from user code:")[2])
    places = [f" ({Path(file).name}, line {line})" for file, line in frames
              if "site-packages" not in file]
    return f"{type(error).__name__}: {what:.200}{places[-1] if places else ''}"


class Meter:
    """Means over the steps since the last log line; the sums stay on the device until then."""

    def __init__(self, world, batch):
        self.world, self.batch = world, batch

    def begin(self, step):
        """Begin an interval after this step."""
        self.step, self.time, self.sums = step, time.perf_counter(), 0

    def read(self, step, extra):
        """The means over steps and ranks, by name, with those of the names extra; the next interval
        begins.

        _equal, _unequal: over the rows with r = t and with r < t, if there are any. gpu_memory_gb:
        the most, 10^9 bytes, that this rank's tensors have taken at once so far.
        """
        sums = (self.world.total(self.sums) / self.world.size).tolist()
        names = (*STATISTICS, *extra)
        sums = dict(zip(names, sums, strict=True))
        made, steps = sums["made_steps"], step - self.step
        mean = {name: value / max(made, 1) for name, value in sums.items()}
        means = {name: mean[f"{name}_equal"] + mean[f"{name}_unequal"]
                 for name in ("error", "velocity_error")}
        means |= {"loss": mean["loss"], "grad_norm": mean["grad_norm"],
                  "skipped_steps": round(steps - made),
                  "images_per_second": steps * self.batch / (time.perf_counter() - self.time)}
        if self.world.device.type == "cuda":
            means["gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        for rows in ("equal", "unequal"):
            if share := mean[f"share_{rows}"]:
                means |= {f"{name}_{rows}": mean[f"{name}_{rows}"] / share
                          for name in ("error", "velocity_error")}
        self.begin(step)
        return means | {name: mean[name] for name in extra}


# ---- the run -------------------------------------------------------------------------------------

# The log line. error is the number to watch: at p = 1 the weighted loss stays about 1
LOG_TEXTS = {"error": "error {:.4f}", "velocity_error": "velocity error {:.4f}",
             "loss": "loss {:.4f}", "grad_norm": "gradient norm {:.4f}",
             "images_per_second": "{:.1f} images/s", "gpu_memory_gb": "{:.2f} GB",
             "skipped_steps": "{} steps left out, not finite"}


class Run(ExitStack):
    """What a command opens: options, data and VAE, all checked, then the folder that it writes to.

    Leaving ``with`` closes what ``open`` has opened. codec: the VAE or pixels, None for latents
    without pictures and evaluation; config: what a checkpoint says of the run. Raises UserError.
    """

    def __init__(self, args, world, initial=None):
        super().__init__()
        self.args, self.world, self.folder, self.initial = args, world, args.run_dir, initial
        check_batch(args, world)
        self.dataset, self.codec = open_data(args, world)
        self.config = make_config(args, self.dataset, self.codec)
        if initial:
            initial.compare(self.config)
        self.order = BatchSampler(len(self.dataset), args.global_batch_size, seed=args.seed,
                                  flip=args.flip, world=world)
        self.total_steps = args.max_steps or args.epochs * self.order.steps_per_epoch
        self.config["total_steps"] = self.total_steps
        if args.cooldown_steps > self.total_steps:
            raise UserError(f"--cooldown-steps must be at most the steps of the run, "
                            f"{self.total_steps}, got {args.cooldown_steps}; lower it")
        self.evaluation = None
        if args.eval_every:
            self.evaluation = Evaluation(args.fid_ref, args.protocol, self.config, world)

    def open(self, state):
        """Lock the folder, restore its newest checkpoint, and open log, signals and saver."""
        world, enter = self.world, self.enter_context
        self.lock = self.images_before = self.changed = None  # on other ranks than 0
        with naming("--run-dir"):
            path = world.on_main(self._open_folder)
            if path:
                state.step = restore_checkpoint(path, state.net, state.ema, state.optimizer)
            # Not before: of options that the checkpoint does not fit nothing must stay
            world.on_main(lambda: write_json(self.folder / "config.json", self.config))
        if not path and self.args.init and not self.initial:
            raise UserError(f"--run-dir must keep its checkpoints during the start, got none in "
                            f"{self.folder}; repeat the command to begin anew from --init")
        self.log = enter(Log(self.folder, active=world.main, step=state.step))
        for line in introduction(self, state):
            self.log.say(line)
        self.saver = enter(Saver(self.folder / "checkpoints", self.args.keep_last, lock=self.lock,
                                 before_write=self.log.to_disk))
        self.saver.path, world.before_exit = path, self.saver.finish_writing
        self.signals = enter(Signals(world))  # left first: no deadline while the saver ends
        self.sampler = ImageSampler(state.ema, self.codec, self.config, world, seed=self.args.seed,
                                    conditions=getattr(self.dataset, "conditions", None))
        if state.step and self.is_due(self.args.eval_every, state.step) and not world.broadcast(
                self.log.has(state.step, "protocol", self.args.protocol)):
            self.evaluate(state.step)  # in which the last run ended

    def _open_folder(self):
        """Lock the folder and check that it is this run's. Returns the newest checkpoint, or None.
        Raises BadValue."""
        self.lock = self.enter_context(FolderLock(self.folder))
        defaults = recorded(parse_args(["--data-path", "."]))
        allowed = {name.replace("-", "_") for name in self.args.allow_change}
        free = {*MAY_CHANGE, *allowed}
        schedule = METHODS[self.args.method].scheduled or self.args.cooldown_steps
        if not schedule or allowed & {"max_steps", "epochs"}:
            free.add("total_steps")
        stored = check_config(self.folder, self.config, defaults=defaults, may_change=free)
        self.images_before = stored.get("num_images")
        self.changed = differences(*({name: config.get(name) for name in allowed}
                                     for config in (stored, self.config)))
        for name in ("checkpoints", "samples"):
            make_folder(self.folder / name)
            remove_temporary_files(self.folder / name)
        return newest_checkpoint(self.folder / "checkpoints")

    def read(self, step):
        """Yields this rank's rows of each batch after this step: images or moments, labels (B,)."""
        steps = self.order.steps(step, self.total_steps)
        with self.world.progress(self.total_steps, initial=step) as bar:
            for batch in load_batches(self.dataset, steps, workers=self.args.num_workers,
                                      device=self.world.device):
                step += 1
                self.world.position = f"step {step}"
                yield batch
                bar.update()

    def is_due(self, every, step):
        """Whether work of every so many steps, 0 = never, is due; after the last step all is."""
        return every > 0 and (step % every == 0 or step == self.total_steps)

    def record(self, step, means, extra, interval_ends):
        """One log line, with the names extra, and, if the interval is complete, one metrics record.
        """
        texts = [text.format(means[name]) for name, text in LOG_TEXTS.items()
                 if name in means and (means[name] or name != "skipped_steps")]
        texts += [f"{name} {means[name]:.4f}" for name in extra]
        self.log.say("  ".join([f"step {step}/{self.total_steps}", *texts]))
        if interval_ends:
            self.log.record(step, **means)

    def save(self, state):
        """Start to write a checkpoint, on rank 0, to which the others give their shards."""
        if self.world.main:
            self.saver.save(state.state_dict())
        else:
            for value in tree_leaves(state.state_dict()):
                sharding.full_tensor(value)

    def picture(self, step):
        """Write one-step samples of the averaged network as one picture, on rank 0."""
        with sharding.gathered_parameters(self.sampler.net):
            if self.world.main:
                self.saver.raise_errors()  # that the folder is still this run's
                self.sampler.picture(self.folder / "samples" / f"{step:07d}.png")

    def evaluate(self, step):
        """Measure one-step samples of the averaged network: one log line, one metrics record."""
        with sharding.gathered_parameters(self.sampler.net):
            metrics = self.evaluation.measure(self.sampler, self.args.eval_samples, EVAL_BATCH)
        if self.world.main:
            metrics |= {"labels": self.sampler.labels, "seed": self.sampler.seed}
            for name, value in self.sampler.guidance.items():
                metrics |= (dict(zip(("t_min", "t_max"), value)) if name == "interval"
                            else {name: value})
            names = metric_names(metrics["protocol"])
            texts = [f"{names.get(key, key)} "
                     + (f"{value:.4f}" if isinstance(value, float) else f"{value}")
                     for key, value in metrics.items()]
            self.log.say("  ".join([f"step {step}", *texts]))
            self.log.record(step, **metrics)

    def finish(self, state):
        """Wait for the other ranks and the last checkpoint, and print its path."""
        self.signals.end_steps()
        self.saver.raise_errors(wait=True)
        if name := self.signals.name:
            self.log.say(f"{name}: saved step {state.step}; repeat the command to go on")
        if self.world.main:
            print(self.saver.path)


def check_batch(args, world):
    """Raise UserError unless the global batch can be divided over ranks and micro-batches."""
    count, batch = world.size * args.grad_accum_steps, args.global_batch_size
    if batch % count:
        raise UserError(f"--global-batch-size must be a multiple of {count}, processes times "
                        f"--grad-accum-steps, got {batch}; choose another")
    if args.shard:
        sharding.check_sharding(world)
        # Ranks gather the shards together: a rank without such rows would skip the derivative
        rows = batch - make_method(vars(args), num_classes=1).equal_rows(batch)
        if 0 < rows < count:
            raise UserError(f"--global-batch-size must have {count} rows with r < t or more for "
                            f"--shard, one per rank and micro-batch, got {rows} of {batch}; choose "
                            f"a larger one or another --ratio")


def open_data(args, world):
    """(dataset, codec): image files or latent shards, and what encodes and decodes them."""
    dataset = (LatentShards(args.data_path) if args.encoded_data
               else ImageFolder(args.data_path, args.image_size, world,
                                skip_bad_images=args.skip_bad_images))
    codec = None
    if not args.encoded_data or args.sample_every or args.eval_every:
        codec = load_codec(args.vae, world.device, precision=args.precision)
        codec.latent_shape(args.image_size)  # refuses a size that the VAE cannot halve
    if args.encoded_data:
        dataset.check(codec=codec, image_size=args.image_size, flip=args.flip)
        dataset.notes = world.on_main(dataset.verify)
    return dataset, codec


def recorded(args):
    """The options in a config, as plain values: lists, no paths; not those of one command alone."""
    return json.loads(json.dumps({name: value for name, value in vars(args).items()
                                  if name != "allow_change"}, default=str))


def make_config(args, dataset, codec):
    """The config: every option, and what sampling and resuming must know of the data."""
    config = recorded(args)
    scale = dataset.scale if args.encoded_data else codec.scale
    shape = dataset.latent_shape if args.encoded_data else codec.latent_shape(args.image_size)
    if args.compile is None:
        config["compile"] = torch.cuda.is_available() and not args.shard
    pixels = (dataset.vae if args.encoded_data else args.vae) == "none"
    if METHODS[args.method].normalises_channels and not pixels:
        if shape[0] != (channels := len(LATENT_NORMALISATION["latent_mean"])):
            raise UserError(f"--vae must have latents of {channels} channels for --method "
                            f"{args.method}, got {shape[0]}; give --vae ema or mse")
        config |= LATENT_NORMALISATION
    if hasattr(dataset, "conditions"):
        config["conditions"] = True  # no labels: sample.py has none
    return config | {
        "latent_shape": list(shape), "scale": scale, "classes": list(dataset.classes),
        "num_classes": len(dataset.classes), "num_images": len(dataset),
        "command": shlex.join(sys.argv), "commit": code_version(), "torch": str(torch.__version__)}


def introduction(run, state):
    """The first lines of the log."""
    args, dataset = run.args, run.dataset
    lines = describe_environment(run.world) + [
        f"{describe(run.config)}, {sum(p.numel() for p in state.params):,} parameters; "
        f"{len(dataset):,} images of {len(dataset.classes)} classes; {args.global_batch_size} "
        f"images per step",
        f"steps {state.step} to {run.total_steps}, into {run.folder}"]
    if state.step >= run.total_steps:
        lines.append("all steps are made: more need a larger --max-steps or --epochs")
    if not args.init and run.total_steps * (1 - args.ema_decay) < 3:
        # The random first weights keep a share of 5 % or more
        decay = max(0, 1 - 10 / run.total_steps)
        lines.append(f"samples will be noise: --ema-decay {args.ema_decay} averages over more "
                     f"steps than the run has; {decay:.4g} would suit {run.total_steps}")
    if run.changed and state.step:
        lines.append(f"from step {state.step} on: {run.changed}")
    if run.initial and not state.step:
        lines += run.initial.notes
    lines += dataset.notes
    if state.step and run.images_before != len(dataset):
        lines.append(f"num_images {run.images_before}, now {len(dataset)}: from here the order of "
                     f"the data is a new one")
    if run.evaluation:
        lines += notes(run.evaluation.reference, args.protocol, args.eval_samples,
                       run.evaluation.image_size)
    return lines


if __name__ == "__main__":
    run_main(main, parse_args)

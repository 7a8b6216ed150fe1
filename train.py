"""Train a DiT with MeanFlow.

One process, for instance on a laptop, and eight GPUs of one node:

    python train.py --data-path data/digits --vae none --image-size 8 --model DiT-T/4 --cfg 1
    torchrun --standalone --nproc_per_node=8 train.py --data-path imagenet/train --vae ema

Several nodes: on each, torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d
--rdzv_endpoint=HOST:29500 train.py ... with --data-path and --run-dir on storage that all share.

Repeating a command continues its run. The defaults are the paper's DiT-B/4 recipe.
"""

import argparse
import copy
import logging
import signal
import time
import warnings
from contextlib import ExitStack, nullcontext
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of Ctrl-C during the imports

import torch
from torch.nn.parallel import DistributedDataParallel

from dataset.images import ImageFolder
from dataset.latents import LatentShards
from dataset.loader import BatchSampler, load_batches
from dataset.vae import load_vae, posterior_sample
from engine.checkpoint import (
    Saver,
    check_config,
    newest_checkpoint,
    restore_checkpoint,
)
from engine.distributed import counted_generator, run_main, start_processes
from engine.faults import Guard, Signals, propagate_nonfinite
from engine.files import lock_folder, make_folder, remove_temporary_files, write_json
from engine.log import Log, describe_environment
from engine.options import Parser, UserError, float_range, int_range, utf8_path
from meanflow import MeanFlow
from metrics.inception import PROTOCOLS
from metrics.reference import Evaluation, metric_names, notes
from models import DiT_models, build
from sample import Generator

# Options that may change when a run is continued; all others make it another run
FREE = ("data_path", "epochs", "max_steps", "run_dir", "ckpt_every", "keep_last", "log_every",
        "sample_every", "num_workers", "compile", "grad_accum_steps", "checkpoint_activations",
        "skip_nonfinite", "eval_every", "eval_samples", "fid_ref", "protocol")
LEAST_BUCKET_MIB = 25  # PyTorch's default
EVAL_BATCH = 50  # images; a constant, as the rounding depends on it


def parse_args(argv=None):
    parser = Parser("Train a DiT with MeanFlow. Repeating a command continues its run.")
    add_data_options(parser.add_argument_group("data"))
    add_method_options(parser.add_argument_group("method (arXiv 2505.13447)"))
    add_optimisation_options(parser.add_argument_group("model and optimisation"))
    add_run_options(parser.add_argument_group("run"))
    args = parser.parse_args(argv)
    parser.validate(method, args, num_classes=1)
    if args.eval_every and args.fid_ref is None:
        parser.error(f"--eval-every must come with --fid-ref, got {args.eval_every} without; name "
                     f"the reference statistics")
    if args.run_dir is None:
        args.run_dir = Path("results", f"{args.model.replace('/', '-')}-cfg{args.cfg}")
    if args.data_path.resolve() in (args.run_dir.resolve(), *args.run_dir.resolve().parents):
        parser.error(f"--run-dir must lie outside --data-path, where it would be taken for a "
                     f"class, got {args.run_dir}; choose another folder")
    return args


def add_data_options(group):
    group.add_argument("--data-path", type=Path, required=True,
                       help="folder with one folder of images per class; with --encoded-data, of "
                            "latents that encode_imagenet.py wrote")
    group.add_argument("--encoded-data", action="store_true", help="train on encoded latents")
    group.add_argument("--image-size", type=int_range(1), default=256,
                       help="side of the centre crop, in pixels")
    group.add_argument("--vae", default="ema",
                       help="ema or mse: the Stable Diffusion VAE with that decoder; a folder: a "
                            "local AutoencoderKL; none: train on pixels")
    group.add_argument("--flip", action="store_true", help="mirror half of the images at random")
    group.add_argument("--num-workers", type=int_range(0, 1024), default=4,
                       help="reading processes per process; 0 = none")


def add_method_options(group):
    group.add_argument("--ratio", type=float_range(0, 1), default=0.25,
                       help="share of rows with r < t; 0 is plain flow matching")
    group.add_argument("--p-mean", type=float_range(-1e9), default=-0.4,
                       help="mean of the logit-normal times")
    group.add_argument("--p-std", type=float_range(0, above=True), default=1.0,
                       help="standard deviation of the logit-normal times")
    group.add_argument("--time-sampler", default="logit_normal",
                       choices=("logit_normal", "uniform"), help="distribution of the times")
    group.add_argument("--cfg", type=float_range(0), default=3.0,
                       help="effective guidance scale omega' = omega / (1 - kappa); 1 = none")
    group.add_argument("--kappa", type=float_range(0), default=0.0,
                       help="weight of the network's own labelled velocity, below 1")
    group.add_argument("--cfg-interval", type=float_range(0, 1), nargs=2, default=(0.0, 1.0),
                       metavar=("FROM", "TO"),
                       help="times t in which guidance acts, both ends included")
    group.add_argument("--label-drop", type=float_range(0, 1), default=0.1,
                       help="probability of the null label")
    group.add_argument("--p", type=float_range(0), default=1.0,
                       help="power of the adaptive weight; 0 = plain L2")
    group.add_argument("--c", type=float_range(0, above=True), default=0.01,
                       help="constant of the adaptive weight")


def add_optimisation_options(group):
    group.add_argument("--model", default="DiT-B/4", choices=DiT_models,
                       metavar="DiT-{T,S,B,M,L,XL}/{2,4,8}", help="size and patch size")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int_range(1), default=80, help="passes over the data")
    length.add_argument("--max-steps", type=int_range(1),
                        help="optimiser steps, in place of --epochs")
    group.add_argument("--global-batch-size", type=int_range(1), default=256,
                       help="images per optimiser step, over all processes")
    group.add_argument("--grad-accum-steps", type=int_range(1), default=1,
                       help="parts in which a process works through its share of the batch, to "
                            "save memory")
    group.add_argument("--checkpoint-activations", action="store_true",
                       help="recompute activations in the backward pass: less memory, more time")
    group.add_argument("--lr", type=float_range(0, above=True), default=1e-4,
                       help="rate of AdamW, constant")
    group.add_argument("--ema-decay", type=float_range(0, 1), default=0.9999,
                       help="decay per step of the averaged weights, which sampling uses")
    group.add_argument("--precision", default="tf32", choices=("fp32", "tf32", "bf16"),
                       help="fp32; tf32: fp32 with TensorFloat-32 products on GPUs; bf16: autocast")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction,
                       help="torch.compile the passes of a step (default: where there is a GPU, "
                            "and not where that fails)")
    group.add_argument("--seed", type=int_range(0), default=0,
                       help="fixes weights, data order and all noise")


def add_run_options(group):
    group.add_argument("--run-dir", type=utf8_path,
                       help="where everything goes (default: results/<model>-cfg<scale>)")
    group.add_argument("--ckpt-every", type=int_range(1), default=5000,
                       help="steps between checkpoints")
    group.add_argument("--keep-last", type=int_range(0), default=3,
                       help="checkpoints kept; 0 = all")
    group.add_argument("--skip-nonfinite", type=int_range(0), default=0,
                       help="steps in a row whose gradient may be infinite or NaN and is left out")
    group.add_argument("--log-every", type=int_range(1), default=100,
                       help="steps between log lines")
    group.add_argument("--sample-every", type=int_range(0), default=5000,
                       help="steps between pictures of one-step samples; 0 = none")
    group.add_argument("--eval-every", type=int_range(0), default=0,
                       help="steps between evaluations of one-step samples, each of which follows "
                            "a checkpoint; 0 = none")
    group.add_argument("--fid-ref", type=Path, metavar="REF.npz",
                       help="reference statistics for --eval-every")
    group.add_argument("--eval-samples", type=int_range(2), default=10000,
                       help="images per evaluation; 50000 are customary and slow")
    group.add_argument("--protocol", choices=PROTOCOLS, default="pytorch-fid",
                       help="how to evaluate; evaluate_fid.py --help says more")


def method(args, num_classes):
    return MeanFlow(
        num_classes=num_classes, ratio=args.ratio, p_mean=args.p_mean, p_std=args.p_std,
        time_sampler=args.time_sampler, cfg=args.cfg, kappa=args.kappa,
        cfg_interval=args.cfg_interval, label_drop=args.label_drop, p=args.p, c=args.c)


def main(args):
    with start_processes(args.precision) as world, ExitStack() as stack:
        dataset, space = open_data(args, world)
        config = describe(args, dataset, space)
        batches = BatchSampler(len(dataset), args.global_batch_size, seed=args.seed,
                               flip=args.flip, world=world)
        total = args.max_steps or args.epochs * batches.steps_per_epoch
        evaluation = (Evaluation(args.fid_ref, args.protocol, config, world)
                      if args.eval_every else None)
        folder, lock = args.run_dir, open_run(args, config, world, stack)
        step, net, ema, optimizer = build_state(args, config, folder, world)
        log = stack.enter_context(Log(folder, active=world.main, step=step))
        lines = introduction(args, world, net, dataset, step, total)
        if evaluation:
            lines += notes(evaluation.reference, args.protocol, args.eval_samples)
        for line in lines:
            log.say(line)

        passes = Passes(args, config, world, net, space)
        batches.start, batches.stop = step, max(step, total)
        params, average = list(net.parameters()), averaging(ema, net, args.ema_decay)
        guard = Guard(world, args.skip_nonfinite)
        signals = stack.enter_context(Signals(world))
        saver = world.saver = stack.enter_context(Saver(
            folder / "checkpoints", args.keep_last, lock=lock, before=log.to_disk))
        stack.callback(signals.steps_end)  # before the saver's end, also after an error
        generator = Generator(ema, space, config, world, seed=args.seed)
        sums, skipped, asked = torch.zeros(5, device=world.device), 0, None
        # One that a run was ended in the midst of is made up for
        if (step and due(step, args.eval_every, step == total)
                and not world.agree(log.has(step, "fid"))):
            evaluate(args, evaluation, generator, log, step)
        bar = world.progress(total, initial=step)

        for images, y in load_batches(dataset, batches, workers=args.num_workers,
                                      device=world.device):
            world.position = f"step {step + 1}"
            if step == batches.start:
                passes.warm_up(images, y, step, log)
                clock = Clock(step)
            values = passes.backward(images, y, step)

            # Update of weights and averages, unless the gradient is not finite
            step += 1
            norm = torch.nn.utils.get_total_norm([p.grad for p in params])
            optimizer.found_inf = average.found_inf = guard.should_skip(step, values[0], norm)
            optimizer.step()
            optimizer.zero_grad()
            average.step()
            values = torch.cat([values, norm[None], torch.ones_like(norm)[None]])
            sums += torch.where(optimizer.found_inf > 0, 0, values)
            bar.update()

            # Log and checkpoint; only then what may fail or take long: picture and evaluation
            asked = signals.stop()
            last = step == total or asked is not None
            evaluates = due(step, args.eval_every, step == total)
            saves = due(step, args.ckpt_every, last) or evaluates
            if saves or due(step, args.log_every, last):
                skipped += guard.check()  # the one synchronisation between log lines
                saver.check()
            if due(step, args.log_every, last):
                record(log, step, total, world.mean(sums).tolist(), skipped,
                       clock.rate(step) * args.global_batch_size, args.log_every)
                sums.zero_()
                skipped = 0
            if saves and world.main:
                saver.save({"step": step, "model": net.state_dict(), "ema": ema.state_dict(),
                            "opt": optimizer.state_dict(), "config": config})
            if due(step, args.sample_every, step == total) and world.main:
                saver.check()
                generator.picture(folder / "samples" / f"{step:07d}.png")
            if evaluates and not asked:  # there may be no time
                evaluate(args, evaluation, generator, log, step)
            if asked:
                break
        signals.close()
        saver.close()
        bar.close()
        if asked:
            log.say(f"{asked}: saved step {step}; repeat the command to go on")
        if world.main:
            print(saver.path or newest_checkpoint(folder / "checkpoints"))


class Passes:
    """The passes of a step, forward and backward: over processes, and compiled where it can be."""

    def __init__(self, args, config, world, net, space):
        self.args, self.config, self.world, self.net, self.space = args, config, world, net, space
        self.flow, self.forward = method(args, config["num_classes"]), net
        if world.distributed:
            with warnings.catch_warnings():  # of a new name for the option, unknown to torch 2.11
                warnings.simplefilter("ignore")
                # The buffers are constant: no need to send them each step. Gradients that are views
                # of what is sent save one copy of them, in memory and in time
                self.forward = DistributedDataParallel(
                    net, broadcast_buffers=False, gradient_as_bucket_view=True,
                    bucket_cap_mb=bucket_mib(net))

    def backward(self, images, y, step, *, local=False):
        """Add the gradients of a step; returns (3,): loss, error, velocity error of these rows.

        In equal parts of the batch, whose gradients add up. local: without the other processes.
        """
        values = torch.zeros(3, device=self.world.device)
        parts = self.args.grad_accum_steps
        for i in range(parts):
            # Dealt out of the global batch as to processes: rows part::count of it
            part, count = self.world.rank + self.world.size * i, self.world.size * parts
            x, draws = self.prepare(images[i::parts], step, part, count)
            alone = self.world.distributed and (local or i < parts - 1)
            with self.forward.no_sync() if alone else nullcontext():
                with self.world.autocast():
                    out = self.flow.loss(self.net, x, y[i::parts], draws, forward=self.forward)
                (propagate_nonfinite(out.loss) / parts).backward()
            values += torch.stack([out.loss.detach(), out.error.mean(),
                                   out.velocity_error.mean()]) / parts
        return values

    def prepare(self, images, step, part, count):
        """Data x and draws of one part, of images or moments: all noise is drawn for the global
        batch, so that a run does not depend on how it is divided."""
        args, device = self.args, images.device
        shape = (args.global_batch_size, *self.config["latent_shape"])
        noise = torch.randn(shape, device=device, generator=counted_generator(
            args.seed, step, "posterior", device=device))[part::count]
        with torch.no_grad():
            moments = images if args.encoded_data else self.space.encode(images)
            x = posterior_sample(moments, noise, self.config["scale"])
        generator = counted_generator(args.seed, step, "method", device=device)
        return x, self.flow.draw(shape, device=device, generator=generator).part(part, count)

    def warm_up(self, images, y, step, log):
        """Compile, and let DistributedDataParallel settle, on the passes of the first step.

        Nothing of it is left in weights, gradients or random state.
        """
        if self.config["compile"]:
            self.compile(images, y, step, log)
        if self.world.distributed:
            # After its first backward it orders the gradients anew, and with three or more
            # processes the order of the sums changes: else a resumed run would differ in bits
            self.backward(images, y, step)
            self.net.zero_grad()

    def compile(self, images, y, step, log):
        """Compile the passes, and try them, forward and backward.

        Where that fails on any process, all go on with plain passes and the log says why; with
        --compile on the command line it is a UserError.
        """
        # DistributedDataParallel marks itself for the profiler, of which Dynamo warns
        logging.getLogger("torch._dynamo.variables.ctx_manager").addFilter(
            lambda record: "Profiler" not in str(record.msg))
        reason, before = None, (self.forward, self.flow)
        try:
            self.forward, self.flow = torch.compile(self.forward), copy.copy(self.flow)
            self.flow.compile()
            # Without the exchange of gradients, in which a process would wait for one that failed
            self.backward(images, y, step, local=True)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # every layer of the compiler has its own kinds
            what = " ".join(str(error).split("\n\n")[0].split())
            reason = f"{type(error).__name__}: {what:.200}"
        self.net.zero_grad()
        reasons = [f"rank {rank}: {reason}"
                   for rank, reason in enumerate(self.world.gather(reason)) if reason]
        if not reasons:
            return
        if self.args.compile:
            raise UserError(f"--compile must be given where torch.compile works, got "
                            f"{reasons[0]}; install what is missing or give --no-compile")
        self.forward, self.flow = before
        log.say(f"torch.compile failed, training goes on without it; {reasons[0]}")


def bucket_mib(net):
    """MiB of gradients that DistributedDataParallel sends at once: two blocks', or 25 at least.

    torch.compile cuts the network where a bucket is full. With PyTorch's own 25 MiB that is within
    every block of DiT-B (18 graphs) and DiT-XL (58); with these it is after every second (8 and
    16). The last bucket is sent when the backward has ended, all others during it: of DiT-XL/2 a
    fourteenth is left to wait for. Memory is the same for all sizes.
    """
    block = sum(p.numel() * p.element_size() for p in net.blocks[0].parameters())
    return max(LEAST_BUCKET_MIB, 2 * block / 2**20)


class Clock:
    """Steps per second since the last time it was asked."""

    def __init__(self, step):
        self.step, self.time = step, time.perf_counter()

    def rate(self, step):
        steps, self.step = step - self.step, step
        seconds, self.time = time.perf_counter() - self.time, time.perf_counter()
        return steps / seconds


def due(step, every, last):
    """Whether it is time for what happens every so many steps (0 = never) and at the last."""
    return bool(every) and (step % every == 0 or last)


def open_data(args, world):
    """(dataset, space): image files or latent shards, and the space that encodes and decodes.

    Latents without pictures and evaluation need no VAE; the space is None then.
    """
    dataset = (LatentShards(args.data_path) if args.encoded_data
               else ImageFolder(args.data_path, args.image_size, world))
    space = None
    if not args.encoded_data or args.sample_every or args.eval_every:
        try:
            space = load_vae(args.vae, world.device, precision=args.precision)
            space.latent_shape(args.image_size)
        except (ValueError, OSError) as error:
            raise UserError(error) from error
    if args.encoded_data:
        dataset.check(space=space, image_size=args.image_size, flip=args.flip)
        dataset.note = world.on_main(dataset.verify)
    return dataset, space


def describe(args, dataset, space):
    """The config: every option, and what of the data sampling and continuing depend on."""
    config = {name: str(value) if isinstance(value, Path) else
              list(value) if isinstance(value, tuple) else value
              for name, value in vars(args).items()}
    encoded = dataset if args.encoded_data else space
    shape = dataset.latent_shape if args.encoded_data else space.latent_shape(args.image_size)
    compiles = torch.cuda.is_available() if args.compile is None else args.compile
    return config | {"compile": compiles, "latent_shape": list(shape), "scale": encoded.scale,
                     "classes": list(dataset.classes), "num_classes": len(dataset.classes),
                     "num_images": len(dataset)}


def open_run(args, config, world, stack):
    """Makes or recognises the run's folder, and holds it until the stack is left; the FolderLock on
    rank 0, else None. Raises UserError before anything is written.
    """
    parts = world.size * args.grad_accum_steps
    if args.global_batch_size % parts:
        raise UserError(f"--global-batch-size must divide over {world.size} process(es) times "
                        f"--grad-accum-steps {args.grad_accum_steps}, got "
                        f"{args.global_batch_size}; choose a multiple of {parts}")
    try:
        with torch.device("meta"):
            build(config)
    except (ValueError, RuntimeError) as error:  # the latter for a size beyond all numbers
        remedy = "" if isinstance(error, ValueError) else "; choose a smaller one"
        raise UserError(f"--image-size must suit --model {args.model}, got {args.image_size}: "
                        f"{error}{remedy}") from error
    check_config(args.run_dir, config, FREE)
    lock = None

    def hold():
        nonlocal lock
        lock = stack.enter_context(lock_folder("--run-dir", args.run_dir))
        # Again: while this process waited, another run may have become the folder's
        path = check_config(args.run_dir, config, FREE)
        for folder in ("checkpoints", "samples"):
            make_folder("--run-dir", args.run_dir / folder)
            remove_temporary_files(args.run_dir / folder)
        write_json(path, config)

    world.on_main(hold)
    return lock


def build_state(args, config, folder, world):
    """(step, network, EMA, optimiser), from the newest checkpoint or fresh."""
    torch.manual_seed(args.seed)  # the same initial weights on every process
    net = build(config).to(world.device)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    net.checkpoint_activations = args.checkpoint_activations
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, betas=(0.9, 0.95),
                                  weight_decay=0, fused=True)
    path = world.on_main(lambda: newest_checkpoint(folder / "checkpoints"))
    step = 0 if path is None else restore_checkpoint(
        path, net, ema, optimizer, config=config, free=FREE)
    return step, net, ema, optimizer


def averaging(ema, net, decay):
    """An optimiser whose step moves the averages by 1 - decay of the way to the weights.

    It is gradient descent with weight decay 1 along the gradient -weights. As an optimiser it makes
    no autograd graph, and its ``found_inf`` leaves a step out without the host knowing.
    """
    optimizer = torch.optim.SGD(ema.parameters(), lr=1 - decay, weight_decay=1, maximize=True,
                                fused=True)
    for average, weight in zip(ema.parameters(), net.parameters()):
        average.grad = weight.detach()  # shares its memory: always the present weight
    return optimizer


def introduction(args, world, net, dataset, step, total):
    """The first lines of the log."""
    parameters = sum(p.numel() for p in net.parameters())
    return describe_environment(world) + [
        f"{args.model}, {parameters:,} parameters; {len(dataset):,} images of "
        f"{len(dataset.classes)} classes; {args.global_batch_size} images per step",
        f"steps {step} to {total}, into {args.run_dir}",
    ] + ([dataset.note] if args.encoded_data and dataset.note else [])


def evaluate(args, evaluation, generator, log, step):
    """Measure the first images of the averaged network: one log line and one metrics record."""
    metrics = evaluation.measure(generator, args.eval_samples, EVAL_BATCH)
    if generator.world.main:
        about = {"labels": generator.labels, "seed": generator.seed}
        assert metrics.keys().isdisjoint(about)
        metrics |= about
        names = metric_names(metrics["protocol"])
        log.say(f"step {step}  " + "  ".join(
            f"{names.get(key, key)} " + (f"{value:.4f}" if isinstance(value, float) else f"{value}")
            for key, value in metrics.items()))
        log.record(step, **metrics)


def record(log, step, total, sums, skipped, rate, every):
    """One log line and, of a complete interval, one metrics record. error is the number to watch:
    at p = 1 the weighted loss stays near 1 whatever the network does."""
    loss, error, velocity_error, grad_norm = (value / max(sums[4], 1) for value in sums[:4])
    log.say(f"step {step}/{total}  error {error:.4f}  velocity error {velocity_error:.4f}  "
            f"loss {loss:.4f}  gradient norm {grad_norm:.4f}  {rate:.1f} images/s"
            + f"  {skipped} steps left out, not finite" * (skipped > 0))
    if due(step, every, step == total):  # not where a signal ended the interval early
        log.record(step, error=error, velocity_error=velocity_error, loss=loss,
                   grad_norm=grad_norm, images_per_second=rate, skipped_steps=skipped)


if __name__ == "__main__":
    run_main(main, parse_args)

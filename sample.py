"""Sample images from a checkpoint, in one network evaluation each.

    python sample.py --ckpt results/quickstart/checkpoints/0006000.pt --num-fid-samples 80
    torchrun --standalone --nproc_per_node=8 sample.py --ckpt CHECKPOINT.pt

writes <sample-dir>/000000.png ..., <sample-dir>.npz with arr_0 uint8 (N, H, W, 3), which ADM's
evaluator reads, and a picture of the first of them, <sample-dir>.png. Image i is a function of
the checkpoint and seed + i. An interrupted command, repeated, goes on where it stopped.
"""

import hashlib
import json
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import checkpoint
import data
import runtime
import vae
from meanflow import sample, starts
from runtime import UserError, whole


def parse_args(argv=None):
    parser = runtime.Parser("Sample images from a checkpoint. Repeat a command to continue it.")
    parser.add_argument("--ckpt", type=Path, required=True,
                        help="checkpoint that train.py wrote; its EMA weights sample")
    parser.add_argument("--num-fid-samples", type=whole(1), default=50000, help="count of images")
    parser.add_argument("--num-sampling-steps", type=whole(1), default=1,
                        help="network evaluations per image, at equal steps of time")
    parser.add_argument("--sample-dir", type=Path, default=Path("samples"),
                        help="new folder for the PNG files")
    parser.add_argument("--per-proc-batch-size", type=whole(1), default=25,
                        help="images per batch, on which the rounding depends")
    parser.add_argument("--seed", type=whole(0), default=0,
                        help="image i is a function of seed + i")
    parser.add_argument("--labels", choices=("balanced", "random"), default="balanced",
                        help="label of image i: i modulo the classes, or uniform from seed + i")
    parser.add_argument("--vae", help="decoder: ema, mse, a local folder, or none (default: the "
                                      "checkpoint's)")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="tf32",
                        help="fp32; tf32: fp32 with TensorFloat-32 products on GPUs; bf16: "
                             "autocast")
    return parser.parse_args(argv)


def main(args):
    with runtime.start(args.precision) as world:
        net, config = checkpoint.load_network(args.ckpt)
        net = net.to(world.device)
        try:
            space = vae.load(args.vae or config["vae"], world.device)
        except (ValueError, OSError) as error:
            raise UserError(error) from error
        open_folder(args, net, config, world)
        draw(args, net, config, space, world)
        world.barrier()
        if world.main:
            paths = [args.sample_dir / f"{i:06d}.png" for i in range(args.num_fid_samples)]
            write_npz(args.sample_dir.with_name(args.sample_dir.name + ".npz"), paths, world)
            columns = min(config["num_classes"], 10)
            grid = [torch.from_numpy(read(path)) for path in paths[:8 * columns]]
            picture = args.sample_dir.with_name(args.sample_dir.name + ".png")
            data.save_grid(picture, torch.stack(grid).permute(0, 3, 1, 2), columns)
            print(args.sample_dir)


def open_folder(args, net, config, world):
    """Make the sample folder, or recognise it by samples.json as this command's own.

    Raises UserError for a folder that holds anything else.
    """
    weights = net.final_layer.linear.weight.cpu().numpy().tobytes()
    settings = {
        "images": args.num_fid_samples, "steps": args.num_sampling_steps, "seed": args.seed,
        "labels": args.labels, "batch": args.per_proc_batch_size, "precision": args.precision,
        "vae": args.vae or config["vae"], "weights": hashlib.sha256(weights).hexdigest()}
    marker = args.sample_dir / "samples.json"
    if args.sample_dir.exists() and not args.sample_dir.is_dir():
        raise UserError(f"--sample-dir must be a folder, got the file {args.sample_dir}; choose "
                        f"another")
    if args.sample_dir.exists() and any(args.sample_dir.iterdir()):
        try:
            stored = json.loads(marker.read_text())
        except (OSError, ValueError):
            stored = None
        if stored != settings:
            raise UserError(f"--sample-dir must be new, or hold this very command's images, got "
                            f"{args.sample_dir} (other files or other settings); choose another")
    world.barrier()
    if world.main:
        runtime.make_folder("--sample-dir", args.sample_dir)
        with runtime.whole_file(marker) as temporary:
            temporary.write_text(json.dumps(settings, indent=1) + "\n")
    world.barrier()


@torch.no_grad()
def draw(args, net, config, space, world):
    """Sample, decode and write this process's batches: whole ones, dealt out in turn, so that the
    bytes do not depend on the number of processes."""
    batches = range(0, args.num_fid_samples, args.per_proc_batch_size)
    bar = world.progress(args.num_fid_samples, desc="sampling", unit="image")
    pending = []
    with ThreadPoolExecutor(min(16, os.cpu_count())) as pool:
        for first in batches[world.rank::world.size]:
            rows = range(first, min(first + args.per_proc_batch_size, args.num_fid_samples))
            paths = [args.sample_dir / f"{i:06d}.png" for i in rows]
            if not all(path.exists() for path in paths):
                z1, y = starts(rows, config["latent_shape"], seed=args.seed,
                               num_classes=config["num_classes"], labels=args.labels)
                with world.autocast():
                    x = sample(net, z1.to(world.device), y.to(world.device),
                               steps=args.num_sampling_steps)
                images = space.decode(x).permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3)
                pending.append([pool.submit(write, *pair) for pair in zip(paths, images)])
            while len(pending) > 4:  # writing may lag behind, memory may not grow
                for job in pending.pop(0):
                    job.result()
            bar.update(min(len(rows) * world.size, bar.total - bar.n))
        for jobs in pending:
            for job in jobs:
                job.result()
    bar.close()


def write(path, image):
    """One image (H, W, 3) as a PNG file."""
    with runtime.whole_file(path) as temporary:
        Image.fromarray(image).save(temporary, "PNG")


def read(path):
    """A PNG file as uint8 (H, W, 3)."""
    with Image.open(path) as image:
        return np.array(image)


def write_npz(path, paths, world):
    """The images in the order of paths as arr_0 of an .npz file, without holding them all."""
    shape = (len(paths), *read(paths[0]).shape)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    bar = world.progress(len(paths), desc=path.name, unit="image")
    with (runtime.whole_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive,
          archive.open("arr_0.npy", "w", force_zip64=True) as file,
          ThreadPoolExecutor(min(16, os.cpu_count())) as pool):
        np.lib.format.write_array_header_1_0(file, header)
        for first in range(0, len(paths), 1000):
            for image in pool.map(read, paths[first:first + 1000]):
                file.write(image.tobytes())
                bar.update()
    bar.close()


if __name__ == "__main__":
    runtime.run(main, parse_args)

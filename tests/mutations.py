"""Run the scripts on damaged, odd and hostile inputs: each must be used, or refused in one line.

    python tests/mutations.py --seed 0 --count 500     # some minutes
    python tests/mutations.py --seed 0 --only 17       # repeats one, and shows what it said

Images, folders, .npz files and checkpoints take turns. A mutation is a function of (seed, number)
and runs in a process of its own. It fails by a traceback, an exit code but 0 or 2, other than one
error line at 2, a change of its input, more than MEMORY, or more than DEADLINE_S. Prints the
failures, and one JSON line of counts; the exit code is 1 if there are any.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import zipfile
from pathlib import Path

import numpy as np
import soak
import torch
from PIL import Image

import convert_checkpoint
import encode_imagenet
import evaluate_fid
import sample
import train
from engine.errors import run_main

MEMORY = 3 * 2**30  # bytes of address space beyond those of this process
DEADLINE_S = 120
SCRIPTS = (convert_checkpoint, encode_imagenet, evaluate_fid, sample, train)
FORMATS = ("avif", "bmp", "gif", "jpg", "pgm", "png", "ppm", "tiff", "webp")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Run the scripts on damaged, odd and hostile inputs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="fixes the mutations")
    parser.add_argument("--count", type=int, default=500, help="mutations")
    parser.add_argument("--only", type=int, help="the number of the one to run")
    return parser.parse_args(argv)


def main(args):
    torch.set_num_threads(1)
    numbers = range(args.count) if args.only is None else [args.only]
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        counts, failures = mutate_all(Path(folder), args.seed, numbers, args.only is not None)
    print(json.dumps({"seed": args.seed, **counts, "failures": failures}))
    sys.exit(1 if failures else 0)


def mutate_all(folder, seed, numbers, show=False):
    """({outcome: count}, [number, ...] of failures) of these mutations."""
    counts, failures, good = collections.Counter(), [], make_inputs(folder / "good")
    for number in numbers:
        rng, place = random.Random(f"{seed} {number}"), folder / "mutated"
        place.mkdir()
        kind = KINDS[number % len(KINDS)]
        script, options = kind(good, place, rng)
        before = listing(place)
        code, said = run_forked(script, options, folder / "out")
        fault = judge(script, code, said) or (
            {} if listing(place).items() >= before.items() else "it changed its input")
        outcome = "failed" if fault else "refused" if code else "used"
        counts[f"{kind.__name__} {outcome}"] += 1
        if fault:
            failures.append(number)
        if fault or show:
            print(f"{number}: {fault or outcome}: {script.__name__} "
                  f"{' '.join(map(ascii, map(str, options)))}\n{said[-3000:]}", file=sys.stderr)
        shutil.rmtree(place)
        shutil.rmtree(folder / "out", ignore_errors=True)
    return counts, failures


def judge(script, code, said):
    """What is wrong with an end of a script, or None."""
    errors = [line for line in said.splitlines() if f"{script.__name__}.py: error: " in line]
    if code not in (0, 2):
        return f"exit code {code}"
    if "Traceback" in said or "Warning" in said:
        return "a traceback or a warning of a library"
    if len(errors) != (code == 2) or "Out of memory" in said:
        return f"{len(errors)} error lines at exit code {code}"
    return None


def run_forked(script, options, folder):
    """(exit code, output) of a script in a forked process, which may write into a new folder."""
    folder.mkdir()
    output = folder / "said.txt"
    child = os.fork()
    if not child:
        try:
            sys.stdout = sys.stderr = open(output, "w", 1, errors="backslashreplace")
            os.dup2(sys.stderr.fileno(), 1)
            os.dup2(sys.stderr.fileno(), 2)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
            os.chdir(folder)
            sys.argv = [f"{script.__name__}.py", *map(str, options)]
            run_main(script.main, script.parse_args)
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
            code = 70
        sys.stdout.flush()
        os._exit(code)
    deadline = time.monotonic() + DEADLINE_S
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, 9)
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(ended[1]), output.read_text(errors="replace")


def listing(folder):
    """{path: content} of a folder, whatever is in it."""
    return {path: os.readlink(path) if path.is_symlink() else path.read_bytes()
            for path in folder.rglob("*") if path.is_symlink() or path.is_file()}


# ---- good inputs -------------------------------------------------------------------------------


def make_inputs(folder):
    """A folder with images, samples.npz, ref.npz, net.pt, net.safetensors and theirs.pt."""
    draw, images = np.random.default_rng(0), folder / "images"
    for i in range(18):
        path = images / "ab"[i % 2] / f"{i}.{FORMATS[i // 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = Image.fromarray(draw.integers(0, 256, (12, 14, 3), dtype=np.uint8))
        pixels.convert("L" if path.suffix == ".pgm" else "RGB").save(path)
    np.savez(folder / "samples.npz", arr_0=draw.integers(0, 256, (9, 8, 8, 3), dtype=np.uint8))
    quietly(evaluate_fid, "--samples", folder / "samples.npz", "--make-ref", folder / "ref.npz",
            "--protocol", "pixels", "--num-workers", 0)
    quietly(train, *train_options(images, folder / "run"))
    shutil.copy(folder / "run" / "checkpoints" / "0000001.pt", folder / "net.pt")
    quietly(convert_checkpoint, "--in", folder / "net.pt", "--out", folder / "net.safetensors")
    quietly(convert_checkpoint, "--in", folder / "net.pt", "--out", folder / "theirs.pt",
            "--format", "noamelata")
    return folder


def quietly(script, *options):
    """Run a script of which nothing may be wrong."""
    folder = Path(tempfile.mkdtemp())
    code, said = run_forked(script, options, folder / "out")
    shutil.rmtree(folder)
    assert code == 0, said


def train_options(data, run, *more):
    """A run of a single step."""
    words = soak.options(data, run, 1, *more)
    words[words.index("--global-batch-size") + 1] = 2
    return words


# ---- mutations: (good inputs, folder for the mutated ones, rng) -> (script, options) ------------


def images(good, place, rng):
    """One image file changed by bytes, renamed to another format, or both."""
    shutil.copytree(good / "images", place / "images")
    path = rng.choice(sorted((place / "images").rglob("*.*")))
    change_bytes(path, rng)
    if rng.random() < 0.2:
        path.rename(path.with_suffix(f".{rng.choice(FORMATS)}"))
    return read_folder(place / "images", rng)


NAMES = ("a", "b", "c", "._0.png", ".hidden", "__MACOSX", "é", "e\u0301", "a b", "$x^{",
         "new\nline", "\udcff", "\u202e", "x" * 200, "0.png", "1.GIF", "2.heic", "3", "--help",
         "%s", "con.txt")


def folders(good, place, rng):
    """A tree of folders to which links, folders and files of odd names are added."""
    root = shutil.copytree(good / "images", place / "images")
    for _ in range(rng.randint(1, 12)):
        parent = rng.choice([path for path in [root, *sorted(root.rglob("*"))] if path.is_dir()])
        path, others = parent / rng.choice(NAMES), [root, place, *sorted(root.rglob("*"))]
        if os.path.lexists(path):
            path = path if path.is_file() or path.is_symlink() else root / "a" / "0.avif"
            path.unlink(missing_ok=True)
        elif (action := rng.random()) < 0.3:
            path.mkdir()
        elif action < 0.6:
            path.symlink_to(rng.choice([*others, path, "nowhere", "..", "../..", "."]))
        elif action < 0.8:
            shutil.copy(good / "images" / "a" / "0.avif", path)
        else:
            path.write_bytes(rng.randbytes(rng.choice([0, 30])))
    return read_folder(root, rng)


def read_folder(folder, rng):
    """A script that reads a folder of images."""
    return rng.choice([
        (train, train_options(folder, "run", *rng.choice([[], ["--skip-bad-images"]]))),
        (encode_imagenet, ["--data-path", folder, "--out-path", "out", "--vae", "none",
                           "--image-size", 8, "--num-workers", 0,
                           *rng.choice([[], ["--skip-bad-images"]])]),
        (evaluate_fid, ["--samples", folder, "--make-ref", "ref.npz", "--protocol", "pixels",
                        "--num-workers", 0, *rng.choice([[], ["--image-size", 8]])])])


def archives(good, place, rng):
    """One of two .npz files changed by bytes or by arrays."""
    for name in ("samples.npz", "ref.npz"):
        shutil.copy(good / name, place)
    path = place / rng.choice(["samples.npz", "ref.npz"])
    if rng.random() < 0.4:
        change_bytes(path, rng)
    else:
        change_arrays(path, rng)
    return rng.choice([
        (evaluate_fid, ["--samples", place / "samples.npz", "--ref", place / "ref.npz",
                        "--protocol", "pixels", *rng.choice([[], ["--image-size", 8]])]),
        (sample, ["--ckpt", good / "net.pt", "--num-fid-samples", 4, "--sample-dir", "s",
                  "--protocol", "pixels", "--fid-ref", place / "ref.npz"]),
        (train, train_options(good / "images", "run", "--eval-every", 1, "--eval-samples", 4,
                              "--protocol", "pixels", "--fid-ref", place / "ref.npz"))])


def change_arrays(path, rng):
    """Change an array of an .npz file, its name, or its header."""
    arrays = dict(np.load(path))
    key = rng.choice(sorted(arrays))
    array = arrays.pop(key)
    with np.errstate(all="ignore"), contextlib.suppress(TypeError, ValueError):
        array = rng.choice([
            lambda: array.astype(rng.choice(["f2", "f8", "i1", "u2", "c8", "?", "U9", "O"])),
            lambda: array[:rng.randint(0, 2)] if array.ndim else array[None],
            lambda: array.reshape(-1), lambda: array[None], lambda: np.asfortranarray(array.T),
            lambda: np.full(array.shape, rng.choice([0, 1, 9]), rng.choice("fdbBiI")),
            lambda: np.full(array.shape, rng.choice([np.nan, np.inf, 1e308, -1.0])),
            lambda: np.array(rng.choice(["", "pixels\n", "adm", "\udcff", 10**30, -5, None]))])()
    arrays[rng.choice([key, key, key, "arr_1", "mu", "../x", "é"])] = array
    rng.choice([np.savez, np.savez_compressed])(path, **arrays)
    if rng.random() < 0.2:  # an array that claims to be large
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {
            "descr": rng.choice(["|u1", "<f8"]), "fortran_order": False, "shape": rng.choice(
                [(2**40, 8, 8, 3), (9, 2**20, 2**20, 3), (2**62, 4), (0, 8, 8, 3)])})
        with zipfile.ZipFile(path, "a") as archive:
            name = rng.choice(["arr_0", "mu", "num_images"]) + ".npy"
            if name not in archive.namelist():
                archive.writestr(name, header.getvalue())


def checkpoints(good, place, rng):
    """A checkpoint changed by bytes or by values."""
    path = Path(shutil.copy(good / rng.choice(["net.pt", "net.safetensors", "theirs.pt"]), place))
    if rng.random() < 0.3 or path.suffix == ".safetensors":
        change_bytes(path, rng, within=rng.choice([10**9, 3000]))
    else:
        change_values(path, rng)
    return rng.choice([
        (sample, ["--ckpt", path, "--num-fid-samples", 2, "--sample-dir", "s"]),
        (train, train_options(good / "images", "run", "--init", path)),
        (convert_checkpoint, ["--in", path, "--out", rng.choice(["new.pt", "new.safetensors"]),
                              *rng.choice([[], ["--source", "noamelata"], ["--raw"]])])])


def change_values(path, rng):
    """Change up to three values of a checkpoint: of the config, a tensor, or on top."""
    state = torch.load(path, weights_only=True)
    for _ in range(rng.randint(1, 3)):
        part = rng.choice([part for part in (state, state.get("config"), state["ema"],
                                             state["model"]) if isinstance(part, dict) and part])
        key = rng.choice(sorted(part, key=str))
        action = rng.random()
        if action < 0.15:
            del part[key]
        elif action < 0.3:
            part[rng.choice([f"module.{key}", f"{key}\n", 7, "v_head", "sizes"])] = part.pop(key)
        elif isinstance(part[key], torch.Tensor) and action < 0.8:
            part[key] = odd_tensor(part[key], rng)
        else:
            part[key] = odd_value(rng)
        if not isinstance(state.get("ema"), dict) or not isinstance(state.get("model"), dict):
            break
    torch.save(state, path, _use_new_zipfile_serialization=rng.random() < 0.7)


def odd_tensor(tensor, rng):
    """A tensor of another kind, shape or content."""
    kinds = [torch.int8, torch.bool, torch.complex64, torch.float16, torch.float64, torch.bfloat16,
             torch.float8_e4m3fn]
    return rng.choice([
        lambda: tensor.to(rng.choice(kinds)), lambda: tensor * float("nan"),
        lambda: tensor * 1e300, lambda: tensor[:0], lambda: tensor.flatten(),
        lambda: torch.zeros(1).expand(2**rng.randint(8, 34)), lambda: tensor[None],
        lambda: torch.zeros(1).expand(tensor.shape), lambda: torch.nn.Parameter(tensor.float()),
        lambda: tensor.to_sparse(), lambda: tensor.to("meta"), lambda: tensor.mT.mT
        if tensor.ndim > 1 else tensor[::1]])()


def odd_value(rng):
    """A value that nobody expects."""
    deep, shared = [], "shared"
    for _ in range(rng.choice([3, 150])):
        deep = [deep]
    for _ in range(25):
        shared = [shared, shared]
    return rng.choice([
        None, True, -1, 0, 1, 3, 10**9, 2**70, 0.5, float("nan"), float("inf"), "", "x" * 10**5,
        "\n", "../..", "none", "DiT-XL/2", b"bytes", [], [0], {}, {"a": {}}, [3, 8, 8], [1e9] * 3,
        {"depth": 10**6}, {"hidden_size": "a"}, deep, shared, torch.ones(2), torch.zeros(())])


def change_bytes(path, rng, within=10**9):
    """Change a file's bytes, the first so many of them, at one place or several."""
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 1, 2, 30])):
        start, length = rng.randrange(min(len(content), within) or 1), rng.choice([1, 1, 4, 100])
        cut, insert = rng.choice([
            (1, rng.randbytes(1)), (length, rng.randbytes(length)), (length, bytes(length)),
            (0, rng.randbytes(length)), (length, b""), (len(content), b""),
            (0, content[start:start + length])])
        content[start:start + cut] = insert
    path.write_bytes(content)


KINDS = (images, folders, archives, checkpoints)


if __name__ == "__main__":
    main(parse_args())

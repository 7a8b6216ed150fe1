"""reproduce.sh: the command that makes a row of docs/reproduce.md. ImageNet, the VAE and Inception
are small stand-ins, and where the shell alone is tested, Python is one, too."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import paper_runs
import pytest
import torch
from conftest import ROOT, call, refused, save_small_vae, tiny
from PIL import Image
from soak import HANG_S

import sample
import train

PAGE = (ROOT / "docs" / "reproduce.md").read_text()
ROWS = re.findall(r"^\| (\S+) \|.*`--model", PAGE, re.MULTILINE)

# Answers where reproduce.sh asks, and notes what it is asked; a part does $PART
PYTHON = r"""#!/bin/bash
echo "${0##*/} $*" >> "$ASKED"
case "$*" in
    *paper_runs.py\ check*) echo "$FOUND";;
    *paper_runs.py\ report*) printf '%s\n' "$@";;
    -c*) echo 0000009;;
    *) line="$*"; part=${line%%.py*}; part=${part##* }; eval "$PART";;
esac
"""
WORK = """[ $part != train ] || for run in "$REPRODUCE_OUT"/*/training; do
    mkdir -p "$run/checkpoints" && touch "$run/checkpoints/0000009.pt"
done"""


@pytest.fixture
def reproduce(tmp_path):
    """A function that runs reproduce.sh with a stand-in for Python: (exit code, stdout, stderr,
    the commands of the parts). found: what the check finds; part: what a part does."""
    for name in ("python", "torchrun"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(PYTHON)
        path.chmod(0o755)

    def run(*words, found="1 --precision tf32", part=WORK):
        (tmp_path / "asked").write_text("")
        done = subprocess.run(
            ["bash", ROOT / "reproduce.sh", *words], cwd=tmp_path, text=True, capture_output=True,
            env=os.environ | {
                "REPRODUCE_PYTHON": str(tmp_path / "bin" / "python"), "FOUND": found, "PART": part,
                "ASKED": str(tmp_path / "asked"), "REPRODUCE_OUT": str(tmp_path / "out")})
        asked = (tmp_path / "asked").read_text().splitlines()
        return done.returncode, done.stdout, done.stderr, [
            line for line in asked if re.search(r"(encode_imagenet|train|sample)\.py --", line)]
    return run


def test_what_is_no_row_is_refused_with_the_rows(reproduce):
    assert len(ROWS) == len(set(ROWS)) == 20
    for words in ([], ["imagenet"], ["imagenet", "B/8"], ["imagenet", "B/4 B/2"], ["imagenet", "*"],
                  ["imagenet", ""], ["imagenet", "every row"]):
        code, out, err, asked = reproduce(*words)
        assert (code, out, asked) == (2, "", []) and err.count("\n") == 1
        assert " ".join(ROWS) in err and (len(words) < 2 or f"got {words[1]};" in err)


@pytest.mark.parametrize("row", ROWS)
def test_every_row_is_made_by_commands_that_the_scripts_take(row, reproduce, tmp_path):
    code, out, _, asked = reproduce("imagenet", row, "ref.npz", found="1")
    encode, training, sampling = (line.split(".py ")[1] for line in asked)
    assert code == 0 and f"| {row} |" in out
    assert encode.split() == ["--data-path", f"{tmp_path}/imagenet", "--out-path",
                              f"{tmp_path}/out/latents-256", "--vae", "mse"]
    args = train.parse_args(shlex.split(training))
    args.encoded_data = False  # here are no latents
    train.resolve(args, None)
    assert args.method == {"i": "improved-meanflow", "S": "soflow"}.get(row[0], "meanflow")
    assert args.tangent == ("network" if row[0] == "b" else args.tangent)
    size = re.search(r"([A-Z]+/\d)", row.replace("SoFlow", ""))[1]
    assert args.model == f"{'iMF' if row[0] == 'i' else 'DiT'}-{size}"
    args = sample.parse_args(shlex.split(sampling))
    figures = re.search(rf"^\| {re.escape(row)} \| (.*?) \|", PAGE, re.MULTILINE)[1]
    assert len(args.num_sampling_steps) == figures.count("/") + 1
    assert (args.num_fid_samples, args.vae, args.protocol) == (50000, "mse", "adm")
    assert args.fid_ref == tmp_path / "ref.npz"


def test_the_row_of_two_steps_shares_the_training(reproduce, tmp_path):
    one, two = (reproduce("imagenet", f"iMF-XL/2{end}")[3] for end in ("", "-2-steps"))
    assert one[:2] == two[:2] and f"--run-dir {tmp_path}/out/iMF-XL-2/training" in two[1]
    assert f"--sample-dir {tmp_path}/out/iMF-XL-2-2-steps/samples" in two[2]


def test_processes_and_precision_are_those_that_the_check_finds(reproduce):
    asked = reproduce("imagenet", "B/4", found="8")[3]
    assert all(line.startswith("torchrun --standalone --nproc_per_node=8 ") for line in asked)
    assert train.parse_args(shlex.split(asked[1].split(".py ")[1])).precision == "bf16"
    asked = reproduce("imagenet", "B/4", found="1 --precision tf32")[3]
    assert all(line.startswith("python ") for line in asked)
    assert train.parse_args(shlex.split(asked[1].split(".py ")[1])).precision == "tf32"


@pytest.mark.parametrize("failing, made", [("encode_imagenet", 1), ("train", 2), ("sample", 3)])
def test_the_exit_code_of_a_part_is_that_of_the_command(failing, made, reproduce):
    code, out, err, asked = reproduce("imagenet", "B/4", part=f"[ $part != {failing} ] || exit 7\n"
                                      + WORK)
    assert (code, out, len(asked)) == (7, "", made)
    assert f"{failing}.py --" in err.splitlines()[-1]  # each command is printed


def test_too_little_gpu_memory_divides_the_batch(reproduce):
    """An older line of the log about memory tells nothing of the present failure."""
    fail = """log=$REPRODUCE_OUT/B-4/training/log.txt
    if [ $part = train ] && [[ "$*" != *"steps 4 "* ]]; then
        echo '2026-11-27 12:00:00 ended by OutOfMemoryError: CUDA out of memory.' >> $log; exit 2
    fi
    """
    code, _, _, asked = reproduce("imagenet", "B/4", part=fail + WORK)
    steps = [train.parse_args(shlex.split(line.split(".py ")[1])).grad_accum_steps
             for line in asked if "train.py" in line]
    assert code == 0 and steps == [1, 2, 4]
    code, _, _, asked = reproduce("imagenet", "B/4", part="[ $part != train ] || exit 5")
    assert code == 5 and len(asked) == 2
    code, _, _, asked = reproduce("imagenet", "B/4", part=fail.replace("steps 4 ", "steps 99"))
    assert code == 2 and len(asked) == 10  # there is an end


def test_the_log_of_a_run_says_that_the_memory_ran_out(digits, tmp_path, monkeypatch):
    """In the words that reproduce.sh looks for."""
    def step(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr("train.train_step", step)
    with pytest.raises(torch.OutOfMemoryError):
        call("train", *tiny(digits, tmp_path), "--max-steps", 2)
    words = re.search('grep "(.*)"', (ROOT / "reproduce.sh").read_text())[1]
    assert words in (tmp_path / "log.txt").read_text().splitlines()[-1]


def test_an_interrupted_training_is_not_sampled(reproduce):
    """After a signal train.py saves and ends without an error."""
    code, _, err, asked = reproduce("imagenet", "B/4", part="true")
    assert code == 1 and len(asked) == 2 and "repeat the command" in err


# ---- before and after ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A thousand folders with WordNet numbers, of two tiny images each."""
    folder = tmp_path_factory.mktemp("imagenet") / "train"
    colours = np.random.default_rng(0).integers(0, 256, (1000, 2, 4, 4, 3), dtype=np.uint8)
    for number, images in enumerate(colours):
        (folder / f"n{number:08d}").mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(folder / f"n{number:08d}" / f"{i}.png")
    return folder


def test_other_folders_than_imagenet_are_refused(imagenet, tmp_path):
    paper_runs.check_imagenet(imagenet)
    for folder, count in (imagenet.parent, 1), (tmp_path / "missing", 0):
        with refused("IMAGENET_TRAIN must hold 1000 folders", folder, f"with {count}"):
            paper_runs.check_imagenet(folder)


def test_too_small_a_disk_is_refused(tmp_path, monkeypatch):
    """What lies there counts as room."""
    folders = [tmp_path / name for name in ("latents", "row/run", "row/samples")]
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=2 * 10**9))
    paper_runs.check_space(*folders, latents=10**9, training=10**9)
    with refused(tmp_path, "3 GB free (latents 1, training 2), got 2; free some"):
        paper_runs.check_space(*folders, latents=10**9, training=2 * 10**9)
    folders[1].mkdir(parents=True)
    os.truncate(os.open(folders[1] / "0.pt", os.O_CREAT | os.O_WRONLY), 10**9)
    paper_runs.check_space(*folders, latents=10**9, training=2 * 10**9)
    with refused("3 GB free (latents 2, training 2)"):
        paper_runs.check_space(*folders, latents=2 * 10**9, training=2 * 10**9)
    assert paper_runs.checkpoint_size("DiT-B/4") == pytest.approx(16 * 131e6, rel=0.01)


def test_without_the_reference_nothing_begins(imagenet, tmp_path):
    """It was missed only after days of training."""
    options = [f"--data-path {imagenet} --out-path {tmp_path}/latents", "--data-path latents",
               f"--fid-ref {tmp_path}/ref.npz"]
    with refused("REFERENCE.npz must be ADM's", tmp_path / "ref.npz", "no such file", "download"):
        paper_runs.main(paper_runs.parse_args(["check", *options]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("gpus, capability, found", [
    (0, None, "1 --precision tf32"), (6, (7, 0), "4 --precision tf32"), (8, (9, 0), "8")])
def test_the_gpus_decide_processes_and_precision(gpus, capability, found, monkeypatch, capsys):
    """Processes that divide the batch, and bfloat16 where the hardware has it."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    monkeypatch.setattr("paper_runs.check", lambda *parts: None)
    options = ["--data-path i --out-path l", "--data-path l", "--fid-ref ref.npz"]
    paper_runs.main(paper_runs.parse_args(["check", *options]))
    assert capsys.readouterr().out.strip() == found


def test_the_report_is_the_row_with_our_figures(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({
        "command": "train.py --cfg 1", "commit": "abc", "torch": "2.13", "num_images": 1281167,
        "total_steps": 300, "global_batch_size": 256}))
    (tmp_path / "log.txt").write_text("".join(f"2026-11-27 12:00:0{i} {line}\n" for i, line in (
        (0, "4 process(es) on A100, precision bf16"), (1, "8 process(es) on H100, precision bf16"),
        (2, "step 300/300"))))
    hour = 256 * 100 / 3600  # images a second at a hundred steps an hour
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in (
        {"step": 100, "images_per_second": hour}, {"step": 200, "fid": 9.0},
        {"step": 300, "images_per_second": 4 * hour})))
    (tmp_path / "evaluation.jsonl").write_text('{"fid": 58.561}\n{"fid": 58.2}\n')
    row = "| SoFlow-B/4 | 11.59 / 8.22 | not run | `--cfg 1` | |"
    lines = paper_runs.report(row, tmp_path, tmp_path / "evaluation.jsonl")
    assert lines[0] == row.replace("not run", "58.56 / 58.20")
    assert '{"fid": 58.561}' in lines and "train.py --cfg 1" in lines
    assert ("commit abc, torch 2.13, 8 process(es) on H100, precision bf16; 1,281,167 images, "
            "300 steps in 1.5 hours") in lines


# ---- all of it -----------------------------------------------------------------------------------


def kill_when(pattern, folder, command, environment):
    """Kill the command, with all that it started, once a file of this pattern is there; returns
    the first one."""
    said, end = folder / "said", time.monotonic() + HANG_S
    with open(said, "w") as file:
        child = subprocess.Popen(command, env=environment, stdout=file, stderr=file,
                                 start_new_session=True)
    try:
        while not list(folder.glob(pattern)):
            assert child.poll() is None and time.monotonic() < end, said.read_text()
            time.sleep(0.01)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.wait(HANG_S)
    assert child.returncode == -signal.SIGKILL, said.read_text()
    return min(folder.glob(pattern))


@pytest.mark.slow
def test_a_row_is_made_though_each_part_is_killed(imagenet, torch_home, tmp_path):
    """A tiny network, from images to the line of the page."""
    vae = save_small_vae(tmp_path / "vae")
    np.savez(tmp_path / "ref.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    environment = os.environ | {
        "REPRODUCE_PYTHON": sys.executable, "TORCH_HOME": str(torch_home),
        "REPRODUCE_OUT": str(tmp_path / "out"),
        "REPRODUCE_ENCODE": f"--vae {vae} --image-size 32 --shard-size 500 --num-workers 0",
        "REPRODUCE_TRAIN": f"--vae {vae} --model DiT-T/4 --global-batch-size 500 --epochs 5 "
                           f"--ckpt-every 1 --log-every 1 --sample-every 0",
        "REPRODUCE_SAMPLE": f"--vae {vae} --num-fid-samples 8 --per-proc-batch-size 2"}
    command = ["bash", ROOT / "reproduce.sh", imagenet, "B/4", tmp_path / "ref.npz"]
    shard, _, image = [kill_when(pattern, tmp_path, command, environment) for pattern in (
        "out/latents-256/shard-0000?.npy", "out/B-4/training/checkpoints/*.pt",
        "out/B-4/samples/000001.png")]
    before = [path.stat().st_mtime_ns for path in (shard, image)]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=HANG_S)
    assert done.returncode == 0, done.stderr
    assert [path.stat().st_mtime_ns for path in (shard, image)] == before
    log = (tmp_path / "out" / "B-4" / "training" / "log.txt").read_text()
    starts = [int(step) for step in re.findall(r"steps (\d+) to 20,", log)]
    assert len(starts) == 3 and starts[0] == 0 < starts[1] < 20 == starts[2], starts
    assert re.findall(r"\$ python (\w+)", done.stderr) == ["encode_imagenet", "train", "sample"]
    assert len(np.load(tmp_path / "out" / "B-4" / "samples.npz")["arr_0"]) == 8
    row, _, metrics, *_ = done.stdout.splitlines()
    metrics = json.loads(metrics)
    assert (metrics["protocol"], metrics["num_samples"]) == ("adm", 8)
    assert row.startswith(f"| B/4 | 15.53 | {metrics['fid']:.2f} | `--model DiT-B/4 ")
    assert "2,000 images, 20 steps in" in done.stdout

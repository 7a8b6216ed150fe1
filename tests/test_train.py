"""Training as users run it: one to four processes, its files, its pictures."""

import json

import pytest
import torch
from conftest import ROOT, run_script, tiny
from PIL import Image

import train


def weights(folder, name):
    return torch.load(folder / "checkpoints" / name, weights_only=True)


def test_the_weights_do_not_depend_on_the_number_of_processes(digits, tmp_path):
    """The draws belong to the global batch, so 1, 2 and 4 processes differ by rounding only.

    Biases of attention keys are left out: softmax does not see them, so their gradient is zero but
    for rounding, which Adam blows up to steps of up to 1e-3 times the rate.
    """
    runs = []
    for processes in (1, 2, 4):
        folder = tmp_path / f"run{processes}"
        done = run_script("train.py", *tiny(digits, folder), "--max-steps", 20, "--cfg", 2,
                          "--kappa", 0.5, processes=processes)
        assert done.returncode == 0, done.stderr
        runs.append(weights(folder, "0000020.pt"))
    for state in runs:
        for kind in ("model", "ema"):
            for key, value in state[kind].items():
                if key.endswith("qkv.bias"):
                    value[len(value) // 3:2 * len(value) // 3] = 0
    for other in runs[1:]:
        for kind in ("model", "ema"):
            for key, expected in runs[0][kind].items():
                error = (other[kind][key] - expected).abs().max() / expected.abs().max()
                assert error <= 1e-5, f"{kind} {key}: {error:.1e}"


def test_all_ranks_of_a_run_hold_the_same_bits(digits, tmp_path):
    """DDP sums gradients in one order for all; a rank of its own mind would show here."""
    script = tmp_path / "ranks.py"
    script.write_text(
        "import sys, torch, checkpoint, train\n"
        "train.checkpoint.save = lambda path, state, **_: None\n"
        "original = train.torch.optim.AdamW.step\n"
        "def step(self):\n"
        "    original(self)\n"
        "    total = sum(p.double().sum() for p in self.param_groups[0]['params'])\n"
        "    bits = torch.stack([total, total])\n"
        "    torch.distributed.all_reduce(bits[:1], torch.distributed.ReduceOp.MIN)\n"
        "    torch.distributed.all_reduce(bits[1:], torch.distributed.ReduceOp.MAX)\n"
        "    assert bits[0] == bits[1] == total\n"
        "train.torch.optim.AdamW.step = step\n"
        "train.checkpoint.files = lambda folder: ['done']\n"
        "train.main(train.parse_args(sys.argv[1:]))\n")
    done = run_script(script, *tiny(digits, tmp_path / "run"), "--max-steps", 5, processes=2,
                      PYTHONPATH=str(ROOT))
    assert done.returncode == 0 and done.stdout.strip() == "done", done.stderr


def test_a_run_leaves_the_promised_files(trained):
    folder = trained.parent.parent
    state = torch.load(trained, weights_only=True)
    assert set(state) == {"step", "model", "ema", "opt", "config"} and state["step"] == 12
    config = json.loads((folder / "config.json").read_text())
    assert state["config"] == config and config["num_classes"] == 10
    assert sorted(p.name for p in trained.parent.iterdir()) == ["0000010.pt", "0000012.pt"]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [4, 8, 12]
    for record in records:
        assert record["error"] > 10 and record["velocity_error"] > 10  # sums over 192 numbers
        assert record["grad_norm"] > 0 and record["images_per_second"] > 0
    assert (folder / "log.txt").read_text().count("images/s") == 3
    assert list(folder.glob("events.out.tfevents.*"))


def test_pictures_come_from_the_same_noise_every_time(digits, tmp_path):
    done = run_script("train.py", *tiny(digits, tmp_path), "--max-steps", 4, "--sample-every", 2,
                      "--lr", 1e-30)
    assert done.returncode == 0, done.stderr
    first, second = sorted((tmp_path / "samples").iterdir())
    assert (first.name, second.name) == ("0000002.png", "0000004.png")
    assert first.read_bytes() == second.read_bytes()  # nothing was learned in between
    assert Image.open(first).size == (10 * 66 + 2, 8 * 66 + 2)


def test_parts_of_the_batch_give_the_same_weights(digits, tmp_path):
    """Gradient accumulation and activation checkpointing change memory, not the result."""
    results = []
    for i, extra in enumerate(([], ["--grad-accum-steps", 4, "--checkpoint-activations"])):
        done = run_script("train.py", *tiny(digits, tmp_path / str(i)), "--max-steps", 5, *extra)
        assert done.returncode == 0, done.stderr
        results.append(weights(tmp_path / str(i), "0000005.pt")["model"])
    for key, expected in results[0].items():
        if not key.endswith("qkv.bias"):  # see the test above
            assert (results[1][key] - expected).abs().max() <= 1e-5 * expected.abs().max(), key


def test_training_improves_the_unweighted_error(digits, tmp_path):
    done = run_script("train.py", *tiny(digits, tmp_path), "--max-steps", 120, "--cfg", 1,
                      "--log-every", 20)
    assert done.returncode == 0, done.stderr
    errors = [json.loads(line)["error"] for line in open(tmp_path / "metrics.jsonl")]
    assert errors[-1] < 0.7 * errors[0]


@pytest.mark.parametrize(("every", "steps"), [(0, []), (1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]),
                                              (9, [5])])
def test_what_is_due_is_done_every_so_often_and_at_the_end(every, steps):
    assert [step for step in range(1, 6) if train.due(step, every, step == 5)] == steps


def test_the_run_directory_is_named_after_model_and_guidance():
    args = train.parse_args(["--data-path", "x", "--model", "DiT-XL/2", "--cfg", "2.5"])
    assert str(args.run_dir) == "results/DiT-XL-2-cfg2.5"

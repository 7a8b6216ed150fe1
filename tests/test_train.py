"""Training as users run it: one to four processes, its files, its pictures."""

import functools
import json
from types import SimpleNamespace

import growth
import pytest
import torch
from conftest import ROOT, call, run_script, save_folder, save_small_vae, tiny
from PIL import Image

import metrics.reference
import models
import train
from dataset.images import NpzImages
from engine.distributed import World
from metrics.inception import Extractor
from metrics.reference import Reference, evaluate
from metrics.statistics import Statistics

WORLD = World(0, 1, torch.device("cpu"), "fp32")


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
        options = [*tiny(digits, folder), "--max-steps", 20, "--cfg", 2, "--kappa", 0.5]
        if processes == 1:
            call("train", *options)
        else:
            done = run_script("train.py", *options, processes=processes)
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


def test_a_start_prints_no_warning(digits, tmp_path):
    """A newcomer saw PyTorch's own "torch.jit.script is deprecated" between the first lines."""
    done = run_script("train.py", *tiny(digits, tmp_path / "run"), "--max-steps", 1,
                      "--sample-every", 1)
    assert done.returncode == 0 and "Warning:" not in done.stderr, done.stderr


def test_all_ranks_of_a_run_hold_the_same_bits(digits, tmp_path):
    """DDP sums gradients in one order for all; a rank of its own mind would show here."""
    script = tmp_path / "ranks.py"
    script.write_text(
        "import sys, torch, train\n"
        "original = train.torch.optim.AdamW.step\n"
        "def step(self):\n"
        "    original(self)\n"
        "    total = sum(p.double().sum() for p in self.param_groups[0]['params'])\n"
        "    bits = torch.stack([total, total])\n"
        "    torch.distributed.all_reduce(bits[:1], torch.distributed.ReduceOp.MIN)\n"
        "    torch.distributed.all_reduce(bits[1:], torch.distributed.ReduceOp.MAX)\n"
        "    assert bits[0] == bits[1] == total\n"
        "train.torch.optim.AdamW.step = step\n"
        "train.main(train.parse_args(sys.argv[1:]))\n")
    done = run_script(script, *tiny(digits, tmp_path / "run"), "--max-steps", 5, processes=2,
                      PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "run", "0000005.pt")["step"] == 5


def test_averages_move_to_the_weights_unless_a_step_is_left_out():
    net, ema = (models.DiT_models["DiT-T/4"](input_size=8) for _ in range(2))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter)
    average = train.make_ema_update(ema.requires_grad_(False), net, 0.99)
    expected = [parameter.clone() for parameter in ema.parameters()]
    for left_out in (0.0, 1.0, 0.0):
        average.found_inf = torch.tensor(left_out)
        average.step()
        with torch.no_grad():
            for value, parameter in zip(expected, net.parameters()):
                value.lerp_(parameter, 0 if left_out else 1 - 0.99)
                parameter += 1  # as an optimiser does, in place
    for value, parameter in zip(expected, ema.parameters()):
        assert torch.allclose(parameter, value, rtol=1e-6, atol=1e-6)


def test_averages_are_part_of_no_graph(digits, tmp_path, monkeypatch):
    """They once were, of one that gained a node per parameter and step: 36 kB a step."""
    seen, averaging = [], train.make_ema_update
    monkeypatch.setattr(train, "make_ema_update",
                        lambda ema, *rest: seen.append(ema) or averaging(ema, *rest))
    call("train", *tiny(digits, tmp_path), "--max-steps", 2)
    assert not any(average.requires_grad for average in seen[0].parameters())


@pytest.mark.slow
def test_a_run_holds_no_more_after_many_steps(tmp_path):
    """With the graph of the test above memory grew by some 150 MiB per 5,000 steps. tests/growth.py
    sees 8 in a longer run; over so few steps what allocators keep can be as much."""
    readings = growth.watch(tmp_path, "images", 500, 12)
    assert growth.growth(readings, mib_per_5000=40)["flat"], growth.table(readings)


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
    call("train", *tiny(digits, tmp_path), "--max-steps", 4, "--sample-every", 2,
                      "--lr", 1e-30)
    first, second = sorted((tmp_path / "samples").iterdir())
    assert (first.name, second.name) == ("0000002.png", "0000004.png")
    assert first.read_bytes() == second.read_bytes()  # nothing was learned in between
    assert Image.open(first).size == (10 * 66 + 2, 8 * 66 + 2)


def test_parts_of_the_batch_give_the_same_weights(digits, tmp_path):
    """Gradient accumulation and activation checkpointing change memory, not the result."""
    results = []
    for i, extra in enumerate(([], ["--grad-accum-steps", 4, "--checkpoint-activations"])):
        call("train", *tiny(digits, tmp_path / str(i)), "--max-steps", 5, *extra)
        results.append(weights(tmp_path / str(i), "0000005.pt")["model"])
    for key, expected in results[0].items():
        if not key.endswith("qkv.bias"):  # see the test above
            assert (results[1][key] - expected).abs().max() <= 1e-5 * expected.abs().max(), key


def test_training_improves_the_unweighted_error(digits, tmp_path):
    call("train", *tiny(digits, tmp_path), "--max-steps", 120, "--cfg", 1, "--log-every", 20)
    errors = [json.loads(line)["error"] for line in open(tmp_path / "metrics.jsonl")]
    assert errors[-1] < 0.7 * errors[0]


@pytest.mark.parametrize(("every", "steps"), [(0, []), (1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]),
                                              (9, [5])])
def test_what_is_due_is_done_every_so_often_and_at_the_end(every, steps):
    run = SimpleNamespace(total_steps=5, args=train.parse_args(
        ["--data-path", "x", "--sample-every", str(every)]))
    assert [step for step in range(1, 6) if train.what_is_due(run, step).picture] == steps


def test_the_run_directory_is_named_after_model_and_guidance():
    args = train.parse_args(["--data-path", "x", "--model", "DiT-XL/2", "--cfg", "2.5"])
    assert str(args.run_dir) == "results/DiT-XL-2-cfg2.5"


def test_shards_and_raw_images_train_the_same_weights(tmp_path):
    """The posterior's noise is counted like all noise, so both paths see the same latents."""
    save_folder(tmp_path / "images", per_class=8, size=40)
    save_small_vae(tmp_path / "vae")
    common = ["--image-size", 32, "--vae", tmp_path / "vae"]
    call("encode_imagenet", "--data-path", tmp_path / "images", "--out-path", tmp_path / "shards",
         "--dtype", "float32", "--flip", "--num-workers", 0, *common)
    states = []
    for path, extra in (("images", []), ("shards", ["--encoded-data"])):
        folder = tmp_path / f"run-{path}"
        call("train", "--data-path", tmp_path / path, "--run-dir", folder, "--model", "DiT-T/4",
             "--flip", "--global-batch-size", 8, "--max-steps", 4, "--num-workers", 0,
             "--sample-every", 4, *common, *extra)
        states.append(weights(folder, "0000004.pt"))
        assert Image.open(folder / "samples" / "0000004.png").width > 32
    raw, encoded = states
    one, two = (torch.cat([p.flatten() for p in state["model"].values()]) for state in states)
    assert (one - two).norm() <= 1e-6 * one.norm()
    assert encoded["config"]["scale"] == raw["config"]["scale"] != 1
    assert encoded["config"]["latent_shape"] == raw["config"]["latent_shape"]


def test_latents_without_pictures_need_no_vae(tmp_path):
    save_folder(tmp_path / "images", per_class=4, size=40)
    save_small_vae(tmp_path / "vae")
    call("encode_imagenet", "--data-path", tmp_path / "images", "--out-path", tmp_path / "shards",
         "--num-workers", 0, "--image-size", 32, "--vae", tmp_path / "vae")
    call("train", "--data-path", tmp_path / "shards", "--encoded-data", "--run-dir",
         tmp_path / "run", "--model", "DiT-T/4", "--global-batch-size", 4, "--max-steps", 1,
         "--image-size", 32, "--sample-every", 0)
    assert weights(tmp_path / "run", "0000001.pt")["config"]["scale"] != 1


def evaluation(digits, folder):
    """Options that evaluate every two steps against the real digits."""
    ref = folder / "ref.npz"
    call("evaluate_fid", "--samples", digits, "--make-ref", ref, "--protocol", "pixels",
         "--image-size", 8, "--num-workers", 0)
    return ["--eval-every", 2, "--fid-ref", ref, "--eval-samples", 60, "--protocol", "pixels"]


def evaluations(folder):
    """The metrics records of evaluations."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [record for record in records if "fid" in record]


def test_evaluation_while_training_changes_nothing_but_the_metrics(digits, tmp_path):
    evaluates = evaluation(digits, tmp_path)
    for name, extra in (("without", []), ("with", evaluates)):
        call("train", *tiny(digits, tmp_path / name), "--max-steps", 4, *extra)
    states = [weights(tmp_path / name, "0000004.pt")["model"] for name in ("without", "with")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    measured = evaluations(tmp_path / "with")
    assert [record["step"] for record in measured] == [2, 4]
    assert measured[0]["protocol"] == "pixels" and measured[0]["num_samples"] == 60
    assert measured[0]["labels"] == "balanced" and measured[0]["seed"] == 0
    line, = (line for line in (tmp_path / "with/log.txt").read_text().splitlines()
             if "step 2  " in line)
    assert "num_samples 60" in line and "labels balanced" in line and "seed 0" in line
    assert "Frechet distance of pixels" in line and "fid" not in line.lower()
    assert "60 samples where the reference suggests 200" in (tmp_path / "with/log.txt").read_text()
    call("sample", "--ckpt", tmp_path / "with" / "checkpoints" / "0000004.pt", "--sample-dir",
         tmp_path / "samples", "--num-fid-samples", 60, "--per-proc-batch-size", 50)
    samples = Statistics(Extractor("pixels", WORLD), 60, (8, 8))
    images = NpzImages(tmp_path / "samples.npz", option="")
    samples.add_all(images.numbered_batches(60, WORLD), "samples")
    reference = Reference.load(evaluate[3], "pixels", (8, 8), option="--ref")
    assert measured[-1]["fid"] == pytest.approx(
        metrics.reference.evaluate(samples, reference)["fid"], rel=1e-9)


def test_an_evaluation_that_was_cut_short_is_made_up_for(digits, tmp_path):
    options = [*tiny(digits, tmp_path / "run"), "--max-steps", 4, *evaluation(digits, tmp_path)]
    call("train", *options)
    path = tmp_path / "run" / "metrics.jsonl"
    before = evaluations(tmp_path / "run")
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True)
                            if not ("fid" in line and '"step": 4' in line)))
    for _ in range(2):
        call("train", *options)
        assert evaluations(tmp_path / "run") == before


def test_two_processes_accumulate_and_evaluate_as_one(digits, tmp_path):
    """As on GPUs that hold a part of their share; gradients are averaged once a step."""
    evaluates = evaluation(digits, tmp_path)
    options = ["--max-steps", 4, "--cfg", 2, "--kappa", 0.5, *evaluates]
    call("train", *tiny(digits, tmp_path / "one"), *options)
    done = run_script("train.py", *tiny(digits, tmp_path / "two"), *options, "--grad-accum-steps",
                      2, processes=2)
    assert done.returncode == 0, done.stderr
    one, two = (weights(tmp_path / name, "0000004.pt")["model"] for name in ("one", "two"))
    for key, value in one.items():
        if not key.endswith("qkv.bias"):  # of key biases Adam sees the rounding only
            assert (two[key] - value).abs().max() <= 1e-5 * value.abs().max(), key
    for first, second in zip(*map(evaluations, (tmp_path / "one", tmp_path / "two"))):
        assert second["fid"] == pytest.approx(first["fid"], rel=1e-3) and first["fid"] > 0


def test_a_compiled_run_in_bfloat16_follows_the_plain_one(digits, tmp_path, monkeypatch):
    """What a GPU runs by default, but for the code that the compiler makes."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    lines = {}
    variants = {"plain": ["--no-compile"], "fast": ["--compile", "--precision", "bf16"]}
    for name, extra in variants.items():
        call("train", *tiny(digits, tmp_path / name), "--max-steps", 8, "--cfg", 2, "--kappa", 0.5,
             *extra)
        *_, lines[name] = map(json.loads, (tmp_path / name / "metrics.jsonl").open())
    for key in ("error", "velocity_error"):
        assert lines["fast"][key] == pytest.approx(lines["plain"][key], rel=0.02)
    state = weights(tmp_path / "fast", "0000008.pt")
    assert all(value.dtype == torch.float32 for value in state["model"].values())

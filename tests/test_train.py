"""Training as users run it: one to four processes, its files, its pictures."""

import json
import shutil

import growth
import pytest
import torch
from conftest import assert_same_weights, call, load_weights, run_ranks, save_small_vae, tiny
from PIL import Image

import sample
import train


@pytest.fixture(scope="module")
def evaluation(reference):
    """Options that evaluate every four steps against the real digits."""
    return ["--eval-every", 4, "--fid-ref", reference, "--eval-samples", 60, "--protocol", "pixels"]


@pytest.fixture(scope="module")
def one(digits, evaluation, guided, tmp_path_factory):
    """The folder of a run of one process: eight guided steps with evaluations."""
    folder = tmp_path_factory.mktemp("one")
    call("train", *tiny(digits, folder), *guided, *evaluation)
    return folder


def records(folder, key):
    """The metrics records that have this key."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if key in record]


# ---- one result, however the work is divided ---------------------------------------------------


def test_micro_batches_and_recomputed_activations_give_the_same_weights(one, digits, guided,
                                                                        tmp_path):
    call("train", *tiny(digits, tmp_path), *guided, "--grad-accum-steps", 4,
         "--checkpoint-activations")
    assert_same_weights(load_weights(tmp_path, 8), load_weights(one, 8))


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "parts"), [(2, 2), (4, 1)])
def test_several_processes_train_and_evaluate_as_one(processes, parts, one, digits, guided,
                                                     evaluation, tmp_path):
    """The draws belong to the global batch, so the results differ by rounding only. The ranks hold
    the same bits after every step: DistributedDataParallel sums gradients in one order for all."""
    said = run_ranks("watched_train", *tiny(digits, tmp_path / "run"), *guided, *evaluation,
                     "--no-compile", "--grad-accum-steps", parts, processes=processes,
                     output=tmp_path / "said")
    assert [text.count("made a step") for text in said] == processes * [8]
    for kind in ("model", "ema"):
        assert_same_weights(load_weights(tmp_path / "run", 8, kind), load_weights(one, 8, kind))
    for ours, theirs in zip(records(tmp_path / "run", "fid"), records(one, "fid")):
        assert ours["fid"] == pytest.approx(theirs["fid"], rel=1e-3) and ours["fid"] > 0


def test_shards_and_raw_images_train_the_same_weights(digits, tmp_path):
    """The posterior's noise is counted like all noise, so both paths see the same latents. Latents
    without pictures and evaluation need no VAE."""
    vae = save_small_vae(tmp_path / "vae")
    common = ["--image-size", 16, "--vae", vae]
    call("encode_imagenet", "--data-path", digits, "--out-path", tmp_path / "shards", "--dtype",
         "float32", "--flip", "--num-workers", 0, *common)
    for name, path, extra in (("raw", digits, ["--sample-every", 2]),
                              ("encoded", tmp_path / "shards", ["--encoded-data"])):
        call("train", *tiny(path, tmp_path / name), *common, "--model", "DiT-T/2", "--flip",
             "--max-steps", 2, *extra)
        shutil.rmtree(vae, ignore_errors=True)
    assert Image.open(tmp_path / "raw" / "samples" / "0000002.png").width > 16
    raw, encoded = (torch.cat([p.flatten() for p in load_weights(tmp_path / name, 2).values()])
                    for name in ("raw", "encoded"))
    assert (raw - encoded).norm() <= 1e-6 * raw.norm()
    raw, encoded = (load_weights(tmp_path / name, 2, "config") for name in ("raw", "encoded"))
    assert encoded["scale"] == raw["scale"] != 1
    assert encoded["latent_shape"] == raw["latent_shape"] == [4, 2, 2]


# ---- what a run does and leaves ----------------------------------------------------------------


def test_a_run_leaves_the_promised_files(trained):
    folder = trained.parent.parent
    state = torch.load(trained, weights_only=True)
    assert set(state) == {"step", "model", "ema", "opt", "config"} and state["step"] == 12
    config = json.loads((folder / "config.json").read_text())
    assert state["config"] == config and config["num_classes"] == 10
    assert sorted(p.name for p in trained.parent.iterdir()) == ["0000010.pt", "0000012.pt"]
    lines = records(folder, "step")
    assert [record["step"] for record in lines] == [4, 8, 12]
    for record in lines:
        assert record["error"] > 10 and record["velocity_error"] > 10  # sums over 192 numbers
        assert record["grad_norm"] > 0 and record["images_per_second"] > 0
    assert (folder / "log.txt").read_text().count("images/s") == 3
    assert list(folder.glob("events.out.tfevents.*"))


@pytest.fixture(scope="module")
def frequent(digits, tmp_path_factory):
    """A run of five steps that saves after each, draws after every second and logs every nine."""
    folder = tmp_path_factory.mktemp("frequent")
    call("train", *tiny(digits, folder), "--max-steps", 5, "--ckpt-every", 1, "--keep-last", 0,
         "--sample-every", 2, "--log-every", 9)
    return folder


def test_what_is_done_every_so_often_is_done_after_the_last_step_too(frequent):
    def numbers(name):
        return sorted(int(path.stem) for path in (frequent / name).iterdir())

    assert numbers("checkpoints") == [1, 2, 3, 4, 5] and numbers("samples") == [2, 4, 5]
    assert [record["step"] for record in records(frequent, "step")] == [5]
    assert not records(frequent, "fid")  # 0 = never


def test_the_average_moves_a_share_of_the_way_to_the_weights(frequent):
    for step in (2, 3, 4, 5):
        before, ema = (load_weights(frequent, n, "ema") for n in (step - 1, step))
        for key, weight in load_weights(frequent, step).items():
            expected = before[key].lerp(weight, 1 - 0.9)
            assert torch.allclose(ema[key], expected, rtol=1e-5, atol=1e-7), key


def test_averages_are_part_of_no_graph(digits, tmp_path, monkeypatch):
    """They once were, of one that gained a node per parameter and step: 36 kB a step."""
    seen = []

    def look(net, *known, **options):
        seen.extend((p.requires_grad, p.grad_fn) for p in net.parameters())
        return original(net, *known, **options)
    original = sample.sample
    monkeypatch.setattr(sample, "sample", look)
    call("train", *tiny(digits, tmp_path), "--max-steps", 2, "--sample-every", 2)
    assert seen and set(seen) == {(False, None)}


@pytest.mark.slow
def test_a_run_holds_no_more_after_many_steps(tmp_path):
    """With the graph of the test above memory grew by some 150 MiB per 5,000 steps. tests/growth.py
    sees 8 in a longer run; over so few steps what allocators keep can be as much."""
    readings = growth.watch(tmp_path, "images", 500, 12)
    assert growth.growth(readings, mib_per_5000=40)["flat"], growth.table(readings)


def test_pictures_come_from_the_same_noise_every_time(digits, tmp_path):
    call("train", *tiny(digits, tmp_path), "--max-steps", 4, "--sample-every", 2, "--lr", 1e-30)
    first, second = sorted((tmp_path / "samples").iterdir())
    assert (first.name, second.name) == ("0000002.png", "0000004.png")
    assert first.read_bytes() == second.read_bytes()  # nothing was learned in between
    assert Image.open(first).size == (10 * 66 + 2, 8 * 66 + 2)


def test_training_lowers_the_unweighted_error(digits, tmp_path):
    call("train", *tiny(digits, tmp_path), "--max-steps", 60, "--cfg", 1, "--log-every", 10,
         "--lr", 2e-3)
    errors = [record["error"] for record in records(tmp_path, "error")]
    assert errors[-1] < 0.7 * errors[0]


def test_the_run_directory_is_named_after_model_and_guidance():
    args = train.parse_args(["--data-path", "x", "--model", "DiT-XL/2", "--cfg", "2.5"])
    assert str(args.run_dir) == "results/DiT-XL-2-cfg2.5"


# ---- evaluation while training -----------------------------------------------------------------


def test_evaluation_changes_nothing_but_the_metrics(one, digits, guided, tmp_path):
    call("train", *tiny(digits, tmp_path), *guided)
    plain, evaluated = load_weights(tmp_path, 8), load_weights(one, 8)
    assert all(torch.equal(value, evaluated[key]) for key, value in plain.items())


def test_evaluations_are_those_of_samples_on_disk(one, reference, tmp_path, capfd):
    first, last = records(one, "fid")
    assert (first["step"], last["step"]) == (4, 8)
    assert first["protocol"] == "pixels" and first["num_samples"] == 60
    assert first["labels"] == "balanced" and first["seed"] == 0
    call("sample", "--ckpt", one / "checkpoints" / "0000008.pt", "--sample-dir",
         tmp_path / "samples", "--num-fid-samples", 60, "--per-proc-batch-size", 50)
    call("evaluate_fid", "--samples", tmp_path / "samples.npz", "--ref", reference, "--protocol",
         "pixels", "--num-workers", 0)
    metrics = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert last["fid"] == pytest.approx(metrics["fid"], rel=1e-9)


def test_the_log_says_what_was_measured(one):
    log = (one / "log.txt").read_text()
    line, = (line for line in log.splitlines() if "step 4  " in line)
    assert "num_samples 60" in line and "labels balanced" in line and "seed 0" in line
    assert "Frechet distance of pixels" in line and "fid" not in line.lower()
    assert "60 samples where the reference suggests 200" in log


def test_an_evaluation_that_was_cut_short_is_redone(one, digits, guided, evaluation, tmp_path):
    run, before = shutil.copytree(one, tmp_path / "run"), records(one, "fid")
    path = run / "metrics.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True)
                            if not ("fid" in line and '"step": 8' in line)))
    for _ in range(2):
        call("train", *tiny(digits, run), *guided, *evaluation)
        assert records(run, "fid") == before

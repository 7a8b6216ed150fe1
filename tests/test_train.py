"""Training as users run it: one to four processes, sharded or not, its files, its pictures."""

import copy
import json
import re
import shlex
import shutil
import sys
from types import SimpleNamespace

import growth
import pytest
import torch
from conftest import (
    assert_same_training,
    call,
    load_state,
    load_weights,
    refused,
    run_ranks,
    save_small_vae,
    sharding,
    tiny,
)
from PIL import Image
from soak import differences

import train
from dataset.noise import noise_and_labels
from dataset.vae import normalisation, posterior_sample
from engine.distributed import World
from engine.log import code_version
from meanflow import MeanFlow
from models import build
from sample import ImageSampler


@pytest.fixture(scope="module")
def evaluation(reference):
    """Options that evaluate every four steps against the real digits."""
    return ["--eval-every", 4, "--fid-ref", reference, "--eval-samples", 60, "--protocol", "pixels"]


@pytest.fixture(scope="module", params=["guided", "improved"])
def method(request):
    """Options of a run with either method."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def one(digits, evaluation, method, tmp_path_factory):
    """The folder of a run of one process: eight guided steps with evaluations."""
    folder = tmp_path_factory.mktemp("one")
    call("train", *tiny(digits, folder), *method, *evaluation)
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return save_small_vae(tmp_path_factory.mktemp("vae") / "vae")


def encode(digits, folder, vae, *extra):
    """Encode the digits at 32 pixels; options of a run on them, without --vae and --image-size."""
    call("encode_imagenet", "--data-path", digits, "--out-path", folder, "--vae", vae,
         "--image-size", 32, "--num-workers", 0, *extra)
    options = tiny(folder, folder.with_name(f"{folder.name} run"))
    at = options.index("--vae")
    del options[at:at + 4]
    return [*options, "--encoded-data"]


def records(folder, key):
    """The metrics records that have this key."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if key in record]


ALONE = World(0, 1, torch.device("cpu"), "fp32")
SPLIT = ("error_equal", "error_unequal", "velocity_error_equal", "velocity_error_unequal")

# ---- one result, however the work is divided ---------------------------------------------------


def test_micro_batches_and_recomputed_activations_give_the_same_weights(one, digits, method,
                                                                        tmp_path):
    call("train", *tiny(digits, tmp_path), *method, "--grad-accum-steps", 4,
         "--checkpoint-activations")
    assert_same_training(load_state(tmp_path, 8), load_state(one, 8))


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "extra"), [
    (2, ["--grad-accum-steps", 2]), (4, []),
    pytest.param(2, ["--shard", "--sample-every", 8], marks=sharding),
    pytest.param(2, ["--shard", "--grad-accum-steps", 2, "--checkpoint-activations"],
                 marks=sharding)])
def test_several_processes_train_and_evaluate_as_one(processes, extra, one, digits, method,
                                                     evaluation, tmp_path):
    """The draws belong to the global batch, so the results differ by rounding only. The ranks hold
    the same bits after every step. Checkpoints of sharded runs need no process group to be read."""
    run, sharded = tmp_path / "run", "--shard" in extra
    said = run_ranks("train" if sharded else "watched_train", *tiny(digits, run), *method,
                     *evaluation, "--no-compile", *extra, processes=processes,
                     output=tmp_path / "said")
    assert sharded or [text.count("made a step") for text in said] == processes * [8]
    assert_same_training(load_state(run, 8), load_state(one, 8))
    for key, tolerance in (("fid", 1e-3), *((key, 1e-5) for key in SPLIT)):
        ours, theirs = ([record[key] for record in records(folder, key)] for folder in (run, one))
        assert ours == pytest.approx(theirs, rel=tolerance) and len(ours) == 2 and min(ours) > 0
    assert (run / "samples" / "0000008.png").exists() == ("--sample-every" in extra)


@pytest.mark.slow
@sharding
def test_a_run_may_change_between_sharded_and_not(one, digits, method, tmp_path):
    run = tmp_path / "run"
    for steps, extra in ((3, ["--shard"]), (6, []), (8, ["--shard"])):
        run_ranks("train", *tiny(digits, run), *method, "--max-steps", steps, *extra,
                  processes=len(extra) + 1, output=tmp_path / "said")
    assert_same_training(load_state(run, 8), load_state(one, 8))


def test_shards_and_raw_images_train_the_same_weights(vae, digits, tmp_path):
    """The posterior's noise is counted like all noise, so both paths see the same latents. Latents
    without pictures and evaluation need no VAE."""
    vae = shutil.copytree(vae, tmp_path / "vae")
    encoded = encode(digits, tmp_path / "shards", vae, "--dtype", "float32", "--flip")
    common = ["--model", "DiT-T/2", "--flip", "--max-steps", 2]
    call("train", *tiny(digits, tmp_path / "raw"), "--vae", vae, "--image-size", 32, *common,
         "--sample-every", 2)
    shutil.rmtree(vae)
    call("train", *encoded, *common)
    assert Image.open(tmp_path / "raw" / "samples" / "0000002.png").width > 32
    raw, encoded = (load_state(tmp_path / name, 2) for name in ("raw", "shards run"))
    one, two = (torch.cat([p.flatten() for p in state["model"].values()])
                for state in (raw, encoded))
    assert (one - two).norm() <= 1e-6 * one.norm()
    assert encoded["config"]["scale"] == raw["config"]["scale"] != 1
    assert encoded["config"]["latent_shape"] == raw["config"]["latent_shape"] == [4, 4, 4]


def test_latents_bring_their_vae_and_image_size(vae, digits, tmp_path):
    """They had to be told again, and the VAE that was looked for was the default one."""
    call("train", *encode(digits, tmp_path / "shards", vae), "--max-steps", 1, "--sample-every", 1)
    config = load_weights(tmp_path / "shards run", 1, "config")
    assert config["vae"] == str(vae) and config["image_size"] == 32
    assert (tmp_path / "shards run" / "samples" / "0000001.png").exists()


def test_every_step_draws_other_noise():
    state = SimpleNamespace(args=SimpleNamespace(global_batch_size=4, seed=0), world=ALONE, step=0,
                            config={"latent_shape": [1, 2, 2], "total_steps": 2},
                            method=MeanFlow(num_classes=2))
    one = train.draw_global_batch(state)
    state.step = 1
    two = train.draw_global_batch(state)
    assert not torch.equal(one[0], two[0]) and not torch.equal(one[1].eps, two[1].eps)


# ---- what a run does and leaves ----------------------------------------------------------------


def test_the_log_says_where_a_run_goes_on_and_that_it_is_finished(digits, tmp_path):
    for steps in (1, 2, 2):
        call("train", *tiny(digits, tmp_path), "--max-steps", steps)
    first, second, third = re.findall("steps . to ., into .*", (tmp_path / "log.txt").read_text())
    assert first == f"steps 0 to 1, into {tmp_path}"
    assert second == f"steps 1 to 2, into {tmp_path}" and third.startswith("steps 2 to 2")
    assert "all steps are made: more need a larger" in (tmp_path / "log.txt").read_text()


def test_a_bad_image_may_be_removed_or_skipped(digits, tmp_path):
    """"Remove the file" ended the run for good: it was not a run of as many images any more."""
    data = shutil.copytree(digits, tmp_path / "data")
    options = [*tiny(data, tmp_path / "run"), "--global-batch-size", 100, "--ckpt-every", 1]
    call("train", *options, "--max-steps", 2)
    bad = data / "3" / "0003.png"
    bad.write_bytes(bad.read_bytes()[:60])
    with refused("--data-path must hold readable images", bad, "remove", "--skip-bad-images"):
        call("train", *options, "--max-steps", 4)
    call("train", *options, "--max-steps", 4, "--skip-bad-images")
    bad.unlink()
    call("train", *options, "--max-steps", 6)
    call("train", *options, "--max-steps", 7)
    log = (tmp_path / "run" / "log.txt").read_text()
    told, = re.findall("num_images 200, now 199: .* a new one", log)
    assert log.index("steps 4 to 6") < log.index(told) < log.index("steps 6 to 7")


@pytest.mark.parametrize(("decay", "suits"), [(.84, None), (.86, "0.5"), (1, "0.5")])
def test_an_average_that_is_longer_than_the_run_is_said(decay, suits, digits, tmp_path):
    """The pictures of a first short run were noise, and nothing said why."""
    call("train", *tiny(digits, tmp_path), "--max-steps", 20, "--ema-decay", decay)
    log = (tmp_path / "log.txt").read_text()
    assert ("will be noise" in log) == bool(suits)
    assert suits is None or f"{suits} would suit 20" in log


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


@pytest.mark.parametrize(("ratio", "equal"), [(0, 16), (0.3, 11), (1, 0)])
@pytest.mark.parametrize("model", ["DiT-T/4", "iMF-T/4"])
def test_errors_are_recorded_by_rows_with_and_without_r_equal_t(model, ratio, equal, digits,
                                                                tmp_path, monkeypatch):
    """Means over rows, also where the micro-batches have different shares of them: with 11 of 16
    rows three of the four have 3 rows with r = t, and one has 2."""
    make_method, rows = train.make_method, {key: [] for key in SPLIT}  # of four steps

    def watched_method(config, **options):
        method = make_method(config, **options)
        loss = method.loss

        def watched_loss(net, x, y, draws, *, forward):
            out = loss(net, x, y, draws, forward=forward)
            for name, values in (("error", out.error), ("velocity_error", out.velocity_error)):
                rows[f"{name}_equal"] += values[draws.r == draws.t].tolist()
                rows[f"{name}_unequal"] += values[draws.r < draws.t].tolist()
            return out
        method.loss = watched_loss
        return method

    monkeypatch.setattr(train, "make_method", watched_method)
    call("train", *tiny(digits, tmp_path), "--max-steps", 4, "--model", model, "--ratio", ratio,
         "--grad-accum-steps", 4)
    assert [len(rows[key]) for key in SPLIT] == 2 * [4 * equal, 4 * (16 - equal)]
    for name in ("error", "velocity_error"):
        rows[name] = rows[f"{name}_equal"] + rows[f"{name}_unequal"]
    record, = records(tmp_path, "error")
    assert {key: record[key] for key in rows if key in record} == {
        key: pytest.approx(sum(values) / len(values), rel=1e-5)
        for key, values in rows.items() if values}


@pytest.fixture(scope="module")
def frequent(digits, tmp_path_factory):
    """A run of plain flow matching: saves after each of five steps, draws after every second."""
    folder = tmp_path_factory.mktemp("frequent")
    call("train", *tiny(digits, folder), "--max-steps", 5, "--ckpt-every", 1, "--keep-last", 0,
         "--sample-every", 2, "--log-every", 9, "--ratio", 0)
    return folder


def test_records_say_how_much_memory_of_a_gpu_a_run_takes(trained, monkeypatch):
    assert not records(trained.parent.parent, "gpu_memory_gb")  # on a CPU
    meter = train.Meter(copy.copy(ALONE), batch=4)
    meter.begin(0)
    meter.world.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2_500_000_000)
    meter.sums = torch.zeros(len(train.STATISTICS))
    assert meter.read(1, ())["gpu_memory_gb"] == 2.5


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


def test_averages_are_part_of_no_graph():
    """They once were, of one that gained a node per parameter and step: 36 kB a step."""
    net, ema = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).requires_grad_(False)
    train.update_average(ema, net, 0.9)
    assert {(p.requires_grad, p.grad_fn) for p in ema.parameters()} == {(False, None)}


@pytest.mark.slow
def test_a_run_holds_no_more_after_many_steps(tmp_path):
    """With the graph of the test above memory grew by some 150 MiB per 5,000 steps. tests/growth.py
    sees 8 in a longer run."""
    assert growth.growth(growth.watch(tmp_path, "images", 500, 12), mib_per_5000=40)["flat"]


def test_pictures_come_from_the_same_noise_every_time(digits, tmp_path):
    call("train", *tiny(digits, tmp_path), "--max-steps", 4, "--sample-every", 2, "--lr", 1e-30)
    first, second = sorted((tmp_path / "samples").iterdir())
    assert (first.name, second.name) == ("0000002.png", "0000004.png")
    assert first.read_bytes() == second.read_bytes()  # nothing was learned in between
    width, height = Image.open(first).size
    assert width == 10 * 66 + 2 and 10 < height - (8 * 66 + 2) < 40  # captions above


def test_training_lowers_the_unweighted_error(digits, tmp_path):
    call("train", *tiny(digits, tmp_path), "--max-steps", 60, "--cfg", 1, "--log-every", 10,
         "--lr", 2e-3)
    errors = [record["error"] for record in records(tmp_path, "error")]
    assert errors[-1] < 0.7 * errors[0]


def resolved(*model):
    args = train.parse_args(["--data-path", "x", "--model", *model])
    train.resolve(args, world=None)
    return args


def test_the_run_directory_is_named_after_model_and_guidance():
    for model, name in ((["DiT-XL/2", "--cfg", "2.5"], "DiT-XL-2-cfg2.5"),
                        (["DiT-B/2", "--tangent", "network", "--flip", "--cfg-interval", "0", ".5"],
                         "DiT-B-2-cfg3.0-flip-cfg-interval=0.0-0.5-tangent=network"),
                        (["DiT-B/4", "--vae", "/a b/my vae", "--seed", "1", "--max-steps", "5"],
                         "DiT-B-4-cfg3.0-vae=my_vae-seed=1"),
                        (["iMF-XL/2"], "iMF-XL-2-omega8.0")):
        assert str(resolved(*model).run_dir) == f"results/{name}"


def test_each_method_has_its_own_defaults():
    plain, improved = resolved("DiT-B/4"), resolved("iMF-B/2")
    assert (plain.ratio, plain.cfg, plain.tangent, plain.omega_max) == (0.25, 3, "velocity", None)
    assert (improved.ratio, improved.omega_max, improved.beta, improved.cfg) == (0.5, 8, 1, None)


def test_a_run_resumes_though_its_config_lacks_an_option(trained, digits, tmp_path, refusal):
    """Every run directory was refused as soon as train.py had one option more."""
    folder = shutil.copytree(trained.parent.parent, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    del config["clip_grad"]
    (folder / "config.json").write_text(json.dumps(config))
    options = [*tiny(digits, folder), "--max-steps", 13]
    line = refusal("train", [*options, "--clip-grad", 1, "--cfg", 1.5], "--run-dir")
    assert "(cfg 3.0, now 1.5; clip_grad 0.0, now 1.0)" in line
    call("train", *options)


def test_a_resumed_run_takes_the_new_values_that_it_is_allowed_and_says_so(digits, tmp_path):
    options = [*tiny(digits, tmp_path), "--max-steps"]
    call("train", *options, 2)
    changed = [*options, 3, "--ema-decay", 0.8, "--lr", 2e-3]
    with refused("--run-dir", "ema_decay 0.9, now 0.8; lr 0.001, now 0.002"):
        call("train", *changed)
    with refused("--run-dir", "(ema_decay 0.9, now 0.8)"):
        call("train", *changed, "--allow-change", "lr")
    call("train", *changed, "--allow-change", "lr", "ema-decay")
    log = (tmp_path / "log.txt").read_text()
    assert "from step 2 on: ema_decay 0.9, now 0.8; lr 0.001, now 0.002" in log
    config = load_state(tmp_path, 3)["config"]
    assert config == json.loads((tmp_path / "config.json").read_text()) and config["lr"] == 2e-3
    call("train", *changed[:-5], 4, *changed[-4:])  # now these are the run's


def test_a_refused_change_leaves_the_config_as_it_was(trained, digits, tmp_path):
    """It held the new value, so that the run's own command was refused from then on."""
    folder = shutil.copytree(trained.parent.parent, tmp_path / "run")
    before = (folder / "config.json").read_text()
    path = folder / "checkpoints" / "0000012.pt"
    torch.save(torch.load(path, weights_only=True) | {"ema": {}}, path)
    with refused("--run-dir", path.name):
        call("train", *tiny(digits, folder), "--max-steps", 14)
    assert (folder / "config.json").read_text() == before


@pytest.mark.parametrize("more", [["--method", "soflow"], ["--cooldown-steps", 4]])
def test_a_run_with_a_schedule_keeps_its_length(more, digits, tmp_path):
    options = [*tiny(digits, tmp_path), *more]
    call("train", *options, "--max-steps", 24)
    call("train", *options, "--epochs", 2)  # as many
    with refused("--run-dir", "total_steps 24, now 25"):
        call("train", *options, "--max-steps", 25)
    call("train", *options, "--max-steps", 25, "--allow-change", "max-steps")


def test_a_config_says_what_made_the_run(trained):
    config = load_state(trained.parent.parent, 12)["config"]
    assert config["torch"] == torch.__version__ and config["commit"] == code_version()
    assert config["command"] == shlex.join(sys.argv) and config["method"] == "meanflow"
    assert config["total_steps"] == 12 and "allow_change" not in config


@pytest.mark.parametrize("optimizer", ["muon", "sgd"])
def test_any_optimiser_resumes_bit_for_bit(optimizer, digits, tmp_path, monkeypatch):
    if optimizer == "sgd":
        monkeypatch.setattr(train, "make_optimizer", lambda args, params: torch.optim.SGD(
            params, lr=args.lr, momentum=0.9))
    more = ["--optimizer", "muon"] if optimizer == "muon" else []
    for name, steps in (("one", (6,)), ("two", (4, 6))):
        for count in steps:
            call("train", *tiny(digits, tmp_path / name), "--max-steps", count, *more)
    one, two = (load_state(tmp_path / name, 6) for name in ("one", "two"))
    assert all(torch.equal(value, two["model"][key]) for key, value in one["model"].items())
    assert len(one["opt"]["state"]) == len([*build(one["config"]).parameters()])


def test_muon_trains_the_weights_of_linear_layers(digits, tmp_path):
    call("train", *tiny(digits, tmp_path), "--max-steps", 2, "--optimizer", "muon")
    state = load_state(tmp_path, 2)
    kinds = ["momentum_buffer" in moments for moments in state["opt"]["state"].values()]
    linear = [m for m in build(state["config"]).modules() if isinstance(m, torch.nn.Linear)]
    assert kinds == sorted(kinds, reverse=True) and sum(kinds) == len(linear)


def test_the_rate_falls_to_zero_in_the_last_steps(digits, tmp_path, monkeypatch):
    rates, step = [], torch.optim.AdamW.step

    def watched(self):
        rates.append({group["lr"] for group in self.param_groups})
        step(self)
    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    for count in (5, 7):
        call("train", *tiny(digits, tmp_path / f"{count}"), "--max-steps", count, "--lr", 0.1,
             "--cooldown-steps", 4, "--warmup-steps", 2)
    expected = [0, 0.05, 0.075, 0.05, 0.025, 0, 0.05, 0.1, 0.1, 0.075, 0.05, 0.025]
    assert [rate for rates in rates for rate in rates] == pytest.approx(expected)


def test_the_rate_rises_to_the_given_one_and_large_gradients_are_clipped(digits, tmp_path,
                                                                        monkeypatch):
    seen, step = [], torch.optim.AdamW.step

    def watched(self):
        norm = torch.nn.utils.get_total_norm(
            p.grad for group in self.param_groups for p in group["params"])
        seen.append((self.param_groups[0]["lr"], float(norm)))
        step(self)
    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    call("train", *tiny(digits, tmp_path), "--max-steps", 6, "--warmup-steps", 4, "--lr", 0.1,
         "--clip-grad", 0.01, "--log-every", 1)
    rates, norms = zip(*seen)
    assert rates == pytest.approx([0, 0.025, 0.05, 0.075, 0.1, 0.1])
    assert max(norms) <= 0.01 * (1 + 1e-4)
    logged = [record["grad_norm"] for record in records(tmp_path, "grad_norm")]
    assert max(logged) > 0.02  # the one before


def test_improved_meanflow_normalises_latents_per_channel(vae, digits, tmp_path):
    call("train", *tiny(digits, tmp_path), "--model", "iMF-T/4", "--image-size", 32, "--vae", vae,
         "--max-steps", 1, "--sample-every", 1)
    config = load_weights(tmp_path, 1, "config")
    mean, std = (torch.tensor(config[name]).view(1, 4, 1, 1)
                 for name in ("latent_mean", "latent_std"))
    moments = torch.randn(2, 2, 4, 4, 4).abs()
    x = posterior_sample(moments, torch.ones(2, 4, 4, 4), *normalisation(config))
    assert torch.allclose(x, (moments.sum(1) - mean) / std, rtol=1e-5, atol=1e-6)
    codec = SimpleNamespace(decode=lambda latents: latents, scale=config["scale"])
    sampler = ImageSampler(lambda *_, heads: (torch.zeros(2, 4, 4, 4), None), codec, config, ALONE)
    z1, _ = noise_and_labels(range(2), (4, 4, 4), seed=0, num_classes=10)
    assert torch.allclose(sampler.images(range(2)), (z1 * std + mean) * config["scale"], rtol=1e-5)


@pytest.mark.parametrize("normalised", [True, False])
def test_encoded_latents_are_normalised_whatever_the_vae_option(normalised, vae, digits, tmp_path):
    """With --vae none, which loads no VAE, they were taken for pixels."""
    options = encode(digits, tmp_path / "shards", vae if normalised else "none")
    call("train", *options, "--vae", "none", "--model", "iMF-T/4", "--max-steps", 1)
    config = load_weights(tmp_path / "shards run", 1, "config")
    assert ("latent_mean" in config) == normalised


def test_a_normalisation_that_does_not_fit_the_channels_is_refused(digits, tmp_path, refusal):
    vae = save_small_vae(tmp_path / "vae", latent_channels=8)
    options = [*tiny(digits, tmp_path / "run"), "--model", "iMF-T/4", "--image-size", 32,
               "--vae", vae]
    assert "4 channels" in refusal("train", options, "--vae")


# ---- evaluation while training -----------------------------------------------------------------


def test_a_resumed_run_without_evaluations_ends_with_the_same_bits(one, digits, method, tmp_path):
    for steps in (3, 8):
        call("train", *tiny(digits, tmp_path), *method, "--max-steps", steps)
    assert not differences(load_state(tmp_path, 8), load_state(one, 8))


def test_evaluations_are_those_of_samples_on_disk(one, reference, tmp_path, capfd):
    first, last = records(one, "fid")
    assert (first["step"], last["step"]) == (4, 8)
    assert first["protocol"] == "pixels" and first["num_samples"] == 60
    assert first["labels"] == "balanced" and first["seed"] == 0
    assert ("omega" in first) == ("iMF" in load_weights(one, 8, "config")["model"])
    call("sample", "--ckpt", one / "checkpoints" / "0000008.pt", "--sample-dir",
         tmp_path / "samples", "--num-fid-samples", 60, "--per-proc-batch-size", 50)
    call("evaluate_fid", "--samples", tmp_path / "samples.npz", "--ref", reference, "--protocol",
         "pixels", "--num-workers", 0)
    metrics = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert last["fid"] == pytest.approx(metrics["fid"], rel=1e-9)


def test_the_log_says_what_was_measured(one):
    log = (one / "log.txt").read_text()
    line, = re.findall("step 4  .*", log)
    assert "Frechet distance of pixels" in line and "fid" not in line.lower()
    assert "num_samples 60" in line and "labels balanced  seed 0" in line
    assert "60 samples against 200 of the reference" in log


def test_an_evaluation_by_another_protocol_is_none_of_this_one(one, digits, method, evaluation,
                                                                tmp_path):
    """Both give a "fid"."""
    run, before = shutil.copytree(one, tmp_path / "run"), records(one, "fid")
    path = run / "metrics.jsonl"
    path.write_text(path.read_text().replace('"protocol": "pixels"', '"protocol": "adm"'))
    call("train", *tiny(digits, run), *method, *evaluation)
    assert records(run, "fid") == [*({**record, "protocol": "adm"} for record in before), before[1]]


def test_an_evaluation_that_was_cut_short_is_redone(one, digits, method, evaluation, tmp_path):
    run, before = shutil.copytree(one, tmp_path / "run"), records(one, "fid")
    path = run / "metrics.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True)
                            if not ("fid" in line and '"step": 8' in line)))
    for _ in range(2):
        call("train", *tiny(digits, run), *method, *evaluation)
        assert records(run, "fid") == before

"""Image files from a checkpoint, by any number of processes."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, png_of_16_bits, refused, run_ranks, save_small_vae, tiny
from PIL import Image
from soak import Child

import sample
from dataset.vae import Pixels
from engine.checkpoint import load_checkpoint, network_of
from engine.distributed import World
from engine.errors import UserError
from engine.files import FolderLock, atomic_file, list_folder
from improved_meanflow import ImprovedMeanFlow
from meanflow import MeanFlow
from metrics.reference import metric_names


def options(trained, folder):
    return ["--ckpt", trained, "--sample-dir", folder, "--num-fid-samples", 21,
            "--per-proc-batch-size", 4]


def files(folder):
    return {path.name: path.read_bytes() for path in list_folder(folder) if path.is_file()}


@pytest.fixture(scope="module")
def sampled(trained, tmp_path_factory):
    """21 images in batches of four, the last of which is not full."""
    folder = tmp_path_factory.mktemp("sampled") / "one"
    call("sample", *options(trained, folder))
    return folder


def test_the_npz_holds_the_images_in_order(sampled):
    images = np.load(f"{sampled}.npz")["arr_0"]
    assert images.shape == (21, 8, 8, 3) and images.dtype == np.uint8
    for i in range(21):
        assert np.array_equal(images[i], np.asarray(Image.open(sampled / f"{i:06d}.png")))
    assert len({image.tobytes() for image in images}) == 21
    assert Image.open(sampled.with_name("one.png")).width == 10 * 66 + 2


def test_an_interrupted_command_goes_on_where_it_stopped(trained, sampled):
    before = files(sampled)
    (sampled / "000002.png").unlink()
    (sampled / "000020.png").unlink()
    time_before = (sampled / "000005.png").stat().st_mtime_ns
    call("sample", *options(trained, sampled))
    assert files(sampled) == before
    assert (sampled / "000005.png").stat().st_mtime_ns == time_before


def test_a_larger_count_ends_with_the_bytes_of_one_command(trained, sampled, tmp_path, monkeypatch):
    """Also where a batch was cut short, which rounds differently, and after an interruption in that
    batch. The image with other bytes stands in for such a rounding."""
    folder = tmp_path / "new"
    call("sample", *options(trained, folder), "--num-fid-samples", 6)
    time_before = (folder / "000003.png").stat().st_mtime_ns
    shutil.copy(folder / "000000.png", folder / "000005.png")

    def interrupt(path, **options):
        if path.name == "000005.png":
            raise UserError("interrupted")
        return atomic_file(path, **options)

    monkeypatch.setattr("dataset.pictures.atomic_file", interrupt)
    with refused("interrupted"):
        call("sample", *options(trained, folder))
    monkeypatch.undo()
    call("sample", *options(trained, folder))
    assert files(folder) == files(sampled)
    assert (folder / "000003.png").stat().st_mtime_ns == time_before
    for suffix in (".npz", ".png"):
        assert Path(f"{folder}{suffix}").read_bytes() == Path(f"{sampled}{suffix}").read_bytes()


def test_a_smaller_count_is_refused(trained, sampled, refusal):
    """It would replace the .npz of all by one of some."""
    line = refusal("sample", [*options(trained, sampled), "--num-fid-samples", 20], "--sample-dir",
                   folder=sampled.parent)
    assert "images 21, now 20" in line


def test_more_of_each_class_and_step_count_are_measured_with_those_on_disk(trained, reference,
                                                                           tmp_path, capfd):
    options = ["--ckpt", trained, "--classes", 4, 7, "--num-sampling-steps", 1, 2, "--fid-ref",
               reference, "--protocol", "pixels"]
    for name, count in (("grown", 2), ("grown", 3), ("direct", 3)):
        call("sample", *options, "--per-class", count, "--sample-dir", tmp_path / name)
    metrics = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert metrics[2:4] == metrics[4:] and metrics[4]["num_samples"] == 6
    grown, direct = ({str(path.relative_to(tmp_path)).replace(name, ""): path.read_bytes()
                      for path in tmp_path.rglob("*") if name in str(path) and path.is_file()
                      and path.name[0] != "."} for name in ("grown", "direct"))
    assert grown == direct and len(grown) == 2 * (6 + 2) + 1


@pytest.mark.slow
def test_a_killed_command_loses_nothing(trained, sampled):
    killed = sampled.with_name("killed")
    child = Child("sample", *options(trained, killed), output=killed.with_suffix(".txt"))
    while child.poll() is None and not list(killed.glob("*.png")):
        time.sleep(0.001)
    child.process.kill()
    assert child.wait()[0] == -9
    call("sample", *options(trained, killed))
    assert files(killed) == files(sampled)


def test_a_folder_of_another_command_is_refused_once_it_has_images(trained, tmp_path):
    """A command that fails for its batch size, say, leaves a folder with samples.json only."""
    folder = tmp_path / "new"
    with FolderLock(folder), pytest.raises(UserError, match="--sample-dir .*process"):
        call("sample", *options(trained, folder))
    call("sample", *options(trained, folder), "--classes", 3)
    record = json.loads((folder / "samples.json").read_text())
    (folder / "samples.json").write_text(json.dumps(record | {"weights": "01234567" * 8}))
    before = files(folder)
    with refused("--sample-dir", "classes [3], now None; weights 01234567", ", now ",
                 record["weights"][:8], "choose another --sample-dir"):
        call("sample", *options(trained, folder))
    assert files(folder) == before
    for path in [*tmp_path.glob("new.*"), *folder.glob("*.png")]:
        path.unlink()
    (folder / ".samples.json.1.tmp").write_text("{")
    call("sample", *options(trained, folder))
    assert len(files(folder)) == 22 and not list(folder.glob("*.tmp"))


def test_the_folder_is_checked_again_once_it_is_held(trained, sampled, tmp_path, monkeypatch):
    """A command that waited for the end of another took over its folder."""
    lock = FolderLock

    def wait_for_another_command(folder):
        shutil.copytree(sampled, folder)
        return lock(folder)

    monkeypatch.setattr("sample.FolderLock", wait_for_another_command)
    with pytest.raises(UserError, match="--sample-dir .*seed 0, now 1"):
        call("sample", *options(trained, tmp_path / "new"), "--seed", 1)
    assert files(tmp_path / "new") == files(sampled)


@pytest.mark.parametrize("spoil", [
    lambda image, path: image.convert("P").save(path), lambda image, path: image.save(path, "JPEG"),
    lambda image, path: image.convert("RGBA").save(path), lambda image, path: image.resize(
        (9, 8)).save(path), lambda image, path: image.convert("L").save(path),
    lambda image, path: path.write_bytes(png_of_16_bits(8))])
def test_an_image_that_another_program_wrote_over_is_named(spoil, trained, sampled, reference,
                                                           tmp_path):
    """Its bytes went into the .npz, and moved all that came after."""
    folder = shutil.copytree(sampled, tmp_path / "new")
    path = folder / "000002.png"
    spoil(Image.open(path).copy(), path)
    for extra in ([], ["--fid-ref", reference, "--protocol", "pixels"]):
        with refused("--sample-dir must hold whole images, PNG, RGB, 8 x 8", path, "remove"):
            call("sample", *options(trained, folder), *extra)
        assert not folder.with_name("new.npz").exists()
    path.unlink()
    call("sample", *options(trained, folder))
    assert files(folder) == files(sampled)


def test_the_picture_of_several_counts_is_not_replaced(trained, tmp_path):
    steps = [*options(trained, tmp_path / "new"), "--num-sampling-steps", 1, 2]
    picture = tmp_path / "new-1-2-steps.png"
    picture.write_text("precious")
    with refused("--sample-dir", picture):
        call("sample", *steps)
    assert [path.name for path in tmp_path.iterdir()] == [picture.name]
    picture.unlink()
    for _ in range(2):
        call("sample", *steps)
    shutil.rmtree(tmp_path / "new-2-steps")
    with refused("--sample-dir"):
        call("sample", *steps)


def test_a_vae_of_other_latents_is_refused(trained, tmp_path, refusal):
    save_small_vae(tmp_path / "vae")
    refusal("sample", [*options(trained, tmp_path / "new"), "--vae", tmp_path / "vae"], "--vae")


def test_files_beside_the_folder_are_not_replaced(trained, tmp_path):
    """A reference may have the name of the folder, with .npz."""
    (tmp_path / "new.npz").write_text("precious")
    with pytest.raises(UserError, match="--sample-dir .*new.npz"):
        call("sample", *options(trained, tmp_path / "new"))
    assert [path.name for path in tmp_path.iterdir()] == ["new.npz"]


@pytest.mark.parametrize("extra", [["--labels", "random"], ["--seed", 1]])
def test_options_change_the_images(extra, trained, sampled, tmp_path):
    call("sample", *options(trained, tmp_path / "new"), *extra)
    one, other = (np.load(f"{path}.npz")["arr_0"] for path in (sampled, tmp_path / "new"))
    assert not np.array_equal(one, other) and len(other) == 21


@pytest.fixture
def measured(reference, sampled, capfd):
    """(options that evaluate, the distance of the images on disk)."""
    call("evaluate_fid", "--samples", sampled, "--ref", reference, "--protocol", "pixels",
         "--num-workers", 0)
    fid = json.loads(capfd.readouterr().out)["fid"]
    return ["--fid-ref", reference, "--protocol", "pixels"], fid


@pytest.mark.parametrize("name, extra", [("one", []), ("new", []), ("none", ["--no-save-images"])])
def test_metrics_of_sampling_are_those_of_the_files(name, extra, measured, trained, sampled, capfd):
    evaluate, fid = measured
    call("sample", *options(trained, sampled.with_name(name)), *evaluate, *extra)
    out, err = capfd.readouterr()
    assert ("picture:" in err) == (name != "none")
    assert json.loads(out)["fid"] == pytest.approx(fid, rel=1e-9)
    assert json.loads(out)["num_samples"] == 21 and json.loads(out)["num_reference"] == 200
    assert sampled.with_name(f"{name}.npz").exists() == (name != "none")


@pytest.mark.slow
def test_two_processes_give_the_bytes_and_metrics_of_one_with_two_threads(measured, trained,
                                                                          sampled):
    evaluate, fid = measured
    two, threads = sampled.with_name("two"), sampled.with_name("threads")
    said, other = run_ranks("sample", *options(trained, two), *evaluate, processes=2,
                            output=two.with_name("said"))
    assert '"fid"' in said and '"fid"' not in other
    line, = [line for line in said.splitlines() if line.startswith("{")]
    assert json.loads(line)["fid"] == pytest.approx(fid, rel=1e-9)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        call("sample", *options(trained, threads))
    finally:
        torch.set_num_threads(before)
    assert files(two) == files(threads) == files(sampled)
    assert np.array_equal(*(np.load(f"{name}.npz")["arr_0"] for name in (two, sampled)))


def test_no_option_replaces_a_metric():
    """The option --precision, tf32, once stood where ADM's precision belongs."""
    args = sample.parse_args(["--ckpt", "x.pt", "--fid-ref", "ref.npz", "--protocol", "adm"])
    args.record = {"omega": 2.0, "precision": "tf32"}
    about = sample.about(args, 5)
    assert about.keys().isdisjoint(metric_names("adm")) and about["omega"] == 2


@pytest.fixture(scope="module")
def improved_checkpoint(digits, improved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("improved")
    call("train", *tiny(digits, folder), *improved, "--max-steps", 40, "--lr", 0.02)
    return folder / "checkpoints" / "0000040.pt"


def test_classes_are_chosen_when_sampling():
    """Image i has the i-th of these classes in turn, and the noise that it always has."""
    config = {"model": "DiT-T/4", "latent_shape": [3, 8, 8], "num_classes": 10}
    every, some = (sample.ImageSampler(None, None, config, None, classes=classes)
                   for classes in (None, [3, 1, 5]))
    (noise, labels), (same, chosen) = every.inputs(range(4)), some.inputs(range(4))
    assert torch.equal(noise, same)
    assert labels.tolist() == [0, 1, 2, 3] and chosen.tolist() == [3, 1, 5, 3]
    assert len(every.picture_rows(100)) == 80 and len(some.picture_rows(20)) == 20


def test_several_seeds_have_their_images_and_metrics_and_a_spread(trained, reference, tmp_path,
                                                                  capfd):
    """Each the images that it has alone; a line for each count of steps, beside the results."""
    command = [*options(trained, tmp_path / "all"), "--num-sampling-steps", 1, 2, "--seeds", 0, 5,
               9, "--fid-ref", reference, "--protocol", "pixels"]
    for _ in range(2):  # the second takes the images on disk
        call("sample", *command)
        out, err = capfd.readouterr()
        lines = [json.loads(line) for line in out.splitlines()]
        assert [(line["steps"], line.get("seed", line.get("seeds"))) for line in lines] == [
            (steps, seed) for steps in (1, 2) for seed in (0, 5, 9, [0, 5, 9])]
        for *results, summary in (lines[:4], lines[4:]):
            fids = [result["fid"] for result in results]
            assert summary["mean"] == {"fid": pytest.approx(np.mean(fids), rel=1e-6)}
            assert summary["std"] == {"fid": pytest.approx(np.std(fids, ddof=1), rel=1e-6)}
            assert len(set(fids)) == 3 and "fid" not in summary
            assert {"num_samples": 21, "ref": str(reference)}.items() <= summary.items()
        assert err.count("note: resampling alone moves fid by") == 2
    call("sample", *options(trained, tmp_path / "alone"), "--seed", 5, "--num-sampling-steps", 2)
    assert files(tmp_path / "alone") == files(tmp_path / "all-2-steps-seed-5")
    assert (tmp_path / "all-2-steps-seed-5.npz").exists()
    assert sorted(path.name for path in tmp_path.glob("all-*.png")) == [
        f"all-1-2-steps-seed-{seed}.png" for seed in (0, 5, 9)]


def test_several_seeds_need_no_reference_and_no_images(trained, reference, tmp_path, capfd):
    call("sample", *options(trained, tmp_path / "new"), "--seeds", 4, 2)
    out, err = capfd.readouterr()
    assert out.split() == [str(tmp_path / f"new-seed-{seed}") for seed in (4, 2)]
    assert f"picture: {tmp_path / 'new-seed-4.png'}\n" in err and "note" not in err
    before = files(tmp_path)
    call("sample", *options(trained, tmp_path / "none"), "--seeds", 4, 2, "--no-save-images",
         "--fid-ref", reference, "--protocol", "pixels")
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["seeds"] == [4, 2]
    assert files(tmp_path) == before


def test_counts_of_steps_stand_side_by_side(trained, tmp_path, capfd):
    """Each in its own folder, with the images that it has without the other."""
    options = ["--ckpt", trained, "--per-class", 2, "--classes", 4, 7]
    call("sample", *options, "--num-sampling-steps", 1, 3, "--sample-dir", tmp_path / "both")
    call("sample", *options, "--num-sampling-steps", 3, "--sample-dir", tmp_path / "alone")
    out, err = capfd.readouterr()
    assert out.split()[:2] == [str(tmp_path / f"both-{name}") for name in ("1-step", "3-steps")]
    assert f"picture: {tmp_path / 'both-1-3-steps.png'}\n" in err
    images = [np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("both-3-steps", "alone")]
    assert np.array_equal(*images) and len(images[0]) == 4
    both, alone = (np.asarray(Image.open(tmp_path / name))[-2 * 66:]  # without captions
                   for name in ("both-1-3-steps.png", "alone.png"))
    assert both.shape[1] == 4 * 66 + 2  # two classes, each in one step and in three
    assert np.array_equal(both[:, 3 * 66:], alone[:, 66:])


@pytest.mark.parametrize("model", ["trained", "improved_checkpoint"])
def test_plain_flow_matching_is_sampled_by_its_velocity(model, request):
    """It was sampled by u(z, 0, 1), which such a network was never trained for."""
    state = load_checkpoint(request.getfixturevalue(model))
    net, config, times = network_of(state, model), state["config"], []

    def watched(z, r, t, *labels, **options):
        times.append((r.unique().tolist(), t.unique().tolist()))
        return net(z, r, t, *labels, **options)

    world = World(0, 1, torch.device("cpu"), "fp32")
    for ratio in (0, 0.5):
        config = config | {"ratio": ratio}
        sample.ImageSampler(watched, Pixels(), config, world, steps=2).images(range(2))
    assert times == [([1.0], [1.0]), ([0.5], [0.5]), ([0.5], [1.0]), ([0.0], [0.5])]


def test_guidance_is_chosen_when_sampling(improved_checkpoint, tmp_path):
    made = {}
    for name, extra in (("default", []), ("none", ["--cfg", 1]), ("strong", ["--cfg", 4]),
                        ("late", ["--cfg", 4, "--cfg-interval", 0.2, 0.6])):
        call("sample", *options(improved_checkpoint, tmp_path / name), *extra)
        made[name] = files(tmp_path / name)
        del made[name]["samples.json"]
    assert made["default"] == made["none"]  # nothing is published for the tiny size
    assert made["default"] != made["strong"] != made["late"] != made["default"]
    stored = json.loads((tmp_path / "late" / "samples.json").read_text())
    assert (stored["omega"], stored["interval"]) == (4, [0.2, 0.6])


def test_published_guidance_is_the_default_of_its_size():
    config = {"model": "iMF-XL/2", "vae": "mse", "omega_max": 8.0, "sizes": {"v_head": False}}
    method = ImprovedMeanFlow(num_classes=10)
    assert method.guidance(config) == {"omega": 8.0, "interval": [0.42, 0.62]}
    assert method.guidance(config | {"omega_max": None}) == method.guidance(config)
    for other in ({"omega_max": 4.0}, {"vae": "none"}, {"sizes": {"depth": 6}}, {"model": "iMF"}):
        # nothing is published of such a training
        assert method.guidance(config | other) == {"omega": 1.0, "interval": [0.0, 1.0]}
    assert MeanFlow(num_classes=10).guidance({"model": "DiT-XL/2"}) == {}
    args = sample.parse_args(["--ckpt", "x.pt", "--cfg", "1"])
    assert sample.choose_guidance(args, config, method) == {"omega": 1.0, "interval": [0.0, 1.0]}

"""evaluate_fid.py as users run it, against pytorch-fid and torch-fidelity on random weights."""

import json
import runpy
import shutil

import numpy as np
import pytest
import torch
import torch_fidelity
from conftest import ROOT, call, pictures, run_ranks
from PIL import Image
from pytorch_fid.fid_score import compute_statistics_of_path
from pytorch_fid.inception import InceptionV3
from tqdm import tqdm

import evaluate_fid
from engine.distributed import World
from metrics.distances import frechet_distance
from metrics.extractors import Pixels
from metrics.statistics import Statistics


def save(images, folder):
    """uint8 images (N, 3, H, W) as 000000.png ... in a folder."""
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:06d}.png")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders, of 5 and 6 pictures."""
    root = tmp_path_factory.mktemp("images")
    return save(pictures(5, 40, seed=1), root / "a"), save(pictures(6, 40, seed=2), root / "b")


def evaluate(capfd, *options):
    """The result that the script prints, run in this process, and its stderr."""
    call("evaluate_fid", *options, "--num-workers", 0)
    out, err = capfd.readouterr()
    assert out.count("\n") == 1  # one JSON line and nothing else
    return json.loads(out), err


@pytest.mark.slow
def test_pytorch_fid_protocol_gives_pytorch_fids_number(torch_home, folders, tmp_path, capfd,
                                                        monkeypatch):
    """Its formula takes half a minute in 2048 dimensions: test_distances.py takes fewer."""
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    ours, theirs = [], []
    model = InceptionV3([InceptionV3.BLOCK_INDEX_BY_DIM[2048]])
    for folder in folders:
        path = tmp_path / f"{folder.name}.npz"
        evaluate(capfd, "--samples", folder, "--make-ref", path, "--batch-size", 3)
        with np.load(path) as file:
            ours.append((file["mu"], file["sigma"]))
        theirs.append(compute_statistics_of_path(str(folder), model, 4, 2048, "cpu", 0))
        np.testing.assert_allclose(ours[-1][1], theirs[-1][1], atol=1e-6 * theirs[-1][1].max())
    assert frechet_distance(*ours) == pytest.approx(frechet_distance(*theirs), rel=1e-6)


@pytest.mark.slow
def test_adm_protocol_gives_torch_fidelitys_numbers_with_one_and_three_processes(
        torch_home, folders, tmp_path, capfd, monkeypatch):
    """Of 5 samples and 6 reference images in batches of 2, one share holds a single image."""
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    a, b = folders
    path, adm = tmp_path / "new" / "ref.npz", ["--protocol", "adm"]
    evaluate(capfd, "--samples", b, "--make-ref", path, *adm)
    with np.load(path) as file:  # in ADM's layout
        shapes = {name: file[name].shape for name in ("mu", "sigma", "mu_s", "sigma_s", "arr_0")}
    assert shapes == {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,),
                      "sigma_s": (2023, 2023), "arr_0": (6, 40, 40, 3)}
    expected = torch_fidelity.calculate_metrics(
        input1=str(a), input2=str(b), cuda=False, fid=True, isc=True, prc=True, isc_splits=1,
        samples_shuffle=False, feature_extractor="inception-v3-compat", cache=False, verbose=False)
    result, _ = evaluate(capfd, "--samples", a, "--ref", path, *adm)
    for ours, theirs in (("fid", "frechet_inception_distance"), ("precision", "precision"),
                         ("inception_score", "inception_score_mean"), ("recall", "recall")):
        assert result[ours] == pytest.approx(expected[theirs], rel=1e-4)
    assert result["inception_score"] > 1.5 and result["sfid"] > 1
    assert result["num_reference_images"] == 6 and result["num_samples"] == 5
    said = run_ranks("evaluate_fid", "--samples", a, "--ref", path, *adm, "--batch-size", 2,
                     "--num-workers", 0, processes=3, output=tmp_path / "said",
                     TORCH_HOME=torch_home)
    line, = [line for line in "".join(said).splitlines() if line.startswith("{")]
    assert json.loads(line) == {
        key: pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
        for key, value in result.items()}


@pytest.mark.slow
def test_the_quickstarts_two_scripts_print_one_number(tmp_path, capfd):
    np.savez(tmp_path / "a.npz", arr_0=pictures(30, 8, seed=7).permute(0, 2, 3, 1).numpy())
    digits = runpy.run_path(ROOT / "examples" / "digits.py")
    digits["main"](digits["parse_args"](["write", str(tmp_path / "digits")]))
    capfd.readouterr()
    digits["main"](digits["parse_args"](["judge", str(tmp_path / "a.npz")]))
    judged = json.loads(capfd.readouterr().out)
    result, err = evaluate(capfd, "--samples", tmp_path / "a.npz", "--ref", tmp_path / "digits",
                           "--image-size", 8, "--protocol", "pixels")
    assert judged["frechet_distance_of_pixels"] == round(result["fid"], 4) > 1
    assert "warning: 30 samples against 1797 of the reference" in err


def test_folder_npz_and_reference_file_of_the_same_images_agree(tmp_path, capfd):
    a, b = pictures(21, 8, seed=4), pictures(19, 8, seed=5)
    folders = save(a, tmp_path / "a"), save(b, tmp_path / "b")
    np.savez(tmp_path / "a.npz", arr_0=a.permute(0, 2, 3, 1).numpy())
    pixels = ["--protocol", "pixels", "--batch-size", 4]
    first, _ = evaluate(capfd, "--samples", folders[0], "--ref", folders[1], *pixels)
    made, _ = evaluate(capfd, "--samples", folders[1], "--make-ref", tmp_path / "b.npz", *pixels)
    second, _ = evaluate(capfd, "--samples", tmp_path / "a.npz", "--ref", tmp_path / "b.npz",
                         *pixels)
    assert made["num_samples"] == 19
    assert second["fid"] == pytest.approx(first["fid"], rel=1e-12)
    rows = [x.flatten(1).double().numpy() / 127.5 - 1 for x in (a, b)]
    expected = frechet_distance(*((x.mean(0), np.cov(x.T)) for x in rows))
    assert first["fid"] == pytest.approx(expected, rel=1e-10)


def test_several_sample_sets_have_a_line_each_and_a_spread(tmp_path, capfd, monkeypatch):
    """The reference is measured once; sets whose FIDs are as close as retraining makes them are
    named, as if pixels gave a FID."""
    folders = [save(pictures(7, 8, seed=seed), tmp_path / str(seed)) for seed in (9, 8, 7)]
    shutil.copytree(folders[0], tmp_path / "same")
    measured, add_all = [], Statistics.add_all

    def watched(self, batches, size, title):
        measured.append(title)
        return add_all(self, batches, size, title)

    monkeypatch.setattr(Statistics, "add_all", watched)
    pixels = ["--ref", folders[2], "--protocol", "pixels", "--num-workers", 0]
    sets = [folders[0], folders[1], tmp_path / "same"]
    call("evaluate_fid", "--samples", *sets, *pixels)
    assert "note: " not in capfd.readouterr().err
    measured.clear()
    monkeypatch.setattr(Pixels, "is_fid", True)
    call("evaluate_fid", "--samples", *sets, *pixels)
    out, err = capfd.readouterr()
    assert measured == ["7", "9", "8", "same"]
    *results, summary = map(json.loads, out.splitlines())
    fids = [result["fid"] for result in results]
    for path, result in zip(sets, results):
        call("evaluate_fid", "--samples", path, *pixels)
        assert json.loads(capfd.readouterr().out) == result
    assert summary == {
        "protocol": "pixels", "num_samples": 7, "num_reference": 7, "ref": str(folders[2]),
        "samples": [str(path) for path in sets],
        "mean": {"fid": pytest.approx(np.mean(fids), rel=1e-6)},
        "std": {"fid": pytest.approx(np.std(fids, ddof=1), rel=1e-6)}}
    assert f"fid of {sets[0]}, {sets[2]} differs by 0 % from one to the next" in err
    assert err.count("note: ") == 1 and fids[0] != fids[1]


def test_image_size_crops_files_of_any_size_and_colour(tmp_path, capfd):
    folder = save(pictures(3, 12, seed=6), tmp_path / "a")
    Image.new("L", (20, 16), 200).save(folder / "grey.png")
    (folder / "notes.txt").write_text("not an image")
    evaluate(capfd, "--samples", folder, "--make-ref", tmp_path / "ref.npz", "--protocol", "pixels",
             "--image-size", 8)
    with np.load(tmp_path / "ref.npz") as file:
        assert file["arr_0"].shape == (4, 8, 8, 3) and (file["arr_0"][3] == 200).all()


def test_a_reference_keeps_evenly_spaced_images(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(evaluate_fid, "STORED_IMAGES", 4)
    images = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 2, 2, 3)
    np.savez(tmp_path / "a.npz", arr_0=images.numpy())
    evaluate(capfd, "--samples", tmp_path / "a.npz", "--make-ref", tmp_path / "ref.npz",
             "--protocol", "pixels")
    with np.load(tmp_path / "ref.npz") as file:
        assert file["arr_0"][:, 0, 0, 0].tolist() == [0, 2, 5, 7] and file["num_images"] == 10


@pytest.mark.parametrize("kind, words", [
    ("size", ["000001.png", "(32, 9)", "--image-size"]), ("few", ["2 images or more", "got 1"]),
    ("mode", ["000001.png", "mode L", "--image-size"])])
@pytest.mark.parametrize("option, other", [("--samples", "--ref"), ("--ref", "--samples")])
def test_images_that_cannot_be_evaluated_are_refused(option, other, kind, words, tmp_path, refusal,
                                                     monkeypatch):
    monkeypatch.setattr(World, "progress", lambda _, total, **__: tqdm(total=total, disable=True))
    images = pictures(3 if kind != "few" else 1, 32, seed=0)
    good, bad = save(pictures(3, 32, seed=1), tmp_path / "good"), save(images, tmp_path / "bad")
    if kind != "few":
        image = Image.new("RGB", (9, 32)) if kind == "size" else Image.new("L", (32, 32))
        image.save(bad / "000001.png")
    line = refusal("evaluate_fid", [option, bad, other, good, "--protocol", "pixels",
                                    "--num-workers", 0], f"error: {option}")
    assert all(word in line for word in words), line

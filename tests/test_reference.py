"""References, what is computed against them, and what a reader is told."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import pictures, refused

from engine.distributed import World
from engine.errors import BadValue
from metrics import reference as module
from metrics.distances import frechet_distance
from metrics.extractors import extractor_of
from metrics.inception import POOL
from metrics.reference import Metric, Reference, evaluate, metric_names, metrics_of, notes
from metrics.statistics import Statistics

ALONE = World(0, 1, torch.device("cpu"), "fp32")


@pytest.mark.parametrize("arrays, message", [
    ({"mu": np.zeros(12)}, "keys mu and sigma, got .* with mu"),
    ({"mu": np.zeros(12), "sigma": np.eye(11)}, r"sigma \(12, 12\), .* got \(12,\) and \(11, 11\)"),
    ({"mu": np.full(12, np.nan), "sigma": np.eye(12)}, "finite"),
    ({"mu": np.zeros(12), "sigma": np.eye(12, dtype="c8")}, "float64 and complex64"),
    ({"mu": np.zeros(12), "sigma": np.full((12, 12), 1e308)}, "finite"),
    ({"mu": np.zeros(12), "sigma": -np.eye(12)}, "finite"),
    ({"mu": np.zeros(12), "sigma": np.triu(np.ones((12, 12)))}, "symmetric"),
    ({"mu": np.zeros(12, dtype="U1"), "sigma": np.eye(12)}, "<U1 and float64"),
    ({"mu": np.array([{}] * 12), "sigma": np.eye(12)}, "plain arrays")])
def test_a_reference_that_does_not_serve_is_refused(arrays, message, tmp_path):
    np.savez(tmp_path / "ref.npz", **arrays)
    with pytest.raises(BadValue, match=f"must .*{message}"):
        Reference.load(tmp_path / "ref.npz", extractor_of("pixels"), (2, 2), ALONE)


def test_notes_name_what_is_left_out_and_what_weakens_the_result(tmp_path):
    np.savez(tmp_path / "ref.npz", mu=np.zeros(POOL), sigma=np.eye(POOL), num_images=np.array(900),
             protocol=np.array("pytorch-fid"))
    reference = Reference.load(tmp_path / "ref.npz", extractor_of("adm"), (8, 8), ALONE)
    assert reference.wants == {"spatial": False, "scores": True, "points": False}
    missing, protocol, few = notes(reference, "adm", 899, (8, 8))
    assert "left out: sfid, precision, recall;" in missing
    assert "made with --protocol pytorch-fid, not adm" in protocol
    assert "899 samples against 900 of the reference" in few
    assert len(notes(reference, "adm", 900, (8, 8))) == 2
    reference = Reference("ref", reference.pool, ("pool",), count=1281167)
    protocol, few = notes(reference, "pytorch-fid", 49999, (8, 8))
    assert "does not record its protocol" in protocol
    assert "49999 samples against 50000 of published results" in few
    assert not notes(reference, "pixels", 50000, (8, 8))


@pytest.mark.parametrize("protocol", ["pytorch-fid", "adm"])
@pytest.mark.parametrize("kind", ["file", "images", "another arr_0"])
def test_a_reference_of_another_resolution_is_told(protocol, kind, tmp_path):
    """The same images gave a distance of .49, without a word."""
    arrays = {"mu": np.zeros(POOL), "sigma": np.eye(POOL), "arr_0": np.zeros((9, 4, 6, 3), "u1")}
    if kind == "images":
        statistics = Statistics(extractor_of("pixels").load(ALONE), 6, (4, 6))
        statistics.add(pictures(6, 8, seed=1)[:, :, :4, :6], 0)
        reference = Reference.of(statistics, "images")
    else:
        if kind == "another arr_0":
            arrays["arr_0"] = np.zeros(5)
        np.savez(tmp_path / "ref.npz", **arrays)
        if kind == "another arr_0" and protocol == "adm":  # which takes its images
            with refused("must hold arr_0"):
                Reference.load(tmp_path / "ref.npz", extractor_of(protocol), (8, 8), ALONE)
            return
        reference = Reference.load(tmp_path / "ref.npz", extractor_of(protocol), (8, 8), ALONE)
    told = [line for line in notes(reference, protocol, 50000, (8, 8)) if "4 x 6 pixels" in line]
    assert len(told) == (kind != "another arr_0")
    assert not any(" pixels" in line and "protocol" not in line
                   for line in notes(reference, protocol, 50000, (4, 6)))


def test_a_matrix_of_another_size_is_refused_before_it_is_copied():
    """A compressed file of few bytes has zeros without end."""
    arrays = {"mu": np.zeros(12), "sigma": np.broadcast_to(np.int8(0), (2**20, 2**20))}
    with refused("sigma (12, 12)", "got (12,) and (1048576, 1048576) in ref"):
        module._pair(arrays, "mu", "sigma", 12, "ref", extractor_of("pixels"))


def statistics_of(dim, seed):
    """mu and sigma, float64, as EDM2's files have them."""
    mu = np.random.default_rng(seed).standard_normal(dim)
    return {"mu": mu, "sigma": np.diag(mu ** 2)}


def test_each_protocol_takes_its_part_of_edm2s_references(tmp_path):
    path, parts = tmp_path / "ref.pkl", {"fid": statistics_of(POOL, 0),
                                         "fd_dinov2": statistics_of(1024, 1)}
    path.write_bytes(pickle.dumps(parts | {"num_images": 1281167}))
    for protocol, key in (("adm", "fid"), ("pytorch-fid", "fid"), ("dinov2", "fd_dinov2")):
        reference = Reference.load(path, extractor_of(protocol), (8, 8), ALONE)
        for ours, name in zip(reference.pool, ("mu", "sigma")):
            np.testing.assert_array_equal(ours, parts[key][name])
        assert reference.count == 1281167
        told = notes(reference, protocol, 50000, (8, 8))
        assert [line.split(":")[0] for line in told] == [
            "note" if protocol == "pytorch-fid" else "left out"]
    for protocol, word in (("timm:test_vit", "mu and sigma of fd for --protocol timm:test_vit"),
                           ("pixels", "mu (192,)")):
        with refused(word, "ref.pkl"):
            Reference.load(path, extractor_of(protocol), (8, 8), ALONE)
    for content, word in (({"fid": {"mu": [1.0]}}, "with fid;"), ([1], "with list;")):
        path.write_bytes(pickle.dumps(content))
        with refused("mu and sigma of fid for --protocol adm", word):
            Reference.load(path, extractor_of("adm"), (8, 8), ALONE)


@pytest.mark.parametrize("count, known", [
    (7, 7), (np.int64(7), 7), (0, None), (-1, None), (2**63, None), ("7", None), (7.0, None)])
def test_the_count_of_a_pickled_reference_is_a_whole_number(count, known, tmp_path):
    path = tmp_path / "ref.PKL"
    with refused("must be a file that can be read", "ref.PKL (No such file"):
        Reference.load(path, extractor_of("pixels"), (2, 2), ALONE)
    path.write_bytes(pickle.dumps({"fid": statistics_of(12, 0), "num_images": count}))
    assert Reference.load(path, extractor_of("pixels"), (2, 2), ALONE).count == known


def test_a_reference_of_other_features_is_refused_with_its_protocol(tmp_path):
    np.savez(tmp_path / "ref.npz", **statistics_of(POOL, 0), protocol=np.array("adm"))
    with refused("mu (1024,)", "--protocol dinov2", "got (2048,)", "ref.npz of --protocol adm"):
        Reference.load(tmp_path / "ref.npz", extractor_of("dinov2"), (8, 8), ALONE)


def test_dinov2_takes_the_images_of_a_reference_and_tells_what_is_left_out(tmp_path):
    arrays = statistics_of(1024, 0) | {"protocol": np.array("dinov2")}
    np.savez(tmp_path / "a.npz", **arrays)
    np.savez(tmp_path / "b.npz", **arrays, arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    for name, lines in (("a", ["left out: precision, recall; the reference lacks arr_0 of more "
                               "than 3 images"]), ("b", [])):
        reference = Reference.load(tmp_path / f"{name}.npz", extractor_of("dinov2"), (8, 8), ALONE)
        assert reference.wants == {"spatial": False, "scores": False, "points": name == "b"}
        assert notes(reference, "dinov2", 50000, (8, 8)) == lines


@pytest.mark.parametrize("protocol", ["pytorch-fid", "adm"])
def test_only_pytorch_fids_protocol_takes_its_rounding_errors(protocol):
    rows = np.random.default_rng(0).standard_normal((2, 5, 60))
    pairs = [(part.mean(0), np.cov(part.T)) for part in rows]
    samples = SimpleNamespace(pool=SimpleNamespace(numpy=lambda: pairs[0]))
    fid = metrics_of(extractor_of(protocol))["fid"].value(samples, SimpleNamespace(pool=pairs[1]))
    assert fid == frechet_distance(*pairs, by_product=protocol == "pytorch-fid")
    assert fid != frechet_distance(*pairs, by_product=protocol != "pytorch-fid")


def test_a_metric_is_a_function_and_its_line(monkeypatch):
    def mean_distance(samples, reference):
        return float(np.linalg.norm(samples.pool.numpy()[0] - reference.pool[0]))

    monkeypatch.setitem(module.METRICS, "mean", Metric("Distance of means", "pool", mean_distance))
    extractor = extractor_of("pixels").load(ALONE)
    first, second = Statistics(extractor, 6, (8, 8)), Statistics(extractor, 6, (8, 8))
    first.add(pictures(6, 8, seed=1), 0)
    second.add(pictures(6, 8, seed=2), 0)
    result = evaluate(first, Reference.of(second, "reference"))
    assert result["mean"] > 0 and result["fid"] >= result["mean"] ** 2
    assert metric_names("pixels")["mean"] == "Distance of means"


def test_names_of_distances_are_those_of_the_protocol():
    every = {"fid": "FID", "fd_dinov2": "FD-DINOv2", "fd": "FD"}
    for protocol, changed in (("adm", {}), ("", {}), (["list"], {}), ("dinov2", {}),
                              ("pixels", {"fid": "Frechet distance of pixels"}),
                              ("timm:any", {"fd": "FD of any"})):
        names = metric_names(protocol)
        assert {key: names[key] for key in every} == every | changed
    assert [*names] == [*every, "sfid", "inception_score", "precision", "recall"]

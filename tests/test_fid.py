"""Statistics, distances and references of fid.py, and the features of features.py."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_fid.fid_score import calculate_frechet_distance
from pytorch_fid.inception import FID_WEIGHTS_URL
from torch import nn

import evaluate_fid
import sample
from dataset.images import NpzImages, read_image
from engine.checkpoint import load_checkpoint
from engine.distributed import World
from engine.options import UserError
from metrics.distances import frechet_distance, inception_score, precision_recall
from metrics.inception import (
    CLASSES,
    POOL,
    SPATIAL,
    Extractor,
    Features,
    dimension,
    inception_network,
    resize_like_tensorflow,
)
from metrics.reference import Reference, notes
from metrics.statistics import Moments, Statistics

ALONE = World(0, 1, torch.device("cpu"), "fp32")


def pictures(count, size, seed):
    """Images (count, 3, size, size), uint8, of different colour and coarseness."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for _ in range(count):
        cells = int(torch.randint(2, size // 2, (), generator=generator))
        colour = 0.2 + 0.8 * torch.rand(1, 3, 1, 1, generator=generator)
        noise = torch.rand(1, 3, cells, cells, generator=generator)
        images.append(F.interpolate(noise, (size, size), mode="bilinear") * colour * 255)
    return torch.cat(images).to(torch.uint8)


def write_weights(home):
    """Random weights where pytorch-fid and torch-fidelity look for theirs under TORCH_HOME.

    The published ones cannot be had without a network. Filters have no mean and batch norms hold
    the statistics of a few pictures, so that features and classes differ between pictures.
    """
    generator = torch.Generator().manual_seed(0)
    net = inception_network().to_empty(device="cpu").train()
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = torch.randn(module.weight.shape, generator=generator)
            weight -= weight.flatten(1).mean(1).view(-1, *[1] * (weight.ndim - 1))
            module.weight.data = weight * (2 / weight[0].numel()) ** 0.5
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.data.normal_(1, 0.1, generator=generator)
            module.bias.data.normal_(0, 0.1, generator=generator)
            module.reset_running_stats()
            module.momentum = 1.0  # the running statistics become the batch's
    net.fc.weight.data.mul_(4)
    net.fc.bias.data.normal_(0, 1, generator=generator)
    with torch.no_grad():
        net(pictures(8, 150, seed=0).float() / 127.5 - 1)
    folder = Path(home, "hub", "checkpoints")
    folder.mkdir(parents=True)
    path = folder / FID_WEIGHTS_URL.rsplit("/", 1)[1]
    torch.save(net.state_dict(), path)
    os.link(path, folder / path.name.replace("pt_inception", "weights-inception"))
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("torch"))


def gaussian(dim, rank, seed):
    """A mean (dim,) and a covariance (dim, dim) of that rank."""
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((dim, rank))
    return rng.standard_normal(dim), root @ root.T


# ---- distances -----------------------------------------------------------------------------


@pytest.mark.parametrize("by_product", [False, True])
def test_equal_covariances_give_the_squared_distance_of_the_means(by_product):
    mean, covariance = gaussian(40, 60, seed=0)
    shift = np.linspace(-1, 2, 40)
    distance = frechet_distance((mean, covariance), (mean + shift, covariance),
                                by_product=by_product)
    assert distance == pytest.approx(shift @ shift, rel=1e-9)


@pytest.mark.parametrize("rank", [0, 3, 40])
def test_a_set_has_no_distance_from_itself(rank):
    pair = gaussian(40, rank, seed=1)
    assert 0 <= frechet_distance(pair, pair) <= 1e-12 * (1 + np.trace(pair[1]))


@pytest.mark.parametrize("zeros", [0, 30, 39])
def test_commuting_covariances_give_the_closed_form_however_singular(zeros):
    """sum (sqrt a - sqrt b)^2 for eigenvalues a, b on common axes; a has zeros where b has none."""
    rng = np.random.default_rng(2)
    axes, _ = np.linalg.qr(rng.standard_normal((40, 40)))
    a, b = rng.uniform(0.1, 3, (2, 40))
    a[:zeros], b[-1] = 0, 0
    pairs = [(np.zeros(40), axes * values @ axes.T) for values in (a, b)]
    expected = np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert frechet_distance(*pairs) == pytest.approx(expected, rel=1e-11)


def test_regular_covariances_give_pytorch_fids_number():
    pairs = gaussian(128, 400, seed=3), gaussian(128, 300, seed=4)
    expected = calculate_frechet_distance(*pairs[0], *pairs[1])
    assert frechet_distance(*pairs) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(*pairs, by_product=True) == pytest.approx(expected, rel=1e-8)


def test_singular_covariances_give_pytorch_fids_number_by_product():
    """pytorch-fid takes roots of rounding errors there, which is part of its number."""
    pairs = gaussian(256, 9, seed=5), gaussian(256, 11, seed=6)
    expected = calculate_frechet_distance(*pairs[0], *pairs[1])
    assert frechet_distance(*pairs, by_product=True) == pytest.approx(expected, rel=2e-8)


def test_precision_and_recall_of_known_points():
    """k = 1 on a line. Balls of 0, 1, 5: to the nearest neighbour, radii 1, 1, 4."""
    reference = torch.tensor([[0.0], [1.0], [5.0]])
    samples = torch.tensor([[-0.5], [-1.5], [9.5], [2.0], [8.0]])
    # Samples within [-1, 2] or [1, 9]: -0.5, 2, 8. Their balls: radii 1, 1, 1.5, 2.5, 1.5, so
    # [-1.5, .5], [-2.5, -.5], [8, 11], [-.5, 4.5], [6.5, 9.5]: of the reference 0 and 1.
    assert precision_recall(samples, reference, k=1) == pytest.approx((3 / 5, 2 / 3))


@pytest.mark.parametrize("held", [1, 50, 2**25])
def test_precision_and_recall_are_those_of_a_search_in_any_chunks(held, monkeypatch):
    monkeypatch.setattr("metrics.distances.DISTANCES", held)
    generator = torch.Generator().manual_seed(7)
    samples = 100 + torch.randn(23, 4, generator=generator)  # far off, where digits are few
    reference = 100.5 + torch.randn(17, 4, generator=generator)

    def share(points, others):
        far = torch.cdist(others.double(), others.double()).sort().values[:, 3]
        near = torch.cdist(points.double(), others.double())
        return (near <= far).any(1).double().mean().item()

    expected = share(samples, reference), share(reference, samples)
    assert precision_recall(samples, reference) == pytest.approx(expected)
    assert 0 < expected[0] < 1


# ---- statistics ----------------------------------------------------------------------------


def test_moments_of_batches_are_those_of_the_whole():
    rows = np.random.default_rng(8).standard_normal((50, 6)) * [1, 2, 3, 4, 5, 0] + 1e6
    moments = Moments(6, "cpu")
    for part in np.split(rows, [1, 8, 30]):
        moments.add(torch.from_numpy(part))
    mean, covariance = moments.numpy()
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-14)
    np.testing.assert_allclose(covariance, np.cov(rows, rowvar=False), rtol=1e-10, atol=1e-10)


class FakeExtractor:
    """Image i has its first pixel's value as class; features are pixels."""

    protocol, world = "adm", ALONE

    def __call__(self, images):
        logits = 200 * F.one_hot(images[:, 0, 0, 0].long(), CLASSES).double()
        pool = torch.zeros(len(images), POOL)
        pool[:, :12] = images.flatten(1) / 255
        return Features(pool, torch.zeros(len(images), SPATIAL), logits)


def measure(images, order=None):
    statistics = Statistics(FakeExtractor(), len(images), (2, 2), scores=True, points=True)
    for first in order or range(0, len(images), 2):
        statistics.add(images[first:first + 2], first)
    return statistics


def images_of_classes(*classes):
    return torch.tensor(classes, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)


@pytest.mark.parametrize("classes, expected", [
    ((5, 5, 5, 5), 1),  # nothing but one class
    ((0, 1, 2, 3, 0, 1, 2, 3), 4),  # four classes, evenly
    ((7, 3), 2)])
def test_inception_score_of_certain_predictions_counts_the_classes(classes, expected):
    scores = measure(images_of_classes(*classes)).scores
    assert inception_score(scores) == pytest.approx(expected, rel=1e-9)


def test_inception_score_splits_in_the_given_order_however_batches_come(monkeypatch):
    monkeypatch.setattr("metrics.statistics.SPLIT", 3)
    images = images_of_classes(0, 1, 2, 4, 4, 4, 9, 8)  # splits of 3, 1 and 2 classes
    in_order, shuffled = measure(images), measure(images, order=[4, 0, 6, 2])
    assert inception_score(in_order.scores) == pytest.approx((3 + 1 + 2) / 3, rel=1e-9)
    assert inception_score(shuffled.scores) == pytest.approx((3 + 1 + 2) / 3, rel=1e-9)
    assert torch.equal(in_order.points, shuffled.points)


def test_fewer_than_two_images_are_refused():
    with pytest.raises(UserError, match="2 images or more, got 1"):
        Statistics(FakeExtractor(), 1, (2, 2))


# ---- features ------------------------------------------------------------------------------


def test_resize_puts_pixel_i_at_i_times_the_ratio_as_tensorflow_1_did():
    ramp = torch.tensor([0.0, 10.0]).expand(1, 3, 2, 2)
    larger = resize_like_tensorflow(ramp, size=4)
    assert larger[0, 0, 0].tolist() == [0, 5, 10, 10]
    assert torch.equal(larger[0, 0, 0], larger[0, 0, 3])
    ramp = torch.arange(4.0).expand(1, 3, 4, 4).transpose(2, 3)
    assert resize_like_tensorflow(ramp, size=2)[0, 0, :, 1].tolist() == [0, 2]


def test_spatial_features_are_seven_channels_in_tensorflows_order(weights):
    extractor = Extractor("adm", ALONE, inception=weights)
    spatial = extractor(pictures(2, 20, seed=9)).spatial.view(2, 17, 17, 7)  # (B, H, W, C)
    maps = extractor.map
    assert maps.shape == (2, 192, 17, 17)
    assert torch.equal(spatial[1, 3, 5], maps[1, :7, 3, 5])
    assert maps.min() == 0 < maps.max()  # after the ReLU


def test_evaluation_leaves_random_numbers_and_precision_as_they_were(weights):
    """Training goes on after an evaluation as if there had been none."""
    torch.set_float32_matmul_precision("high")
    before = torch.get_rng_state()
    try:
        extractor = Extractor("pytorch-fid", ALONE, inception=weights)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = extractor(pictures(1, 20, seed=9)).pool
        assert torch.equal(before, torch.get_rng_state())
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(mixed, extractor(pictures(1, 20, seed=9)).pool)


def test_a_weight_file_of_another_network_is_refused_in_one_line(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    (tmp_path / "torn.pth").write_bytes(b"PK\x03\x04 torn")
    for name in ("other.pth", "torn.pth"):
        with pytest.raises(UserError, match=f"pytorch-fid's, got .*{name}.*again"):
            Extractor("adm", ALONE, inception=tmp_path / name)
    with pytest.raises(UserError, match="--inception must be a file"):
        Extractor("adm", ALONE, inception=tmp_path / "missing.pth")


# ---- references and images of .npz files ---------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_images_are_dealt_in_whole_batches(save, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (11, 4, 5, 3), dtype=np.uint8)
    save(tmp_path / "x.npz", arr_0=images, labels=np.zeros(11))
    stored = NpzImages(tmp_path / "x.npz", option="--samples")
    assert len(stored) == 11 and stored.image_size == (4, 5)
    seen = torch.zeros(11, dtype=torch.int64)
    for rank in range(3):
        for first, batch in stored.batches(2, SimpleNamespace(rank=rank, size=3)):
            assert first // 2 % 3 == rank
            seen[first:first + len(batch)] += 1
            expected = torch.from_numpy(images[first:first + 2]).permute(0, 3, 1, 2)
            assert torch.equal(batch, expected)
    assert torch.equal(seen, torch.ones_like(seen))


PIXELS = {"mu": np.zeros(12), "sigma": np.eye(12)}  # of 2 x 2 images


@pytest.mark.parametrize("arrays, message", [
    ({"mu": np.zeros(12)}, "keys mu and sigma, got .* with mu"),
    ({"mu": np.zeros(12), "sigma": np.eye(11)}, r"sigma \(12, 12\), .* got \(12,\) and \(11, 11\)"),
    ({"mu": np.full(12, np.nan), "sigma": np.eye(12)}, "finite"),
    ({"mu": np.array([{}] * 12), "sigma": np.eye(12)}, "plain arrays")])
def test_a_reference_that_does_not_serve_is_refused(arrays, message, tmp_path):
    np.savez(tmp_path / "ref.npz", **arrays)
    with pytest.raises(UserError, match=f"--fid-ref must .*{message}"):
        Reference.load(tmp_path / "ref.npz", "pixels", (2, 2), option="--fid-ref")


@pytest.mark.parametrize("sigma", [
    -np.eye(12), np.diag([1.0] * 11 + [-0.01]), np.triu(np.ones((12, 12))) + 11 * np.eye(12)])
def test_a_reference_whose_sigma_is_no_covariance_is_refused(sigma, tmp_path):
    """With a covariance of -1 on the diagonal every image had the distance 0."""
    np.savez(tmp_path / "ref.npz", mu=np.zeros(12), sigma=sigma)
    with pytest.raises(UserError, match="--ref must have a symmetric sigma.*again"):
        Reference.load(tmp_path / "ref.npz", "pixels", (2, 2), option="--ref")


@pytest.mark.parametrize("rank", [0, 1, 5, 40])
def test_a_singular_covariance_of_float32_is_taken(rank, tmp_path):
    """Rounding gives it negative eigenvalues of up to 1e-7 of the largest."""
    covariance = gaussian(12, rank, seed=10)[1].astype(np.float32)
    np.savez(tmp_path / "ref.npz", mu=np.zeros(12), sigma=covariance)
    reference = Reference.load(tmp_path / "ref.npz", "pixels", (2, 2), option="--ref")
    assert np.array_equal(reference.pool[1], covariance.astype(np.float64))


@pytest.fixture
def fifo(tmp_path):
    """A path that nobody writes to: whoever opened it would wait, here for ten seconds."""
    def give_up(*_):
        raise RuntimeError("opened")

    os.mkfifo(tmp_path / "fifo.png")
    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(10)
    yield tmp_path / "fifo.png"
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("read", [
    lambda path: Reference.load(path, "pixels", (2, 2), option="--ref"),
    lambda path: NpzImages(path, option="--samples"), lambda path: read_image(path, 8),
    lambda path: evaluate_fid.FolderImages(path.parent, None, 0, option="--samples"),
    sample.read, lambda path: load_checkpoint(path)])
def test_a_fifo_is_refused_and_not_waited_for(read, fifo):
    with pytest.raises(UserError, match="fifo.png .*(not a regular|no such) file"):
        read(fifo)


@pytest.mark.parametrize("content", [b"", b"mu, sigma", b"PK\x03\x04", None])
def test_a_file_that_is_no_npz_is_refused(content, tmp_path):
    path = tmp_path / "ref.npz"
    if content is None:  # a torn one
        np.savez(path, **PIXELS)
        content = path.read_bytes()[:-40]
    path.write_bytes(content)
    with pytest.raises(UserError, match="--ref must be a whole .npz file"):
        Reference.load(path, "pixels", (2, 2), option="--ref")
    with pytest.raises(UserError, match="--samples must be a whole .npz file"):
        NpzImages(path, option="--samples")


@pytest.mark.parametrize("array", [np.zeros((3, 4, 4, 3)), np.zeros((3, 4, 4), np.uint8),
                                   np.zeros((3, 4, 4, 4), np.uint8)])
def test_images_that_are_not_uint8_rgb_are_refused(array, tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=array)
    with pytest.raises(UserError, match="--samples must hold arr_0 of shape"):
        NpzImages(tmp_path / "x.npz", option="--samples")


def test_notes_name_what_is_left_out_and_what_weakens_the_result(tmp_path):
    inception = {"mu": np.zeros(POOL), "sigma": np.eye(POOL)}
    np.savez(tmp_path / "ref.npz", **inception, num_images=np.array(900),
             protocol=np.array("pytorch-fid"))
    reference = Reference.load(tmp_path / "ref.npz", "adm", (8, 8), option="--ref")
    assert reference.wants == {"spatial": False, "scores": True, "points": False}
    sfid, shares, protocol, few = notes(reference, "adm", 899)
    assert "sfid is left out" in sfid and "mu_s" in sfid
    assert "precision and recall are left out" in shares and "arr_0" in shares
    assert "made with --protocol pytorch-fid, not adm" in protocol
    assert "899 samples where the reference suggests 900" in few and "raise" in few
    assert len(notes(reference, "adm", 900)) == 3
    reference = Reference("ref", reference.pool, scores=False)
    assert "suggests 50000" in notes(reference, "pytorch-fid", 49999)[0]
    assert not notes(reference, "pytorch-fid", 50000)


def test_pixels_are_for_tiny_images():
    assert dimension("pixels", (32, 32)) == 3072
    with pytest.raises(UserError, match="--protocol pixels .* got 64 x 32"):
        dimension("pixels", (64, 32))

"""FD-DINOv2 and distances of timm's networks, on random weights, against direct computations."""

import json
from functools import partial

import numpy as np
import pytest
import timm
import torch
from conftest import call, flip_bit, pictures, refused
from PIL import Image
from safetensors.torch import save_file
from scipy.linalg import sqrtm
from torchvision.transforms.functional import normalize, to_tensor

from engine.distributed import World
from metrics.extractors import DINOv2, extractor_of
from metrics.timm_networks import (
    Plan,
    create,
    load_network,
    load_published,
    plan_of,
    set_size_like_dinov2,
)

ALONE = World(0, 1, torch.device("cpu"), "fp32")
VIT = "test_vit.r160_in1k"
COUNTS = 110, 100  # images of two sets: more than the networks have features


def random_network(name):
    """A network whose features differ between pictures."""
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=0).eval().requires_grad_(False)
    for p in net.parameters():
        if p.ndim > 1:
            p.normal_(0, (2 / p[0].numel()) ** 0.5)
        else:
            p.add_(torch.rand(p.shape), alpha=0.2)
    return net


@pytest.fixture
def vit():
    return random_network(VIT)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two .npz files of pictures, and their images."""
    folder, images = tmp_path_factory.mktemp("sets"), {}
    for name, count in zip("ab", COUNTS):
        images[folder / f"{name}.npz"] = array = pictures(count, 40, seed=count).permute(
            0, 2, 3, 1).numpy()
        np.savez(folder / f"{name}.npz", arr_0=array)
    return images


def direct_distance(net, sets, size, resample, mean, std):
    """The Frechet distance of two sets of images by Pillow, torchvision, NumPy and SciPy."""
    features = [net(torch.stack([
        normalize(to_tensor(Image.fromarray(image).resize((size, size), resample)), mean, std)
        for image in images])).double().numpy() for images in sets.values()]
    (m1, m2), (s1, s2) = [f.mean(0) for f in features], [np.cov(f.T) for f in features]
    return ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2)).real


def measured(capfd, protocol, weights, sets, reference):
    """What evaluate_fid.py says of the first set against a reference made of the second."""
    a, b = sets
    options = ["--protocol", protocol, "--weights", weights, "--batch-size", 50]
    call("evaluate_fid", "--samples", b, "--make-ref", reference, *options)
    call("evaluate_fid", "--samples", a, "--ref", reference, *options)
    out, err = capfd.readouterr()
    assert "made with" not in err
    return json.loads(out.splitlines()[1])


def test_a_network_of_timm_gives_the_distance_of_a_direct_computation(vit, sets, capfd, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(vit.state_dict() | {"head.weight": torch.zeros(9)}, path)  # as published files have
    result = measured(capfd, f"timm:{VIT}", path, sets, tmp_path / "ref.npz")
    expected = direct_distance(vit, sets, 160, Image.BICUBIC, [0.5] * 3, [0.5] * 3)
    assert result["fd"] == pytest.approx(expected, rel=1e-6)
    assert result["protocol"] == f"timm:{VIT}" and result.keys().isdisjoint({"fid", "precision"})


def test_a_network_has_its_own_interpolation(tmp_path):
    net, images = random_network("test_resnet.r160_in1k"), pictures(2, 190, seed=0)
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    extractor = extractor_of("timm:test_resnet.r160_in1k").load(ALONE, tmp_path / "weights.pth")
    assert extractor.plan.interpolation == "bilinear"
    resized = [Image.fromarray(image.permute(1, 2, 0).numpy()).resize((160, 160), Image.BILINEAR)
               for image in images]
    expected = net(torch.stack([to_tensor(image) for image in resized]) * 2 - 1)
    torch.testing.assert_close(extractor(images).pool, expected, rtol=1e-4, atol=1e-4)


# ---- DINOv2 --------------------------------------------------------------------------------------


SMALL = dict(depth=2, embed_dim=64, num_heads=2)  # of a ViT/14 that stands in for ViT-L/14


@pytest.fixture
def small_dinov2(monkeypatch):
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, **SMALL))
    monkeypatch.setattr(DINOv2, "plan", DINOv2.plan._replace(dimension=64))
    net = random_network("vit_large_patch14_dinov2.lvd142m")
    net.pos_embed.normal_(0, 0.5)
    return net


def table_by_hand(table, old=37, new=16, a=-0.75):
    """(1, 1 + old^2, D) -> (1, 1 + new^2, D), as PyTorch's bicubic interpolation is defined: Keys's
    kernel with a = -.75, pixel i at (i + .5) old / (new + .1) - .5, the border repeated."""
    def curve(x):
        return np.where(x < 1, (a + 2) * x**3 - (a + 3) * x**2 + 1,
                        np.where(x < 2, a * (x**3 - 5 * x**2 + 8 * x - 4), 0))

    weights = np.zeros((new, old))
    for i in range(new):
        place = (i + 0.5) * old / (new + 0.1) - 0.5
        for j in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            weights[i, min(max(j, 0), old - 1)] += curve(abs(place - j))
    grid = table[0, 1:].double().numpy().reshape(old, old, -1)
    grid = np.einsum("ia,jb,abd->ijd", weights, weights, grid).reshape(1, new * new, -1)
    return torch.cat([table[:, :1], torch.from_numpy(grid).float()], dim=1)


def test_dinov2_gives_the_distance_of_a_direct_computation(small_dinov2, sets, capfd, tmp_path):
    """Also from a file as DINOv2's authors publish it, whose mask token is for training alone."""
    state = small_dinov2.state_dict()
    torch.save(state | {"mask_token": torch.zeros(1, 64)}, tmp_path / "theirs.pth")
    save_file(state, tmp_path / "timm.safetensors")
    net = timm.create_model("vit_large_patch14_dinov2", num_classes=0, img_size=224).eval()
    state["pos_embed"] = table_by_hand(state["pos_embed"])
    net.requires_grad_(False).load_state_dict(state)
    expected = direct_distance(net, sets, 224, Image.BICUBIC, [0.485, 0.456, 0.406],
                               [0.229, 0.224, 0.225])
    result = measured(capfd, "dinov2", tmp_path / "theirs.pth", sets, tmp_path / "ref.npz")
    assert result["fd_dinov2"] == pytest.approx(expected, rel=1e-6)
    assert 0 < result["precision"] < 1 and 0 < result["recall"] < 1 and "fid" not in result
    first, second = (extractor_of("dinov2").load(ALONE, tmp_path / name)(pictures(2, 40, seed=0))
                     for name in ("theirs.pth", "timm.safetensors"))
    assert torch.equal(first.pool, second.pool)


def test_the_position_table_is_interpolated_by_dinov2s_factor(small_dinov2):
    """The FD of a random network does not tell 16.1 / 37 from 16 / 37."""
    expected = table_by_hand(small_dinov2.pos_embed)
    table = set_size_like_dinov2(small_dinov2, 224).pos_embed
    # Places of up to 37 round by 2^-18 in float32, on slopes of some units
    torch.testing.assert_close(table.detach(), expected, rtol=0, atol=8 * 2**-18)


# ---- names and files -----------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", [
    lambda state, path: torch.save({"weight": torch.zeros(3)}, path),
    lambda state, path: torch.save({key: state[key] for key in [*state][1:]}, path),
    lambda state, path: torch.save(state | {"cls_token": torch.zeros(1, 1, 63)}, path),
    lambda state, path: torch.save({key: value.long() for key, value in state.items()}, path),
    lambda state, path: torch.save([state], path), lambda state, path: torch.save(print, path),
    lambda state, path: path.write_bytes(path.read_bytes()[:-9999]),
    lambda state, path: flip_bit(path, 99999), lambda state, path: path.unlink()])
def test_a_file_that_does_not_serve_is_refused(spoil, vit, tmp_path):
    """Torn, damaged, missing or foreign ones, and code; timm itself leaves what is missing random.
    """
    path = tmp_path / "weights.pth"
    torch.save(vit.state_dict(), path)
    load_network(VIT, path, ALONE)
    spoil(vit.state_dict(), path)
    with refused("--weights must be a whole file of the weights of timm's test_vit", path):
        load_network(VIT, path, ALONE)


@pytest.mark.parametrize("name", ["levit_128s", "repvit_m0_9", "convnext_atto"])
def test_whole_files_of_timm_serve_whatever_their_classifier_holds(name, tmp_path):
    """Of the first two it has a batch norm; of the last a norm beside it belongs to the features.
    """
    with torch.device("meta"):
        state = timm.create_model(name).to_empty(device="cpu").state_dict()
    save_file(state, tmp_path / "whole.safetensors")
    net = load_network(name, tmp_path / "whole.safetensors", ALONE)
    assert state.keys() > net.state_dict().keys()
    save_file(state | {"heads.weight": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with refused("--weights", "heads.weight"):
        load_network(name, tmp_path / "foreign.safetensors", ALONE)


def test_a_pickled_network_is_named_and_not_run(vit, tmp_path):
    torch.save(vit, tmp_path / "net.pth")
    with refused("it names timm.models.vision_transformer.VisionTransformer, code that is not run"):
        load_network(VIT, tmp_path / "net.pth", ALONE)


def test_weights_that_cannot_be_downloaded_are_named(monkeypatch, capsys):
    def fail(*words, **options):
        raise OSError("no network")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", fail)
    with refused("cannot load the weights of test_vit.r160_in1k (no network)",
                 "evaluate_fid.py --weights"):
        extractor_of(f"timm:{VIT}").load(ALONE)
    assert capsys.readouterr().err.startswith("loading test_vit.r160_in1k, downloaded if")
    with refused("no network"):
        load_published(VIT, World(1, 2, torch.device("cpu"), "fp32"))
    assert not capsys.readouterr().err


def test_published_weights_come_from_the_hub_and_leave_random_numbers_as_they_were(
        vit, tmp_path, monkeypatch):
    save_file(vit.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr("timm.models._hub.hf_hub_download",
                        lambda *words, filename, **options: tmp_path / filename)
    before, images = torch.get_rng_state(), pictures(2, 30, seed=0)
    pool = extractor_of(f"timm:{VIT}").load(ALONE)(images).pool
    assert torch.equal(before, torch.get_rng_state())
    x = torch.stack([to_tensor(Image.fromarray(image.permute(1, 2, 0).numpy()).resize((160, 160)))
                     for image in images])
    torch.testing.assert_close(pool, vit(x * 2 - 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name, words", [
    ("vit_large_patch14_dinov3", ["near it are", "vit_large_patch14_dinov2"]),
    ("test_vit.r161_in1k", ["near it are", VIT]), ("q", ["list_models"]), ("", ["list_models"])])
def test_unknown_networks_are_refused_with_near_names(name, words):
    with refused("must name a network of timm", f"timm:{name}", *words):
        extractor_of(f"timm:{name}").dimension((8, 8))


def test_a_network_without_one_vector_an_image_is_refused(monkeypatch):
    plan_of.cache_clear()
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, global_pool=""))
    with refused("one vector as output", VIT, "(1, 101, 64)"):
        extractor_of(f"timm:{VIT}").dimension((8, 8))


def test_the_length_of_features_is_known_without_weights():
    """mobilenetv3 has a layer between its last convolution, num_features, and the classifier."""
    assert extractor_of("timm:mobilenetv3_small_050").plan == Plan(
        1024, (224, 224), "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert extractor_of("dinov2").dimension((8, 8)) == create(
        "vit_large_patch14_dinov2.lvd142m", device="meta").num_features

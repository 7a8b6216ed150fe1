"""The network: parity with the official implementation, sizes, names, initialisation."""

import pytest
import torch
from conftest import (
    GOLDEN_SIZES,
    assert_official,
    golden,
    golden_improved_network,
    golden_network,
    precisions,
)
from torch.utils.flop_counter import FlopCounterMode

from models import IMPROVED_SIZES, SIZES, DiT, DiT_models, ImprovedDiT, build


@precisions
def test_forward_equals_the_official_implementation(dtype):
    net, numbers = golden_network(dtype), golden("forward", dtype)
    t = numbers["t"]
    assert_official(net.t_embedder.features(t), numbers["timestep_embedding_t"])
    assert_official(net.pos_embed[0], numbers["pos_embed"])
    assert_official(net(numbers["x"], t - numbers["h"], t, numbers["y"]), numbers["u"])


@pytest.mark.parametrize(("name", "settings", "millions"), [
    ("DiT-S/2", {}, 33.1), ("DiT-B/4", {}, 131.2), ("DiT-B/2", {}, 131.1), ("DiT-M/2", {}, 308.0),
    ("DiT-L/2", {}, 459.1), ("DiT-XL/2", {}, 676.4), ("iMF-B/2", {}, 145.597),
    ("iMF-M/2", {}, 230.570), ("iMF-L/2", {}, 509.752), ("iMF-XL/2", {}, 711.114),
    *((f"iMF-{size}/2", {"v_head": False}, millions) for size, millions in
      (("B", 88.935), ("M", 173.908), ("L", 409.054), ("XL", 610.416)))])
def test_parameter_counts_are_the_published_ones(name, settings, millions):
    with torch.device("meta"):
        count = sum(p.numel() for p in DiT_models[name](**settings).parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.05 if name[0] == "D" else 0.0005)


def test_every_size_has_its_depth_heads_and_patches():
    for size, (depth, width, heads) in SIZES.items():
        for patch in (2, 4, 8):
            with torch.device("meta"):
                net = DiT_models[f"DiT-{size}/{patch}"](input_size=16)
            assert len(net.blocks) == depth and net.blocks[0].attn.num_heads == heads
            assert net.x_embedder.proj.weight.shape == (width, 4, patch, patch)
            assert width // heads == {"T": 32, "XL": 72}.get(size, 64)
    for size, (depth, head_depth, *_) in IMPROVED_SIZES.items():
        with torch.device("meta"):
            net = DiT_models[f"iMF-{size}"](input_size=8)
        assert len(net.shared_blocks) + len(net.u_heads) == depth
        assert len(net.u_heads) == len(net.v_heads) == head_depth


def test_initial_weights_have_the_official_distributions():
    torch.manual_seed(0)
    net = DiT(input_size=16, patch_size=4, hidden_size=256, depth=1, num_heads=4)
    net.requires_grad_(False)
    limit = (6 / (256 + 768)) ** 0.5  # Xavier on the fused matrix, 768 rows out of 256
    qkv = net.blocks[0].attn.qkv.weight
    assert qkv.abs().max() <= limit and qkv.std() == pytest.approx(limit / 3**0.5, rel=0.02)
    limit = (6 / (4 * 4 * 4 + 256)) ** 0.5  # patches flattened to 64 numbers
    patch = net.x_embedder.proj.weight
    assert patch.abs().max() <= limit and patch.std() == pytest.approx(limit / 3**0.5, rel=0.02)
    for embedder in (net.t_embedder, net.r_embedder):
        for layer in (embedder.mlp[0], embedder.mlp[2]):
            assert layer.weight.std() == pytest.approx(0.02, rel=0.02) and not layer.bias.any()
    assert net.y_embedder.embedding_table.weight.std() == pytest.approx(0.02, rel=0.02)
    zeroed = [net.blocks[0].adaLN_modulation[1], net.final_layer.adaLN_modulation[1],
              net.final_layer.linear]
    assert not any(p.any() for layer in zeroed for p in layer.parameters())


@pytest.mark.parametrize(("sizes", "word"), [
    (dict(input_size=9), "patch size 2"), (dict(hidden_size=66), "heads"),
    (dict(hidden_size=62, num_heads=2), "multiple of 4")])
def test_sizes_that_do_not_fit_are_refused(sizes, word):
    with pytest.raises(ValueError, match=word):
        DiT(**{**GOLDEN_SIZES, **sizes})


# ---- the network of improved MeanFlow ----------------------------------------------------------


def conditions(numbers):
    """(z, r, t, y, omega, t_min, t_max) of golden/imf/forward.npz."""
    t = numbers["t"]
    return (numbers["x"], t - numbers["h"], t,
            *(numbers[name] for name in ("y", "omega", "t_min", "t_max")))


@precisions
def test_improved_forward_equals_the_official_implementation(dtype):
    net, numbers = golden_improved_network(dtype), golden("imf/forward", dtype)
    x, r, t, *rest = conditions(numbers)
    u, v = net(x, r, t, *rest)
    assert_official(u, numbers["u"])
    assert_official(v, numbers["v"])
    assert_official(net.sequence(x, t - r, *rest)[:2], numbers["seq"])
    for table, name in zip(net.rope, ("rope_cos", "rope_sin")):
        assert_official(table, numbers[name])


def test_one_head_alone_gives_the_same_and_none_for_the_other():
    inputs = conditions(golden("imf/forward", torch.float32))
    net, headless = (golden_improved_network(torch.float32, v_head) for v_head in (True, False))
    u, v = net(*inputs)
    for outputs, expected in ((net(*inputs, heads="u"), (u, None)),
                              (net(*inputs, heads="v"), (None, v)), (headless(*inputs), (u, None))):
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(outputs, expected))


def test_of_the_times_the_improved_network_sees_the_interval_alone():
    net = golden_improved_network(torch.float64)
    z, r, t, *rest = conditions(golden("imf/forward", torch.float64))
    moved, _ = net(z, r + 0.25, t + 0.25, *rest)
    assert torch.allclose(moved, net(z, r, t, *rest)[0], rtol=1e-9)
    assert not torch.allclose(net(z, r - 0.1, t, *rest)[0], moved, rtol=1e-3)


def test_improved_weights_start_with_the_official_distributions():
    torch.manual_seed(0)
    net = ImprovedDiT(**{**GOLDEN_SIZES, "hidden_size": 256, "depth": 3}, head_depth=1)
    for name, p in net.named_parameters():
        fan_in = p[0].numel() if p.ndim > 1 else 1
        if name.endswith(("_scale", "bias")) or "final_layer.linear" in name:
            assert (p == 0).all(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        elif "x_embedder" in name:
            assert abs(p.std() * (256 + 16) ** 0.5 / 2**0.5 - 1) < 0.1, name
        elif "tokens" in name or "table" in name:
            assert abs(p.std() * 256**0.5 - 1) < 0.15, name
        else:
            gain = 1 if "embedder" in name else 0.32
            assert abs(p.std() * fan_in**0.5 / gain - 1) < 0.05, name


@pytest.mark.parametrize("network", [golden_network, golden_improved_network])
def test_checkpointed_activations_change_no_gradient_but_the_work(network):
    """Bit for bit, because the recomputed blocks repeat the same operations."""
    inputs = conditions(golden("imf/forward", torch.float64))
    gradients, flops = [], []
    for recompute in (False, True):
        net = network(torch.float64)
        net.checkpoint_activations = recompute
        with FlopCounterMode(display=False) as counter:
            outputs = net(*inputs) if network is golden_improved_network else [net(*inputs[:4])]
            sum(out.square().sum() for out in outputs).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
        flops.append(counter.get_total_flops())
    assert torch.equal(*gradients) and flops[1] > 1.1 * flops[0]


# ---- networks outside the table ----------------------------------------------------------------

DIGITS = {"latent_shape": [3, 8, 8], "num_classes": 10}


@pytest.mark.parametrize(("family", "network", "more"), [
    ("DiT", DiT, {"mlp_ratio": 2.5}), ("iMF", ImprovedDiT, {"head_depth": 1, "v_head": False})])
def test_a_family_builds_a_network_of_any_sizes(family, network, more):
    sizes = {"patch_size": 2, "hidden_size": 48, "depth": 3, "num_heads": 4, **more}
    net = build({"model": family, "sizes": sizes, **DIGITS})
    expected = network(input_size=8, in_channels=3, num_classes=10, **sizes)
    assert ({key: value.shape for key, value in net.state_dict().items()}
            == {key: value.shape for key, value in expected.state_dict().items()})


def test_sizes_replace_those_of_the_table():
    for sizes, depth in ({"depth": 2}, 2), (None, 4):
        assert len(build({"model": "DiT-T/4", "sizes": sizes, **DIGITS}).blocks) == depth
    with pytest.raises(ValueError, match="DiT-Q/4.*DiT-B/4"):
        build({"model": "DiT-Q/4", **DIGITS})

"""The network: parity with the official implementation, sizes, names, initialisation."""

import pytest
import torch
from conftest import GOLDEN_SIZES, assert_official, golden, golden_network

from models import SIZES, DiT, DiT_models


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_forward_equals_the_official_implementation(dtype):
    net, numbers = golden_network(dtype), golden("forward", dtype)
    t = numbers["t"]
    assert_official(net.t_embedder.features(t), numbers["timestep_embedding_t"])
    assert_official(net.pos_embed[0], numbers["pos_embed"])
    assert_official(net(numbers["x"], t - numbers["h"], t, numbers["y"]), numbers["u"])


@pytest.mark.parametrize(("name", "millions"), [
    ("DiT-S/2", 33.1), ("DiT-B/4", 131.2), ("DiT-B/2", 131.1), ("DiT-M/2", 308.0),
    ("DiT-L/2", 459.1), ("DiT-XL/2", 676.4)])
def test_parameter_counts_are_the_published_ones(name, millions):
    with torch.device("meta"):
        net = DiT_models[name]()
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == millions


def test_every_size_exists_with_patches_2_4_and_8():
    assert set(DiT_models) == {f"DiT-{size}/{patch}" for size in SIZES for patch in (2, 4, 8)}
    assert {"S", "B", "M", "L", "XL"} < set(SIZES)
    for name, build in DiT_models.items():
        with torch.device("meta"):
            net = build(input_size=16)
        depth, width, heads = SIZES[name.split("-")[1].split("/")[0]]
        patch = int(name.split("/")[1])
        assert len(net.blocks) == depth and net.blocks[0].attn.num_heads == heads
        assert net.x_embedder.proj.weight.shape == (width, 4, patch, patch)


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_output_has_the_shape_of_the_input(patch):
    net = DiT_models[f"DiT-T/{patch}"](input_size=16, in_channels=3, num_classes=7)
    z, r, t = torch.zeros(2, 3, 16, 16), torch.zeros(2), torch.ones(2)
    assert net(z, r, t, torch.tensor([0, 7])).shape == (2, 3, 16, 16)


def test_state_dict_keys_are_the_contract():
    block = [f"blocks.0.{layer}.{kind}" for layer in
             ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
             for kind in ("weight", "bias")]
    rest = [f"{layer}.{kind}" for layer in
            ("x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "r_embedder.mlp.0",
             "r_embedder.mlp.2", "final_layer.linear", "final_layer.adaLN_modulation.1")
            for kind in ("weight", "bias")]
    net = DiT(**{**GOLDEN_SIZES, "depth": 1})
    assert set(net.state_dict()) == {*block, *rest, "pos_embed",
                                     "y_embedder.embedding_table.weight"}
    assert "pos_embed" not in dict(net.named_parameters())


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


def test_swapping_r_and_t_changes_the_output():
    net = golden_network(torch.float64)
    z, y = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([1, 10])
    r, t = z.new_tensor([0.1, 0.2]), z.new_tensor([0.7, 0.9])
    assert (net(z, r, t, y) - net(z, t, r, y)).abs().max() > 1e-3


def test_checkpointed_activations_give_the_same_gradients():
    net = golden_network(torch.float64)
    z, y = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([1, 10])
    r, t = z.new_tensor([0.1, 0.2]), z.new_tensor([0.7, 0.9])
    gradients = []
    for net.checkpoint_activations in (False, True):
        net.zero_grad()
        net(z, r, t, y).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert torch.allclose(*gradients, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("sizes", "word"), [
    (dict(input_size=9), "patch size 2"), (dict(input_size=0), "patch size"),
    (dict(hidden_size=66), "heads"), (dict(hidden_size=62, num_heads=2), "multiple of 4")])
def test_sizes_that_do_not_fit_are_refused(sizes, word):
    with pytest.raises(ValueError, match=word):
        DiT(**{**GOLDEN_SIZES, **sizes})

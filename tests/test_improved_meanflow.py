"""Improved MeanFlow: parity with the official step, the necessary passes, the draws."""

import math
from dataclasses import fields, replace

import pytest
import torch
from conftest import (
    assert_official,
    assert_official_gradients,
    golden,
    golden_improved_network,
    golden_step,
    precisions,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from improved_meanflow import ImprovedDraws, ImprovedMeanFlow, sample
from meanflow import SettingError

CASES = [f"imf/loss_{case}" for case in ("default", "no_guidance", "ratio25_beta2", "drop50")]


# ---- parity --------------------------------------------------------------------------------


@precisions
@pytest.mark.parametrize("case", CASES)
def test_step_equals_the_official_implementation(case, dtype):
    net, method, batch, numbers = golden_step(case, dtype)
    out = method.loss(net, *batch)
    out.loss.backward()
    assert_official(out.error, numbers["err_u"])
    assert_official(out.velocity_error, numbers["err_v"])
    assert_official(out.loss.detach(), numbers["loss"])
    assert_official_gradients(net, numbers, stride=13)


@precisions
def test_samples_equal_the_official_implementation(dtype):
    """Without the v head, as released checkpoints are."""
    net, numbers = golden_improved_network(dtype, v_head=False), golden("imf/sample", dtype)
    names = [key.removeprefix("setting_") for key in numbers if key.startswith("setting_")]
    assert len(names) == 3
    for name in names:
        steps, omega, *interval = numbers[f"setting_{name}"].tolist()
        ours = sample(net, numbers["noise"], numbers["labels"], steps=int(steps), omega=omega,
                      interval=interval)
        assert_official(ours, numbers[f"z0_{name}"])


@pytest.mark.parametrize("case", CASES)
def test_step_equals_the_naive_one(case):
    """All passes on all rows, as the paper writes the step, and not only the necessary ones."""
    (fast, method, batch, _), (naive, *_) = (golden_step(case, torch.float64) for _ in range(2))
    method.loss(fast, *batch).loss.backward()
    naive_loss(naive, method, *batch).backward()
    for (key, a), b in zip(fast.named_parameters(), naive.parameters()):
        assert torch.allclose(a.grad, b.grad, rtol=1e-9, atol=1e-12), key


def naive_loss(net, method, x, y, draws):
    """The step in the order of improved_meanflow.py's docstring."""
    t, r, omega, t_min, t_max = draws.t, draws.r, draws.omega, draws.t_min, draws.t_max
    null, ones = torch.full_like(y, method.num_classes), torch.ones_like(t)
    column = [-1, 1, 1, 1]
    z = (1 - t.view(column)) * x + t.view(column) * draws.eps
    v, w = draws.eps - x, torch.where((t_min <= t) & (t <= t_max), omega, 1)
    with torch.no_grad():
        v_c = net(z, t, t, y, w, 0 * t, ones)[1]
        v_u = net(z, t, t, null, ones, 0 * t, ones)[1]
        v_g = v + (1 - 1 / w).view(column) * (v_c - v_u)
        v_g = torch.where(draws.dropped.view(column), v, v_g)
    y = torch.where(draws.dropped, null, y)
    with sdpa_kernel(SDPBackend.MATH):
        u, du_dt, head = torch.func.jvp(
            lambda z, r, t: net(z, r, t, y, omega, t_min, t_max), (z, r, t),
            (v_c, 0 * r, ones), has_aux=True)
    errors = [(u + (t - r).view(column) * du_dt.detach() - v_g), head - v_g]
    errors = [error.square().flatten(1).sum(1) for error in errors]
    return sum(error / (error.detach() + method.c) ** method.p for error in errors).mean()


# ---- cost: passes that are not needed are not made -------------------------------------------


@pytest.mark.parametrize(("settings", "equal", "calls"), [
    ({}, 6, [(8, "uv"), (2, "v"), (8, "v"), (2, "u")]),
    ({"omega_max": 1}, 6, [(8, "uv"), (2, "v"), (2, "u")]),
    ({}, 8, [(8, "uv"), (8, "v")]),
    ({"omega_max": 1}, 8, [(8, "uv")])])
def test_only_the_necessary_passes_are_made(settings, equal, calls):
    def counted(z, *inputs, heads="uv"):
        made.append((len(z), heads))
        return net(z, *inputs, heads=heads)

    net, made = golden_improved_network(torch.float32), []
    method = ImprovedMeanFlow(num_classes=10, **settings)
    draws = replace(method.draw((8, 4, 8, 8)), equal=equal)
    method.loss(counted, torch.randn(8, 4, 8, 8), torch.arange(8), draws)
    assert made == calls


# ---- the draws -------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 1 + 1e-9, 2.0])
def test_omega_has_the_density_of_its_power(beta):
    """By the largest distance of 20,000 draws from the distribution: false alarm below 1e-6."""
    method = ImprovedMeanFlow(num_classes=10, omega_max=8, beta=beta)
    omega = method.scale(torch.rand(20_000)).double().sort().values
    assert omega[0] >= 1 and omega[-1] <= 8 * (1 + 1e-6)
    if abs(beta - 1) < 1e-6:
        expected = omega.log() / math.log(8)
    else:
        expected = (omega ** (1 - beta) - 1) / (8 ** (1 - beta) - 1)
    steps = torch.arange(1, 20_001) / 20_000
    assert (expected - steps).abs().max() < 2.7 / math.sqrt(20_000)


def test_intervals_hold_a_half_and_all_times_where_r_is_t():
    draws = ImprovedMeanFlow(num_classes=10, ratio=0.25).draw((4000, 1))
    assert draws.equal == 3000 and torch.equal(draws.r[:3000], draws.t[:3000])
    assert draws.t_min[:3000].max() == 0 and draws.t_max[:3000].min() == 1
    t_min, t_max = draws.t_min[3000:], draws.t_max[3000:]
    assert t_min.min() >= 0 and t_min.max() <= 0.5 <= t_max.min() and t_max.max() <= 1
    assert abs(t_min.mean() - 0.25) < 0.03 and abs(t_max.mean() - 0.75) < 0.03  # 6 sigma


def test_parts_share_all_draws():
    draws = ImprovedMeanFlow(num_classes=10).draw((8, 2))
    parts = [draws.part(i, 2) for i in range(2)]
    for field in fields(ImprovedDraws):
        whole, halves = getattr(draws, field.name), [getattr(part, field.name) for part in parts]
        if field.name == "equal":
            assert halves == [2, 2]
        else:
            assert torch.equal(torch.stack(halves, 1).flatten(0, 1), whole), field.name


# ---- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), [
    ("omega_max", 0.5), ("omega_max", math.inf), ("beta", -1.0), ("beta", math.nan), ("c", 0.0),
    ("p", -1.0), ("ratio", 1.5), ("label_drop", 2.0), ("num_classes", 0)])
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(SettingError, match=f"^{name} must be") as refusal:
        ImprovedMeanFlow(**{"num_classes": 10, name: value})
    assert refusal.value.name == name


@pytest.mark.parametrize(("name", "value"), [
    ("omega", 0.5), ("omega", math.inf), ("interval", (0.6, 0.4)), ("interval", (0.5, 1.1))])
def test_guidance_that_is_none_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        sample(None, torch.zeros(1, 2), torch.zeros(1), **{name: value})

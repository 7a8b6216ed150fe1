"""SoFlow: parity with the official step and sampler, the necessary passes, the draws."""

import json
from dataclasses import replace
from functools import partial

import conftest
import pytest
import torch
from conftest import assert_official_gradients, golden, precisions

import meanflow
from models import DiT
from soflow import SoFlow, SoFlowDraws, sample

CASES = ["none_start", "default_middle", "drop50_end"]
SIZES = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=2, num_heads=4,
             num_classes=10)


def golden_network(dtype):
    net = DiT(**SIZES)
    params = golden("soflow/params", torch.float32)
    net.load_state_dict({"pos_embed": net.pos_embed, **params})
    return net.to(dtype)


def golden_step(case, dtype):
    """(network, method, (x, labels, draws), numbers) of a golden file of a loss."""
    numbers = golden(f"soflow/loss_{case}", dtype)
    s = json.loads(numbers["settings"])
    method = SoFlow(num_classes=10, ratio=1 - s["velocity_loss_ratio"], cfg=s["cfg_scale"],
                    kappa=1 - s["mix_ratio"], cfg_end=s["cfg_decay_time"], c=s["eps"], p=s["p"],
                    gap_start=s["l_init_ratio"], gap_end=s["l_end_ratio"],
                    label_drop=s["cfg_drop_rate"])
    draws = SoFlowDraws(numbers["r"], numbers["t"], numbers["eps"], numbers["dropped"].bool(),
                        int(numbers["equal"]), numbers["l"])
    return golden_network(dtype), method, (numbers["x"], numbers["labels"], draws), numbers


# In float32 the tolerance is that of a division by t - l, which is 1e-4 at the least
assert_official = partial(conftest.assert_official, float32=2e-4)


# ---- parity --------------------------------------------------------------------------------------


@precisions
@pytest.mark.parametrize("case", CASES)
def test_step_equals_the_official_implementation(case, dtype):
    net, method, batch, numbers = golden_step(case, dtype)
    out = method.loss(net, *batch)
    out.loss.backward()
    assert_official(out.error, numbers["error"])
    assert_official(out.velocity_error, numbers["velocity_error"])
    assert_official(out.loss.detach(), numbers["loss_regression"])
    assert_official_gradients(net, numbers, stride=1, float32=6e-4)


@precisions
def test_samples_equal_the_official_implementation(dtype):
    net, numbers = golden_network(dtype), golden("soflow/sample", dtype)
    for steps in (1, 2, 4):
        ours = sample(net, numbers["noise"], numbers["labels"], steps=steps,
                      noise=[*numbers["later"][:steps - 1]])
        assert_official(ours, numbers[f"z0_{steps}step"])
    walk = meanflow.sample(net, numbers["noise"], numbers["labels"], steps=2)
    assert_official(walk, numbers["z0_2step_flow"])


def test_another_number_of_noises_is_refused():
    net, z1 = golden_network(torch.float32), torch.randn(2, 4, 8, 8)
    with pytest.raises(ValueError, match="noise must be 1 tensors"):
        sample(net, z1, torch.arange(2), steps=2)


@pytest.mark.parametrize("case", CASES)
def test_draws_follow_from_the_raw_numbers_as_officially(case):
    """float32 numbers of two programs: some roundings of 6e-8 of a number below 1."""
    _, method, (_, _, draws), numbers = golden_step(case, torch.float32)
    normal = torch.zeros(3, len(draws.t))
    normal[0, :draws.equal] = numbers["n_flow"]
    normal[1, draws.equal:], normal[2, draws.equal:] = numbers["n_time2"], numbers["n_time1"]
    s = json.loads(numbers["settings"])
    for ours, name in zip(method.times(normal, draws.equal, s["step"] / s["total_steps"]), "rtl"):
        assert (ours - numbers[name]).abs().max() <= 2e-7, name


# ---- the method ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "equal", "calls"), [
    ({}, 6, [8, 8, 2, 2]), ({"kappa": 0}, 6, [8, 8, 2]), ({"cfg": 1.0}, 6, [8, 2]),
    ({"cfg": 0.5}, 6, [8, 2]), ({}, 8, [8, 8]), ({"cfg": 1.0}, 8, [8])])
def test_only_the_necessary_passes_are_made(settings, equal, calls):
    def counted(z, *inputs):
        made.append(len(z))
        return net(z, *inputs)

    net, made = golden_network(torch.float32), []
    method = SoFlow(num_classes=10, **settings)
    draws = replace(method.draw((8, 4, 8, 8)), equal=equal)
    method.loss(counted, torch.randn(8, 4, 8, 8), torch.arange(8), draws)
    assert made == calls


def test_the_target_goes_to_that_of_meanflow_as_the_gap_closes():
    """The error of a one-sided difference is in proportion to its step."""
    net, x, y = golden_network(torch.float64), torch.randn(8, 4, 8, 8).double(), torch.arange(8)
    draws = SoFlow(num_classes=10, ratio=1).draw(x.shape)
    draws = replace(draws, eps=draws.eps.double(), dropped=torch.zeros(8, dtype=torch.bool),
                    t=(t := torch.linspace(0.5, 0.9, 8).double()), r=(r := t - 0.4))
    z, v = (1 - t.view(-1, 1, 1, 1)) * x + t.view(-1, 1, 1, 1) * draws.eps, draws.eps - x
    exact = meanflow.MeanFlow(num_classes=10, ratio=1).target(net, z, v, y, draws, None)
    errors = []
    for gap in (1e-3, 1e-4):
        near = replace(draws, l=t - gap * (t - r))
        out = net(z, r, t, y).detach()
        target = SoFlow(num_classes=10, ratio=1, cfg=1.0).target(net, z, v, y, near, out)
        errors.append(float((target - exact).norm() / exact.norm()))
    assert errors[0] < 0.01 and errors[1] == pytest.approx(errors[0] / 10, rel=0.1)


def test_another_step_changes_the_second_time_alone():
    one, two = (SoFlow(num_classes=10).draw((64, 2), generator=torch.Generator().manual_seed(1),
                                            step=step, total=100) for step in (0, 99))
    for name, value in vars(one).items():
        assert name == "equal" or torch.equal(value, getattr(two, name)) == (name != "l"), name
    rest = slice(one.equal, None)
    assert torch.equal(one.l[:48], one.t[:48]) and one.equal == 48
    for draws, gap in ((one, 0.1), (two, 0.1 * 0.02 ** 0.99)):
        expected = (draws.t - gap * (draws.t - draws.r)).minimum(draws.t - 1e-4)
        assert torch.allclose(draws.l[rest], expected[rest], atol=1e-6)


def test_draws_have_the_official_distribution():
    """Figures of 4 million official draws; of 200,000 the standard error is below .001."""
    draws = SoFlow(num_classes=10, ratio=0.5).draw((400_000, 1))
    rest = slice(draws.equal, None)
    assert float(draws.t[:draws.equal].mean()) == pytest.approx(0.459, abs=0.004)
    assert float(draws.t[rest].mean()) == pytest.approx(0.544, abs=0.004)
    assert float(draws.r[rest].mean()) == pytest.approx(0.274, abs=0.004)
    cut = (draws.t - draws.r)[rest] < 1.001e-4
    assert float(cut.float().mean()) == pytest.approx(0.144, abs=0.004)
    assert float(draws.dropped.float().mean()) == pytest.approx(0.1, abs=0.004)
    assert not SoFlow(num_classes=10, cfg=1.0).draw((1000, 1)).dropped.any()


def test_guidance_fades_steeply_and_continuously():
    fade = SoFlow(num_classes=10).fade(torch.tensor([0.0, 0.8, 0.801, 0.805, 0.81, 0.9, 1.0]))
    expected = torch.tensor([1, 1, 0.993, 0.623, 0.378, 0.025, 0])
    assert torch.allclose(fade, expected, atol=1e-3)
    assert SoFlow(num_classes=10, cfg_end=1.0).fade(torch.tensor([0.9, 1.0])).tolist() == [1, 1]


def test_bfloat16_is_refused():
    method, x = SoFlow(num_classes=10), torch.randn(4, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast"):
        method.loss(golden_network(torch.float32), x, torch.arange(4), method.draw(x.shape))

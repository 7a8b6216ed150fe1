"""The method: parity with the official step, closed forms, finite differences, statistics."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import (
    assert_official,
    assert_official_gradients,
    golden,
    golden_network,
    golden_step,
    precisions,
)
from naive import naive_step

from meanflow import Draws, MeanFlow, sample, schedule


def constant_draws(batch, *, r, t, equal=0, shape=(1, 2, 2)):
    """Draws in float64 with the same r and t in every row."""
    torch.manual_seed(0)
    eps = torch.randn(batch, *shape, dtype=torch.float64)
    return Draws(eps.new_full((batch,), r), eps.new_full((batch,), t), eps,
                 torch.zeros(batch, dtype=torch.bool), equal)


class Counted:
    """Wraps a network and records the labels of each call."""

    def __init__(self, net):
        self.net, self.labels = net, []

    def __call__(self, z, r, t, y):
        self.labels.append(y.tolist())
        return self.net(z, r, t, y)


def zero(z, r, t, y):
    return torch.zeros_like(z)


# ---- parity --------------------------------------------------------------------------------


@precisions
@pytest.mark.parametrize("case", ["loss_none", "loss_cfg_w3_k0", "loss_cfg_w1_k05",
                                  "imf/loss_boundary_none", "imf/loss_boundary_w1_k05_int"])
def test_step_equals_the_official_implementation(case, dtype):
    """Numbers of the boundary variant (tangent "network") are derived: no official code has it."""
    net, method, batch, numbers = golden_step(case, dtype)
    out = method.loss(net, *batch)
    out.loss.backward()
    assert_official(out.error, numbers["sq_err"])
    assert_official(out.velocity_error, numbers["v_loss"])
    assert_official(out.loss.detach(), numbers["loss"])
    assert_official_gradients(net, numbers, stride=13 if "boundary" in case else 7)


@precisions
def test_samples_equal_the_official_implementation(dtype):
    net, numbers = golden_network(dtype), golden("sample", dtype)
    for name, steps in (("1", 1), ("2", 2), ("2", (1, 0.5, 0)), ("4", (1.0, 0.9, 0.5, 0.2, 0.0))):
        ours = sample(net, numbers["noise"], numbers["labels"], steps=steps)
        assert_official(ours, numbers[f"z0_{name}step"])


@pytest.mark.parametrize("settings", [
    dict(), dict(cfg=3.0), dict(cfg=2.0, kappa=0.8), dict(cfg=3.0, ratio=0),
    dict(cfg=6.0, kappa=0.5, ratio=1),
    dict(cfg=3.0, kappa=0.3, cfg_interval=(0.3, 0.7), ratio=0.6, label_drop=0.7, p=0.5, c=0.1)])
def test_fast_step_equals_the_naive_one(settings):
    """Slices and omitted passes change nothing. Rows with r < t lose labels, too."""
    flow = MeanFlow(num_classes=10, **{"label_drop": 0.3, **settings})
    torch.manual_seed(3)
    draws = flow.draw((8, 4, 8, 8))
    draws = replace(draws, r=draws.r.double(), t=draws.t.double(), eps=draws.eps.double())
    x, y = torch.randn(8, 4, 8, 8).double(), torch.randint(10, (8,))
    fast, naive = golden_network(torch.float64), golden_network(torch.float64)
    out = flow.loss(fast, x, y, draws)
    out.loss.backward()
    loss, error = naive_step(naive, x, y, draws, num_classes=10, omega=flow.omega, p=flow.p,
                             kappa=flow.kappa, interval=flow.cfg_interval, c=flow.c)
    loss.backward()
    assert torch.allclose(out.error, error, rtol=1e-10)
    for a, b in zip(fast.parameters(), naive.parameters()):
        assert torch.allclose(a.grad, b.grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("shape", [(8,), (1, 2, 2, 2)])
def test_data_may_have_any_shape(shape):
    """The same numbers as a batch of images give the same errors."""
    def net(z, r, t, y):
        flat = z.flatten(1)
        return (flat.sin() * (1 + t - r * y)[:, None] + flat.mean(1, keepdim=True)).reshape(z.shape)

    flow = MeanFlow(num_classes=3, cfg=2.0, kappa=0.5, cfg_interval=(0.2, 0.9), label_drop=0.5)
    draws, x, y = flow.draw((8, *shape)), torch.randn(8, *shape), torch.arange(8) % 3
    image = replace(draws, eps=draws.eps.reshape(8, 8, 1, 1))
    losses = flow.loss(net, x, y, draws), flow.loss(net, x.reshape(8, 8, 1, 1), y, image)
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(*(out[:3] for out in losses)))
    z0, image_z0 = (sample(net, eps, y, steps=2).flatten(1) for eps in (draws.eps, image.eps))
    assert torch.allclose(z0, image_z0, rtol=1e-6)


# ---- closed forms ----------------------------------------------------------------------------


def test_one_step_is_exact_for_a_linear_velocity():
    """For v(z, t) = a z + b t the path from t = 1 to 0 and its average velocity are known: with
    g = z + b t / a + b / a^2, which grows as exp(a t), z_r = g exp(a (r-t)) - b r / a - b / a^2."""
    a, b = 0.7, -1.3

    def path(z, r, t):
        return (z + b * t / a + b / a**2) * torch.exp(a * (r - t)) - b * r / a - b / a**2

    def average(z, r, t, y):
        r, t = r[:, None, None, None], t[:, None, None, None]
        return (z - path(z, r, t)) / (t - r)

    z1 = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    exact = path(z1, *z1.new_tensor([0.0, 1.0]))
    for steps in (1, 2, 7, (1.0, 0.3, 0.0)):
        assert torch.allclose(sample(average, z1, torch.zeros(5), steps=steps), exact, rtol=1e-12)


def test_target_is_the_average_velocity_when_the_network_knows_it():
    """A single data point x: v(z, t) = (z - x) / t is then also the average velocity."""
    draws = constant_draws(6, r=0.2, t=0.8)
    x, y = torch.tensor([[[[0.3, -1.0], [2.0, 0.1]]]]).double(), torch.zeros(6).long()
    out = MeanFlow(num_classes=3).loss(lambda z, r, t, y: (z - x) / t[:, None, None, None],
                                       x, y, draws)
    assert out.error.max() < 1e-24 and out.velocity_error.max() < 1e-24


def test_target_of_a_path_dependent_velocity():
    """u = z t (r + 2): along the path du/dt = v t (r+2) + z (r+2), so the target is known."""
    def net(z, r, t, y):
        return z * (t * (r + 2))[:, None, None, None]

    draws = constant_draws(4, r=0.25, t=0.5)
    z, v, y = draws.eps, torch.randn_like(draws.eps), torch.zeros(4).long()
    expected = v - 0.25 * (v * 0.5 + z) * 2.25
    target = MeanFlow(num_classes=3).target(net, z, v, y, draws, None)
    assert torch.allclose(target, expected, rtol=1e-12)


def test_derivative_agrees_with_central_differences():
    net = golden_network(torch.float64)
    draws = constant_draws(3, r=0.2, t=0.7, shape=(4, 8, 8))
    z, v, y = draws.eps, torch.randn_like(draws.eps), torch.tensor([0, 4, 10])
    h = 1e-5
    after = net(z + h * v, draws.r, draws.t + h, y)
    before = net(z - h * v, draws.r, draws.t - h, y)
    du_dt = MeanFlow(num_classes=10).time_derivative(net, z, draws.r, draws.t, y, v)
    assert torch.allclose(du_dt, (after - before) / (2 * h), rtol=1e-6, atol=1e-7)


def test_guidance_acts_in_the_closed_interval_only():
    t = torch.tensor([0.29, 0.3, 0.5, 0.8, 0.81], dtype=torch.float64)
    draws = replace(constant_draws(5, r=0.0, t=0.0, equal=3), r=t, t=t)
    v, y = torch.ones_like(draws.eps), torch.zeros(5).long()
    flow = MeanFlow(num_classes=3, cfg=4.0, kappa=0.25, cfg_interval=(0.3, 0.8))
    v_g = flow.guided_velocity(zero, draws.eps, v, y, draws, 0 * v, 0 * v[3:])
    assert v_g[:, 0, 0, 0].tolist() == [1, 3, 3, 3, 1]  # omega = 4 (1 - .25)


# ---- cost --------------------------------------------------------------------------------------


ALL, TAIL, NULL = list(range(8)), [6, 7], [9] * 8


@pytest.mark.parametrize(("settings", "equal", "labels"), [
    ({}, 8, [ALL]),  # no guidance: the forward with gradient alone
    ({"kappa": 0.5}, 8, [ALL]),  # the null pass has coefficient 0, the labelled is that forward
    ({"cfg": 3.0}, 8, [ALL, NULL]),
    ({"cfg": 3.0, "kappa": 0.5}, 8, [ALL, NULL]),
    ({}, 6, [ALL, TAIL]),  # the derivative of rows with r < t
    ({"cfg": 2.0, "kappa": 0.5}, 6, [ALL, TAIL, NULL, TAIL]),  # and their labelled pass
    ({"tangent": "network"}, 6, [ALL, TAIL, TAIL]),
    ({"tangent": "network", "kappa": 0.5}, 6, [ALL, TAIL, TAIL])])  # guidance has made the pass
def test_only_the_necessary_passes_are_made(settings, equal, labels):
    net, draws = Counted(zero), constant_draws(8, r=0.2, t=0.5, equal=equal)
    MeanFlow(num_classes=9, **settings).loss(net, draws.eps, torch.arange(8), draws)
    assert net.labels == labels


def test_gradient_flows_through_the_given_forward_only():
    """The wrapped network (DDP, compiled) carries the gradient, the bare one the rest."""
    draws = constant_draws(4, r=0.2, t=0.5, equal=2)
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    bare, wrapped = Counted(lambda z, r, t, y: z * weight), Counted(lambda z, r, t, y: z * weight)
    out = MeanFlow(num_classes=7, cfg=2.0).loss(bare, draws.eps, torch.arange(4), draws,
                                                forward=wrapped)
    out.loss.backward()
    assert len(wrapped.labels) == 1 and len(bare.labels) == 2 and weight.grad is not None
    assert not out.error.requires_grad and not out.velocity_error.requires_grad


# ---- draws ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "ratio", "equal"), [
    (8, 0.25, 6), (256, 0.25, 192), (6, 0.25, 4), (1, 0.25, 0), (10, 0.9, 1), (10, 0.7, 3),
    (8, 0, 8), (8, 1, 0)])
def test_leading_rows_have_equal_times(batch, ratio, equal):
    draws = MeanFlow(num_classes=10, ratio=ratio).draw((batch, 1, 2, 2))
    assert draws.equal == equal
    assert torch.equal(draws.r[:equal], draws.t[:equal])
    assert (draws.r[equal:] < draws.t[equal:]).all()


def test_uniform_times_are_sorted_and_fill_the_interval():
    """The smaller of two has the mean 1/3, the larger 2/3 (100,000 rows: 10 sigma allowed)."""
    draws = MeanFlow(num_classes=10, ratio=1, time_sampler="uniform").draw((100_000, 1))
    assert (draws.r <= draws.t).all() and draws.r.min() >= 0 and draws.t.max() <= 1
    assert draws.r.mean().item() == pytest.approx(1 / 3, abs=0.008)
    assert draws.t.mean().item() == pytest.approx(2 / 3, abs=0.008)


def test_t_is_the_larger_of_two_logit_normals_on_every_row():
    """Also where r = t: the sorting comes first. Its mean is .536, that of a single draw .42
    (100,000 rows: a false alarm is a 9 sigma event)."""
    draws = MeanFlow(num_classes=10).draw((100_000, 1))
    logit = torch.logit(draws.t[:draws.equal].double())
    larger = -0.4 + 1 / math.sqrt(math.pi)  # mean of the larger of two N(-.4, 1)
    assert logit.mean().item() == pytest.approx(larger, abs=0.03)
    assert draws.t[:draws.equal].mean().item() == pytest.approx(0.536, abs=0.007)


def test_leading_rows_lose_their_label_with_the_given_probability():
    """100 batches of 1,000 at 10 %: the mean share is .1 +- .001 (10 sigma allowed)."""
    flow = MeanFlow(num_classes=10, label_drop=0.1)
    dropped = [flow.draw_dropped(1000) for _ in range(100)]
    assert all(mask[:mask.sum()].all() for mask in dropped)
    assert torch.stack(dropped).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert not MeanFlow(num_classes=10, label_drop=0).draw_dropped(1000).any()
    assert MeanFlow(num_classes=10, label_drop=1).draw_dropped(1000).all()


@pytest.mark.parametrize("parts", [1, 3, 4, 8])
def test_parts_share_the_batch_and_its_leading_rows(parts):
    whole = MeanFlow(num_classes=10).draw((24, 1, 2, 2))
    shares = [whole.part(i, parts) for i in range(parts)]
    assert sum(share.equal for share in shares) == whole.equal == 18
    for i, share in enumerate(shares):
        for name in ("r", "t", "eps", "dropped"):
            assert torch.equal(getattr(share, name), getattr(whole, name)[i::parts])
        assert (share.r[:share.equal] == share.t[:share.equal]).all()
        assert (share.r[share.equal:] < share.t[share.equal:]).all()


# ---- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [
    dict(num_classes=0), dict(ratio=-0.1), dict(ratio=1.5), dict(ratio=math.nan), dict(p_std=0),
    dict(time_sampler="normal"), dict(cfg=-1), dict(cfg=math.inf), dict(kappa=1), dict(kappa=-0.1),
    dict(cfg_interval=(0.8, 0.2)), dict(cfg_interval=(-0.1, 1)), dict(label_drop=2), dict(p=-1),
    dict(c=0), dict(c=math.nan)])
def test_settings_out_of_range_are_refused_by_name(setting):
    with pytest.raises(ValueError, match=f"^{next(iter(setting))} must be"):
        MeanFlow(**{"num_classes": 10, **setting})


@pytest.mark.parametrize("steps", [0, -1, (1.0,), (0.0, 1.0), (1.0, 1.0, 0.0), (2.0, 0.0)])
def test_schedules_that_do_not_decrease_are_refused(steps):
    with pytest.raises(ValueError, match="steps must be"):
        schedule(steps)

"""The benchmarks compare like with like and count right."""

import copy
import importlib
import re

import pytest
import torch
from conftest import ROOT
from torch.nn.attention import SDPBackend, sdpa_kernel

from models import DiT_models


@pytest.fixture
def program(monkeypatch):
    """A function that imports a program from its folder, as when it is run."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


# ---- the formulations of the step --------------------------------------------------------------


def loss_and_gradient(variant, net):
    """(1,) and (N,), as float64."""
    net.zero_grad()
    loss = variant.loss()
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    return loss.detach().double(), gradient.double()


@pytest.mark.parametrize(("model", "sizes"), [
    ("DiT-T/4", {"depth": 1}), ("iMF-T/4", {"depth": 2, "head_depth": 1})])
def test_the_formulations_are_the_same_step(model, sizes, program, monkeypatch):
    """The cost table compares like with like: loss, gradient and du/dt."""
    train_step = program("train_step")
    method = train_step.ImprovedMeanFlow if "iMF" in model else train_step.MeanFlow
    torch.manual_seed(1)
    draws = method(num_classes=1000).draw((8, 4, 8, 8))
    monkeypatch.setattr(method, "draw", lambda *shape, **options: draws)
    net = DiT_models[model](input_size=8, num_classes=train_step.NUM_CLASSES, **sizes)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, y, exact = torch.randn(8, 4, 8, 8), torch.randint(1000, (8,)), copy.deepcopy(net).double()
    variants = {v.name: v for v in train_step.build_variants(net, x, y, modes=["eager"])}
    expected = loss_and_gradient(variants["ours"], net)
    for name in ("ours, but a central difference for the derivative", *train_step.RIVALS):
        near = 2e-2 if "difference" in name else 1e-5
        for ours, theirs in zip(loss_and_gradient(variants[name], net), expected):
            assert (ours - theirs).norm() <= near * theirs.norm(), name
        rows, du_dt = variants[name].seen
        error = train_step.relative_error(du_dt, rows, train_step.exact_derivative(exact, rows))
        assert error <= near and ("difference" in name) == (error > 1e-5), name


@pytest.mark.slow
def test_the_tables_are_markdown_with_sound_figures(program, capsys):
    """JVP is exact to rounding; central differences have their least error in between."""
    train_step = program("train_step")
    train_step.main(train_step.parse_args(
        ["--model", "DiT-T/4", "--input-size", "8", "--batch-size", "4", "--no-compile",
         "--seconds", "0"]))
    tables = re.findall(r"(?:^\|.*\n)+", capsys.readouterr().out, re.MULTILINE)
    steps, derivatives = ([[cell.strip() for cell in row.split("|")[1:-1]]
                           for row in table.splitlines()[2:]] for table in tables)
    assert len(steps) == 13 and {len(cells) for cells in steps} == {6}
    assert steps[0][:5] == ["flow matching", "1.00", "", "1.00", "1.00"]
    jvp, *errors = [[float(cell) for cell in cells[1:]] for cells in derivatives]
    assert jvp[0] < 1e-5 < jvp[1] < 5e-2 and len(errors) == len(train_step.STEPS)
    assert errors[0][0] > errors[1][0] and errors[0][1] > errors[-1][1] > jvp[1]


# ---- hours, scaling and memory on paper ---------------------------------------------------------


def test_hours_count_the_passes_and_the_update(program):
    """Forward and backward 3, null pass 1, derivative on a quarter .5; at 90 % of 3.35 TB/s."""
    gpu_hours = program("gpu_hours")
    with sdpa_kernel(SDPBackend.MATH):
        forward, step = gpu_hours.flops("DiT-T/4", cfg=3.0)
    assert step / forward == pytest.approx(4.5, abs=0.05)
    assert gpu_hours.update_seconds("DiT-B/4", "H100") == pytest.approx(
        44 * 131.2e6 / (0.9 * 3.35e12), rel=1e-3)


def test_collectives_cost_what_they_cost_by_hand(program):
    """One gigabyte and one kilobyte; 7 hops over NVLink, 56 over NVLink and 7 over the network."""
    scaling = program("scaling")
    large = scaling.ring(1e9, 8, 400e9)  # protocol Simple
    assert large.latency == pytest.approx(8.4e-6 + 7 * 3.4e-6)
    assert large.transfer == pytest.approx(7 / 8 * 1e9 / 360e9)
    small = scaling.ring(1e3, 64, 400e9)  # LL128
    assert small.latency == pytest.approx(14e-6 + 56 * 1.9e-6 + 7 * 4e-6)
    assert scaling.ring(1e9, 64, 50e9).transfer == pytest.approx(63 / 64 * 1e9 / 50e9)
    assert scaling.ring(1e9, 8, 50e9) == large  # one node needs no network
    assert scaling.all_reduce(1e3, 256, 400e9).latency == pytest.approx(
        14e-6 + 2 * (7 * 1.25e-6 + 5 * 8.5e-6))  # a tree of 32 nodes
    assert scaling.all_reduce(1e10, 8, 400e9).transfer == pytest.approx(14 / 8 * 1e10 / 360e9)


def test_a_step_costs_what_it_costs_by_hand(program):
    """So many weights that bytes count, not latency alone; four rows a GPU, one with r < t."""
    scaling, G = program("scaling"), 10**9
    net = scaling.Network(forward=10.0, velocity=10.0, derivative=20.0,
                          blocks={"blocks": [6 * G, 6 * G]}, rest=4 * G, bucket=32 * G,
                          velocity_lists=("blocks",), derivative_lists=("blocks",))
    steps = scaling.passes(net, 4, 1)
    assert [flops for flops, _ in steps] == [40, 10, 40, 20, 80]  # 4.75 forwards
    rest, block, gradients, last = (scaling.ring(size * G, 8, 1).seconds
                                    for size in (8, 12, 24, 16))
    seconds, collectives = scaling.fully_sharded(net, steps, 8, 1, speed=1.0)
    total = rest + 5 * 2 * block + 2 * gradients + last
    assert len(collectives) == 1 + 5 * 2 + 2 + 1
    assert sum(c.seconds for c in collectives) == pytest.approx(total)
    assert seconds == pytest.approx(190 + 4 * block + last)  # arithmetic hides the others
    assert scaling.limit(190, seconds, collectives) == "arithmetic"
    seconds, _ = scaling.fully_sharded(net, steps, 8, 1, speed=1e12)
    assert seconds == pytest.approx(total)
    seconds, collectives = scaling.data_parallel(net, steps, 8, 1, speed=1.0)
    assert len(collectives) == 2  # 16 weights of 4 bytes, buckets of 32
    assert seconds == pytest.approx(190 + scaling.all_reduce(32 * G, 8, 1).seconds)


@pytest.mark.parametrize(("model", "tail", "settings"), [
    ("DiT-T/4", 1, {"cfg": 2.0, "kappa": 0.5}), ("iMF-T/4", 2, {"omega_max": 8.0})])
def test_the_counted_step_is_the_one_that_is_run(model, tail, settings, program):
    """By the passes of a step, each with the blocks it uses, and by running it."""
    scaling = program("scaling")
    with sdpa_kernel(SDPBackend.MATH):
        _, step = program("gpu_hours").flops(model, **settings)
    net = scaling.describe(model)
    assert sum(flops for flops, _ in scaling.passes(net, 4, tail)) / 4 == pytest.approx(
        step, rel=4e-3)
    assert net.parameters == sum(p.numel() for p in DiT_models[model]().parameters())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_counted_is_what_a_real_step_allocates(precision, program, capsys):
    memory = program("memory")
    memory.main(memory.parse_args(
        ["--measure", "--model", "DiT-T/4", "--precision", precision]))
    measured, counted = re.findall(r"([\d.]+)(?= MB|$)", capsys.readouterr().out.strip())
    assert float(counted) == pytest.approx(float(measured), rel=0.02)
